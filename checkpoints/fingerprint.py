"""Fingerprints of checkpoints and other values by their content, which tell if kept results belong to them."""

import hashlib
import io
import json
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoConfig, AutoProcessor, GenerationConfig

from .files import weight_files


# Of a saved checkpoint, what says nothing about its answers, or changes with use.
VARYING = (
    "_name_or_path", "architectures", "auto_map", "dtype", "padding", "transformers_version", "truncation",
    "use_cache",
)  # fmt: skip
UNREAD = ("tokenizer_config.json", ".py")


def digest(value) -> str:
    """
    The fingerprint of a value.

    Args:
        value (`bytes`, or what JSON takes): The value; of others their text counts.

    Example:

    ```python
    >>> from tokenflex.checkpoints.fingerprint import digest

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    True
    ```
    """
    if not isinstance(value, bytes):
        value = json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.sha256(value).hexdigest()[:16]


def fingerprint(model, processor) -> dict[str, str]:
    """
    Fingerprints of all on which a model's answers depend. A gigabyte of weights takes one to two seconds.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        processor ([`~transformers.ProcessorMixin`]): Its processor.

    Returns:
        `dict[str, str]`: Of the `weights`, whatever their names and files, the `config` and the `processor`.
    """
    weights = model.state_dict()
    if any(tensor.is_meta for tensor in weights.values()):
        weights = get_state_dict_offloaded_model(model)
    return {
        "weights": _of_tensors(weights.values()),
        "config": _of_config(model.config, model.generation_config),
        "processor": _of_processor(processor),
    }


def fingerprint_tower(model, processor) -> dict[str, str]:
    """
    Fingerprints of all on which the vision tower's features of an image depend; arguments as for [`fingerprint`].

    Returns:
        `dict[str, str]`: Of the tower's `weights`, of what the `config` says of it, and of the `image_processor`.
    """
    config = json.loads(json.dumps(model.config.to_dict(), default=str))
    names = ("vision_config", "vision_feature_layer", "num_prefix_tokens", "downsample_factor")
    return {
        "weights": _of_tensors(model.model.vision_tower.state_dict().values()),
        "config": digest(_without_varying({name: config[name] for name in names})),
        "image_processor": digest(_without_varying(processor.image_processor.to_dict())),
    }


def fingerprint_checkpoint(checkpoint: str | Path) -> dict[str, str]:
    """
    Fingerprints of a saved checkpoint, which are those of the model and processor that are loaded from it.

    Args:
        checkpoint (`str` or `Path`): Folder or Hub id.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(checkpoint), ignore_patterns=["*.bin", "*.pt", "*.gguf"]))
    config = AutoConfig.from_pretrained(folder)
    return {
        "weights": _of_tensors(_stored_tensors(folder, config.dtype)),
        "config": _of_config(config, GenerationConfig.from_pretrained(folder)),
        "processor": _of_processor(AutoProcessor.from_pretrained(folder)),
    }


def name_differences(before: Mapping, now: Mapping) -> str:
    """
    Names what differs between two descriptions, for an error; empty if nothing does.

    Args:
        before (`Mapping`): A description that was kept.
        now (`Mapping`): The same, of what it is to be used for.

    Example:

    ```python
    >>> from tokenflex.checkpoints.fingerprint import name_differences

    >>> name_differences({"steps": 4, "seed": 0}, {"steps": 5, "seed": 0})
    'steps (4, not 5)'
    ```
    """
    names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    return ", ".join(f"{name} ({before.get(name)}, not {now.get(name)})" for name in names)


def _stored_tensors(folder: Path, dtype: torch.dtype | None) -> Iterable[torch.Tensor]:
    for file in weight_files(folder):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                tensor = weights.get_tensor(name)
                yield tensor.to(dtype or tensor.dtype) if tensor.is_floating_point() else tensor


def _of_tensors(tensors: Iterable[torch.Tensor]) -> str:
    with ThreadPoolExecutor() as pool:
        return digest(sorted(set(pool.map(_of_tensor, tensors))))  # tied weights are stored once


def _of_tensor(tensor: torch.Tensor) -> str:
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):  # such as a quantized one
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        return digest(buffer.getvalue())
    content = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    content.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return content.hexdigest()


def _of_config(config, generation_config) -> str:
    return digest(
        _without_varying(json.loads(json.dumps([config.to_dict(), generation_config.to_dict()], default=str)))
    )


def _of_processor(processor) -> str:
    """Of its files, as it would be saved."""
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        files = [file for file in sorted(Path(folder).rglob("*")) if file.is_file() and not file.name.endswith(UNREAD)]
        return digest({file.name: _content(file) for file in files})


def _content(file: Path):
    return _without_varying(json.loads(file.read_text())) if file.suffix == ".json" else digest(file.read_bytes())


def _without_varying(value):
    if isinstance(value, dict):
        return {name: _without_varying(part) for name, part in value.items() if name not in VARYING}
    return [_without_varying(part) for part in value] if isinstance(value, list) else value
