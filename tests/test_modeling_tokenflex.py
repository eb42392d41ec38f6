import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d
from transformers import AutoModel, AutoModelForImageTextToText, DynamicCache, GenerationConfig

from tokenflex import TokenFlexForConditionalGeneration, TokenFlexModel, pooling_weights, recount_vision_tokens
from tokenflex.files import save_checkpoint
from tokenflex.modeling_tokenflex import segment_position_ids
from tokenflex.training.synthetic import draw_scene
from tokenflex.training.tiny import tiny_model_and_processor


COUNTS = [4, 16, 36, 64, (2, 5)]
IMAGES = [draw_scene(7, index).image for index in range(6)]


def encode(processor, images_per_row, count=36, words=("which color?", "hi", "how tall is the red bar?")):
    """A batch whose rows hold the given numbers of images and texts of different lengths."""
    texts = ["<|image_pad|> and ".join([word] * (n + 1)) for n, word in zip(images_per_row, words * 4)]
    images = [IMAGES[i % len(IMAGES)] for i in range(sum(images_per_row))] or None
    kwargs = {"num_vision_tokens": count} if images else {}
    return processor(images=images, text=texts, padding=True, return_tensors="pt", **kwargs)


def generate(model, inputs, **kwargs):
    settings_ = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    output = model.generate(**inputs, **{**settings_, **kwargs})
    return output.sequences, torch.stack(output.logits)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(1, 30))
def test_two_matrices_pool_like_adaptive_avg_pool2d(rows, columns, new_rows, new_columns):
    features = torch.randn(2, 3, rows, columns)
    pooled = pooling_weights(rows, new_rows) @ features @ pooling_weights(columns, new_columns).T
    torch.testing.assert_close(pooled, adaptive_avg_pool2d(features, (new_rows, new_columns)), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("side", "new_side"), [(27, 8), (27, 12), (27, 16), (24, 16), (16, 12), (8, 6), (27, 27)])
def test_projector_pools_like_adaptive_avg_pool2d(tiny, side, new_side):
    projector = tiny[0].model.multi_modal_projector
    whole = type(projector)(tiny[0].config)
    whole.patch_grid = (side, side)
    features = torch.randn(2, side * side, 5)
    expected = adaptive_avg_pool2d(features.view(2, side, side, 5).permute(0, 3, 1, 2), new_side)
    torch.testing.assert_close(
        whole.pool(features, (new_side, new_side)), expected.flatten(2).transpose(1, 2), atol=1e-6, rtol=0
    )


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


def test_positions_of_segments_count_on_from_the_prefix():
    segments = torch.tensor([[-1, 0, 0, 1, 1, 2], [0, 1, 2, 2, -1, -1]])
    assert segment_position_ids(segments).tolist() == [[0, 0, 1, 2, 3, 2], [0, 1, 1, 2, 0, 1]]


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_recounting_equals_encoding_at_that_count(tiny, data):
    processor = tiny[1]
    images_per_row = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any))
    draw_counts = st.lists(st.sampled_from(COUNTS), min_size=sum(images_per_row), max_size=sum(images_per_row))
    old, new = data.draw(draw_counts), data.draw(draw_counts)
    encoded, expected = encode(processor, images_per_row, old), encode(processor, images_per_row, new)
    grids = [tuple(grid) for grid in expected["vision_token_grids"].tolist()]
    before = {name: tensor.clone() for name, tensor in encoded.items()}
    pad = processor.tokenizer.pad_token_id
    recounted = recount_vision_tokens(encoded, grids, processor.image_token_id, pad)
    assert all(torch.equal(recounted[name], expected[name]) for name in expected)
    assert all(torch.equal(encoded[name], before[name]) for name in before), "the caller's tensors are left alone"


def test_recounting_keeps_right_padding_labels_and_segments():
    image = 99
    inputs = {
        "input_ids": torch.tensor([[5, image, image, image, image, 6, 7], [image, image, image, image, 8, 0, 0]]),
        "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
        "labels": torch.tensor([[-100] * 5 + [6, 7], [-100] * 4 + [8, -100, -100]]),
        "segment_ids": torch.tensor([[0, 0, 0, 0, 0, 1, 2], [0, 0, 0, 0, 1, -1, -1]]),
        "position_ids": torch.arange(7)[None].expand(2, -1),
        "vision_token_grids": torch.tensor([[2, 2], [2, 2]]),
    }
    output = recount_vision_tokens(inputs, [(1, 1), (1, 3)], image)
    assert output["input_ids"].tolist() == [[5, image, 6, 7], [image, image, image, 8]]
    assert output["labels"].tolist() == [[-100, -100, 6, 7], [-100, -100, -100, 8]]
    assert output["segment_ids"].tolist() == [[0, 0, 1, 2], [0, 0, 0, 1]]
    output = recount_vision_tokens(inputs, [(1, 1), (1, 1)], image, pad_token_id=3)
    assert output["input_ids"].tolist() == [[5, image, 6, 7], [image, 8, 3, 3]]
    assert output["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert output["labels"].tolist()[1] == [-100, 8, -100, -100]
    assert "position_ids" not in output


def test_recounting_refuses_runs_that_do_not_match():
    image = 99
    for ids, grids in [
        ([[5, image, image, image]], [[2, 2]]),
        ([[image, 5, image, image, image]], [[2, 2]]),
        ([[image, image, 5], [image, image, 5]], [[2, 2]]),
        ([[image, image, image, image]], [[2, 2], [1, 1]]),
    ]:
        inputs = {"input_ids": torch.tensor(ids), "vision_token_grids": torch.tensor(grids)}
        with pytest.raises(ValueError, match="Image features and image tokens do not match"):
            recount_vision_tokens(inputs, [(1, 1)] * len(grids), image)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("encoded_at", [4, 36])
def test_generating_at_a_count_equals_encoding_at_it(tiny, encoded_at, count, num_beams):
    model, processor = tiny
    images_per_row = [1, 3, 0, 2]
    encoded, expected = encode(processor, images_per_row, encoded_at), encode(processor, images_per_row, count)
    sequences, logits = generate(model, encoded, num_vision_tokens=count, num_beams=num_beams)
    expected_sequences, expected_logits = generate(model, expected, num_beams=num_beams)
    length = encoded["input_ids"].shape[1]
    assert torch.equal(sequences[:, :length], encoded["input_ids"])
    assert torch.equal(sequences[:, length:], expected_sequences[:, expected["input_ids"].shape[1] :])
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=0)
    plain = model.generate(**encoded, num_vision_tokens=count, num_beams=num_beams, max_new_tokens=5, do_sample=False)
    assert torch.equal(plain, sequences)


def test_each_image_can_have_its_own_count(tiny):
    model, processor = tiny
    counts = [4, 64, (2, 5), 16]
    sequences, logits = generate(model, encode(processor, [1, 3]), num_vision_tokens=counts)
    _, expected = generate(model, encode(processor, [1, 3], counts))
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_return_sequences_stand_behind_the_callers_prompt(tiny):
    model, processor = tiny
    inputs = encode(processor, [1, 2])
    output = model.generate(
        **inputs, num_vision_tokens=4, num_beams=2, num_return_sequences=2, max_new_tokens=3, do_sample=False
    )
    assert torch.equal(output[:, : inputs["input_ids"].shape[1]], inputs["input_ids"].repeat_interleave(2, dim=0))


def test_precedence_of_counts(tiny):
    _, processor = tiny
    model = tiny_model_and_processor()[0].eval()
    inputs = encode(processor, [1, 2])
    at = {count: generate(model, encode(processor, [1, 2], count))[1] for count in (4, 16, 64)}
    own = GenerationConfig(**model.generation_config.to_dict(), num_vision_tokens=4)
    model.generation_config = own
    torch.testing.assert_close(generate(model, inputs)[1], at[4], atol=1e-4, rtol=0)
    passed = GenerationConfig(
        num_vision_tokens=16, max_new_tokens=5, return_dict_in_generate=True, output_logits=True, do_sample=False
    )
    logits = torch.stack(model.generate(**inputs, generation_config=passed).logits)
    torch.testing.assert_close(logits, at[16], atol=1e-4, rtol=0)
    logits = torch.stack(model.generate(**inputs, generation_config=passed, num_vision_tokens=64).logits)
    torch.testing.assert_close(logits, at[64], atol=1e-4, rtol=0)


def test_hand_built_inputs_without_grids_or_mask(tiny):
    model, processor = tiny
    inputs = encode(processor, [1])
    bare = {"inputs": inputs["input_ids"], "pixel_values": inputs["pixel_values"]}
    _, expected = generate(model, encode(processor, [1], 4))
    torch.testing.assert_close(generate(model, bare, num_vision_tokens=4)[1], expected, atol=1e-4, rtol=0)


def test_a_padded_batch_without_mask_is_recounted_by_its_padding(tiny):
    model, processor = tiny
    inputs, expected = encode(processor, [2, 1]), encode(processor, [2, 1], 4)
    assert inputs.pop("attention_mask").min() == expected.pop("attention_mask").min() == 0
    logits = generate(model, inputs, num_vision_tokens=4)[1]
    torch.testing.assert_close(logits, generate(model, expected)[1], atol=1e-4, rtol=0)


def test_text_only_prompts_have_no_count(tiny):
    model, processor = tiny
    inputs = encode(processor, [0, 0])
    assert torch.equal(generate(model, inputs, num_vision_tokens=4)[0], generate(model, inputs)[0])
    with pytest.raises(ValueError, match="`num_vision_tokens`=5"):
        model.generate(**inputs, num_vision_tokens=5)


def test_placeholders_without_images_are_refused(tiny):
    model, processor = tiny
    inputs = encode(processor, [1])
    with pytest.raises(ValueError, match="there are no images"):
        model.generate(input_ids=inputs["input_ids"])


def test_a_kept_cache_goes_on_at_the_count_it_was_made_with(tiny):
    model, processor = tiny
    inputs = encode(processor, [1])
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(**inputs, **options)
    ids = torch.cat([first.sequences, torch.tensor([[70, 71]])], dim=-1)
    again = model.generate(input_ids=ids, past_key_values=first.past_key_values, **options)
    whole = model.generate(input_ids=ids, pixel_values=inputs["pixel_values"], **options)
    assert torch.equal(again.sequences, whole.sequences)


def test_runs_that_are_not_the_grids_are_refused(tiny):
    model, processor = tiny
    inputs = encode(processor, [2], [4, 16])
    inputs["vision_token_grids"] = inputs["vision_token_grids"].flip(0)
    with pytest.raises(ValueError, match=r"encoded as \[16, 4\] tokens in unbroken runs"):
        model.generate(**inputs)
    with pytest.raises(ValueError, match=r"`vision_token_grids` has shape \(2,\)"):
        model.generate(**{**inputs, "vision_token_grids": torch.tensor([4, 16])})


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


def test_one_tower_pass_serves_every_count_and_question(tiny):
    model, processor = tiny
    passes = []
    hook = model.model.vision_tower.register_forward_hook(lambda *_: passes.append(1))
    try:
        features = model.get_image_features(encode(processor, [2])["pixel_values"])
        for count in (4, 16, 64):
            inputs = encode(processor, [2], words=(f"question {count}",))
            expected = generate(model, encode(processor, [2], count, words=(f"question {count}",)))[1]
            inputs.pop("pixel_values")
            passes.clear()
            kept = {"image": features}
            logits = generate(model, inputs, mm_encoder_outputs=kept, num_vision_tokens=count, num_beams=1)[1]
            assert not passes
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
            assert kept == {"image": features}
        passes.clear()
        generate(model, encode(processor, [2, 1]), num_vision_tokens=4)
        assert len(passes) == 1
    finally:
        hook.remove()


@pytest.mark.parametrize("count", [0, -4, 5, 81, 2.5, "4", [4], (9, 1)])
def test_a_count_that_is_not_allowed_is_refused(tiny, count):
    model, processor = tiny
    with pytest.raises(ValueError, match="num_vision_tokens"):
        model.generate(**encode(processor, [2]), num_vision_tokens=count)


def test_what_cannot_be_rewritten_is_refused(tiny):
    model, processor = tiny
    inputs = encode(processor, [1])
    cache = DynamicCache(config=model.config.text_config)
    model(input_ids=torch.tensor([[1, 2, 3]]), past_key_values=cache)
    with pytest.raises(ValueError, match="3 tokens are already in `past_key_values`"):
        model.generate(**inputs, past_key_values=cache, num_vision_tokens=4)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    without_ids = {name: value for name, value in inputs.items() if name != "input_ids"}
    with pytest.raises(ValueError, match="cannot be applied to `inputs_embeds`"):
        model.generate(**without_ids, inputs_embeds=embeds, num_vision_tokens=4)


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
            model.activation_checkpointing_enable()
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
