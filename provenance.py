"""What a checkpoint was made from and how: kept beside its weights, and carried on from stage to stage."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers.utils import cached_file

from .files import PROVENANCE_NAME


def read_provenance(checkpoint: str | Path) -> dict:
    """
    What is known of how a checkpoint was made.

    Args:
        checkpoint (`str` or `Path`): Folder or Hub id.

    Returns:
        `dict`: `base_models`, the Hub ids of what it was built from, and `stages`, what was done since, oldest first. Both
        are empty for a checkpoint that says nothing.
    """
    file = cached_file(str(checkpoint), PROVENANCE_NAME, _raise_exceptions_for_missing_entries=False)
    known = json.loads(Path(file).read_text()) if file else {}
    return {"base_models": known.get("base_models", []), "stages": known.get("stages", [])}


def add_stage(provenance: dict, kind: str, **facts) -> dict:
    """
    The provenance of what one more stage makes.

    Args:
        provenance (`dict`): What [`read_provenance`] returns.
        kind (`str`): What is done, such as `"training"`.
        facts: What the result depends on, as JSON takes it; `None` is left out.

    Returns:
        `dict`: A new one; libraries' versions are added.

    Example:

    ```python
    >>> from tokenflex.provenance import add_stage

    >>> made = add_stage({"base_models": [], "stages": []}, "training", seed=0, lora_rank=None)
    >>> [made["stages"][0][name] for name in ("stage", "seed")], "lora_rank" in made["stages"][0]
    (['training', 0], False)
    ```
    """
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    stage = {"stage": kind, **{name: value for name, value in facts.items() if value is not None}, **versions}
    return {**provenance, "stages": [*provenance["stages"], stage]}


def public_names(sources: str | Sequence[str] | None) -> list[str]:
    """
    Data sets and checkpoints as others may read of them: of a local path only the last part.

    Args:
        sources (`str` or `Sequence[str]`, *optional*): Hub ids and local paths.

    Example:

    ```python
    >>> import tempfile
    >>> from tokenflex.provenance import public_names

    >>> folder = tempfile.mkdtemp(suffix="photos")
    >>> public_names([folder, "google/siglip-so400m-patch14-384"])[1], public_names(folder)[0].endswith("photos")
    ('google/siglip-so400m-patch14-384', True)
    ```
    """
    sources = [sources] if isinstance(sources, (str, Path)) else sources or []
    return [Path(name).name if Path(name).exists() else str(name) for name in sources]
