"""The checkpoint that a run goes on from, and the check that its folder holds this very run."""

import json
import shutil
import uuid
from dataclasses import fields
from pathlib import Path

from torch import nn
from transformers import AutoConfig
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ..checkpoints.files import write_file
from .arguments import TokenFlexTrainingArguments


# Of the Trainer's own arguments, those on which the weights depend.
DECISIVE = (
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim",
    "optim_args", "optim_target_modules", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "average_tokens_across_devices", "bf16", "fp16", "seed", "data_seed",
    "train_sampling_strategy", "dataloader_drop_last", "ignore_data_skip", "neftune_noise_alpha",
    "accelerator_config", "load_best_model_at_end", "world_size",
)  # fmt: skip
INDECISIVE = ("cache_features", "resume_from_checkpoint", "remove_unused_columns", "eval_max_new_tokens")
GROWING = ("num_train_epochs", "max_steps")  # a run may be prolonged
STARTED, ENDED = "arguments.json", "finished.json"
INCOMPLETE = ".incomplete"


def mark_incomplete(checkpoint: str | Path) -> Path:
    """
    Marks a checkpoint as one that is not whole, before its first file is written or deleted.

    Args:
        checkpoint (`str` or `Path`): The folder, which need not exist.

    Returns:
        `Path`: The mark, an empty file beside the folder, to be deleted when the folder is whole or gone.
    """
    mark = Path(f"{checkpoint}{INCOMPLETE}")
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    return mark


def is_incomplete(checkpoint: str | Path) -> bool:
    """Tells if a killed run, of whatever folder, left the checkpoint half written or half deleted."""
    return Path(f"{Path(checkpoint)}{INCOMPLETE}").exists()


def delete_checkpoint(checkpoint: str | Path) -> None:
    """Deletes a checkpoint so that no half of it is ever taken for a whole one."""
    mark = mark_incomplete(checkpoint)
    shutil.rmtree(checkpoint, ignore_errors=True)
    if not Path(checkpoint).exists():
        mark.unlink(missing_ok=True)


def clean_up(run: str | Path) -> None:
    """
    Deletes the checkpoints that a killed run left incomplete.

    Args:
        run (`str` or `Path`): The run's `output_dir`.
    """
    for mark in Path(run).glob(f"{PREFIX_CHECKPOINT_DIR}-*{INCOMPLETE}"):
        delete_checkpoint(mark.with_suffix(""))


def describe_run(model_args, data_args, eval_args, args: TokenFlexTrainingArguments) -> dict:
    """The arguments on which a run's weights depend, as in JSON, and the run that made its start, if one did."""
    own = [
        field.name
        for field in fields(args)
        if field.name in TokenFlexTrainingArguments.__annotations__ and field.name not in INDECISIVE
    ]
    described = {**vars(model_args), **vars(data_args), **{name: getattr(args, name) for name in (*DECISIVE, *own)}}
    if data_args.streaming:
        described["dataloader_num_workers"] = args.dataloader_num_workers
    if args.load_best_model_at_end:
        described |= vars(eval_args)
    made_by = Path(model_args.model_name_or_path).parent / ENDED
    described["start"] = json.loads(made_by.read_text())["id"] if made_by.is_file() else None
    return json.loads(json.dumps(described, default=str))


def begin_run(output_dir: str | Path, described: dict) -> None:
    """Notes what the folder is going to hold."""
    (Path(output_dir) / ENDED).unlink(missing_ok=True)
    write_file(Path(output_dir) / STARTED, json.dumps(described, indent=2) + "\n")


def end_run(output_dir: str | Path, described: dict) -> None:
    """Notes that the folder's final checkpoint is this run's."""
    write_file(Path(output_dir) / ENDED, json.dumps({"id": uuid.uuid4().hex, "arguments": described}, indent=2) + "\n")


def has_ended(output_dir: str | Path, described: dict) -> bool:
    """Tells if this very run has been trained to its end."""
    ended = Path(output_dir) / ENDED
    final = Path(output_dir) / "final" / "config.json"
    return final.is_file() and ended.is_file() and json.loads(ended.read_text())["arguments"] == described


def find_checkpoint(resume: str, output_dir: str | Path, described: dict) -> str | None:
    """
    The checkpoint that training goes on from.

    Args:
        resume (`str`): `"auto"`, `"true"`, `"false"` or a folder.
        output_dir (`str` or `Path`): The run's folder.
        described (`dict`): The run, as [`describe_run`] returns it.

    Returns:
        `str`, *optional*: The folder, `None` to start anew.

    Raises:
        ValueError: If a checkpoint is asked for that is not there, or what is there is another run's.
    """
    last = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    stands = last if last is not None else next(iter(Path(output_dir).glob("final")), None)
    if resume.lower() == "false":
        if last is not None:
            raise ValueError(
                f"`resume_from_checkpoint`=false: {output_dir} holds the checkpoints of a run, with which those of a "
                "new one would be mixed. Name another `output_dir`, or delete them."
            )
        return None
    if resume.lower() not in ("auto", "true"):
        if is_incomplete(resume) or not (Path(resume) / "trainer_state.json").is_file():
            raise ValueError(f"`resume_from_checkpoint`={resume!r} is no checkpoint of a training run.")
        return resume
    if last is None and resume.lower() == "true":
        raise ValueError(f"`resume_from_checkpoint`=true: {output_dir} holds no checkpoint. Use auto or false.")
    started = Path(output_dir) / STARTED
    if stands is not None and started.is_file():
        before = json.loads(started.read_text())
        differing = [
            f"`{name}` ({before.get(name)}, not {value})"
            for name, value in described.items()
            if before.get(name) != value and not (name in GROWING and value > before[name] > 0)
        ]
        if differing:
            raise ValueError(
                f"{output_dir} holds another run, which differs in {', '.join(differing)}: name another `output_dir`, "
                "or a checkpoint as `resume_from_checkpoint` to go on from it all the same."
            )
    return last


def check_same_model(checkpoint: str | Path, model: nn.Module) -> None:
    """
    Refuses to go on from a checkpoint of another model.

    Raises:
        ValueError: If the checkpoint's configuration, or that of its adapters, is not that of `model`.
    """
    saved = Path(checkpoint)
    has_adapter, is_adapted = (saved / "adapter_config.json").is_file(), hasattr(model, "peft_config")
    if has_adapter != is_adapted:
        kinds = ["a whole model", "adapters"]
        raise ValueError(
            f"The checkpoint {checkpoint} holds {kinds[has_adapter]}, but {kinds[is_adapted]} are to be trained: name "
            "another `output_dir`."
        )
    if has_adapter:
        other = json.loads((saved / "adapter_config.json").read_text())
        own = json.loads(json.dumps(next(iter(model.peft_config.values())).to_dict(), default=list))
        names = ("r", "lora_alpha", "target_modules", "modules_to_save", "base_model_name_or_path")
    elif (saved / "config.json").is_file():
        other, own = _flatten(AutoConfig.from_pretrained(saved).to_dict()), _flatten(model.config.to_dict())
        varying = ("_name_or_path", "dtype", "use_cache", "transformers_version", "architectures", "auto_map")
        names = [
            name
            for name in other
            if name.rsplit(".", 1)[-1] not in varying and not name.startswith("vision_token_") and "." in name
        ]
        names += ["image_token_id", "vision_feature_layer", "num_prefix_tokens", "downsample_factor"]
        names += [name for name in other if name.startswith("projector_")]
    else:
        return
    differing = [
        f"{name} ({other.get(name)}, not {own.get(name)})" for name in names if other.get(name) != own.get(name)
    ]
    if differing:
        raise ValueError(
            f"The checkpoint {checkpoint} is of another model, which differs in {', '.join(differing)}: name another "
            "`output_dir`."
        )


def _flatten(config: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in config.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
