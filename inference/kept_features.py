"""Features of the vision tower, kept for images that are asked about again."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch

from ..placeholders_tokenflex import TokenFlexImageOutput


class KeptFeatures:
    """
    The vision tower's features of the images last used, known again by the content of `pixel_values` (SHA-256) and the
    resolution they were seen at, so that a second question on an image runs no tower, at any count. They are the
    features of one model, whose weights stay as they are.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model.
        max_images (`int`):
            Number of images (each tile and each resolution counts as one) to keep, at least 1; the longest unused give
            way. Each takes num_patches * vision_hidden_size values on the model's device: 1.6 MiB in bfloat16 for
            SigLIP-so400m at 384 pixels.

    Raises:
        ValueError: If `max_images` is no positive integer.

    Example:

    ```python
    >>> import torch
    >>> from tokenflex.inference.kept_features import KeptFeatures
    >>> from tokenflex.towers.tiny import tiny_model_and_processor

    >>> model, _ = tiny_model_and_processor()
    >>> kept = KeptFeatures(model.eval(), max_images=8)
    >>> images = torch.rand(1, 3, 64, 64)
    >>> [kept.encode(images, [(side, side)]).last_hidden_state.shape for side in (64, 32)]
    [torch.Size([1, 64, 128]), torch.Size([1, 16, 128])]
    ```
    """

    def __init__(self, model, max_images: int):
        if isinstance(max_images, bool) or not isinstance(max_images, int) or max_images < 1:
            raise ValueError(f"`max_images`={max_images!r}: give the number of images to keep, 1 or more.")
        self.model, self.max_images = model, max_images
        self._kept: OrderedDict[tuple, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor, resolutions: Sequence[tuple[int, int]]) -> TokenFlexImageOutput:
        """
        The features of images, of which the tower runs only those that are not kept, each once.

        Args:
            pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`): The images.
            resolutions (`Sequence[tuple[int, int]]`): (height, width) in pixels that each is to be seen at.

        Returns:
            [`TokenFlexImageOutput`]: With `last_hidden_state` and `image_resolutions`, for `mm_encoder_outputs`.
        """
        keys = list(zip(digest_images(pixel_values), resolutions))
        with self._lock:
            found = {key: self._kept[key] for key in keys if key in self._kept}
            new = {key: i for i, key in enumerate(keys) if key not in found}
            found |= encode_new(self.model, pixel_values, new)
            for key in keys:
                self._kept[key] = found[key]
                self._kept.move_to_end(key)
            while len(self._kept) > self.max_images:
                self._kept.popitem(last=False)
        rows = [found[key] for key in keys]
        features = torch.stack(rows) if len(set(resolutions)) == 1 else rows
        return TokenFlexImageOutput(last_hidden_state=features, image_resolutions=list(resolutions))


def encode_new(
    model, pixel_values: torch.Tensor, new: Mapping[tuple[bytes, tuple[int, int]], int]
) -> dict[tuple[bytes, tuple[int, int]], torch.Tensor]:
    """
    Runs the vision tower, once for each resolution.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model.
        pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`): The images.
        new (`Mapping[tuple[bytes, tuple[int, int]], int]`): The place in `pixel_values` of each image to be encoded,
            by its digest and its resolution.

    Returns:
        `dict[tuple[bytes, tuple[int, int]], torch.Tensor]`: Features of shape `(num_patches, vision_feature_size)`.
    """
    features = {}
    for size in dict.fromkeys(size for _, size in new):
        members = {key: i for key, i in new.items() if key[1] == size}
        images = pixel_values[list(members.values())]
        output = model.get_image_features(images, 1, image_size=size, return_dict=True)
        # A row of a batch would keep the whole batch in memory.
        features.update((key, row.clone()) for key, row in zip(members, output.last_hidden_state))
    return features


def digest_images(pixel_values: torch.Tensor) -> list[bytes]:
    """The SHA-256 of each image's pixels, their dtype and shape."""
    images = pixel_values.detach().cpu().contiguous()
    kind = f"{images.dtype} {tuple(images.shape[1:])}".encode()
    return [hashlib.sha256(kind + image.view(torch.uint8).numpy().tobytes()).digest() for image in images]
