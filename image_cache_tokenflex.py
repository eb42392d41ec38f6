"""Patch features of images that were encoded before, found again by the images' content."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import nn


class ImageFeatureCache:
    """
    Keeps the vision tower's features of the images last used, so that a second question on one runs no tower. What decides
    is the content of `pixel_values`, by SHA-256. When the tower's weights or adapters change, all features are forgotten.

    Args:
        max_images (`int`): How many images' features are kept, at least 1; the longest unused give way. Each takes
            num_patches * vision_hidden_size values on the model's device: 1.6 MiB in bfloat16 for SigLIP-so400m at 384 pixels.

    Attributes:
        hits, misses (`int`): How many images were found, and how many had to be encoded.

    Raises:
        ValueError: If `max_images` is no positive integer.

    Example:

    ```python
    >>> import torch
    >>> from tokenflex.training.tiny import tiny_model_and_processor

    >>> model, _ = tiny_model_and_processor()
    >>> cache = model.eval().keep_image_features(max_images=8)
    >>> image = torch.rand(1, 3, 64, 64)
    >>> with torch.no_grad():
    ...     counts = [model.get_image_features(image, count).pooler_output.shape[1] for count in (4, 36)]
    >>> counts, cache.hits, cache.misses
    ([4, 36], 1, 1)
    ```
    """

    def __init__(self, max_images: int):
        if isinstance(max_images, bool) or not isinstance(max_images, int) or max_images < 1:
            raise ValueError(f"`max_images`={max_images!r}: give the number of images to keep, 1 or more.")
        self.max_images = max_images
        self.hits = self.misses = 0
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._tower_state = None

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forgets all features."""
        self._kept.clear()

    def encode(
        self, tower: nn.Module, pixel_values: torch.Tensor, run: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """
        The features of images, of which only new ones are run, each once.

        Args:
            tower (`torch.nn.Module`): The vision tower, whose weights must be what they were.
            pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`): The images.
            run (`Callable`): Turns pixel values into features of shape `(num_images, num_patches, vision_hidden_size)`.

        Returns:
            `torch.Tensor` of shape `(num_images, num_patches, vision_hidden_size)`.
        """
        state = _describe(tower)
        if state != self._tower_state:
            self.clear()
            self._tower_state = state
        keys = _digest(pixel_values)
        found = {key: self._kept.pop(key, None) for key in keys}
        new = {key: index for index, key in reversed(list(enumerate(keys))) if found[key] is None}
        self.misses += len(new)
        self.hits += len(keys) - len(new)
        if new:
            found.update(zip(new, run(pixel_values[list(new.values())])))
        for key in found:
            # A row of a batch would keep the whole batch in memory.
            self._kept[key] = found[key].clone() if key in new else found[key]
        while len(self._kept) > self.max_images:
            self._kept.popitem(last=False)
        return torch.stack([found[key] for key in keys])


def _describe(tower: nn.Module) -> list:
    """What changes when the tower's weights, or the adapters in use, do."""
    weights = [
        (weight.data_ptr(), None if weight.is_inference() else weight._version) for weight in tower.parameters()
    ]
    adapters = [
        (module.disable_adapters, *module.active_adapters)
        for module in tower.modules()
        if isinstance(getattr(module, "disable_adapters", None), bool)
    ]
    return weights + adapters


def _digest(pixel_values: torch.Tensor) -> list[bytes]:
    images = pixel_values.detach().cpu().contiguous()
    kind = f"{images.dtype} {tuple(images.shape[1:])}".encode()
    return [hashlib.sha256(kind + image.view(torch.uint8).numpy().tobytes()).digest() for image in images]


__all__ = ["ImageFeatureCache"]
