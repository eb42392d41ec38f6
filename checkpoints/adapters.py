"""Adapters (PEFT) where a checkpoint is named: what they are loaded with, and where they are not enough."""

import json
from pathlib import Path

from transformers import AutoProcessor
from transformers.utils import PROCESSOR_NAME, find_adapter_config_file

from .provenance import is_hub_id


def adapted_checkpoint(checkpoint: str | Path) -> str | None:
    """
    The checkpoint that adapters were trained on, `None` of what is no adapters.

    Args:
        checkpoint (`str` or `Path`): Folder or Hub id.
    """
    if not Path(checkpoint).is_dir() and not is_hub_id(str(checkpoint)):
        return None
    file = find_adapter_config_file(str(checkpoint))
    return None if file is None else json.loads(Path(file).read_text())["base_model_name_or_path"]


def load_processor(checkpoint: str | Path):
    """
    Loads the processor of a checkpoint; of adapters that were saved without one it is that of the model they adapt.

    Args:
        checkpoint (`str` or `Path`): Folder or Hub id.

    Returns:
        [`TokenFlexProcessor`]: The processor.
    """
    base = None if (Path(checkpoint) / PROCESSOR_NAME).is_file() else adapted_checkpoint(checkpoint)
    return AutoProcessor.from_pretrained(base or checkpoint)


def refuse_adapters(checkpoint: str | Path) -> None:
    """
    Refuses adapters where the weights of a whole model are changed or published.

    Args:
        checkpoint (`str` or `Path`): Folder or Hub id.

    Raises:
        ValueError: If it holds adapters; the message says how to merge them.
    """
    base = adapted_checkpoint(checkpoint)
    if base is not None:
        raise ValueError(
            f"`model_name_or_path`={str(checkpoint)!r}: these are adapters of {base}, not a model. `tokenflex train` "
            "leaves them merged in `final`; others are merged with `save_checkpoint(folder, merge_adapters(base, "
            "adapter), processor)`. Name that folder."
        )
