"""The Trainer with what flexible token counts add: their figures, their scores, and checkpoints that are whole or not there."""

import os
import shutil
import time
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch.utils.data import IterableDataset, Subset
from transformers import Trainer
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints
from transformers.utils import logging

from ..evaluation.sweep import predict, score
from .arguments import TokenFlexTrainingArguments
from .collator import TokenFlexDataCollator
from .liger import register_liger
from .optimization import MuonAdamW
from .publishing import PublishingMixin


logger = logging.get_logger(__name__)

INCOMPLETE, REPLACED = ".incomplete", "replaced-"


class ProgressBar(ProgressCallback):
    """The Trainer's bar, with the figures of the last logged step beside it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            super().on_log(args, state, control, logs, **kwargs)
        elif self.training_bar is not None:
            shown = ("loss", "learning_rate", "num_vision_tokens", "tokens_per_second", "images_per_second")
            figures = {name: f"{logs[name]:.4g}" for name in shown if logs.get(name) is not None}
            self.training_bar.set_postfix(figures, skipped_rows=logs.get("skipped_rows", 0))


class TokenFlexTrainer(PublishingMixin, Trainer):
    """
    `transformers.Trainer` with the collator and its callback wired in, and on top of it: throughput and the drawn count
    in every log, evaluation at every count, a learning rate for each part of the model, checkpoints that are written under
    another name and then renamed, so that a killed run never leaves half of one, and publishing with a card of what was
    measured.

    Args:
        model ([`TokenFlexForConditionalGeneration`] or a PEFT model of one): The model.
        args ([`TokenFlexTrainingArguments`]): The arguments; scheme, packing and learning rates are read from them.
        data_collator ([`TokenFlexDataCollator`], *optional*): Made from `processing_class` and `args` if not given.
        processing_class ([`TokenFlexProcessor`]): The processor.
        vision_token_choices (`list[int]`, *optional*): The counts to draw from. Defaults to the model config's.
        vision_token_weights (`list[float]`, *optional*): One weight per choice.
        callbacks (`list[TrainerCallback]`, *optional*): Further callbacks; the collator's own is put first.
        train_dataset (sequence or `IterableDataset`, *optional*): The rows to train on.
        **kwargs: As for `transformers.Trainer`; data sets hold rows as [`to_example`] takes or returns them.

    Example:

    ```python
    >>> from tokenflex.training.arguments import TokenFlexTrainingArguments
    >>> from tokenflex.data.synthetic import SyntheticVQA
    >>> from tokenflex.towers.tiny import tiny_model_and_processor
    >>> from tokenflex.training.trainer import TokenFlexTrainer

    >>> model, processor = tiny_model_and_processor()
    >>> args = TokenFlexTrainingArguments("outputs/mine", max_steps=100, report_to="none")
    >>> rows = SyntheticVQA(num_images=8, seed=0)
    >>> trainer = TokenFlexTrainer(model, args, processing_class=processor, train_dataset=rows)
    >>> trainer.data_collator.vision_token_choices  # what `trainer.train()` draws from
    [4, 16, 36]
    ```
    """

    def __init__(
        self,
        model,
        args: TokenFlexTrainingArguments,
        data_collator: TokenFlexDataCollator | None = None,
        *,
        processing_class,
        vision_token_choices: list[int] | None = None,
        vision_token_weights: list[float] | None = None,
        callbacks=(),
        train_dataset=None,
        **kwargs,
    ):
        if data_collator is None:
            data_collator = TokenFlexDataCollator(
                processing_class,
                vision_token_choices,
                vision_token_weights,
                seed=args.seed,
                scheme=args.scheme,
                packing=args.packing,
                distillation_weight=args.distillation_weight,
                distillation_temperature=args.distillation_temperature,
            )
        elif (args.scheme, args.packing) not in (("batch", False), (data_collator.scheme, data_collator.packing)):
            raise ValueError(
                f"The arguments say `scheme`={args.scheme!r} and `packing`={args.packing}, the `data_collator` says "
                f"{data_collator.scheme!r} and {data_collator.packing}: leave one of them out."
            )
        if isinstance(kwargs.get("eval_dataset"), IterableDataset):
            raise ValueError("`eval_dataset` is an iterable data set, which has no length: load it without streaming.")
        self.vision_tokens = data_collator.callback
        if args.use_liger_kernel:
            if data_collator.scheme in ("nested", "distill"):
                raise ValueError(
                    f"`use_liger_kernel`=True makes no logits, which `scheme`={data_collator.scheme!r} weighs: leave one "
                    "of them out."
                )
            register_liger()
        if isinstance(train_dataset, IterableDataset):
            args.accelerator_config.dispatch_batches = False  # the main process would split images unlike prompts
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            processing_class=processing_class,
            callbacks=[data_collator.callback, *(callbacks or ())],
            train_dataset=train_dataset,
            **kwargs,
        )
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(ProgressBar)
        self._logged_totals = torch.zeros(len(self.vision_tokens.totals), dtype=torch.float64)
        self._logged_at = None
        self._paused = 0.0

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As in transformers, with Muon if asked for, or the parts' own learning rates."""
        args, model = self.args, self.model if model is None else model
        if args.muon and self.optimizer is None:
            self.optimizer = MuonAdamW(model, lr=args.learning_rate, weight_decay=args.weight_decay)
            return self.optimizer
        super().create_optimizer(model)
        rates = {
            "vision_tower": args.vision_tower_learning_rate,
            "multi_modal_projector": args.projector_learning_rate,
        }
        if any(rate is not None for rate in rates.values()):
            part_of = {
                parameter: next((part for part in rates if f"{part}." in name), None)
                for name, parameter in model.named_parameters()
            }
            groups = []
            for group in self.optimizer.param_groups:
                for part in (None, *rates):
                    rate = args.learning_rate if rates.get(part) is None else rates[part]
                    members = [parameter for parameter in group["params"] if part_of[parameter] == part]
                    groups += [{**group, "params": members, "lr": rate}] if members else []
            self.optimizer.param_groups = groups
        return self.optimizer

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled:  # evaluation calls it outside `forward`, while weights are shared out
            torch.distributed.fsdp.register_fsdp_forward_method(self.model, "get_image_features")
        return prepared

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the drawn count, and throughput since the last log, before anything reports them."""
        if "loss" in logs:
            totals = [float(total) for total in self.vision_tokens.totals.values()]
            totals = torch.tensor(totals, device=self.args.device, dtype=torch.float64)
            totals = self.accelerator.reduce(totals, "sum").cpu()
            now = time.perf_counter()
            new = dict(zip(self.vision_tokens.totals, (totals - self._logged_totals).tolist()))
            seconds = now - self._logged_at - self._paused
            logs["num_vision_tokens"] = self.vision_tokens.num_vision_tokens
            logs["tokens_per_second"] = new["tokens"] / seconds
            logs["images_per_second"] = new["images"] / seconds
            so_far = dict(zip(self.vision_tokens.totals, totals.tolist()))
            logs["skipped_rows"], logs["truncated_rows"] = int(so_far["skipped_rows"]), int(so_far["truncated_rows"])
            self._logged_totals, self._logged_at, self._paused = totals, now, 0.0
        super().log(logs, start_time)

    def _inner_training_loop(self, *args, **kwargs):
        self._logged_at = time.perf_counter()
        return super()._inner_training_loop(*args, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step < self.state.max_steps:  # a resumed Trainer would take one more step
            super()._run_epoch(*args, **kwargs)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        Exact-match accuracy at every count that is trained on. The tower runs once per image; processes share the rows,
        unless the model itself is shared out between them.

        Args:
            eval_dataset (sequence or `dict` of sequences, *optional*):
                Rows as [`to_example`] takes or returns them. Defaults to the Trainer's.
            ignore_keys: Has no effect; it is here because `Trainer.evaluate` has it.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`): What the names begin with.

        Returns:
            `dict[str, float]`: `eval_64_accuracy`, ... for each count, `eval_accuracy`, their mean, by which the best
            checkpoint is chosen, and `eval_runtime` in seconds. Of several sets, `eval_<name>_64_accuracy`, ..., and
            `eval_accuracy` is the mean over the sets.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(rows, dict):
            metrics = {}
            for name, part in rows.items():
                metrics |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            means = [metrics[f"{metric_key_prefix}_{name}_accuracy"] for name in rows]
            return {**metrics, f"{metric_key_prefix}_accuracy": sum(means) / len(means)}
        start = time.perf_counter()
        counts = sorted(self.data_collator.vision_token_choices)
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        share = range(len(rows)) if is_sharded else range(self.args.process_index, len(rows), self.args.world_size)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        predictions = predict(
            model,
            self.processing_class,
            Subset(rows, share),
            counts,
            self.args.per_device_eval_batch_size,
            self.args.eval_max_new_tokens,
            show_progress=not self.args.disable_tqdm and self.is_world_process_zero(),
        )
        if len(share) < len(rows):
            predictions = gather_object(predictions)
        accuracy = score(predictions, counts)["overall"]
        metrics = {f"{metric_key_prefix}_{count}_accuracy": accuracy[count] for count in counts}
        metrics[f"{metric_key_prefix}_accuracy"] = sum(accuracy.values()) / len(accuracy)
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._paused += time.perf_counter() - start
        return metrics

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / INCOMPLETE) if self._is_writing else folder

    _is_writing = False

    def _save_checkpoint(self, model, trial) -> None:
        """Writes the checkpoint under another name, then renames it; older ones go when it is there, not before."""
        start, args, step = time.perf_counter(), self.args, self.state.global_step
        run = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
        pushes, args.push_to_hub = args.push_to_hub, False
        try:
            if args.local_process_index == 0:
                clean_up(run)
            self.accelerator.wait_for_everyone()
            self._is_writing = True
            super()._save_checkpoint(model, trial)
            self._is_writing = False
            if self.state.best_global_step is not None:
                best = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
                if self.state.best_global_step == step or best.is_dir():
                    self.state.best_model_checkpoint = str(best)
                if args.should_save:
                    self.state.save_to_json(str(run / INCOMPLETE / name / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
            with args.main_process_first(local=False):
                if args.local_process_index == 0 and (run / INCOMPLETE / name).is_dir():
                    _replace(run / INCOMPLETE / name, run / name)
        finally:
            self._is_writing, args.push_to_hub = False, pushes
            if args.local_process_index == 0:
                clean_up(run)
        if pushes:
            self._push_from_checkpoint(str(run / name))
        if args.should_save and (args.save_total_limit or 0) > 0:
            # Kept are the last one, to go on from, and the best; the others go, oldest first.
            checkpoints = sort_checkpoints(str(run))
            kept = {checkpoints[-1], self.state.best_model_checkpoint}
            surplus = max(0, len(checkpoints) - max(args.save_total_limit, len(kept - {None})))
            for checkpoint in [path for path in checkpoints if path not in kept][:surplus]:
                (run / INCOMPLETE).mkdir(exist_ok=True)
                os.rename(checkpoint, run / INCOMPLETE / Path(checkpoint).name)
            shutil.rmtree(run / INCOMPLETE, ignore_errors=True)
        self._paused += time.perf_counter() - start


def _replace(source: Path, target: Path) -> None:
    if target.exists():
        target.rename(source.with_name(REPLACED + target.name))
    source.rename(target)


def clean_up(run: str | Path) -> None:
    """
    Deletes what a killed run left unfinished; a checkpoint that it was just about to replace is put back.

    Args:
        run (`str` or `Path`): The run's `output_dir`.
    """
    unfinished = Path(run) / INCOMPLETE
    for replaced in unfinished.glob(f"{REPLACED}*"):
        target = Path(run) / replaced.name.removeprefix(REPLACED)
        if not target.exists():
            replaced.rename(target)
    shutil.rmtree(unfinished, ignore_errors=True)
