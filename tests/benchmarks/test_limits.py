import weakref

import pytest
import rates
import torch
from limits import (
    Rates,
    Work,
    activation_bytes,
    cache_bytes,
    decode_work,
    limit_seconds,
    prefill_work,
    projector_work,
    tower_work,
    training_work,
    weight_bytes,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tokenflex import TokenFlexConfig, TokenFlexForConditionalGeneration
from tokenflex.training.train import freeze_parts


TEXT = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LANGUAGE_MODELS = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**TEXT, intermediate_size=72)),
    "qwen2-tied": (Qwen2ForCausalLM, Qwen2Config(**TEXT, intermediate_size=48, tie_word_embeddings=True)),
    "llama": (LlamaForCausalLM, LlamaConfig(**{**TEXT, "num_key_value_heads": 4}, intermediate_size=56)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**TEXT, intermediate_size=40, head_dim=24)),
}


def vision_config(width: int = 24, image_size: int = 32) -> SiglipVisionConfig:
    return SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width + 8,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=8,
        vision_use_head=False,
    )


def tokenflex_config(text_config=LANGUAGE_MODELS["qwen2"][1], projector_hidden_size=40, **vision) -> TokenFlexConfig:
    return TokenFlexConfig(
        vision_config=vision_config(**vision),
        text_config=text_config,
        image_token_id=100,
        num_vision_tokens=4,
        vision_token_choices=[4, 9],
        vision_token_weights=[1, 1],
        projector_hidden_size=projector_hidden_size,
    )


def count_flops(function) -> int:
    """As torch counts them; the plain attention, since the fused one of CPUs is not counted."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    # transformers 5.18 computes the angles of rotary embeddings with a product of matrices; later ones with operations
    # that are not counted.
    angles = [
        sum(counts.values()) for name, counts in counter.get_flop_counts().items() if name.endswith("rotary_emb")
    ]
    return counter.get_total_flops() - sum(angles)


def masked_flops(text_config, batch_size: int, length: int) -> int:
    """The FLOPs that plain attention spends on pairs that the causal mask removes, which a limit must not contain."""
    head_width = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    pairs = length * (length - 1) // 2
    return 4 * batch_size * text_config.num_hidden_layers * text_config.num_attention_heads * head_width * pairs


def num_values(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def draw_inputs(config: TokenFlexConfig, batch_size: int, num_images: int, count: int, text_tokens: int) -> dict:
    size = config.vision_config.image_size
    input_ids = torch.randint(0, 99, (batch_size, num_images * count + text_tokens))
    input_ids += input_ids >= config.image_token_id  # text holds none
    input_ids[:, 1 : 1 + num_images * count] = config.image_token_id
    pixels = torch.rand(batch_size * num_images, 3, size, size)
    return {"input_ids": input_ids, "pixel_values": pixels, "num_vision_tokens": count}


@pytest.mark.parametrize(
    "config, tower_class",
    [
        (vision_config(), SiglipVisionModel),
        (vision_config(width=16, image_size=56), SiglipVisionModel),
        (CLIPVisionConfig(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
                          image_size=48, patch_size=16), CLIPVisionModel),
    ],
)  # fmt: skip
def test_tower_flops_are_those_of_the_tower(config, tower_class):
    tower = tower_class(config).eval()
    pixels = torch.rand(2, 3, config.image_size, config.image_size)
    flops = count_flops(lambda: tower(pixels))
    assert tower_work(config, 2, bytes_per_value=2).flops == flops
    assert tower_work(config, 6, bytes_per_value=2).flops == 3 * flops


def test_tower_bytes_are_weights_pixels_and_features_without_the_pooling_head():
    config = vision_config()
    values = num_values(SiglipVisionModel(config)) + 5 * (3 * 32 * 32 + 16 * 24)
    config.vision_use_head = True
    assert tower_work(config, 5, bytes_per_value=2).bytes == 2 * values


@pytest.mark.parametrize("batch_size, length, num_logits", [(1, 7, 1), (3, 16, 1), (2, 5, 5)])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_prefill_flops_are_those_of_the_language_model_less_masked_attention(name, batch_size, length, num_logits):
    model_class, config = LANGUAGE_MODELS[name]
    model = model_class(config).eval()
    input_ids = torch.randint(0, 100, (batch_size, length))
    flops = count_flops(lambda: model(input_ids=input_ids, logits_to_keep=num_logits))
    counted = prefill_work(config, batch_size, length, bytes_per_value=4, num_logits=num_logits).flops
    assert counted == flops - masked_flops(config, batch_size, length)


@pytest.mark.parametrize("batch_size, context", [(1, 6), (3, 15)])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@torch.no_grad()
def test_a_step_of_decoding_and_its_cache_are_those_of_the_language_model(name, batch_size, context):
    model_class, config = LANGUAGE_MODELS[name]
    model = model_class(config).eval()
    cache = model(input_ids=torch.randint(0, 100, (batch_size, context)), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cache_bytes(config, batch_size, context, bytes_per_value=4) == held
    next_ids = torch.randint(0, 100, (batch_size, 1))
    flops = count_flops(lambda: model(input_ids=next_ids, past_key_values=cache))
    assert decode_work(config, batch_size, context, bytes_per_value=4).flops == flops


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_prefill_and_decoding_read_every_weight_but_an_untied_embedding_table_once(name):
    model_class, config = LANGUAGE_MODELS[name]
    model = model_class(config)
    weights = num_values(model) - (0 if config.tie_word_embeddings else 101 * 32)
    prefill = weights + 3 * (7 * 32 + 2 * 101) + cache_bytes(config, 3, 7, bytes_per_value=1)
    assert prefill_work(config, 3, 7, bytes_per_value=2, num_logits=2).bytes == 2 * prefill
    decode = weights + 3 * (32 + 101) + cache_bytes(config, 3, 8, bytes_per_value=1)
    assert decode_work(config, 3, 7, bytes_per_value=2).bytes == 2 * decode


@pytest.mark.parametrize("count", [1, 4, 9, 16, (1, 3), (4, 2)])
def test_projector_work_is_that_of_pooling_and_swiglu(count):
    config = tokenflex_config()
    projector = TokenFlexForConditionalGeneration(config).model.multi_modal_projector
    grid = count if isinstance(count, tuple) else (int(count**0.5),) * 2
    features = torch.rand(3, 16, 24)
    work = projector_work(config, 3, count, bytes_per_value=2)
    assert work.flops == count_flops(lambda: projector(features, [grid] * 3, [(4, 4)] * 3))
    num_tokens = 3 * grid[0] * grid[1]
    assert work.bytes == 2 * (num_values(projector) + features.numel() + num_tokens * 32)


@pytest.mark.parametrize("batch_size, num_images, count", [(1, 1, 4), (2, 3, 9)])
def test_a_prompts_work_is_the_sum_of_its_parts(tiny, batch_size, num_images, count):
    for model in (tiny[0], TokenFlexForConditionalGeneration(tokenflex_config()).eval()):
        config, text_tokens = model.config, 10
        inputs = draw_inputs(config, batch_size, num_images, count, text_tokens)
        length = inputs["input_ids"].shape[1]
        work = (
            tower_work(config.vision_config, batch_size * num_images, bytes_per_value=2)
            + projector_work(config, batch_size * num_images, count, bytes_per_value=2)
            + prefill_work(config.text_config, batch_size, length, bytes_per_value=2)
        )
        flops = count_flops(lambda: model(**inputs, logits_to_keep=1))  # noqa: B023
        assert work.flops == flops - masked_flops(config.text_config, batch_size, length)


@pytest.mark.parametrize("is_tower_frozen", [True, False])
@pytest.mark.parametrize("batch_size, num_images, count", [(1, 1, 16), (2, 3, 9)])
@pytest.mark.parametrize("name", ["qwen2", "qwen2-tied"])
def test_training_flops_are_those_of_a_step(name, batch_size, num_images, count, is_tower_frozen):
    config = tokenflex_config(LANGUAGE_MODELS[name][1])
    model = TokenFlexForConditionalGeneration(config)
    if is_tower_frozen:
        freeze_parts(model, ["vision_tower"])
    inputs = draw_inputs(config, batch_size, num_images, count, text_tokens=10)
    length = inputs["input_ids"].shape[1]
    flops = count_flops(lambda: model(**inputs).logits.sum().backward())
    work = training_work(config, batch_size, num_images, count, 10, 2, is_tower_frozen)
    assert work.flops == flops - 3 * masked_flops(config.text_config, batch_size, length)
    written = sum(parameter.grad.numel() for parameter in model.parameters() if parameter.grad is not None)
    read = num_values(model) - (0 if config.tie_word_embeddings else 101 * 32)
    tower = num_values(model.model.vision_tower)
    moved = inputs["pixel_values"].numel() + written
    # A frozen tower is read once and writes its features.
    moved += 2 * read - tower + batch_size * num_images * 16 * 24 if is_tower_frozen else 2 * read
    assert work.bytes == 2 * moved


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_weight_bytes_are_those_of_all_parameters(name, tiny):
    model = TokenFlexForConditionalGeneration(tokenflex_config(LANGUAGE_MODELS[name][1]))
    assert weight_bytes(model.config, bytes_per_value=2) == 2 * num_values(model)
    assert weight_bytes(tiny[0].config, bytes_per_value=4) == 4 * num_values(tiny[0])


class LiveBytes(TorchDispatchMode):
    """The most that tensors made under it held at once."""

    def __init__(self, *inputs: torch.Tensor):
        super().__init__()
        self.live, self.peak, self.storages = 0, 0, weakref.WeakSet()
        for tensor in inputs:
            self.hold(tensor)

    def hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.storages:
            self.storages.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.release, storage.nbytes())

    def release(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                self.hold(tensor)
        return outputs


@pytest.mark.parametrize(
    "intermediate_size, image_size, count, text_tokens, is_text_largest",
    [(256, 32, 9, 60, True), (256, 32, 16, 200, True), (40, 96, 4, 10, False)],
)
@torch.no_grad()
def test_activations_are_counted_as_a_prefill_holds_them(
    intermediate_size, image_size, count, text_tokens, is_text_largest
):
    """Callers keep a few more residuals than the count, which is what a prefill cannot do without."""
    text_config = Qwen2Config(**TEXT, intermediate_size=intermediate_size)
    config = tokenflex_config(text_config, projector_hidden_size=32, image_size=image_size)
    model = TokenFlexForConditionalGeneration(config).eval()
    inputs = draw_inputs(config, 4, 2, count, text_tokens)
    with LiveBytes(inputs["pixel_values"]) as memory:
        memory.storages.update(parameter.untyped_storage() for parameter in model.parameters())
        model(**inputs, logits_to_keep=1, use_cache=True)
    counted = activation_bytes(config, 4, 2, count, text_tokens, bytes_per_value=4)
    length = inputs["input_ids"].shape[1]
    if is_text_largest:
        counted += cache_bytes(text_config, 4, length, bytes_per_value=4)
    assert counted <= memory.peak <= 1.25 * counted


def test_works_add_up_and_repeat():
    work = Work(flops=3, bytes=5)
    assert sum([work, 2 * work, work * 0.5], Work()) == Work(flops=10.5, bytes=17.5)


def test_the_limit_is_set_by_what_takes_longer():
    rates_ = Rates(flops_per_second=10, bytes_per_second=2)
    assert limit_seconds(Work(flops=100, bytes=2), rates_) == 10
    assert limit_seconds(Work(flops=10, bytes=40), rates_) == 20


def test_rates_are_of_the_fastest_product_and_count_a_copys_reading_and_writing(monkeypatch):
    taken = iter([9, 4, 4, 4, 5, 8, 8, 2, 4])  # seconds of three repeats of each: two products, then the copy
    monkeypatch.setattr(rates, "_cpu_seconds", lambda function: next(taken))
    monkeypatch.setattr(rates, "CPU_PRODUCTS", ((2, 3, 4), (5, 6, 7)))
    monkeypatch.setattr(rates, "CPU_COPY_BYTES", 1024)
    measured = rates.measure_rates("cpu", torch.float32, seconds=0)
    assert measured == Rates(flops_per_second=2 * 5 * 6 * 7 / 4, bytes_per_second=2 * 1024 / 2)
