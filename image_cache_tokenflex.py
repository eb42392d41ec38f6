"""Patch features of images that were encoded before, found again by the images' content."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import nn


class ImageFeatureCache:
    """
    Keeps the vision tower's features of the images last used, so that a second question on one runs no tower. What decides
    is the content of `pixel_values`, by SHA-256. When the tower's weights, its adapters or their scales, the layer that is
    read or autocast's dtype change, all features are forgotten. Writes that bypass autograd's version counter, such as
    those to `weight.data`, are not seen: call `clear` after them. Features are not copied or saved with the model.

    Args:
        max_images (`int`): How many images' features are kept, at least 1; the longest unused give way. Each takes
            num_patches * vision_hidden_size values on the model's device: 1.6 MiB in bfloat16 for SigLIP-so400m at 384 pixels.

    Attributes:
        hits, misses (`int`): How many images were known, also from the same batch, and how many had to be encoded.

    Raises:
        ValueError: If `max_images` is no positive integer.

    Example:

    ```python
    >>> import torch
    >>> from tokenflex.towers.tiny import tiny_model_and_processor

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
        self._made_with = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def __getstate__(self) -> dict:
        return {"max_images": self.max_images}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def clear(self) -> None:
        """Forgets all features."""
        with self._lock:
            self._kept.clear()

    def encode(
        self,
        tower: nn.Module,
        pixel_values: torch.Tensor,
        run: Callable[[torch.Tensor], torch.Tensor],
        settings: Hashable = None,
    ) -> torch.Tensor:
        """
        The features of images, of which only new ones are run, each once.

        Args:
            tower (`torch.nn.Module`): The vision tower, whose weights must be what they were.
            pixel_values (`torch.Tensor` of shape `(num_images, num_channels, height, width)`): The images.
            run (`Callable`): Turns pixel values into features of shape `(num_images, num_patches, vision_hidden_size)`.
            settings (*optional*): What else the features depend on.

        Returns:
            `torch.Tensor` of shape `(num_images, num_patches, vision_hidden_size)`.
        """
        made_with = _describe(tower, pixel_values.device.type, settings)
        if made_with is None:
            return run(pixel_values)
        keys = _digest(pixel_values)
        with self._lock:
            if made_with != self._made_with:
                self._kept.clear()
                self._made_with = made_with
            found = {key: self._kept[key] for key in keys if key in self._kept}
        new = {}
        for index, key in enumerate(keys):
            if key not in found:
                new.setdefault(key, index)
        if new:
            # A row of a batch would keep the whole batch in memory.
            found.update((key, row.clone()) for key, row in zip(new, run(pixel_values[list(new.values())])))
        with self._lock:
            self.misses += len(new)
            self.hits += len(keys) - len(new)
            if made_with == self._made_with:
                for key in found:
                    self._kept[key] = found[key]
                    self._kept.move_to_end(key)
            while len(self._kept) > self.max_images:
                self._kept.popitem(last=False)
        return torch.stack([found[key] for key in keys])


def _describe(tower: nn.Module, device_type: str, settings: Hashable) -> list | None:
    """What features depend on beside the image; nothing where that cannot be seen, and nothing may be kept."""
    parameters = list(tower.parameters())
    tuners = [module for module in tower.modules() if isinstance(getattr(module, "disable_adapters", None), bool)]
    # Offloaded weights are elsewhere; adapters chosen for each row are in hooks.
    if any(weight.is_meta for weight in parameters) or any(tuner._forward_pre_hooks for tuner in tuners):
        return None
    weights = [(weight.data_ptr(), None if weight.is_inference() else weight._version) for weight in parameters]
    adapters = [
        (tuner.disable_adapters, *tuner.active_adapters, *sorted(getattr(tuner, "scaling", {}).items()))
        for tuner in tuners
    ]
    autocast = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type)
    return [settings, autocast, *weights, *adapters]


def _digest(pixel_values: torch.Tensor) -> list[bytes]:
    images = pixel_values.detach().cpu().contiguous()
    kind = f"{images.dtype} {tuple(images.shape[1:])}".encode()
    return [hashlib.sha256(kind + image.view(torch.uint8).numpy().tobytes()).digest() for image in images]


__all__ = ["ImageFeatureCache"]
