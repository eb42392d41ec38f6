"""Videos as lists of frames, which TokenFLEX takes as images."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from transformers.image_utils import (
    ChannelDimension,
    infer_channel_dimension_format,
    is_valid_image,
    load_image,
    make_flat_list_of_images,
    to_numpy_array,
)
from transformers.processing_utils import VideosKwargs
from transformers.utils import is_av_available, is_cv2_available, is_decord_available, is_torchcodec_available
from transformers.video_utils import VideoMetadata, default_sample_indices_fn, load_video


VIDEO_OPTIONS = ("num_frames", "fps", "do_sample_frames", "video_metadata", "return_metadata")


class TokenFlexVideosKwargs(VideosKwargs, total=False):
    """
    num_vision_tokens (`int`, `tuple[int, int]` or a list of these, *optional*):
        The count of every frame, or a list with one per video. Defaults to the processor's
        `num_vision_tokens_per_frame`.
    """

    num_vision_tokens: Any


def list_videos(videos, depth: int = 0) -> list:
    """
    Flattens what `videos=` may hold to a list of single videos.

    Args:
        videos: A video, or lists of videos. A video is a list of frames (images), an array of shape
            `(num_frames, height, width, channels)` or `(num_frames, channels, height, width)`, the path or URL of a
            video file, or, two lists deep as chat messages nest them, a list of image files.

    Returns:
        `list`: One entry per video.

    Raises:
        ValueError: If something else is found.
    """
    if isinstance(videos, (str, Path)):
        return [videos]
    if getattr(videos, "ndim", None) == 4:
        return [videos]
    if isinstance(videos, (list, tuple)) or getattr(videos, "ndim", None) == 5:
        items = list(videos)
        if items and all(is_frame(item) for item in items):
            return [items]
        if items and depth >= 2 and all(isinstance(item, (str, Path)) for item in items):
            return [items]
        return [video for item in items for video in list_videos(item, depth + 1)]
    shape = f" of shape {tuple(videos.shape)}" if hasattr(videos, "shape") else ""
    raise ValueError(
        f"`videos` holds a {type(videos).__name__}{shape}: a video is a list of images, an array of shape (num_frames, "
        "height, width, channels), or the path of a video file."
    )


def is_frame(item) -> bool:
    return isinstance(item, PIL.Image.Image) or (is_valid_image(item) and getattr(item, "ndim", 0) in (2, 3))


def sample_frames(
    video,
    num_frames: int | None = None,
    fps: float | None = None,
    do_sample_frames: bool | None = None,
    video_metadata: dict | VideoMetadata | None = None,
) -> tuple[list[PIL.Image.Image], VideoMetadata]:
    """
    Reads one video's frames, evenly sampled as transformers' video processors do.

    Args:
        video: One entry of [`list_videos`].
        num_frames (`int`, *optional*): How many frames to take. Defaults to all.
        fps (`float`, *optional*): How many frames per second to take; for frames, their own rate is read from
            `video_metadata`.
        do_sample_frames (`bool`, *optional*): `False` takes every frame whatever the two above say.
        video_metadata (`dict` or `VideoMetadata`, *optional*): `fps` of a video given as frames.

    Returns:
        `tuple[list[PIL.Image.Image], VideoMetadata]`: The frames, and where in the video they are.

    Raises:
        ValueError: If both `num_frames` and `fps` are given, or more frames are asked for than there are.
        ImportError: If a video file is given and no decoder is installed.
    """
    if num_frames is not None and fps is not None:
        raise ValueError(f"`num_frames`={num_frames} and `fps`={fps} exclude each other: give one of them.")
    if do_sample_frames is False:
        num_frames = fps = None
    if isinstance(video, (str, Path)):
        frames, metadata = load_video(str(video), num_frames=num_frames, fps=fps, backend=_decoder(video))
        return [_to_image(frame) for frame in frames], metadata
    metadata = VideoMetadata(**{**dict(video_metadata or {}), "total_num_frames": len(video)})
    if num_frames is not None and not 1 <= num_frames <= len(video):
        raise ValueError(f"`num_frames`={num_frames}: the video has {len(video)} frames, so give 1 to {len(video)}.")
    indices = default_sample_indices_fn(metadata, num_frames=num_frames, fps=fps).tolist()
    metadata.frames_indices = indices
    return [_to_image(video[index]) for index in indices], metadata


def _decoder(video: str | Path) -> str:
    decoders = {
        "torchcodec": is_torchcodec_available,
        "pyav": is_av_available,
        "decord": is_decord_available,
        "opencv": is_cv2_available,
    }
    for name, is_available in decoders.items():
        if is_available():
            return name
    raise ImportError(
        f"`videos`={str(video)!r} is a file and no video decoder is installed: install one (`pip install av`), or pass "
        "the frames as a list of images or an array."
    )


def _to_image(frame) -> PIL.Image.Image:
    if isinstance(frame, PIL.Image.Image):
        return frame
    if isinstance(frame, (str, Path)):
        return load_image(str(frame))
    pixels = to_numpy_array(frame)
    if pixels.dtype != np.uint8:
        raise ValueError(f"`videos` holds frames of type {pixels.dtype}: give uint8 values from 0 to 255.")
    if pixels.ndim == 3 and infer_channel_dimension_format(pixels) == ChannelDimension.FIRST:
        pixels = pixels.transpose(1, 2, 0)
    return PIL.Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels)


def one_each(name: str, value, number: int, items: str) -> list:
    if not isinstance(value, list):
        return [value] * number
    if len(value) != number:
        raise ValueError(f"`{name}` has {len(value)} entries for {number} {items}: give one for each.")
    return value


class VideosAsImagesMixin:
    """What a processor needs to take videos where its image processor takes images."""

    def _videos_to_images(self, images, text, videos, kwargs: dict):
        """Puts the frames of videos among the images, and a placeholder for each frame into the text."""
        kwargs = dict(kwargs)
        options = dict(kwargs.pop("videos_kwargs", None) or {})
        options.update({name: kwargs.pop(name) for name in VIDEO_OPTIONS if name in kwargs})
        unknown = set(options) - {*VIDEO_OPTIONS, "num_vision_tokens"}
        if unknown:
            raise ValueError(
                f"`videos_kwargs` holds {sorted(unknown)}: it takes {VIDEO_OPTIONS} and `num_vision_tokens`; how frames "
                "are resized and normalised is said in `images_kwargs`."
            )
        return_metadata = options.pop("return_metadata", False)
        frame_count = options.pop("num_vision_tokens", None)
        videos = list_videos(videos)
        metadata = one_each("video_metadata", options.pop("video_metadata", None), len(videos), "videos")
        sampled = [sample_frames(video, video_metadata=own, **options) for video, own in zip(videos, metadata)]
        videos = [frames for frames, _ in sampled]

        if images is not None:
            images = self.image_processor.fetch_images(images)
        flat_images = [] if images is None else list(make_flat_list_of_images(images))
        kinds, spans = ["image"] * len(flat_images) + ["video"] * len(videos), []
        if text is not None:
            text, spans = self._place_frames(images, text, videos)
            kinds = [span["type"] for row in spans for span in row]

        images_kwargs = dict(kwargs.pop("images_kwargs", None) or {})
        count = kwargs.pop("num_vision_tokens", None)
        if count is not None and (frame_count is not None or "num_vision_tokens" in images_kwargs):
            raise ValueError(
                f"`num_vision_tokens`={count} is given beside one in `images_kwargs` or `videos_kwargs`: give it once."
            )
        if frame_count is None:
            own = self.num_vision_tokens
            own = math.prod(own) if isinstance(own, tuple) else own
            default = self.num_vision_tokens_per_frame or max(1, math.isqrt(own // 4)) ** 2
            frame_count = default if count is None or isinstance(count, list) else count
        count = images_kwargs.get("num_vision_tokens") if count is None else count
        count = self.num_vision_tokens if count is None else count
        if "crop_to_patches" in images_kwargs and "crop_to_patches" in kwargs:
            raise ValueError("`crop_to_patches` is given beside one in `images_kwargs`: give it once.")
        crop = images_kwargs.get("crop_to_patches", kwargs.pop("crop_to_patches", None))
        crops = one_each("crop_to_patches", self.crop_to_patches if crop is None else crop, len(flat_images), "images")
        own_images = zip(flat_images, one_each("num_vision_tokens", count, len(flat_images), "images"), crops)
        own_videos = zip(videos, one_each("videos_kwargs['num_vision_tokens']", frame_count, len(videos), "videos"))
        rows = []
        for kind in kinds:
            if kind == "image":
                rows.append(next(own_images))
            else:
                frames, count = next(own_videos)
                rows += [(frame, count, False) for frame in frames]
        merged, counts, crops = (list(column) for column in zip(*rows))
        kwargs["images_kwargs"] = {**images_kwargs, "num_vision_tokens": counts, "crop_to_patches": crops}
        return merged, text, spans, [own for _, own in sampled] if return_metadata else None, kwargs

    def _place_frames(self, images, text: str | list[str], videos: list[list]) -> tuple[list[str], list[list[dict]]]:
        """The prompts with an image placeholder for each frame, and what was replaced in each."""
        text = [text] if isinstance(text, str) else list(text)
        texts = ["".join(f"Frame{i + 1}: {self.image_placeholder}\n" for i in range(len(video))) for video in videos]
        spare = [""] * sum(sample.count(self.video_token) for sample in text)
        same = [self.image_token] * (1 + sum(sample.count(self.image_token) for sample in text))
        text, spans = self.get_text_with_replacements(text, same, texts + spare)
        kinds = [[span["type"] for span in row] for row in spans]
        found = sum(row.count("video") for row in kinds)
        if found != len(videos):
            raise ValueError(
                f"`text` has {found} video placeholders ({self.video_token}), but `videos` holds {len(videos)} videos: "
                "give one placeholder per video."
            )
        self._check_images(images, [row.count("image") for row in kinds])
        return text, spans


def join_replacements(first: list[dict], then: list[dict]) -> list[dict]:
    """What two rounds of replacements in one prompt, as `get_text_with_replacements` returns them, replace together."""

    def shift(char: int) -> int:
        return char + sum(len(part["replacement"]) - len(part["text"]) for part in then if part["span"][1] <= char)

    joined = []
    for span in first:
        (start, end), text = span["new_span"], span["replacement"]
        for part in reversed(then):
            if start <= part["span"][0] and part["span"][1] <= end:
                text = text[: part["span"][0] - start] + part["replacement"] + text[part["span"][1] - start :]
        joined.append({**span, "new_span": (shift(start), shift(end)), "replacement": text})
    return joined
