"""The files of a checkpoint that is to be published, and whether they are all there."""

import math
from pathlib import Path

from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_NAME

from ..checkpoints.adapters import refuse_adapters
from ..checkpoints.files import weight_files


NEEDED = ("config.json", "processor_config.json", "tokenizer.json", "generation_config.json", "modeling_tokenflex.py")
# Other files that a training run leaves beside a checkpoint are not part of it.
PUBLISHED = ("*.json", "*.py", "*.jinja", "*.txt", "*.model", "*.safetensors", "LICENSE*", "NOTICE*")
LEFT_OUT = ("trainer_state.json", "arguments.json", "finished.json")


def checkpoint_files(folder: str | Path) -> list[Path]:
    """
    Lists the files of a checkpoint that are published: weights as safetensors, code, configs, tokenizer, provenance.

    Args:
        folder (`str` or `Path`): The checkpoint.

    Returns:
        `list[Path]`: In the order of their names.

    Raises:
        ValueError: If it is no TokenFLEX checkpoint, or not a whole one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"`model_name_or_path`={str(folder)!r}: no such folder. Give a checkpoint's, such as "
            "outputs/demo/checkpoint."
        )
    refuse_adapters(folder)
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    missing += [] if weight_files(folder) else [SAFE_WEIGHTS_NAME]
    missing += [file.name for file in weight_files(folder) if not file.is_file()]
    if missing:
        raise ValueError(
            f"`model_name_or_path`={str(folder)!r} lacks {', '.join(missing)}: give a folder that `tokenflex train` "
            "(its `final`), `build` or `save_checkpoint` wrote."
        )
    found = {file for pattern in PUBLISHED for file in folder.glob(pattern) if file.name not in LEFT_OUT}
    return sorted(found)


def count_parameters(folder: Path) -> int:
    """
    The number of parameters; tied weights are stored, and counted, once.

    Args:
        folder (`Path`): The checkpoint.
    """
    total = 0
    for file in weight_files(Path(folder)):
        with safe_open(file, "pt") as weights:
            total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return total
