"""Saving without half-written results: everything is written under a temporary name, then renamed."""

import contextlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


PROVENANCE_NAME = "provenance.json"


@contextlib.contextmanager
def replace_directory(path: str | Path) -> Iterator[Path]:
    """
    Yields a new empty folder that takes the place of `path` once the block has ended well. If the block raises, what
    was at `path` stays as it was; if the process is killed between the two renames, it lies beside under a hidden
    name.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from tokenflex.checkpoints.files import replace_directory

    >>> target = Path(tempfile.mkdtemp()) / "checkpoint"
    >>> with replace_directory(target) as folder:
    ...     _ = (folder / "config.json").write_text("{}")
    >>> [file.name for file in target.iterdir()]
    ['config.json']
    ```
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{uuid.uuid4().hex}.new")
    old = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old")
    new.mkdir()
    try:
        yield new
        if path.exists():
            path.rename(old)
        new.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    finally:
        if old.is_symlink() or old.is_file():
            old.unlink()
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(new, ignore_errors=True)


def write_file(path: str | Path, content: str | bytes) -> None:
    """
    Writes a file whole or not at all.

    Args:
        path (`str` or `Path`): The file.
        content (`str` or `bytes`): Content to write; text as UTF-8.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_module(path: str | Path, module: torch.nn.Module) -> None:
    """
    Writes a module's `state_dict` whole or not at all, for `torch.load`.

    Args:
        path (`str` or `Path`): The file.
        module (`torch.nn.Module`): The module.
    """
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    write_file(path, buffer.getvalue())


def save_checkpoint(
    path: str | Path,
    model,
    processor,
    max_shard_size: int | str = "50GB",
    state_dict: dict | None = None,
    provenance: dict | None = None,
) -> None:
    """
    Saves a model and its processor as one folder that the Auto classes load; an older checkpoint there is replaced.
    Weights keep their dtypes; where these differ, the folder loads in the widest of them, so that none is rounded.

    Args:
        path (`str` or `Path`): The folder.
        model ([`~transformers.PreTrainedModel`]): The model.
        processor ([`~transformers.ProcessorMixin`]): Its processor.
        max_shard_size (`int` or `str`, *optional*, defaults to `"50GB"`): The largest file of weights.
        state_dict (`dict`, *optional*): The weights, where the model holds only a share of them.
        provenance (`dict`, *optional*): History of the model, for its card, as [`add_stage`] returns it.

    Raises:
        ValueError: If there is a file at `path`, or a folder with something else than a checkpoint.
    """
    path = Path(path)
    if path.is_file():
        raise ValueError(f"A checkpoint cannot be saved to {path}: it is a file.")
    if path.is_dir() and any(path.iterdir()) and not (path / "config.json").is_file():
        raise ValueError(f"A checkpoint cannot be saved to {path}, which holds other things: name a new folder.")
    with replace_directory(path) as folder:
        _write_checkpoint(folder, model, processor, max_shard_size, state_dict, provenance)


def update_checkpoint(path: str | Path, model, processor, provenance: dict) -> None:
    """
    Saves a model over the checkpoint that it was loaded from; other files of the folder, such as a model card, stay.

    Args:
        path (`str` or `Path`): The folder.
        model ([`~transformers.PreTrainedModel`]): The model.
        processor ([`~transformers.ProcessorMixin`]): Its processor.
        provenance (`dict`): History of the model, as [`add_stage`] returns it.
    """
    with replace_directory(path) as folder:
        shutil.copytree(path, folder, dirs_exist_ok=True)
        _write_checkpoint(folder, model, processor, "50GB", None, provenance)


def _write_checkpoint(folder: Path, model, processor, max_shard_size, state_dict, provenance: dict | None) -> None:
    model.save_pretrained(folder, state_dict=state_dict, max_shard_size=max_shard_size)
    processor.save_pretrained(folder)
    if provenance is not None:
        (folder / PROVENANCE_NAME).write_text(json.dumps(provenance, indent=2, default=str) + "\n")


def weight_files(folder: Path) -> list[Path]:
    """
    The weights: one file, or those that the index names.

    Args:
        folder (`Path`): The checkpoint.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return [file for file in [folder / SAFE_WEIGHTS_NAME] if file.is_file()]
