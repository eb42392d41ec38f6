import numpy as np
import pytest
import torch
from PIL import Image

from tokenflex.data.synthetic import draw_scene


IMAGES = [draw_scene(11, index).image for index in range(6)]
FRAMES = IMAGES[:4]
ARRAY = np.stack([np.asarray(frame) for frame in FRAMES])
TEXT = "look <|image_pad|> and <|video_pad|> then <|image_pad|>: what moved?"


def tokens_per_run(processor, input_ids):
    """Lengths of the unbroken runs of image tokens in one row."""
    is_image = np.asarray(input_ids) == processor.image_token_id
    edges = np.flatnonzero(np.diff(np.concatenate([[0], is_image, [0]])))
    return (edges[1::2] - edges[::2]).tolist()


def process(processor, videos, **kwargs):
    return processor(images=IMAGES[4:], text=TEXT, videos=videos, return_tensors="pt", **kwargs)


def test_frames_are_images_in_the_videos_place(tiny):
    processor = tiny[1]
    output = process(processor, FRAMES)
    assert output["vision_token_grids"].tolist() == [[6, 6], *[[3, 3]] * 4, [6, 6]]
    assert tokens_per_run(processor, output["input_ids"][0]) == [36, 9, 9, 9, 9, 36]
    marked = "".join(f"Frame{i}: {processor.image_placeholder}\n" for i in (1, 2, 3, 4))
    by_hand = processor(
        images=[IMAGES[4], *FRAMES, IMAGES[5]],
        text=TEXT.replace("<|video_pad|>", marked),
        num_vision_tokens=[36, 9, 9, 9, 9, 36],
        return_tensors="pt",
    )
    assert output.keys() == by_hand.keys()
    assert all(torch.equal(output[name], by_hand[name]) for name in by_hand)


@pytest.mark.parametrize(
    "video",
    [
        pytest.param([FRAMES], id="list of one video"),
        pytest.param([[FRAMES]], id="as chat messages nest it"),
        pytest.param(ARRAY, id="array"),
        pytest.param([ARRAY], id="list of arrays"),
        pytest.param(ARRAY[None], id="batch in one array"),
        pytest.param(ARRAY.transpose(0, 3, 1, 2), id="channels first"),
        pytest.param(torch.from_numpy(ARRAY), id="tensor"),
        pytest.param(list(ARRAY), id="list of frames as arrays"),
    ],
)
def test_all_ways_to_give_frames_agree(tiny, video):
    expected, output = process(tiny[1], FRAMES), process(tiny[1], video)
    assert all(torch.equal(output[name], expected[name]) for name in expected)


def test_frames_from_files_and_chat_messages(tiny, tmp_path):
    processor = tiny[1]
    files = [str(tmp_path / f"{i}.png") for i in range(4)]
    for file, frame in zip(files, FRAMES):
        frame.save(file)
    for video in (FRAMES, files, ARRAY):
        content = [{"type": "video", "video": video}, {"type": "text", "text": "what moved?"}]
        output = processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert tokens_per_run(processor, output["input_ids"][0]) == [9] * 4
        assert torch.equal(output["pixel_values"], process(processor, FRAMES)["pixel_values"][1:5])


def test_the_order_of_images_and_videos_is_that_of_the_text(tiny):
    processor = tiny[1]
    texts = ["<|video_pad|> <|image_pad|>", "no picture", "<|image_pad|> <|video_pad|> <|video_pad|>"]
    videos = [FRAMES[:1], FRAMES[1:3], FRAMES[3:]]
    for images in (IMAGES[4:], [IMAGES[4:5], [], IMAGES[5:]]):
        output = processor(images=images, text=texts, videos=videos, padding=True, return_tensors="pt")
        expected = [FRAMES[0], IMAGES[4], IMAGES[5], FRAMES[1], FRAMES[2], FRAMES[3]]
        assert torch.equal(output["pixel_values"], processor(images=expected, return_tensors="pt")["pixel_values"])
        counts = [tokens_per_run(processor, row) for row in output["input_ids"]]
        assert counts == [[9, 36], [], [36, 9, 9, 9]]


def test_counts_of_frames(tiny):
    processor = tiny[1]

    def counts(**kwargs):
        return tokens_per_run(processor, process(processor, FRAMES[:2], **kwargs)["input_ids"][0])

    assert counts() == [36, 9, 9, 36]
    assert counts(num_vision_tokens=16) == [16, 16, 16, 16]
    assert counts(num_vision_tokens=[4, 16]) == [4, 9, 9, 16]
    assert counts(videos_kwargs={"num_vision_tokens": (2, 5)}) == [36, 10, 10, 36]
    assert counts(images_kwargs={"num_vision_tokens": [4, 16]}) == [4, 9, 9, 16]
    assert counts(images_kwargs={"num_vision_tokens": 4}, videos_kwargs={"num_vision_tokens": [16]}) == [4, 16, 16, 4]
    with pytest.raises(ValueError, match="give it once"):
        counts(num_vision_tokens=4, videos_kwargs={"num_vision_tokens": 16})


def test_the_default_count_of_frames_is_saved(tiny, tmp_path):
    processor = tiny[1]
    own = type(processor)(
        processor.image_processor, processor.tokenizer, 36, processor.patch_size, num_vision_tokens_per_frame=4
    )
    own.save_pretrained(tmp_path)
    loaded = type(processor).from_pretrained(tmp_path)
    assert tokens_per_run(loaded, process(loaded, FRAMES)["input_ids"][0]) == [36, 4, 4, 4, 4, 36]
    with pytest.raises(ValueError, match="`num_vision_tokens_per_frame`=5"):
        type(processor)(
            processor.image_processor, processor.tokenizer, 36, processor.patch_size, num_vision_tokens_per_frame=5
        )


def test_frames_are_not_cut_into_tiles(tiny):
    processor = tiny[1]
    wide = Image.new("RGB", (128, 64))
    output = processor(
        images=wide, text="<|image_pad|> <|video_pad|>", videos=[wide, wide], crop_to_patches=True, max_patches=2
    )
    assert output["num_tiles"] == [3, 1, 1]


def test_frames_are_sampled_evenly(tiny):
    processor = tiny[1]
    all_frames = process(processor, FRAMES)["pixel_values"][1:5]

    def sampled(**kwargs):
        output = process(processor, FRAMES, return_metadata=True, **kwargs)
        assert len(output["pixel_values"]) == 2 + len(output["video_metadata"][0].frames_indices)
        assert torch.equal(output["pixel_values"][1:-1], all_frames[output["video_metadata"][0].frames_indices])
        return output["video_metadata"][0].frames_indices

    assert sampled(num_frames=2) == [0, 2]
    assert sampled(num_frames=2, do_sample_frames=False) == [0, 1, 2, 3]
    assert sampled(fps=1, video_metadata={"fps": 2.0}) == [0, 2]
    assert sampled(fps=1, video_metadata=[{"fps": 4.0}]) == [0]


def test_answers_about_videos_are_those_about_their_frames(tiny):
    model, processor = tiny
    frames = processor(images=FRAMES, text=processor.image_placeholder * 4, num_vision_tokens=4, return_tensors="pt")
    embeds = model.model(**process(processor, FRAMES)).image_hidden_states[1:5]
    alone = model.get_image_features(frames["pixel_values"], num_vision_tokens=9).pooler_output
    torch.testing.assert_close(torch.stack(embeds), alone, atol=1e-5, rtol=0)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    output = model.generate(**process(processor, FRAMES), num_vision_tokens=4, **options)
    expected = model.generate(**process(processor, FRAMES, num_vision_tokens=4), **options)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("videos", "kwargs", "message"),
    [
        ([FRAMES, FRAMES], {}, r"1 video placeholders .* holds 2 videos"),
        (FRAMES, {"num_frames": 9}, "`num_frames`=9: the video has 4 frames, so give 1 to 4"),
        (FRAMES, {"num_frames": 2, "fps": 1}, "exclude each other"),
        (FRAMES, {"videos_kwargs": {"size": 5}}, r"holds \['size'\]"),
        (FRAMES, {"videos_kwargs": {"num_vision_tokens": [4, 4]}}, "has 2 entries for 1 videos"),
        (FRAMES, {"num_vision_tokens": [4]}, "has 1 entries for 2 images"),
        (FRAMES, {"num_vision_tokens": 5}, "Nearest: 4 or 9"),
        (FRAMES, {"video_metadata": [None, None]}, "2 entries for 1 videos"),
        (ARRAY / 255, {}, "frames of type float64"),
        (ARRAY[0], {}, r"ndarray of shape \(64, 64, 3\): a video is"),
        (7, {}, "holds a int"),
    ],
)
def test_what_cannot_be_meant_is_refused(tiny, videos, kwargs, message):
    with pytest.raises(ValueError, match=message):
        process(tiny[1], videos, **kwargs)


def test_placeholders_without_videos_are_refused(tiny):
    with pytest.raises(ValueError, match="no videos were passed"):
        tiny[1](images=IMAGES[4:], text=TEXT)
    with pytest.raises(ValueError, match=r"`text` has 2 .* holds 0"):
        tiny[1](text=TEXT, videos=FRAMES)


def test_files_are_decoded_and_sampled(tiny, tmp_path):
    av = pytest.importorskip("av")
    with av.open(tmp_path / "clip.avi", "w") as container:
        stream = container.add_stream("ffv1", rate=4)  # lossless
        stream.width = stream.height = 64
        stream.pix_fmt = "bgr0"
        for frame in FRAMES:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    output = process(tiny[1], str(tmp_path / "clip.avi"), num_frames=2, return_metadata=True)
    assert torch.equal(output["pixel_values"], process(tiny[1], FRAMES, num_frames=2)["pixel_values"])
    assert list(output["video_metadata"][0].frames_indices) == [0, 2]


def test_a_file_needs_a_decoder(tiny, monkeypatch):
    for name in ("torchcodec", "av", "decord", "cv2"):
        monkeypatch.setattr(f"tokenflex.video_processing_tokenflex.is_{name}_available", lambda: False)
    with pytest.raises(ImportError, match="no video decoder is installed: install one .*, or pass the frames"):
        process(tiny[1], "clip.mp4")


def test_no_videos_are_no_videos(tiny):
    assert tiny[1](videos=[], text="a")["input_ids"] == tiny[1](text="a")["input_ids"]


def test_tiling_said_twice_is_refused(tiny):
    with pytest.raises(ValueError, match="`crop_to_patches` is given beside one in `images_kwargs`"):
        process(tiny[1], FRAMES, crop_to_patches=False, images_kwargs={"crop_to_patches": True})


def test_masks_and_offsets_are_those_of_the_expanded_prompt(tiny):
    processor = tiny[1]
    template = (
        "{%- for m in messages -%}[{{ m.role }}]{%- for part in m.content -%}{%- if part.type == 'video' -%}<|video_pad|>"
        "{%- elif part.type == 'image' -%}<|image_pad|>{%- elif m.role == 'assistant' -%}{% generation %}{{ part.text }}"
        "{% endgeneration %}{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}{% endfor -%}"
    )
    question = [
        {"type": "image", "image": IMAGES[4]},
        {"type": "video", "video": FRAMES},
        {"type": "text", "text": "?"},
    ]
    answer = [{"type": "text", "text": "it is purple"}]
    output = processor.apply_chat_template(
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    )
    mask = torch.as_tensor(output["assistant_masks"])[0].bool()
    assert processor.decode(output["input_ids"][0][mask]) == "it is purple"
    offsets = process(processor, FRAMES, return_text_replacement_offsets=True)["text_replacement_offsets"][0]
    assert [span["type"] for span in offsets] == ["image", "video", "image"]
    text = processor.decode(process(processor, FRAMES)["input_ids"][0])
    for span in offsets:
        start, end = span["new_span"]
        assert text[start:end] == span["replacement"]
        assert TEXT[slice(*span["span"])] == span["text"]
