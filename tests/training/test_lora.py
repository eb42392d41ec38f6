import functools
import re

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Dinov2WithRegistersConfig,
    Gemma2Config,
    InternVLVisionConfig,
    LlamaConfig,
    Qwen3Config,
    SiglipVisionConfig,
    Trainer,
    TrainingArguments,
)

from tokenflex import TokenFlexConfig, TokenFlexForConditionalGeneration
from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.data.synthetic import SyntheticVQA
from tokenflex.towers.tiny import tiny_model_and_processor
from tokenflex.training import TokenFlexDataCollator
from tokenflex.training.lora import add_adapters, lora_config, merge_adapters, nf4_config


peft = pytest.importorskip("peft")

PROJECTOR = {f"multi_modal_projector.connector.{name}.weight" for name in ("gate", "up", "down")}
LAYERS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
HEADS = {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2}


def build(tower, language_model, processor, **kwargs):
    size = [64, 64] if tower is InternVLVisionConfig else 64
    patch = [8, 8] if tower is InternVLVisionConfig else 8
    config = TokenFlexConfig(
        vision_config=tower(**LAYERS, image_size=size, patch_size=patch),
        text_config=language_model(**LAYERS, **HEADS, **kwargs, vocab_size=len(processor.tokenizer)),
        image_token_id=processor.image_token_id,
        num_vision_tokens=36,
        vision_token_choices=[4, 16, 36],
        vision_token_weights=[0.2, 0.3, 0.5],
    )
    torch.manual_seed(0)
    model = TokenFlexForConditionalGeneration(config)
    model.generation_config.suppress_tokens = [config.image_token_id]
    return model


@functools.cache
def read_processor():
    return tiny_model_and_processor(width=32)[1]


def tiny(*parts):
    model, processor = tiny_model_and_processor(width=32)
    return (build(*parts, processor), processor) if parts else (model, processor)


@pytest.fixture(scope="module", params=[(), (CLIPVisionConfig, LlamaConfig)], ids=["siglip-qwen2", "clip-llama"])
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_checkpoint(folder, *tiny(*request.param))
    return folder


def load(base, **kwargs):
    return AutoModelForImageTextToText.from_pretrained(base, **kwargs)


def adapt(base, rank=4, alpha=8, **kwargs):
    model = load(base)
    torch.manual_seed(1)
    return add_adapters(model, lora_config(model, rank, alpha, **kwargs))


def disturb(model):
    """Adapters start as zero maps; these are not, and neither is the projector what it was."""
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)
    return model.eval()


def fit(model, tmp_path, steps=3, resume=None, **kwargs):
    collator = TokenFlexDataCollator(read_processor())
    args = TrainingArguments(
        str(tmp_path), max_steps=steps, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
        remove_unused_columns=False, use_cpu=True, report_to="none", disable_tqdm=True,
        **{"save_strategy": "no", **kwargs},
    )  # fmt: skip
    trainer = Trainer(
        model,
        args,
        data_collator=collator,
        train_dataset=SyntheticVQA(16, seed=1, questions_per_image=2),
        callbacks=[collator.callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@functools.cache
def encode(count):
    processor = tiny_model_and_processor(width=32)[1]
    text = "<|vision_start|><|image_pad|><|vision_end|>which color?"
    return processor(images=SyntheticVQA(1, 9)[0]["image"], text=text, num_vision_tokens=count, return_tensors="pt")


def logits_of(model):
    with torch.no_grad():
        return [model(**encode(count)).logits for count in (4, 16, 36)]


def plain_name(name):
    return re.sub(r"^base_model\.model\.model\.|modules_to_save\.default\.|\.default(?=\.weight$)", "", name)


def linear_layers_inside(model, part):
    """By name, where the function under test goes by type."""
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name for name in names if re.match(rf"model\.{part}\.(encoder\.)?layers?\.\d+\.", name)}


@pytest.mark.parametrize("vision_tower", [False, True])
@pytest.mark.parametrize(
    "parts",
    [
        (SiglipVisionConfig, Gemma2Config),
        (CLIPVisionConfig, LlamaConfig),
        (Dinov2WithRegistersConfig, Qwen3Config),
        (InternVLVisionConfig, Qwen3Config),
        (),
    ],
    ids=lambda parts: "-".join(part.model_type for part in parts) or "tiny",
)
def test_adapters_and_projector_are_all_that_is_trained(parts, vision_tower):
    model, _ = tiny(*parts)
    expected = linear_layers_inside(model, "language_model")
    assert len(expected) == 14
    if vision_tower:
        expected |= linear_layers_inside(model, "vision_tower")
        assert len(expected) == 14 + 6 * model.config.vision_config.num_hidden_layers
    adapted = add_adapters(model, lora_config(model, vision_tower=vision_tower))
    assert set(adapted.targeted_module_names) == expected
    trained = {plain_name(name) for name, weight in adapted.named_parameters() if weight.requires_grad}
    adapters = {f"{name.removeprefix('model.')}.lora_{side}.weight" for name in expected for side in "AB"}
    assert trained == adapters | PROJECTOR


def test_tied_head_and_embeddings_stay_tied_and_frozen():
    model, _ = tiny()
    adapted = add_adapters(model, lora_config(model)).get_base_model()
    assert adapted.lm_head.weight is adapted.get_input_embeddings().weight
    assert not adapted.lm_head.weight.requires_grad


@pytest.mark.parametrize(
    "parts",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"]},
    ],
    ids=str,
)
def test_adapters_of_a_tied_head_are_merged_into_it_alone(base, tmp_path, parts):
    torch.manual_seed(0)
    adapted = peft.get_peft_model(load(base), peft.LoraConfig(r=2, init_lora_weights=False, **parts)).eval()
    with torch.no_grad():
        for weight in adapted.parameters():
            weight.add_(torch.randn_like(weight) * weight.requires_grad / 100)
        expected = adapted(**encode(4)).logits
        adapted.save_pretrained(tmp_path / "adapter")
        merged = merge_adapters(base, tmp_path / "adapter").eval()
        merged.save_pretrained(tmp_path / "merged")
        for model in (merged, load(tmp_path / "merged")):
            torch.testing.assert_close(model.eval()(**encode(4)).logits, expected, atol=1e-3, rtol=1e-4)
            is_tied = model.lm_head.weight is model.get_input_embeddings().weight
            assert is_tied == (load(base).config.tie_word_embeddings and parts == {"target_modules": ["q_proj"]})


def test_rank_that_is_no_rank_is_refused():
    with pytest.raises(ValueError, match="`rank`=0"):
        lora_config(tiny()[0], rank=0)


def test_what_is_trained_is_float32_in_a_bfloat16_model(base):
    model = load(base, dtype=torch.bfloat16)
    adapted = add_adapters(model, lora_config(model))
    assert {weight.dtype for weight in adapted.parameters() if weight.requires_grad} == {torch.float32}
    assert {weight.dtype for weight in adapted.parameters() if not weight.requires_grad} == {torch.bfloat16}
    assert adapted(**encode(4)).logits.isfinite().all()


@pytest.mark.parametrize("vision_tower", [False, True])
def test_trainer_changes_what_is_trained_and_nothing_else(base, tmp_path, vision_tower):
    model = adapt(base, vision_tower=vision_tower)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    fit(model, tmp_path)
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) != weight.requires_grad, name


def test_gradient_checkpointing_changes_nothing(base, tmp_path):
    runs = [
        fit(adapt(base, vision_tower=True), tmp_path, gradient_checkpointing=checkpointing)
        for checkpointing in (False, True)
    ]
    assert [run.model.is_gradient_checkpointing for run in runs] == [False, True]
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    for (name, weight), other in zip(runs[0].model.named_parameters(), runs[1].model.parameters()):
        assert torch.equal(weight, other), name


def test_counts_are_drawn_as_without_adapters(base, tmp_path):
    runs = []
    for model in (load(base), adapt(base)):
        seen = []
        inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
        inner.model.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs["vision_token_grids"].prod(-1).tolist()),
            with_kwargs=True,
        )
        history = fit(model, tmp_path, steps=6, gradient_accumulation_steps=2).state.log_history
        runs.append((seen, [entry["num_vision_tokens"] for entry in history if "loss" in entry]))
    assert runs[0] == runs[1]
    assert len(runs[0][0]) == 12 and len({counts[0] for counts in runs[0][0]}) > 1


def test_saved_adapters_give_the_same_logits(base, tmp_path):
    adapted = disturb(adapt(base, vision_tower=True))
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(load(base), tmp_path)
    for first, second in zip(logits_of(adapted), logits_of(loaded)):
        assert torch.equal(first, second)


def test_merged_model_is_a_plain_one_with_the_adapted_logits(base, tmp_path):
    adapted = disturb(adapt(base, vision_tower=True))
    adapted.save_pretrained(tmp_path / "adapter")
    merged = merge_adapters(base, tmp_path / "adapter").eval()
    plain = load(base)
    save_checkpoint(tmp_path / "merged", merged, read_processor())
    loaded = load(tmp_path / "merged")
    for model in (merged, loaded):
        assert type(model) is TokenFlexForConditionalGeneration
        assert model.state_dict().keys() == plain.state_dict().keys()
        assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    for of_adapted, of_merged, of_loaded, of_plain in zip(*map(logits_of, (adapted, merged, loaded, plain))):
        torch.testing.assert_close(of_merged, of_adapted, rtol=0, atol=1e-5)
        assert torch.equal(of_loaded, of_merged)
        assert (of_plain - of_adapted).abs().max() > 1e-2
    traces = [path for path in (tmp_path / "merged").glob("*.json") if re.search("lora|peft", path.read_text(), re.I)]
    assert not traces and not list((tmp_path / "merged").glob("adapter*"))


def test_adapted_model_generates_what_the_merged_one_does(base, tmp_path):
    adapted = disturb(adapt(base))
    adapted.save_pretrained(tmp_path)
    merged = merge_adapters(base, tmp_path).eval()
    for count in (4, 16):
        options = {"num_vision_tokens": count, "max_new_tokens": 6, "do_sample": False}
        first, second = (model.generate(**encode(36), **options) for model in (adapted, merged))
        assert torch.equal(first, second)
        assert first.shape[1] > encode(count)["input_ids"].shape[1]


def test_merging_into_another_dtype(base, tmp_path):
    disturb(adapt(base)).save_pretrained(tmp_path)
    merged = merge_adapters(base, tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in merged.parameters()} == {torch.bfloat16}


def test_resumed_run_equals_uninterrupted(base, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = fit(adapt(base, dropout=0.1), tmp_path / "whole", 4, **options).model
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed = fit(adapt(base, dropout=0.1), tmp_path / "resumed", 4, resume=str(checkpoint), **options).model
    for (name, weight), other in zip(whole.named_parameters(), resumed.parameters()):
        assert torch.equal(weight, other), name


def test_checkpoint_of_the_trainer_merges(base, tmp_path):
    trainer = fit(adapt(base), tmp_path, 2, save_strategy="steps", save_steps=2)
    merged = merge_adapters(base, tmp_path / "checkpoint-2").eval()
    for first, second in zip(logits_of(trainer.model.eval()), logits_of(merged)):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    save_checkpoint(folder, *tiny_model_and_processor(width=64))
    return folder


@pytest.mark.parametrize("prepare", [False, True])
def test_qlora_trains_saves_and_merges(wide_base, tmp_path, prepare):
    pytest.importorskip("bitsandbytes")
    model = load(wide_base, quantization_config=nf4_config(), dtype=torch.bfloat16)
    quantized = {name for name, module in model.named_modules() if "4bit" in type(module).__name__}
    assert quantized == linear_layers_inside(model, "language_model")
    if prepare:
        model = peft.prepare_model_for_kbit_training(model)
    adapted = add_adapters(model, lora_config(model, rank=4))
    assert {weight.dtype for weight in adapted.parameters() if weight.requires_grad} == {torch.float32}
    before = {name: weight.clone() for name, weight in adapted.named_parameters()}
    trainer = fit(adapted, tmp_path, 2, save_strategy="steps", save_steps=2)
    for name, weight in adapted.named_parameters():
        assert torch.equal(weight, before[name]) != weight.requires_grad, name
    merged = merge_adapters(wide_base, tmp_path / "checkpoint-2", dtype=torch.float32).eval()
    assert {weight.dtype for weight in merged.parameters()} == {torch.float32}
    for of_merged, of_quantized in zip(logits_of(merged), logits_of(trainer.model.eval())):
        error = (of_merged - of_quantized).norm() / of_merged.norm()
        assert error < 0.3  # the rounding of weights to 4 bits
    with pytest.raises(ValueError, match="holds quantized weights"):
        model = load(wide_base, quantization_config=nf4_config())
        model.save_pretrained(tmp_path / "quantized")
        merge_adapters(tmp_path / "quantized", tmp_path / "checkpoint-2")
