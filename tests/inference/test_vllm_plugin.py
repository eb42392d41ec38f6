"""The calls of vLLM's Transformers backend, made in its order without vLLM, which needs a GPU machine to run."""

import operator

import accelerate
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer
from transformers.activations import ACT2CLS
from transformers.conversion_mapping import WeightRenaming, get_model_conversion_mapping
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import ModelOutput

from tokenflex import TokenFlexModel
from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.data.synthetic import draw_scene
from tokenflex.inference.vllm_plugin import register


IMAGES = [draw_scene(5, index).image for index in range(3)]


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("vllm") / "checkpoint"
    save_checkpoint(path, *tiny)
    return path


@pytest.fixture
def config(checkpoint):
    return AutoConfig.from_pretrained(checkpoint)


@pytest.fixture
def model(checkpoint, config):
    """The base model as the backend makes it: on meta, with the checkpoint's tensors put in by name."""
    weights = load_file(checkpoint / "model.safetensors")
    with accelerate.init_empty_weights(include_buffers=False):
        model = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    children = {name for name, _ in model.named_children()}
    assert {name.split(".")[1] for name in weights if name.startswith("model.")} == children
    base = {name.removeprefix("model."): tensor for name, tensor in weights.items() if name.startswith("model.")}
    model.load_state_dict(base, assign=True)
    assert weights.keys() - {f"model.{name}" for name in base} <= {"lm_head.weight"}
    return model.eval()


@pytest.fixture
def attention():
    """An attention function of vLLM's form, and what it was handed for each layer."""
    seen = []

    def forward(module, query, key, value, attention_mask, attention_instances=None, scaling=None, **kwargs):
        assert attention_mask is None, "vLLM makes its own"
        seen.append(attention_instances[module.layer_idx])
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return output.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS["vllm"] = forward
    yield seen
    del ALL_ATTENTION_FUNCTIONS["vllm"]


def load_processor(checkpoint, **kwargs):
    """As vLLM does for each set of a request's `mm_processor_kwargs`."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return AutoProcessor.from_pretrained(checkpoint, tokenizer=tokenizer, trust_remote_code=False, **kwargs)


def process(processor, images, **kwargs):
    """The form that a request's images take: the fields of each, and the ids that replace each placeholder."""
    inputs = processor(
        text=processor.image_token * len(images),
        images=images,
        return_text_replacement_offsets=True,
        truncation=False,
        add_special_tokens=False,
        return_tensors="pt",
        **kwargs,
    )
    offsets = inputs.pop("text_replacement_offsets")[0]
    assert [entry["type"] for entry in offsets] == ["image"] * len(images)
    ids = [processor.tokenizer.encode(entry["replacement"], add_special_tokens=False) for entry in offsets]
    assert all(set(row) == {processor.image_token_id} for row in ids)
    sizes = [(image.height, image.width) for image in images]
    rows = processor._get_num_multimodal_tokens(image_sizes=sizes, **kwargs)["num_image_patches"]
    fields = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    assert len(fields["pixel_values"]) == sum(rows)
    return fields, ids, rows


def test_the_plugin_makes_the_architecture_known(config, monkeypatch):
    monkeypatch.delattr(transformers, "TokenFlexForConditionalGeneration", raising=False)
    register()
    register()
    (architecture,) = config.architectures
    assert getattr(transformers, architecture).is_backend_compatible()
    assert config != config.get_text_config(), "vLLM takes it for multimodal"
    monkeypatch.delattr(transformers, "TokenFlexForConditionalGeneration")


def test_remote_code_names_its_classes_in_the_order_that_vllm_reads(config):
    assert config.auto_map["AutoModel"] == "modeling_tokenflex.TokenFlexModel"
    assert [name for name in config.auto_map if name.startswith("AutoModel")][0] == "AutoModel"


def test_the_model_has_what_the_backend_reads(model, config):
    assert type(model) is TokenFlexModel
    text_config = config.get_text_config()
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        assert isinstance(getattr(text_config, name), int)
    assert config.tie_word_embeddings and text_config.tie_word_embeddings
    assert text_config.layer_types == ["full_attention"] * text_config.num_hidden_layers
    assert model.get_encoder(modality="image") is model.vision_tower
    assert model.get_decoder() is model.language_model
    assert model.base_model_prefix == "model"
    assert not model._keys_to_ignore_on_load_unexpected
    assert model.tp_plan and all(name.startswith("language_model.") for name in model.tp_plan)
    embeddings = model.get_input_embeddings()
    assert embeddings is model.language_model.embed_tokens
    model.set_input_embeddings(torch.nn.Embedding(embeddings.num_embeddings, embeddings.embedding_dim))
    assert model.language_model.embed_tokens is not embeddings


def test_the_projector_has_the_form_that_is_fused(model):
    swiglu = model.multi_modal_projector.connector
    tracer = torch.fx.Tracer()
    tracer.is_leaf_module = lambda *_: True
    graph = tracer.trace(swiglu)
    (product,) = [node for node in graph.nodes if node.target is operator.mul]
    act, up = product.args
    assert type(swiglu.get_submodule(act.target)) is ACT2CLS["silu"]
    (gate,) = act.args
    assert {type(swiglu.get_submodule(node.target)) for node in (gate, up)} == {torch.nn.Linear}
    assert gate.args == up.args
    (down,) = product.users
    assert type(swiglu.get_submodule(down.target)) is torch.nn.Linear


def test_the_projector_works_when_fused(tiny, model, monkeypatch):
    """Fusing takes `gate` and `up` away and changes the forward of the module that has them, and of no other."""
    pixel_values = tiny[1](images=IMAGES, return_tensors="pt")["pixel_values"]
    swiglu = model.multi_modal_projector.connector
    with torch.no_grad():
        expected = model.get_image_features(pixel_values, num_vision_tokens=16).pooler_output
        gate_up = torch.nn.Linear(swiglu.gate.in_features, 2 * swiglu.gate.out_features, bias=False)
        gate_up.weight.copy_(torch.cat([swiglu.gate.weight, swiglu.up.weight]))
        del swiglu.gate, swiglu.up
        swiglu.gate_up_proj = gate_up

        def forward(hidden_states):
            gate, up = gate_up(hidden_states).chunk(2, dim=-1)
            return swiglu.down(swiglu.act_fn(gate) * up)

        monkeypatch.setattr(swiglu, "forward", forward)
        features = model.get_image_features(pixel_values, num_vision_tokens=16).pooler_output
    torch.testing.assert_close(features, expected)


def test_names_of_weights_are_found_as_they_are_saved(model, checkpoint):
    names = load_file(checkpoint / "model.safetensors").keys()
    renamings = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    assert renamings
    for name in names:
        for rule in renamings:
            assert rule.rename_source_key(name)[0] == name


@pytest.mark.parametrize("size", [(64, 64), (10_000, 10_000), (1, 10_000)])
def test_the_dearest_image_is_known_without_an_image(checkpoint, size):
    processor = load_processor(checkpoint)
    for kwargs, tokens in [
        ({}, 36),
        ({"num_vision_tokens": 4}, 4),
        ({"images_kwargs": {"num_vision_tokens": 16}}, 16),
        ({"num_vision_tokens": (2, 5)}, 10),
    ]:
        counted = processor._get_num_multimodal_tokens(image_sizes=([*size],), **kwargs)
        assert counted["num_image_tokens"] == [tokens]
        assert counted["num_image_patches"] == [1]


def test_the_processor_serves_images_alone(checkpoint):
    processor = load_processor(checkpoint)
    for name in ("audio_processor", "feature_extractor", "video_processor", "image_start_token", "image_end_token"):
        assert getattr(processor, name, None) is None
    assert processor.image_processor.size == {"height": 64, "width": 64}
    assert "pixel_values" in processor.image_processor.model_input_names
    assert processor.image_token_ids == [processor.image_token_id]
    assert processor.tokenizer.encode(processor.image_token, add_special_tokens=False) == [processor.image_token_id]
    assert processor.decode([processor.image_token_id]) == processor.image_token


def test_a_request_sets_its_count(checkpoint):
    for count, side in ((4, 2), (16, 4), (49, 7)):
        kwargs = {"num_vision_tokens": count}
        fields, ids, rows = process(load_processor(checkpoint, **kwargs), IMAGES[:2], **kwargs)
        assert fields.keys() == {"pixel_values", "vision_token_grids"}
        assert fields["vision_token_grids"].tolist() == [[side, side]] * 2
        assert [len(row) for row in ids] == [count] * 2
        assert rows == [1, 1]
    assert load_processor(checkpoint).num_vision_tokens == 36, "the next request has the default again"


def test_requests_with_different_counts_share_a_tower_pass(model, checkpoint):
    requests = []
    for image, count in zip(IMAGES, (4, 36, 9)):
        kwargs = {"num_vision_tokens": count}
        requests.append(process(load_processor(checkpoint, **kwargs), [image], **kwargs))
    with torch.no_grad():
        alone = [model.get_image_features(**fields).pooler_output[0] for fields, _, _ in requests]
        for members in ([0, 1, 2], [1], [0, 0]):
            batch = {
                name: torch.cat([requests[i][0][name] for i in members])
                for name in ("pixel_values", "vision_token_grids")
            }
            outputs = model.get_image_features(**batch)
            assert isinstance(outputs, ModelOutput)
            features = outputs.pooler_output
            # One entry per image if counts differ; a tensor is split evenly, which is right only where they do not.
            assert isinstance(features, torch.Tensor) == (len(set(members)) == 1)
            for i, feature in zip(members, features):
                assert len(feature) == len(requests[i][1][0])
                torch.testing.assert_close(feature, alone[i])


@pytest.mark.parametrize("options", [{"crop_to_patches": True, "max_patches": 2}, {"match_aspect_ratio": True}])
def test_tiles_and_shapes_are_known_before_and_kept(model, checkpoint, options):
    images = [IMAGES[0].resize((128, 64)), IMAGES[1].resize((100, 160))]
    kwargs = {"num_vision_tokens": 4, **options}
    processor = load_processor(checkpoint, **kwargs)
    fields, ids, rows = process(processor, images, **kwargs)
    sizes = [(image.height, image.width) for image in images]
    counted = processor._get_num_multimodal_tokens(image_sizes=sizes, **kwargs)
    assert counted["num_image_tokens"] == [len(row) for row in ids]
    assert (sum(rows) > 2) == ("crop_to_patches" in options)
    with torch.no_grad():
        features = model.get_image_features(**fields).pooler_output
        plain = model.get_image_features(fields["pixel_values"], vision_token_grids=fields["vision_token_grids"])
    assert sum(map(len, features)) == sum(map(len, ids))
    for feature, expected in zip(features, plain.pooler_output):
        assert torch.equal(feature, expected)


@pytest.mark.parametrize("count", [4, 16, 36])
def test_the_backend_computes_the_models_logits(tiny, checkpoint, attention, count):
    reference, processor = tiny
    config = AutoConfig.from_pretrained(checkpoint)
    config.get_text_config()._attn_implementation = "vllm"
    model = AutoModel.from_config(config).eval()
    model.load_state_dict(reference.model.state_dict())

    fields, (ids,), _ = process(load_processor(checkpoint), IMAGES[:1], num_vision_tokens=count)
    prompt = processor.tokenizer("look: <|image_pad|> which color?", return_tensors="pt")["input_ids"][0].tolist()
    place = prompt.index(processor.image_token_id)
    prompt = torch.tensor(prompt[:place] + ids + prompt[place + 1 :])
    positions = torch.arange(len(prompt))
    instances = {layer: f"layer {layer}" for layer in range(config.get_text_config().num_hidden_layers)}
    with torch.no_grad():
        embeds = model.get_input_embeddings()(prompt)
        embeds[prompt == processor.image_token_id] = model.get_image_features(**fields).pooler_output[0]
        outputs = model(
            input_ids=None,
            inputs_embeds=embeds[None],
            use_cache=False,
            position_ids=positions[None],
            attention_instances=instances,
            return_dict=False,
        )
        assert isinstance(outputs, tuple)
        logits = reference.lm_head(outputs[0][0])
        expected = reference(input_ids=prompt[None], **fields).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert attention == list(instances.values()), "the language model's layers, and not the tower's"
