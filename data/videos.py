"""Videos in chat messages as their frames, which TokenFLEX takes as images."""

import math
from collections.abc import Sequence
from pathlib import Path

import PIL.Image
from transformers.utils import is_av_available, is_cv2_available, is_decord_available, is_torchcodec_available
from transformers.video_utils import VideoMetadata, default_sample_indices_fn, load_video

from ..choices_tokenflex import count_tokens, format_size, split_choice
from ..processing_tokenflex import read_image


def expand_videos(
    messages: Sequence[dict],
    num_frames: int | None = None,
    fps: float | None = None,
    num_vision_tokens: int | tuple[int, int] = 256,
    num_vision_tokens_per_frame: int | tuple[int, int] | None = None,
) -> tuple[list[dict], list[int | tuple[int, int]]]:
    """
    Turns every video of a conversation into its frames: a line `FrameN: ` and an image part for each.

    Args:
        messages (`Sequence[dict]`):
            Chat messages. A part of type `video` has, in `video`, `path` or `url`, a file, a list of images or of
            image files, or a `uint8` array of shape `(num_frames, height, width, channels)`, and may have `num_frames`
            or `fps` of its own.
        num_frames (`int`, *optional*): Number of frames to take of each video, evenly spaced. Defaults to all.
        fps (`float`, *optional*): Frames per second to take; of a list of frames, `video_fps` of its part is the
            rate that it was recorded at.
        num_vision_tokens (`int`, `tuple[int, int]` or `str`, *optional*, defaults to 256): The count of other images.
        num_vision_tokens_per_frame (`int`, `tuple[int, int]` or `str`, *optional*):
            The count of each frame. Defaults to the largest square that is at most a quarter of `num_vision_tokens`,
            at the same resolution.

    Returns:
        `tuple[list[dict], list]`: New messages without videos, and the count of each of their images, as the
        processor's `num_vision_tokens` takes them.

    Raises:
        ValueError: If a video has no frames or is nothing of that kind, or both `num_frames` and `fps` are given.
        ImportError: If a video file is given and no decoder is installed.

    Example:

    ```python
    >>> from PIL import Image
    >>> from tokenflex.data.videos import expand_videos

    >>> video = {"type": "video", "video": [Image.new("RGB", (64, 64))] * 8}
    >>> messages = [{"role": "user", "content": [video, {"type": "text", "text": "what moves?"}]}]
    >>> messages, counts = expand_videos(messages, num_frames=2, num_vision_tokens=36)
    >>> [part["type"] for part in messages[0]["content"]], counts
    (['text', 'image', 'text', 'text', 'image', 'text', 'text'], [9, 9])
    ```
    """
    if num_vision_tokens_per_frame is None:
        _, resolution = split_choice(num_vision_tokens)
        num_vision_tokens_per_frame = max(1, math.isqrt(count_tokens(num_vision_tokens) // 4)) ** 2
        if resolution is not None:
            num_vision_tokens_per_frame = f"{num_vision_tokens_per_frame}@{format_size(resolution)}"
    expanded, counts = [], []
    for message in messages:
        if not isinstance(message["content"], (list, tuple)):
            expanded.append(message)
            continue
        parts = []
        for part in message["content"]:
            if part.get("type") != "video":
                parts.append(part)
                counts += [num_vision_tokens] * (part.get("type") in ("image", "image_url"))
                continue
            source = next((part[name] for name in ("video", "path", "url") if part.get(name) is not None), None)
            own = {"num_frames": part.get("num_frames"), "fps": part.get("fps")}
            own = own if any(own.values()) else {"num_frames": num_frames, "fps": fps}
            for number, frame in enumerate(sample_frames(source, **own, video_fps=part.get("video_fps")), start=1):
                parts += [
                    {"type": "text", "text": f"Frame{number}: "},
                    {"type": "image", "image": frame},
                    {"type": "text", "text": "\n"},
                ]
                counts.append(num_vision_tokens_per_frame)
        expanded.append({**message, "content": parts})
    return expanded, counts


def sample_frames(
    video, num_frames: int | None = None, fps: float | None = None, video_fps: float | None = None
) -> list[PIL.Image.Image]:
    """
    Reads one video's frames, evenly sampled as transformers' video processors do.

    Args:
        video:
            A path or URL of a video file, a list of images or of image files, or an array of shape `(num_frames,
            height, width, channels)` or `(num_frames, channels, height, width)`.
        num_frames (`int`, *optional*): Number of frames to take. Defaults to all.
        fps (`float`, *optional*): Frames per second to take.
        video_fps (`float`, *optional*): The rate of a video that is given as frames.

    Returns:
        `list[PIL.Image.Image]`: The frames, as [`read_image`] makes them.

    Raises:
        ValueError:
            If both `num_frames` and `fps` are given, more frames are asked for than there are, it is no video, or a
            frame is no image.
        ImportError: If a video file is given and no decoder is installed.
    """
    if num_frames is not None and fps is not None:
        raise ValueError(f"`num_frames`={num_frames} and `fps`={fps} exclude each other: give one of them.")
    if isinstance(video, (str, Path)):
        backend = _decoder(video)
        try:
            video, _ = load_video(str(video), num_frames=num_frames, fps=fps, backend=backend)
        except Exception as error:  # decoders raise whatever they like on damaged files
            raise ValueError(
                f"The video {str(video)!r} cannot be read ({type(error).__name__}: {error}): if its container does "
                "not say how many frames it has, as Matroska and WebM may not, give them as a list of images."
            ) from None
        return _read_frames(video, range(len(video)))
    if not isinstance(video, (list, tuple)) and getattr(video, "ndim", None) != 4:
        shape = f" of shape {tuple(video.shape)}" if getattr(video, "shape", None) is not None else ""
        raise ValueError(
            f"A video is a {type(video).__name__}{shape}: give a list of images, an array of shape (num_frames, "
            "height, width, channels), or the path of a video file."
        )
    if len(video) == 0:
        raise ValueError("A video has no frames: give at least one.")
    if num_frames is not None and not 1 <= num_frames <= len(video):
        raise ValueError(f"`num_frames`={num_frames}: the video has {len(video)} frames, so give 1 to {len(video)}.")
    metadata = VideoMetadata(total_num_frames=len(video), fps=video_fps)
    indices = default_sample_indices_fn(metadata, num_frames=num_frames, fps=fps).tolist()
    return _read_frames(video, indices)


def _read_frames(video, indices: Sequence[int]) -> list[PIL.Image.Image]:
    frames = []
    for index in indices:
        try:
            frames.append(read_image(video[index]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"Frame {index} of a video: {error}.") from None
    return frames


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
        f"The video {str(video)!r} is a file and no video decoder is installed: install one (`pip install av`), or "
        "pass the frames as a list of images or an array."
    )
