import copy
import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor, GotOcr2ImageProcessorPil, PreTrainedTokenizerFast, SiglipImageProcessorPil

from tokenflex import TokenFlexProcessor, at_count
from tokenflex.evaluation.sweep import encode_questions
from tokenflex.processing_tokenflex import CHATML_TEMPLATE
from tokenflex.towers.tiny import tiny_model_and_processor
from tokenflex.training import TokenFlexDataCollator


IMAGE = Image.new("RGB", (80, 50), (200, 30, 30))
TEXT = "<|image_pad|> which color is it?"
MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which color is it?"}]}]


def num_image_tokens(processor, inputs):
    return [list(row).count(processor.image_token_id) for row in inputs["input_ids"]]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.sampled_from([1, 4, 9, 64, (2, 3), (8, 1)]), min_size=1, max_size=4))
def test_every_image_gets_its_count(tiny, counts):
    _, processor = tiny
    text = "a" + "b".join(["<|image_pad|>"] * len(counts))
    inputs = processor(images=[IMAGE] * len(counts), text=text, num_vision_tokens=counts)
    sizes = [count if isinstance(count, int) else count[0] * count[1] for count in counts]
    assert num_image_tokens(processor, inputs) == [sum(sizes)]
    assert [rows * columns for rows, columns in inputs["vision_token_grids"]] == sizes


def test_all_ways_to_give_the_count_agree(tiny):
    _, processor = tiny
    prompt = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    expected = processor(images=IMAGE, text=prompt, num_vision_tokens=4)["input_ids"]
    assert processor(images=IMAGE, text=prompt, images_kwargs={"num_vision_tokens": 4})["input_ids"] == expected
    messages = [{"role": "user", "content": [{"type": "image", "image": IMAGE}, MESSAGES[0]["content"][1]]}]
    options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True}
    inputs = processor.apply_chat_template(messages, processor_kwargs={"num_vision_tokens": 4}, **options)
    assert inputs["input_ids"] == expected


def test_the_default_count_is_the_processors(tiny):
    _, processor = tiny
    assert num_image_tokens(processor, processor(images=IMAGE, text=TEXT)) == [processor.num_vision_tokens]


def test_output_is_what_the_model_takes(tiny):
    model, processor = tiny
    inputs = processor(images=[IMAGE, IMAGE], text=[TEXT, "x " + TEXT], padding=True, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values", "vision_token_grids"}
    assert inputs["vision_token_grids"].dtype == torch.long
    assert inputs["attention_mask"][0, 0] == 0, "rows are padded on the left"
    assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape
    assert processor.model_input_names[0] == "input_ids"
    assert set(inputs) <= set(processor.model_input_names)


def test_batched_equals_single(tiny):
    _, processor = tiny
    texts = [TEXT, "two: <|image_pad|><|image_pad|>", "none"]
    batch = processor(images=[IMAGE] * 3, text=texts, num_vision_tokens=4)
    singles = [processor(images=[IMAGE] * text.count("<|"), text=text, num_vision_tokens=4) for text in texts[:2]]
    assert batch["input_ids"][:2] == [single["input_ids"][0] for single in singles]
    assert batch["input_ids"][2] == processor(text="none")["input_ids"][0]


@pytest.mark.parametrize("count", [0, -4, 5, 81, 2.0, "4", [4, 4], (9, 1)])
def test_a_count_that_is_not_allowed_is_refused(tiny, count):
    with pytest.raises(ValueError, match="num_vision_tokens"):
        tiny[1](images=IMAGE, text=TEXT, num_vision_tokens=count)


@pytest.mark.parametrize("name", ["num_visual_tokens", "num_vision_token", "vision_tokens"])
def test_a_near_miss_of_the_argument_is_refused(tiny, name):
    with pytest.raises(ValueError, match="did you mean `num_vision_tokens`"):
        tiny[1](images=IMAGE, text=TEXT, **{name: 4})


@pytest.mark.parametrize(("num_images", "text"), [(2, TEXT), (1, TEXT + TEXT), (1, "no image")])
def test_images_and_placeholders_must_match(tiny, num_images, text):
    with pytest.raises(
        ValueError, match=rf"`text` has \[{text.count('<|image_pad|>')}\] per prompt, `images` holds {num_images}"
    ):
        tiny[1](images=[IMAGE] * num_images, text=text)


@pytest.mark.parametrize("images", [None, [], [[]]])
def test_placeholders_without_images_are_refused(tiny, images):
    with pytest.raises(ValueError, match="no images were passed"):
        tiny[1](images=images, text=TEXT)


def test_images_grouped_by_prompt_stay_with_their_prompt(tiny):
    texts = ["none", TEXT]
    assert "pixel_values" in tiny[1](images=[[], [IMAGE]], text=texts)
    with pytest.raises(ValueError, match=r"`text` has \[0, 1\] per prompt, `images` holds \[1, 0\]"):
        tiny[1](images=[[IMAGE], []], text=texts)


def test_a_count_is_checked_even_without_images(tiny):
    assert set(tiny[1](images=[], text="none", num_vision_tokens=4)) == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="`num_vision_tokens`=5"):
        tiny[1](text="none", num_vision_tokens=5)


PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "=None: the image cannot be decoded.*give a PIL image, array, file, URL or bytes"),
        (3, "=3: the image cannot be decoded.*give a PIL image"),
        ("missing.png", "='missing.png': the image cannot be decoded .*No such file"),
        ("what color is it?", "='what color is it\\?': .*prompts are `text`"),
        ("bm8gaW1hZ2U=", "cannot be decoded"),
        (b"no image", "=b'no image': the image cannot be decoded"),
        ({"bytes": None, "path": None}, "cannot be decoded"),
        (Image.new("RGB", (0, 4)), r"has no pixels \(0 x 4\)"),
        (np.zeros((0, 4, 3), dtype=np.uint8), r"has no pixels \(4 x 0\)"),
        (PIXELS / 255, "holds float64 values from 0.0 to 1.0: give `uint8` values .*`do_rescale=False`"),
        (torch.from_numpy(PIXELS / 255).permute(2, 0, 1), "holds float64 values from 0.0 to 1.0"),
        (PIXELS / 127.5 - 1, "holds float64 values from -1.0 to 1.0"),
        (PIXELS * np.float32("nan"), "holds float32 values from nan to nan"),
        (PIXELS.astype(np.int64) * 1000, "holds int64 values"),
        (Image.new("F", (8, 8), 0.5), "holds float32 values from 0.0 to 0.5"),
        (PIXELS[:3, :, :], r"has shape \(3, 30, 3\): make a PIL image"),
        (PIXELS.repeat(2, axis=-1), r"has shape \(20, 30, 6\): make a PIL image"),
        (PIXELS[0, :, 0], r"has shape \(30,\): make a PIL image"),
        (PIXELS[None, None], r"has shape \(1, 1, 20, 30, 3\): make a PIL image"),
        (torch.zeros(3, 8, 8, dtype=torch.bfloat16), "BFloat16"),
        ("/", "='/': the image cannot be decoded .*Is a directory"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_image_is_named_with_its_place(tiny, image, message):
    text = [TEXT, TEXT + TEXT]
    for images, place in [([IMAGE, IMAGE, image], "2"), ([[IMAGE], [IMAGE, image]], r"1\]\[1")]:
        with pytest.raises(ValueError, match=f"(?s)`images\\[{place}\\]`.*{message}"):
            tiny[1](images=images, text=text)


@pytest.mark.parametrize("text", [IMAGE, [IMAGE], PIXELS, 7])
def test_images_in_the_place_of_text_are_refused(tiny, text):
    with pytest.raises(ValueError, match="`text`=.*: give a string or a list of strings, behind the images"):
        tiny[1](TEXT, text)


def test_floats_with_alpha_are_refused_even_where_nothing_is_to_be_rescaled(tiny):
    with pytest.raises(ValueError, match="`images`=.*or an RGB array of floats from 0 to 1 with `do_rescale=False`"):
        tiny[1](images=np.full((8, 9, 4), 0.5), text=TEXT, do_rescale=False)


def test_floats_up_to_one_are_taken_where_nothing_is_to_be_rescaled(tiny):
    options = {"text": TEXT, "return_tensors": "pt"}
    expected = tiny[1](images=PIXELS, **options)["pixel_values"]
    for floats in (PIXELS / 255, torch.from_numpy(PIXELS / 255).permute(2, 0, 1)):
        for rescale in ({"do_rescale": False}, {"images_kwargs": {"do_rescale": False}}):
            got = tiny[1](images=floats, **rescale, **options)["pixel_values"]
            torch.testing.assert_close(got.float(), expected, atol=0.02, rtol=0)


ODD_IMAGES = {
    "one pixel": Image.new("RGB", (1, 1), (9, 9, 9)),
    "one pixel wide": Image.new("RGB", (1, 40), (200, 0, 0)),
    "three pixels": Image.new("RGB", (3, 3), (200, 0, 0)),
    "CMYK": Image.new("CMYK", (20, 20), (0, 255, 255, 0)),
    "gray": Image.new("L", (20, 20), 128),
    "gray with alpha": Image.new("LA", (20, 20), (128, 0)),
    "bilevel": Image.new("1", (20, 20), 1),
    "palette": Image.new("RGB", (20, 20), (200, 0, 0)).convert("P"),
    "alpha": Image.new("RGBA", (20, 20), (200, 0, 0, 128)),
    "16 bit": Image.fromarray(np.full((20, 20), 32768, dtype=np.uint16)),
    "32 bit": Image.new("I", (20, 20), 32768),
    "32 bit, small": Image.new("I", (20, 20), 128),
}


@pytest.mark.parametrize("kind", ODD_IMAGES)
def test_odd_but_valid_images_work(tiny, kind):
    pixel_values = tiny[1](images=ODD_IMAGES[kind], text=TEXT, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 64, 64)
    assert pixel_values.abs().max() <= 1


def test_modes_mean_what_they_show(tiny):
    def color(image):
        pixel_values = tiny[1](images=image, text=TEXT, return_tensors="pt")["pixel_values"]
        return [round(float(value), 1) for value in pixel_values[0, :, 32, 32]]

    for kind in ("16 bit", "32 bit", "32 bit, small", "gray"):
        assert color(ODD_IMAGES[kind]) == [0.0, 0.0, 0.0], kind
    assert color(ODD_IMAGES["CMYK"]) == [1.0, -1.0, -1.0]
    assert color(ODD_IMAGES["gray with alpha"]) == [1.0, 1.0, 1.0], "what is transparent shows white"
    encoded = io.BytesIO()
    Image.fromarray(np.full((20, 20), 65535, dtype=np.uint16)).save(encoded, "png")
    assert color(Image.open(encoded)) == [1.0, 1.0, 1.0]


def test_saving_and_loading_changes_nothing(tiny, tmp_path):
    processor = tiny[1]
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, TokenFlexProcessor)
    assert (loaded.num_vision_tokens, loaded.patch_size) == (processor.num_vision_tokens, processor.patch_size)
    assert loaded.chat_template == processor.chat_template
    first, second = (p(images=IMAGE, text=TEXT, return_tensors="pt") for p in (processor, loaded))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_count_given_on_loading_is_a_default_that_can_be_changed(tiny, tmp_path):
    tiny[1].save_pretrained(tmp_path / "a")
    loaded = AutoProcessor.from_pretrained(tmp_path / "a", num_vision_tokens=4)
    assert num_image_tokens(loaded, loaded(images=IMAGE, text=TEXT)) == [4]
    loaded.num_vision_tokens = 16
    assert num_image_tokens(loaded, loaded(images=IMAGE, text=TEXT)) == [16]
    loaded.save_pretrained(tmp_path / "b")
    again = AutoProcessor.from_pretrained(tmp_path / "b")
    assert num_image_tokens(again, again(images=IMAGE, text=TEXT)) == [16]


def test_a_tokenizer_without_image_token_is_refused(tiny):
    processor = tiny[1]
    tokenizer = type(processor.tokenizer)(
        tokenizer_object=processor.tokenizer.backend_tokenizer, unk_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    tokenizer.image_token = "<nowhere>"
    with pytest.raises(ValueError, match="`tokenizer` has no token '<nowhere>'"):
        TokenFlexProcessor(processor.image_processor, tokenizer, 36, 8)


def test_a_default_beyond_the_patch_grid_is_refused(tiny):
    with pytest.raises(ValueError, match="`num_vision_tokens`=256"):
        TokenFlexProcessor(tiny[1].image_processor, tiny[1].tokenizer, 256, 8)


def test_chat_template_places_images_where_the_message_does(tiny):
    content = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "c"}]
    text = tiny[1].apply_chat_template(messages)
    assert text == (
        "<|im_start|>user\na<|vision_start|><|image_pad|><|vision_end|>b<|im_end|>\n"
        "<|im_start|>assistant\nc<|im_end|>\n"
    )


def test_tokens_are_counted_without_processing(tiny):
    processor = tiny[1]
    sizes = [(10_000, 10_000), (3, 5)]
    assert processor._get_num_multimodal_tokens(sizes, num_vision_tokens=4).num_image_tokens == [4, 4]
    counted = processor._get_num_multimodal_tokens(sizes, images_kwargs={"num_vision_tokens": [4, (2, 3)]})
    assert counted.num_image_tokens == [4, 6]
    assert counted.num_image_patches == [1, 1]
    assert processor._get_num_multimodal_tokens(sizes).num_image_tokens == [36, 36]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_counting_from_sizes_equals_processing(tiny, data):
    processor = tiny[1]
    sides = st.integers(20, 300)
    sizes = data.draw(st.lists(st.tuples(sides, sides), min_size=1, max_size=3))
    options = {
        "num_vision_tokens": data.draw(st.sampled_from([4, 16, 36, (2, 5)])),
        "match_aspect_ratio": data.draw(st.booleans()),
        "crop_to_patches": data.draw(st.booleans()),
        "max_patches": data.draw(st.integers(1, 6)),
    }
    images = [Image.new("RGB", (width, height)) for height, width in sizes]
    texts = ["<|image_pad|>"] * len(images)
    output = processor(images=[[image] for image in images], text=texts, **options)
    counts = processor.count_vision_tokens(sizes, **options)
    assert num_image_tokens(processor, output) == counts
    assert len(output["pixel_values"]) == len(output["vision_token_grids"])
    asked = processor._get_num_multimodal_tokens(image_sizes=sizes, images_kwargs=options)
    assert asked.num_image_tokens == counts
    assert asked.num_image_patches == output.get("num_tiles", [1] * len(images))


def test_tiles_are_gotocr2s(tiny):
    processor = tiny[1]
    pixels = np.random.default_rng(0).integers(0, 255, (90, 200, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    own = processor.image_processor
    reference = GotOcr2ImageProcessorPil(
        size=own.size, image_mean=own.image_mean, image_std=own.image_std, resample=own.resample, max_patches=4
    )
    expected = reference([image], crop_to_patches=True, max_patches=4, return_tensors="pt")
    options = {"crop_to_patches": True, "max_patches": 4, "num_vision_tokens": [4, 16], "return_tensors": "pt"}
    output = processor(images=[image, IMAGE.resize((64, 64))], text=TEXT + TEXT, **options)
    assert output["num_tiles"].tolist() == [expected["num_patches"].item(), 1] == [3, 1]
    assert torch.equal(output["pixel_values"][:3], expected["pixel_values"])
    whole = processor(images=[image, IMAGE.resize((64, 64))], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(output["pixel_values"][2:], whole, msg="the thumbnail is the whole image")
    assert output["vision_token_grids"].tolist() == [[2, 2]] * 3 + [[4, 4]]
    assert num_image_tokens(processor, {"input_ids": output["input_ids"].tolist()}) == [3 * 4 + 16]
    some = processor(images=[image, image], text=TEXT + TEXT, crop_to_patches=[False, True], max_patches=4)
    assert some["num_tiles"] == [1, 3]


def test_tiles_are_one_image_when_generating(tiny):
    model, processor = tiny
    images = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (70, 150, 3), dtype=np.uint8)) for i in (0, 1)]
    options = {"crop_to_patches": True, "max_patches": 2, "return_tensors": "pt"}
    generation = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    inputs = processor(images=images, text=TEXT + TEXT, **options)
    assert inputs["num_tiles"].tolist() == [3, 3]
    for asked, per_image in [(4, 4), ([4, 16], [4, 16]), ([4, 4, 16, 9, 9, 1], None)]:
        logits = torch.stack(model.generate(**inputs, num_vision_tokens=asked, **generation).logits)
        expected = dict(inputs)
        if per_image is None:
            tokens = processor.tokenizer(
                TEXT.replace("<|image_pad|>", "<|image_pad|>" * (4 + 4 + 16))
                + TEXT.replace("<|image_pad|>", "<|image_pad|>" * (9 + 9 + 1)),
                return_tensors="pt",
            )
            grids = torch.tensor([[2, 2], [2, 2], [4, 4], [3, 3], [3, 3], [1, 1]])
            expected = {**tokens, "pixel_values": inputs["pixel_values"], "vision_token_grids": grids}
        else:
            expected = processor(images=images, text=TEXT + TEXT, num_vision_tokens=per_image, **options)
        expected = torch.stack(model.generate(**expected, **generation).logits)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="lists 3 counts for 2 images cut into 6 tiles"):
        model.generate(**inputs, num_vision_tokens=[4, 4, 4])


def test_grids_that_follow_the_image_do_so_at_every_count(tiny):
    model, processor = tiny
    images, text = [IMAGE, IMAGE.rotate(90, expand=True)], TEXT + TEXT
    options = {"match_aspect_ratio": True, "return_tensors": "pt"}
    generation = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    inputs = processor(images=images, text=text, num_vision_tokens=30, **options)
    assert inputs["vision_token_grids"].tolist() == [[4, 7], [7, 4]]
    assert inputs["image_shapes"].tolist() == [[50, 80], [80, 50]]
    for count in (10, [3, 17], (2, 5)):
        logits = torch.stack(model.generate(**inputs, num_vision_tokens=count, **generation).logits)
        expected = processor(images=images, text=text, num_vision_tokens=count, **options)
        expected = torch.stack(model.generate(**expected, **generation).logits)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="an integer from 1 to 64"):
        model.generate(**inputs, num_vision_tokens=65)


def test_options_of_the_processor_are_saved_and_can_be_changed_on_loading(tiny, tmp_path):
    processor = tiny[1]
    own = TokenFlexProcessor(
        processor.image_processor, processor.tokenizer, 36, processor.patch_size, crop_to_patches=True, max_patches=2
    )
    own.save_pretrained(tmp_path)
    wide = Image.new("RGB", (128, 64))
    for loaded, num_tiles in [
        (AutoProcessor.from_pretrained(tmp_path), 3),
        (AutoProcessor.from_pretrained(tmp_path, max_patches=4), 3),
        (AutoProcessor.from_pretrained(tmp_path, crop_to_patches=False), None),
    ]:
        output = loaded(images=wide, text=TEXT)
        assert output.get("num_tiles") == (None if num_tiles is None else [num_tiles])
        loaded.crop_to_patches = False
        assert "num_tiles" not in loaded(images=wide, text=TEXT)
    assert "crop_to_patches" not in AutoProcessor.from_pretrained(tmp_path).tokenizer.init_kwargs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_patches": 3, "max_patches": 2, "crop_to_patches": True}, "`min_patches`=3 and `max_patches`=2"),
        ({"crop_to_patches": [True, False]}, "`crop_to_patches` has 2 entries for 1 images"),
        ({"match_aspect_ratio": True, "num_vision_tokens": 65}, "`num_vision_tokens`=65: with `match_aspect_ratio`"),
        ({"match_aspect_ratios": True}, "did you mean `match_aspect_ratio`"),
        ({"crop_to_patch": True}, "did you mean `crop_to_patches`"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        tiny[1](images=IMAGE, text=TEXT, **options)


LLAMA_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_language_models_own_template_is_kept_and_learns_images(tiny, tmp_path):
    processor = tiny[1]
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = LLAMA_TEMPLATE
    own = TokenFlexProcessor(processor.image_processor, tokenizer, 36, processor.patch_size)
    chat = [{"role": "user", "content": " hello "}, {"role": "assistant", "content": "hi"}]
    assert own.apply_chat_template(chat) == tokenizer.apply_chat_template(chat, tokenize=False)
    in_parts = [
        {"role": "user", "content": [{"type": "text", "text": " hel"}, {"type": "text", "text": "lo "}]},
        chat[1],
    ]
    assert own.apply_chat_template(in_parts) == own.apply_chat_template(chat)
    prompt = own.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert prompt == f"[user] {own.image_placeholder}which color is it?\n[assistant]"
    own.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.apply_chat_template(MESSAGES, add_generation_prompt=True) == prompt
    assert loaded.apply_chat_template(chat) == own.apply_chat_template(chat)
    tokenizer.chat_template = "{{ messages[0].content[0].type }} <|image_pad|>"
    knows = TokenFlexProcessor(processor.image_processor, tokenizer, 36, processor.patch_size)
    assert knows.chat_template == tokenizer.chat_template


def test_without_marks_an_image_is_its_token_alone(tiny):
    processor = tiny[1]
    state = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<|vision_")]
    state["model"]["vocab"] = {
        word if not word.startswith("<|vision_") else f"unused {index}": index
        for word, index in state["model"]["vocab"].items()
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), pad_token="<|endoftext|>"
    )
    own = TokenFlexProcessor(processor.image_processor, tokenizer, 36, processor.patch_size)
    assert own.image_placeholder == "<|image_pad|>"
    assert "user\n<|image_pad|>which" in own.apply_chat_template(MESSAGES)


def test_a_grid_can_be_the_default_and_survives_saving(tiny, tmp_path):
    processor = tiny[1]
    own = TokenFlexProcessor(processor.image_processor, processor.tokenizer, (4, 5), 8)
    own.save_pretrained(tmp_path)
    for loaded in (own, TokenFlexProcessor.from_pretrained(tmp_path)):
        assert loaded(images=[IMAGE, IMAGE], text=TEXT + TEXT)["vision_token_grids"] == [[4, 5], [4, 5]]


@pytest.mark.parametrize(("size", "count"), [((64, 64), 64), ((40, 64), 25), ((256, 256), 256), ((8, 8), 1)])
def test_the_default_count_is_the_largest_that_the_grid_allows_up_to_256(tiny, size, count):
    image_processor = SiglipImageProcessorPil(size=dict(zip(("height", "width"), size)))
    assert TokenFlexProcessor(image_processor, tiny[1].tokenizer, patch_size=8).num_vision_tokens == count


def test_saving_changes_nothing_that_a_processor_says_of_itself(tiny, tmp_path):
    processor = TokenFlexProcessor(tiny[1].image_processor, tiny[1].tokenizer, 36, 8)
    before = processor.to_dict()
    processor.save_pretrained(tmp_path)
    assert processor.to_dict() == before == TokenFlexProcessor.from_pretrained(tmp_path).to_dict()


def test_videos_are_refused_with_the_way_out(tiny):
    processor = tiny[1]
    with pytest.raises(ValueError, match="`videos` is given.*expand_videos"):
        processor(videos=[[IMAGE] * 3], text="what moves?")
    content = [{"type": "video", "video": [IMAGE] * 3}, {"type": "text", "text": "what moves?"}]
    with pytest.raises(Exception, match="takes the frames of videos as images.*expand_videos"):
        processor.apply_chat_template([{"role": "user", "content": content}])


def test_pixel_values_are_the_image_processors_own_whatever_the_threads(tiny):
    processor, threads = tiny[1], torch.get_num_threads()
    images = [IMAGE.resize(size) for size in ((64, 64), (70, 33), (20, 90), (64, 64), (5, 5))]
    expected = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            assert torch.equal(processor(images=images, return_tensors="pt")["pixel_values"], expected)
    finally:
        torch.set_num_threads(threads)


def test_parts_of_messages_may_hold_empty_columns(tiny):
    part = {"type": "text", "text": "which color?", "image": None, "video": None, "image_url": None}
    assert tiny[1].apply_chat_template([{"role": "user", "content": [part]}]) == tiny[1].apply_chat_template(
        [{"role": "user", "content": "which color?"}]
    )


@pytest.mark.parametrize("own_template", [False, True])
@pytest.mark.parametrize("image", ["image", "path"])
def test_parts_that_tables_have_filled_with_none_are_as_they_were(tiny, tmp_path, image, own_template):
    processor = copy.copy(tiny[1])
    if own_template:  # as Qwen2-VL's, which looks for keys
        processor.chat_template = (
            "{%- for part in messages[0].content -%}{%- if part.type == 'image' or 'image' in part -%}<|image_pad|>"
            "{%- elif 'text' in part -%}{{ part.text }}{%- endif -%}{%- endfor -%}"
        )
    IMAGE.save(tmp_path / "a.png")
    parts = [{"type": "image", image: IMAGE if image == "image" else str(tmp_path / "a.png")}]
    parts += [{"type": "text", "text": "which color?"}, {"type": "text"}]
    empty = dict.fromkeys(("text", "image", "path", "url", "base64", "image_url", "video"))
    filled = [{**empty, **part} for part in parts]
    options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    for tokenize in (False, True):
        expected, given = (
            processor.apply_chat_template(conversation, tokenize=tokenize, **(options if tokenize else {}))
            for conversation in ([{"role": "user", "content": parts}], [{"role": "user", "content": filled}])
        )
        assert str(given) == str(expected)
    batched = processor.apply_chat_template([[{"role": "user", "content": filled}]] * 2)
    assert batched == [processor.apply_chat_template([{"role": "user", "content": parts}])] * 2
    assert all(part.keys() == empty.keys() | {"type"} for part in filled), "the caller's parts are left as they were"


@pytest.mark.parametrize("writes", [True, False])
def test_every_reader_of_a_row_begins_it_alike(writes):
    """With tokenizers that put a token before each text, as Llama's do, whether or not the template writes it."""
    model, processor = tiny_model_and_processor(width=32)
    tokenizer = processor.tokenizer
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    if not writes:
        tokenizer.chat_template = CHATML_TEMPLATE
    processor = TokenFlexProcessor(processor.image_processor, tokenizer, 4, 8)
    model.resize_token_embeddings(len(tokenizer))
    row = {"image": IMAGE, "question": "which color?", "answer": "red"}
    content = [{"type": "image", "image": IMAGE}, {"type": "text", "text": "which color?"}]
    messages, options = [{"role": "user", "content": content}], {"add_generation_prompt": True}
    prompt = processor.apply_chat_template(messages, **options)
    batch = TokenFlexDataCollator(processor, [4], [1.0])([row])
    (_, asked), *_ = encode_questions(model, processor, [row], show_progress=False)
    asked = at_count(asked, 4, model.config)
    tokenized = processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
    read = [
        batch["input_ids"][batch["labels"] == -100].tolist(),
        asked["input_ids"][0].tolist(),
        tokenized["input_ids"][0],
        processor(images=IMAGE, text=prompt)["input_ids"][0],
    ]
    assert read == [read[0]] * 4
    assert read[0].count(tokenizer.bos_token_id) == writes


@pytest.mark.parametrize(
    "part", ["Describe it.", {"type": "audio", "path": "a.wav"}, {"type": "file", "file": {"file_id": "x"}}], ids=str
)
def test_parts_that_are_neither_text_nor_image_are_refused(tiny, part):
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "what is it?"}]}]
    with pytest.raises(TemplateError, match="a text with its `text`, or an image; this is .*(Describe|audio|file_id)"):
        tiny[1].apply_chat_template(messages)
