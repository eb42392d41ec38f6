import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from torch.nn import functional
from torch.nn.functional import adaptive_avg_pool2d
from transformers import AutoModel, AutoModelForImageTextToText, DynamicCache

from tokenflex import TokenFlexForConditionalGeneration, TokenFlexModel, pooling_weights
from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.data.synthetic import draw_scene
from tokenflex.towers.tiny import tiny_model_and_processor
from tokenflex.vision_tokenflex import average_pool, pixel_unshuffle


IMAGES = [draw_scene(7, index).image for index in range(6)]


def encode(processor, images_per_row, count=36, words=("which color?", "hi", "how tall is the red bar?")):
    """A batch whose rows hold the given numbers of images and texts of different lengths."""
    texts = ["<|image_pad|> and ".join([word] * (n + 1)) for n, word in zip(images_per_row, words * 4)]
    images = [IMAGES[i % len(IMAGES)] for i in range(sum(images_per_row))] or None
    kwargs = {"num_vision_tokens": count} if images else {}
    return processor(images=images, text=texts, padding=True, return_tensors="pt", **kwargs)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(1, 30))
def test_two_matrices_pool_like_adaptive_avg_pool2d(rows, columns, new_rows, new_columns):
    features = torch.randn(2, 3, rows, columns)
    pooled = pooling_weights(rows, new_rows) @ features @ pooling_weights(columns, new_columns).T
    torch.testing.assert_close(pooled, adaptive_avg_pool2d(features, (new_rows, new_columns)), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("side", "new_side"), [(27, 8), (27, 12), (27, 16), (24, 16), (16, 12), (8, 6), (27, 27)])
def test_average_pooling_is_adaptive_avg_pool2d(side, new_side):
    features = torch.randn(2, side * side, 5)
    expected = adaptive_avg_pool2d(features.view(2, side, side, 5).permute(0, 3, 1, 2), new_side)
    pooled = average_pool(features, (side, side), (new_side, new_side))
    torch.testing.assert_close(pooled, expected.flatten(2).transpose(1, 2), atol=1e-6, rtol=0)


def connector_options(connector, **options):
    return {"projector_connector": connector, "projector_bias": connector != "swiglu", **options}


@pytest.mark.parametrize(
    "options",
    [
        connector_options("swiglu", projector_norm_eps=1e-3),
        connector_options("mlp", projector_hidden_act="gelu"),
        connector_options("linear"),
        connector_options("mlp", downsample_factor=2, projector_norm_eps=1e-6),
        connector_options("linear", downsample_factor=4, vision_feature_layer=[-2, 1]),
    ],
    ids=str,
)
def test_the_config_describes_the_connector(tiny, tmp_path, options):
    counts = {"num_vision_tokens": 4, "vision_token_choices": [1, 4], "vision_token_weights": [0.5, 0.5]}
    config = type(tiny[0].config).from_dict(tiny[0].config.to_dict() | options | counts)
    model = TokenFlexForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    loaded = TokenFlexForConditionalGeneration.from_pretrained(tmp_path)
    inputs = encode(tiny[1], [2, 1], 4)
    output = loaded(**inputs)
    torch.testing.assert_close(output.logits, model(**inputs).logits)
    rows, columns = loaded.config.patch_grid
    assert output.image_outputs.last_hidden_state.shape == (3, rows * columns, config.vision_feature_size)
    assert loaded.model.multi_modal_projector.connector.down.bias is None or options["projector_bias"]


def test_an_unknown_connector_is_refused(tiny):
    with pytest.raises(ValueError, match="`projector_connector`='perceiver'.*swiglu, mlp or linear"):
        type(tiny[0].config).from_dict(tiny[0].config.to_dict() | {"projector_connector": "perceiver"})


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_pixel_unshuffle_is_torchs(rows, columns, factor):
    features = torch.randn(2, rows * factor, columns * factor, 3)
    expected = functional.pixel_unshuffle(features.permute(0, 3, 1, 2), factor).permute(0, 2, 3, 1)
    blocks = pixel_unshuffle(features.flatten(1, 2), (rows, columns), factor)
    blocks = blocks.view(2, rows, columns, factor**2, 3).transpose(3, 4)  # torch has the channels first
    assert torch.equal(blocks.flatten(3), expected)


def test_mixed_counts_give_each_image_what_it_gets_alone(tiny):
    model, processor = tiny
    counts = [4, 36, (2, 5), 4]
    pixel_values = processor(images=IMAGES[:4], return_tensors="pt")["pixel_values"]
    mixed = model.get_image_features(pixel_values, num_vision_tokens=counts).pooler_output
    assert isinstance(mixed, list)
    for i, count in enumerate(counts):
        alone = model.get_image_features(pixel_values[i : i + 1], num_vision_tokens=count).pooler_output
        torch.testing.assert_close(mixed[i], alone[0], atol=1e-5, rtol=0)


def test_forward_batched_equals_single(tiny):
    model, processor = tiny
    batch = encode(processor, [1, 2, 0])
    logits = model(**batch).logits
    first = 0
    for row, n in enumerate([1, 2, 0]):
        keep = batch["attention_mask"][row].bool()
        single = {"input_ids": batch["input_ids"][row : row + 1, keep]}
        if n:
            single["pixel_values"] = batch["pixel_values"][first : first + n]
            single["vision_token_grids"] = batch["vision_token_grids"][first : first + n]
        first += n
        torch.testing.assert_close(logits[row, keep], model(**single).logits[0], atol=1e-4, rtol=0)


def test_the_count_can_be_told_or_inferred(tiny):
    model, processor = tiny
    inputs = encode(processor, [1, 2], count=16)
    expected = model(**inputs).logits
    grids = inputs.pop("vision_token_grids")
    assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(model(**inputs, num_vision_tokens=16).logits, expected)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    inputs.pop("input_ids")
    assert torch.equal(model(**inputs, inputs_embeds=embeds, vision_token_grids=grids).logits, expected)
    assert torch.equal(model(**inputs, inputs_embeds=embeds).logits, expected)


def test_encoded_images_stand_in_for_pixels(tiny):
    model, processor = tiny
    inputs = encode(processor, [1, 2], count=16)
    expected = model(**inputs).logits
    features = model.get_image_features(inputs.pop("pixel_values"), vision_token_grids=inputs["vision_token_grids"])
    assert torch.equal(model(**inputs, mm_encoder_outputs={"image": features}).logits, expected)


def test_the_answer_depends_on_the_image_and_the_count(tiny):
    model, processor = tiny
    one, other = encode(processor, [1]), encode(processor, [1])
    other["pixel_values"] = encode(processor, [2])["pixel_values"][1:]
    assert (model(**one).logits[:, -1] - model(**other).logits[:, -1]).abs().max() > 1e-3
    assert (model(**one).logits[:, -1] - model(**encode(processor, [1], 4)).logits[:, -1]).abs().max() > 1e-3


def test_tuples_come_out_when_asked_for(tiny):
    model, processor = tiny
    inputs = encode(processor, [1])
    assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).logits)
    assert torch.equal(model.model(**inputs, return_dict=False)[0], model.model(**inputs).last_hidden_state)
    assert isinstance(model.get_image_features(inputs["pixel_values"], return_dict=False), tuple)


def test_hidden_states_and_last_logits(tiny):
    model, processor = tiny
    inputs = encode(processor, [1, 2])
    output = model(**inputs, output_hidden_states=True)
    assert len(output.hidden_states) == 1 + model.config.text_config.num_hidden_layers
    torch.testing.assert_close(model(**inputs, logits_to_keep=1).logits, output.logits[:, -1:])


def test_missing_weights_are_initialized_as_new_ones_are(tiny):
    config = tiny[0].config
    torch.manual_seed(0)
    new = TokenFlexForConditionalGeneration(config).state_dict()
    torch.manual_seed(0)
    loaded = TokenFlexForConditionalGeneration.from_pretrained(None, config=config, state_dict={}).state_dict()
    for name, weight in new.items():
        mean, other = weight.std().nan_to_num(), loaded[name].std().nan_to_num()
        torch.testing.assert_close(other, mean, rtol=0.2, atol=1e-3, msg=name)


def test_another_layer_of_the_tower_can_feed_the_projector():
    model, processor = tiny_model_and_processor(width=32)
    pixel_values = processor(images=IMAGES[:1], return_tensors="pt")["pixel_values"]
    model.config.vision_feature_layer = -2
    features = model.eval().get_image_features(pixel_values)
    hidden = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(features.last_hidden_state, hidden)


def test_implementations_of_attention_agree_on_segments(tiny):
    model, processor = tiny
    inputs = encode(processor, [1, 1])
    inputs["segment_ids"] = torch.where(inputs["attention_mask"] == 1, 0, -1)
    inputs["segment_ids"][:, -6:-3], inputs["segment_ids"][:, -3:] = 1, 2
    expected = model(**inputs).logits
    eager = tiny_model_and_processor()[0].eval()
    eager.set_attn_implementation("eager")
    keep = inputs["attention_mask"].bool()
    torch.testing.assert_close(eager(**inputs).logits[keep], expected[keep], atol=1e-4, rtol=0)
    inputs["input_ids"][:, -5] += 1
    changed = model(**inputs).logits
    assert torch.equal(changed[:, -3:], expected[:, -3:]), "the second segment does not see the first"
    assert not torch.equal(changed[:, -5], expected[:, -5])


def test_segments_need_no_mask_and_fit_the_attention_window():
    model, processor = tiny_model_and_processor(width=32)
    inputs = encode(processor, [1])
    inputs["segment_ids"] = torch.zeros_like(inputs["input_ids"])
    inputs["segment_ids"][:, -6:-3], inputs["segment_ids"][:, -3:] = 1, 2
    masked = model.eval()(**inputs).logits
    torch.testing.assert_close(model(**{k: v for k, v in inputs.items() if k != "attention_mask"}).logits, masked)
    text_config = model.model.language_model.config
    text_config.layer_types = ["sliding_attention"] * len(text_config.layer_types)
    text_config.sliding_window = inputs["input_ids"].shape[1]
    torch.testing.assert_close(model(**inputs).logits, masked)
    text_config.sliding_window -= 1
    with pytest.raises(ValueError, match="longer than the attention window"):
        model(**inputs)
    text_config.layer_types[0] = "linear_attention"
    with pytest.raises(ValueError, match="type linear_attention carry a state"):
        model(**inputs)


def test_images_may_appear_in_another_order_and_more_than_once(tiny):
    model, processor = tiny
    inputs = encode(processor, [1, 2])
    expected = model(**inputs).logits
    shuffled = {**inputs, "pixel_values": inputs["pixel_values"][[2, 0, 1]]}
    torch.testing.assert_close(model(**shuffled, image_indices=torch.tensor([1, 2, 0])).logits, expected)
    same = {**inputs, "pixel_values": inputs["pixel_values"][[0, 0, 1]]}
    once = {**inputs, "pixel_values": inputs["pixel_values"][:2]}
    torch.testing.assert_close(model(**once, image_indices=torch.tensor([0, 0, 1])).logits, model(**same).logits)
    with pytest.raises(ValueError, match="lists 3"):
        model(**{**once, "vision_token_grids": inputs["vision_token_grids"]}, image_indices=torch.tensor([0, 1]))


@pytest.mark.parametrize("part", ["head", "no head"])
@pytest.mark.parametrize("mode", [{}, {"labels": True}, {"training": True}, {"cache": True}], ids=str)
def test_placeholders_without_images_are_refused(part, mode):
    model, processor = tiny_model_and_processor(width=32)
    model.train("training" in mode)
    inputs = encode(processor, [1, 0], 4)
    kwargs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    if "cache" in mode:
        kwargs["past_key_values"] = DynamicCache()
    if "labels" in mode and part == "head":
        kwargs["labels"] = kwargs["input_ids"]
    model = model if part == "head" else model.model
    with pytest.raises(ValueError, match="`input_ids` holds 4 image tokens, but there are no images: pass `pixel_v"):
        model(**kwargs)
    model(**kwargs, mm_encoder_outputs={})  # which says that there are none
    model(**kwargs | {"input_ids": torch.full_like(kwargs["input_ids"], 70)})


def test_a_batch_without_images_has_gradients_for_tower_and_projector():
    model = tiny_model_and_processor(width=32)[0].train()
    batch = {"input_ids": torch.tensor([[7, 8, 9]]), "labels": torch.tensor([[7, 8, 9]])}
    loss = model(**batch).loss
    loss.backward()
    for name, weight in model.named_parameters():
        is_visual = "vision_tower" in name or "multi_modal_projector" in name
        assert weight.grad is not None and (weight.grad == 0).all() == is_visual, name
    torch.testing.assert_close(model.eval()(**batch).loss, loss)
    model.train().model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    passes = []
    model.model.vision_tower.register_forward_hook(lambda *args: passes.append(1))
    model(**batch)
    assert not passes, "nothing to keep in step"


def test_a_count_set_on_loading_is_checked(tiny, tmp_path):
    save_checkpoint(tmp_path / "checkpoint", *tiny)
    with pytest.raises(ValueError, match="`num_vision_tokens`=17"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint", num_vision_tokens=17)


def test_exporting_takes_an_integer_beside_the_processors_output(tiny):
    model, processor = tiny
    inputs = dict(encode(processor, [1], 16))
    program = torch.export.export(model.model, (), {**inputs, "num_vision_tokens": 16, "use_cache": False})
    exported = program.module()(**inputs, num_vision_tokens=16, use_cache=False)
    torch.testing.assert_close(exported["last_hidden_state"], model.model(**inputs).last_hidden_state)


def test_mismatches_name_both_numbers(tiny):
    model, processor = tiny
    inputs = encode(processor, [1])
    with pytest.raises(ValueError, match="forward` does not rewrite prompts"):
        model(**inputs, num_vision_tokens=4)
    inputs["vision_token_grids"] = torch.tensor([[2, 2]])
    with pytest.raises(ValueError, match="do not match: 36 image tokens in the prompts, 4 image features"):
        model(**inputs)
    with pytest.raises(ValueError, match="lists 1 counts for 2 images"):
        model.get_image_features(torch.zeros(2, 3, 64, 64), vision_token_grids=torch.tensor([[2, 2]]))
    with pytest.raises(ValueError, match="`pixel_values` has shape"):
        model.get_image_features(torch.zeros(1, 3, 64, 67))
    four_short_rows = {
        "input_ids": torch.full((4, 4), processor.image_token_id),
        "pixel_values": torch.zeros(1, 3, 64, 64),
    }
    with pytest.raises(ValueError, match="no uniform count"):
        model(**four_short_rows)


def test_a_fresh_process_gets_identical_logits_through_the_auto_classes(tiny, tmp_path):
    model, processor = tiny
    save_checkpoint(tmp_path / "checkpoint", model, processor)
    IMAGES[0].save(tmp_path / "image.png")
    script = """
import sys, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, trust = sys.argv[1], sys.argv[2] == "remote code"
if trust:
    sys.modules["tokenflex"] = None
else:
    import tokenflex
options = {"trust_remote_code": True} if trust else {}
processor = AutoProcessor.from_pretrained(folder + "/checkpoint", **options)
model = AutoModelForImageTextToText.from_pretrained(folder + "/checkpoint", **options)
inputs = processor(images=Image.open(folder + "/image.png"), text="<|image_pad|> which color?", return_tensors="pt")
torch.save({n: model(**processor(images=Image.open(folder + "/image.png"), text="<|image_pad|> which color?",
            num_vision_tokens=n, return_tensors="pt")).logits for n in (4, 36)}, folder + "/logits.pt")
assert model.generate(**inputs, num_vision_tokens=16, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
"""
    for mode in ("installed package", "remote code"):
        subprocess.run([sys.executable, "-c", script, str(tmp_path), mode], check=True, cwd=tmp_path)
        logits = torch.load(tmp_path / "logits.pt")
        for count, loaded in logits.items():
            inputs = processor(
                images=IMAGES[0], text="<|image_pad|> which color?", num_vision_tokens=count, return_tensors="pt"
            )
            assert torch.equal(loaded, model(**inputs).logits), mode


def test_auto_classes_give_the_right_classes(tiny, tmp_path):
    save_checkpoint(tmp_path / "checkpoint", *tiny)
    assert type(AutoModel.from_pretrained(tmp_path / "checkpoint")) is TokenFlexModel
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint")
    assert type(loaded) is TokenFlexForConditionalGeneration
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert loaded.generation_config.suppress_tokens == [tiny[1].image_token_id]


def next_logits(model, size):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[70, 71, 72]])).logits[..., :size]


@pytest.mark.parametrize("top", [True, False])
@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("is_trained", [True, False])
@pytest.mark.parametrize("is_resized", [True, False])
def test_a_head_of_its_own_stays_so(tmp_path, top, text, is_trained, is_resized):
    model = tiny_model_and_processor(width=32)[0].eval()
    weight, size = model.lm_head.weight.detach(), model.config.text_config.vocab_size
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(weight) if is_trained else weight.clone())
    model.config.tie_word_embeddings, model.config.text_config.tie_word_embeddings = top, text
    expected = next_logits(model, size)
    if is_resized:
        model.resize_token_embeddings(size + 8)
    model.save_pretrained(tmp_path)
    loaded = TokenFlexForConditionalGeneration.from_pretrained(tmp_path)
    for said in (loaded.config, loaded.config.text_config):
        assert said.tie_word_embeddings is False
    loaded.resize_token_embeddings(size + 16)
    for kept in (model, loaded):
        assert kept.lm_head.weight is not kept.get_input_embeddings().weight
        torch.testing.assert_close(next_logits(kept, size), expected, atol=1e-5, rtol=0)


def test_a_tied_head_stays_tied(tmp_path):
    model = tiny_model_and_processor(width=32)[0].eval()
    size = model.config.text_config.vocab_size
    expected = next_logits(model, size)
    model.resize_token_embeddings(size + 8)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    loaded = TokenFlexForConditionalGeneration.from_pretrained(tmp_path)
    for kept in (model, loaded):
        assert kept.lm_head.weight is kept.get_input_embeddings().weight
        assert kept.config.tie_word_embeddings and kept.config.text_config.tie_word_embeddings
        torch.testing.assert_close(next_logits(kept, size), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "dtypes",
    [("bfloat16", "float32", "bfloat16"), ("float16", "float16", "bfloat16"), ("bfloat16", "bfloat16", "float32")],
    ids=str,
)
def test_weights_of_different_dtypes_are_loaded_unrounded(tmp_path, dtypes):
    model, processor = tiny_model_and_processor(width=32)
    for part, dtype in zip(("vision_tower", "multi_modal_projector", "language_model"), dtypes):
        getattr(model.model, part).to(getattr(torch, dtype))
    for images_per_row in ([1, 0], [0]):
        inputs = encode(processor, images_per_row)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    model.save_pretrained(tmp_path)
    loaded = TokenFlexForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.dtype == loaded.config.dtype == torch.float32
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.float()), name


def test_a_folder_without_weights_is_refused(tiny, tmp_path):
    tiny[0].config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="model.safetensors"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_no_split_modules_exist(tiny):
    names = {type(module).__name__ for module in tiny[0].modules()}
    assert tiny[0]._no_split_modules and set(tiny[0]._no_split_modules) <= names


def test_gradients_reach_every_parameter_and_checkpointing_changes_nothing():
    model, processor = tiny_model_and_processor(width=32)
    inputs = encode(processor, [1, 2])
    losses, gradients = [], []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)
    assert all(
        gradient.abs().sum() > 0
        for name, gradient in zip(dict(model.named_parameters()), gradients[0])
        if "k_proj.bias" not in name
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(tiny, dtype):
    model, processor = tiny_model_and_processor()
    inputs = encode(processor, [1, 2])
    expected = tiny[0](**inputs).logits
    logits = model.eval().to(dtype)(**inputs).logits
    assert logits.dtype == dtype
    keep = inputs["attention_mask"].bool()
    assert (logits[keep].float() - expected[keep]).abs().max() < 0.05 * expected[keep].abs().max()


def test_a_gray_image_has_one_color_at_every_count(tiny):
    model, processor = tiny
    pixel_values = processor(images=Image.new("L", (64, 64), 90), return_tensors="pt")["pixel_values"]
    features = model.get_image_features(pixel_values)
    assert pixel_values.unique().numel() == 1
    assert features.pooler_output.isfinite().all()
