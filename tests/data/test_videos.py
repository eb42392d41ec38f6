import numpy as np
import pytest
import torch

from tokenflex.data.synthetic import draw_scene
from tokenflex.data.videos import expand_videos


IMAGES = [draw_scene(11, index).image for index in range(6)]
FRAMES = IMAGES[:4]
ARRAY = np.stack([np.asarray(frame) for frame in FRAMES])


def ask(*parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "what moved?"}]}]


def film(video, **options):
    return {"type": "video", "video": video, **options}


def frames_of(messages):
    return [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]


def pixels(images):
    return np.stack([np.asarray(image.convert("RGB")) for image in images])


def encode(processor, messages, counts):
    template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(messages, **template, processor_kwargs={"num_vision_tokens": counts})


def test_frames_are_images_in_the_videos_place(tiny):
    processor = tiny[1]
    messages = ask({"type": "image", "image": IMAGES[4]}, film(FRAMES), {"type": "image", "image": IMAGES[5]})
    output = encode(processor, *expand_videos(messages, num_vision_tokens=36))
    assert output["vision_token_grids"].tolist() == [[6, 6], *[[3, 3]] * 4, [6, 6]]
    mark = processor.image_placeholder
    films = "".join(f"Frame{i}: {mark}\n" for i in (1, 2, 3, 4))
    by_hand = processor(
        images=[IMAGES[4], *FRAMES, IMAGES[5]],
        text=f"<|im_start|>user\n{mark}{films}{mark}what moved?<|im_end|>\n<|im_start|>assistant\n",
        num_vision_tokens=[36, 9, 9, 9, 9, 36],
        return_tensors="pt",
    )
    assert all(torch.equal(output[name], by_hand[name]) for name in by_hand)


@pytest.mark.parametrize(
    "video",
    [
        pytest.param(ARRAY, id="array"),
        pytest.param(ARRAY.transpose(0, 3, 1, 2), id="channels first"),
        pytest.param(torch.from_numpy(ARRAY), id="tensor"),
        pytest.param(list(ARRAY), id="list of frames as arrays"),
    ],
)
def test_all_ways_to_give_frames_agree(video):
    messages, _ = expand_videos(ask(film(video)))
    assert (pixels(frames_of(messages)) == ARRAY).all()


def test_frames_from_files(tmp_path):
    files = [str(tmp_path / f"{i}.png") for i in range(4)]
    for file, frame in zip(files, FRAMES):
        frame.save(file)
    messages, _ = expand_videos(ask(film(files)))
    assert (pixels(frames_of(messages)) == ARRAY).all()


def test_messages_without_videos_stay_as_they_are():
    messages = [{"role": "system", "content": "be short"}, *ask({"type": "image", "image": IMAGES[0]})]
    assert expand_videos(messages, num_vision_tokens=16) == (messages, [16])
    before = ask(film(FRAMES))
    expand_videos(before)
    assert before[0]["content"][0] == film(FRAMES), "the caller's messages are left alone"


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({}, [256, 64, 64]),
        ({"num_vision_tokens": 16}, [16, 4, 4]),
        ({"num_vision_tokens": 1}, [1, 1, 1]),
        ({"num_vision_tokens": (4, 5)}, [(4, 5), 4, 4]),
        ({"num_vision_tokens_per_frame": (2, 5)}, [256, (2, 5), (2, 5)]),
    ],
)
def test_counts_of_frames(options, counts):
    messages = ask({"type": "image", "image": IMAGES[0]}, film(FRAMES[:2]))
    assert expand_videos(messages, **options)[1] == counts


@pytest.mark.parametrize(
    ("part", "options", "expected"),
    [
        ({}, {"num_frames": 2}, [0, 2]),
        ({"num_frames": 1}, {"num_frames": 2}, [0]),
        ({"video_fps": 4}, {"fps": 2}, [0, 2]),
        ({"video_fps": 4, "fps": 4}, {"num_frames": 1}, [0, 1, 2, 3]),
    ],
)
def test_frames_are_sampled_evenly(part, options, expected):
    messages, _ = expand_videos(ask(film(FRAMES, **part)), **options)
    assert (pixels(frames_of(messages)) == ARRAY[expected]).all()


@pytest.mark.parametrize(
    ("video", "options", "message"),
    [
        (FRAMES, {"num_frames": 9}, "`num_frames`=9: the video has 4 frames, so give 1 to 4"),
        (FRAMES, {"num_frames": 2, "fps": 1}, "exclude each other"),
        ([], {}, "no frames"),
        (np.empty((0, 8, 8, 3)), {}, "no frames"),
        (ARRAY / 255, {}, "Frame 0 of a video: the image holds float64 values"),
        (ARRAY[:, :0], {}, r"Frame 0 of a video: the image has no pixels \(64 x 0\)"),
        ([IMAGES[0], None], {}, "Frame 1 of a video: the image cannot be decoded"),
        ([IMAGES[0], "missing.png"], {}, "Frame 1 of a video: .*No such file"),
        (ARRAY[0], {}, r"ndarray of shape \(64, 64, 3\): give a list of images"),
        (7, {}, "A video is a int"),
    ],
)
def test_what_cannot_be_meant_is_refused(video, options, message):
    with pytest.raises(ValueError, match=message):
        expand_videos(ask(film(video)), **options)


def test_a_part_without_a_video_is_refused():
    with pytest.raises(ValueError, match="A video is a NoneType"):
        expand_videos(ask({"type": "video"}))


def test_files_are_decoded_and_sampled(tmp_path):
    av = pytest.importorskip("av")
    with av.open(tmp_path / "clip.avi", "w") as container:
        stream = container.add_stream("ffv1", rate=4)  # lossless
        stream.width = stream.height = 64
        stream.pix_fmt = "bgr0"
        for frame in FRAMES:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    for name in ("video", "path", "url"):
        part = {"type": "video", name: str(tmp_path / "clip.avi")}
        messages, _ = expand_videos(ask(part), num_frames=2)
        assert (pixels(frames_of(messages)) == ARRAY[[0, 2]]).all()


def test_a_file_needs_a_decoder(monkeypatch):
    for name in ("torchcodec", "av", "decord", "cv2"):
        monkeypatch.setattr(f"tokenflex.data.videos.is_{name}_available", lambda: False)
    with pytest.raises(ImportError, match="no video decoder is installed: install one .*, or pass the frames"):
        expand_videos(ask(film("clip.mp4")))


def test_gray_frames_are_images_too():
    messages, _ = expand_videos(ask(film(ARRAY[..., :1])))
    assert (pixels(frames_of(messages)) == ARRAY[..., :1]).all()


def test_a_file_that_names_no_frames_is_refused(tmp_path):
    av = pytest.importorskip("av")
    file = str(tmp_path / "clip.mkv")
    with av.open(file, "w") as container:
        stream = container.add_stream("ffv1", rate=4)
        stream.width = stream.height = 64
        stream.pix_fmt = "bgr0"
        container.mux(stream.encode(av.VideoFrame.from_image(FRAMES[0])))
        container.mux(stream.encode())
    for video in (file, str(tmp_path / "missing.mp4")):
        with pytest.raises(ValueError, match=f"The video '{video}' cannot be read .* give them as a list of images"):
            expand_videos(ask(film(video)))
