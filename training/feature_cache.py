"""Features of a frozen vision tower, kept on disk: training on an image again runs no tower."""

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers.utils import logging

from ..checkpoints.files import write_file
from ..checkpoints.fingerprint import digest, fingerprint_tower, name_differences
from ..inference.kept_features import digest_images, encode_new
from ..placeholders_tokenflex import TokenFlexImageOutput, seen_resolutions


logger = logging.get_logger(__name__)

MANIFEST = "tower.json"


class FeatureCache:
    """
    The features of a frozen vision tower as they are before pooling, one file for each image (or tile) and resolution,
    found again by the content of `pixel_values` (SHA-256). Several processes and runs may use a folder at once: a file
    is written whole or not at all. A disk that is full ends the writing, not the training.

    Args:
        folder (`str` or `Path`): The folder, made if it is not there. It holds the features of one tower.
        model ([`TokenFlexForConditionalGeneration`] or a PEFT model of one): The model, its vision tower frozen.
        processor ([`TokenFlexProcessor`]): Its processor, on whose image processor the features depend.
        mixed_precision (`str`, *optional*, defaults to `"no"`): `"bf16"` or `"fp16"` if training is under autocast.

    Raises:
        ValueError: If the tower is trained or adapted, its features of an image vary while training, or
            the folder holds those of another tower, image processor or mixed precision.

    Example:

    ```python
    >>> from tokenflex.data.synthetic import SyntheticVQA
    >>> from tokenflex.towers.tiny import tiny_model_and_processor
    >>> from tokenflex.training import TokenFlexDataCollator
    >>> from tokenflex.training.feature_cache import FeatureCache

    >>> model, processor = tiny_model_and_processor()
    >>> _ = model.model.vision_tower.requires_grad_(False)
    >>> features = FeatureCache("outputs/features", model, processor)
    >>> features.bytes_per_image([4, 16, 36])  # 64 patches of 128 values of 4 bytes
    32768
    >>> batch = TokenFlexDataCollator(processor, [16], [1]).collate([SyntheticVQA(num_images=1, seed=0)[0]])
    >>> sorted(batch.keys() - features.serve(batch).keys())  # it has `mm_encoder_outputs` in their place
    ['pixel_values']
    ```
    """

    def __init__(self, folder: str | Path, model, processor, mixed_precision: str = "no"):
        check_frozen(model)
        self.folder, self.model = Path(folder), model.get_base_model() if is_peft_model(model) else model
        self.mixed_precision, self._writes = mixed_precision, True
        self._refuse_varying()
        made_by = fingerprint_tower(self.model, processor) | {"mixed_precision": mixed_precision}
        self._salt = digest(made_by).encode()
        manifest = self.folder / MANIFEST
        if self.folder.is_file():
            raise ValueError(f"`cache_features`={str(folder)!r} is a file: name a folder.")
        if not manifest.is_file():
            write_file(manifest, json.dumps(made_by, indent=2) + "\n")
        try:
            differing = name_differences(json.loads(manifest.read_text()), made_by)
        except ValueError as error:
            raise ValueError(f"{manifest} is damaged ({error}): name another folder, or delete this one.") from None
        if differing:
            raise ValueError(
                f"`cache_features`={str(folder)!r} holds what another vision tower or image processor made, which "
                f"differs in {differing}: name another folder, or delete this one."
            )

    def bytes_per_image(self, choices: Sequence[int | str]) -> int:
        """
        The bytes that an image takes once it was trained on at every choice: those of its patches, at each resolution.

        Args:
            choices (`Sequence[int | str]`): The counts, also with resolutions.
        """
        config = self.model.config
        patches = sum(math.prod(config.patch_grid_at(size)) for size in config.resolutions_for(choices))
        return patches * config.vision_feature_size * self.model.model.vision_tower.dtype.itemsize

    def say_size(self, choices: Sequence[int | str]) -> None:
        """Logs how large the folder gets, arguments as for [`~FeatureCache.bytes_per_image`]."""
        size, free = self.bytes_per_image(choices), shutil.disk_usage(self.folder).free
        logger.warning(
            f"Features of the vision tower are kept in {self.folder}: {size / 2**20:.3g} MiB for each image, "
            f"{1e5 * size / 2**30:.3g} GiB for 100,000; {free / 2**30:.3g} GiB are free."
        )

    @torch.no_grad()
    def serve(self, batch: dict) -> dict:
        """
        Takes the features of a batch's images from the folder, and runs the tower on those that are new.

        Args:
            batch (`dict`): The model's inputs as [`~TokenFlexDataCollator.arrange`] returns them.

        Returns:
            `dict`: With `mm_encoder_outputs` in place of `pixel_values` and `image_indices`.
        """
        if "pixel_values" not in batch:
            return batch
        images, sizes = batch["pixel_values"], seen_resolutions(batch, self.model.config)
        shown = range(len(images)) if batch.get("image_indices") is None else batch["image_indices"].tolist()
        digests = digest_images(images)
        keys = [(digests[image], size) for image, size in zip(shown, sizes)]
        features = {key: self._read(key) for key in dict.fromkeys(keys)}
        new = {key: image for image, key in sorted(zip(shown, keys)) if features[key] is None}
        dtype = torch.float16 if self.mixed_precision == "fp16" else torch.bfloat16
        with torch.autocast(images.device.type, dtype, enabled=self.mixed_precision != "no"):
            computed = encode_new(self.model, images, new)
        for key, row in computed.items():
            self._write(key, row)
        features |= computed
        rows = [features[key].to(images.device) for key in keys]
        rows = torch.stack(rows) if len(set(sizes)) == 1 else rows
        served = {name: value for name, value in batch.items() if name not in ("pixel_values", "image_indices")}
        output = TokenFlexImageOutput(last_hidden_state=rows, image_resolutions=sizes)
        return {**served, "mm_encoder_outputs": {"image": output}}

    def _path(self, key: tuple[bytes, tuple[int, int]]) -> Path:
        name, (height, width) = hashlib.sha256(self._salt + key[0]).hexdigest(), key[1]
        return self.folder / name[:2] / f"{name}-{height}x{width}.safetensors"

    def _read(self, key) -> torch.Tensor | None:
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            return load_file(path)["features"]
        except (SafetensorError, KeyError) as error:
            logger.warning(f"{path} is damaged ({error}): its image goes through the tower again.")
            return None

    def _write(self, key, row: torch.Tensor) -> None:
        if not self._writes:
            return
        try:
            write_file(self._path(key), save({"features": row.contiguous().cpu()}))
        except OSError as error:
            self._writes = False
            logger.warning(
                f"`cache_features`={str(self.folder)!r} takes no more ({error}): training goes on with what it holds, "
                "and runs the tower on other images."
            )

    @torch.no_grad()
    def _refuse_varying(self) -> None:
        config, tower = self.model.config, self.model.model.vision_tower
        is_training = tower.training
        size = (1, config.vision_config.num_channels, *config.image_size)
        image = torch.linspace(-1, 1, math.prod(size), device=self.model.device).view(size)
        features = []
        for mode in (True, False):
            tower.train(mode)
            features += encode_new(self.model, image, {(b"", config.own_resolution()): 0}).values()
        tower.train(is_training)
        if (features[0] - features[1]).abs().max() > 1e-3 * features[1].abs().max():
            raise ValueError(
                "`cache_features`: while it trains, this vision tower's features of an image vary (dropout, batch "
                "normalization). Set the dropout in `vision_config` to 0, or leave `cache_features` out."
            )


def check_frozen(model) -> None:
    """
    Checks, of the model alone, that its vision tower's features can be kept.

    Args:
        model ([`TokenFlexForConditionalGeneration`] or a PEFT model of one): The model.

    Raises:
        ValueError: If the tower is trained or has adapters.
    """
    tower = (model.get_base_model() if is_peft_model(model) else model).model.vision_tower
    if is_peft_model(model):
        from peft.tuners.tuners_utils import BaseTunerLayer

        if any(isinstance(module, BaseTunerLayer) for module in tower.modules()):
            raise ValueError(
                "`cache_features`: the vision tower has adapters (LoRA), and its features change. Adapt the language "
                "model alone (no `lora_vision_tower`), or leave `cache_features` out."
            )
    if any(parameter.requires_grad for parameter in tower.parameters()):
        raise ValueError(
            "`cache_features`: the vision tower is trained, and its features change. Freeze it (`--freeze "
            "vision_tower`), or leave `cache_features` out."
        )
