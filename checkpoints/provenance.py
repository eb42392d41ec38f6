"""The origin of a checkpoint and the stages since: kept beside its weights, and carried on from stage to stage."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers.utils import cached_file

from .. import __version__
from .files import PROVENANCE_NAME


ADOPTED = "pooling before connector"  # the stage of `tokenflex adopt`


def read_provenance(checkpoint: str | Path) -> dict:
    """
    Reads the history of a checkpoint, as far as it is known.

    Args:
        checkpoint (`str` or `Path`): Folder or Hub id.

    Returns:
        `dict`: `base_models`, what it was built from, and `stages`, what was done since, oldest first. Of a folder
        that says nothing both are empty; a checkpoint of the Hub that says nothing is itself what others are built
        from.

    Raises:
        ValueError: If what it says cannot be read.
    """
    # A training run is not to fail for want of this file.
    kinds = ("missing_entries", "gated_repo", "connection_errors")
    file = cached_file(str(checkpoint), PROVENANCE_NAME, **{f"_raise_exceptions_for_{kind}": False for kind in kinds})
    if file is None:
        return {"base_models": [str(checkpoint)] if _is_hub_id(checkpoint) else [], "stages": []}
    try:
        known = json.loads(Path(file).read_text())
        return {"base_models": list(known["base_models"]), "stages": [dict(stage) for stage in known["stages"]]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is no record of how a checkpoint was made ({error!r}): delete it to go on without."
        ) from None


def _is_hub_id(name: str | Path) -> bool:
    return not Path(name).exists() and is_hub_id(str(name))


def is_hub_id(name: str) -> bool:
    """
    Tells whether a name has the form of the Hub's, `"user/name"`.

    Args:
        name (`str`): The name.
    """
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def add_stage(provenance: dict, kind: str, **facts) -> dict:
    """
    The provenance of what one more stage makes.

    Args:
        provenance (`dict`): Provenance from [`read_provenance`].
        kind (`str`): Name of the stage, such as `"training"`.
        facts: Facts that the result depends on, as JSON takes it; `None` is left out.

    Returns:
        `dict`: A new one; libraries' versions are added.

    Example:

    ```python
    >>> from tokenflex.checkpoints.provenance import add_stage

    >>> made = add_stage({"base_models": [], "stages": []}, "training", seed=0, lora_rank=None)
    >>> [made["stages"][0][name] for name in ("stage", "seed")], "lora_rank" in made["stages"][0]
    (['training', 0], False)
    ```
    """
    versions = {"tokenflex": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    stage = {"stage": kind, **{name: value for name, value in facts.items() if value is not None}, **versions}
    return {**provenance, "stages": [*provenance["stages"], stage]}


def untrained_tokens(provenance: dict) -> list[str]:
    """
    Tokens that building gave a language model and no stage has trained since.

    Args:
        provenance (`dict`): Provenance from [`read_provenance`].

    Example:

    ```python
    >>> from tokenflex.checkpoints.provenance import add_stage, untrained_tokens

    >>> built = add_stage({"base_models": [], "stages": []}, "new projector", new_tokens=["<|im_end|>"])
    >>> aligned = add_stage(built, "training", frozen=["language_model"])
    >>> untrained_tokens(aligned), untrained_tokens(add_stage(aligned, "training"))
    (['<|im_end|>'], [])
    ```
    """
    tokens = []
    for stage in provenance["stages"]:
        kept = "language_model" in stage.get("frozen", []) or "lora_rank" in stage
        if stage["stage"] == "training" and not kept:
            tokens = []
        tokens = stage.get("new_tokens", tokens)
    return tokens


def public_names(sources: str | Sequence[str] | None) -> list[str]:
    """
    Data sets and checkpoints as others may read of them: of a local path only the last part.

    Args:
        sources (`str` or `Sequence[str]`, *optional*): Hub ids and local paths.

    Example:

    ```python
    >>> import tempfile
    >>> from tokenflex.checkpoints.provenance import public_names

    >>> folder = tempfile.mkdtemp(suffix="photos")
    >>> public_names([folder, "google/siglip-so400m-patch14-384"])[1], public_names(folder)[0].endswith("photos")
    ('google/siglip-so400m-patch14-384', True)
    ```
    """
    sources = [sources] if isinstance(sources, (str, Path)) else sources or []
    return [str(name) if _is_hub_id(name) or ":" in str(name) else Path(name).resolve().name for name in sources]
