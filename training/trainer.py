"""The Trainer with flexible token counts: their figures and scores in the log, and checkpoints that survive a kill."""

import time
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch.utils.data import IterableDataset, Subset
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, sort_checkpoints

from ..choices_tokenflex import sort_choices
from ..evaluation.sweep import predict, score
from .arguments import TokenFlexTrainingArguments
from .collator import TokenFlexDataCollator
from .liger import register_liger
from .optimization import MuonAdamW
from .publishing import PublishingMixin
from .resume import clean_up, delete_checkpoint, is_incomplete, mark_incomplete
from .schemes import NESTED


class ProgressBar(ProgressCallback):
    """The Trainer's bar, with the figures of the last logged step beside it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            super().on_log(args, state, control, logs, **kwargs)
        elif self.training_bar is not None:
            shown = ("loss", "learning_rate", "num_vision_tokens", "tokens_per_second", "images_per_second")
            figures = {name: f"{logs[name]:.4g}" for name in shown if logs.get(name) is not None}
            self.training_bar.set_postfix(figures, skipped_rows=logs.get("skipped_rows", 0))


class CheckpointCallback(TrainerCallback):
    """
    Ends the checkpoints that a [`TokenFlexTrainer`] writes; made by it.

    Args:
        trainer ([`TokenFlexTrainer`]): The trainer.
    """

    def __init__(self, trainer):
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        self.trainer.end_checkpoint()

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer.end_checkpoint()  # one that was written on a signal, `enable_jit_checkpoint`


class TokenFlexTrainer(PublishingMixin, Trainer):
    """
    `transformers.Trainer` with the collator and its callback wired in, and on top of it: throughput and the drawn
    count in every log, evaluation at every count, a learning rate for each part of the model, checkpoints that are
    marked while they are written, so that a run never goes on from half of one, and publishing with a card of what was
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
        wanted = {"args": (args, TokenFlexTrainingArguments)}
        if data_collator is not None:
            wanted["data_collator"] = (data_collator, TokenFlexDataCollator)
        for name, (value, kind) in wanted.items():
            if not isinstance(value, kind):
                raise ValueError(f"`{name}` is a {type(value).__name__}: give a {kind.__name__}.")
        for name in ("compute_metrics", "preprocess_logits_for_metrics"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"`{name}` is given, but the evaluation generates answers and scores them: leave it out, or "
                    "override `evaluate`, with `tokenflex.evaluation.predict` for the answers."
                )
        if args.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            columns = getattr(train_dataset, "column_names", None) or ()
            if args.length_column_name not in columns:
                raise ValueError(
                    f"`train_sampling_strategy`={args.train_sampling_strategy!r}: the Trainer cannot measure rows of "
                    f"texts and images. Give the rows a column {args.length_column_name!r} "
                    "(`length_column_name`), or pack samples: `packing=True`."
                )
        if data_collator is None:
            data_collator = TokenFlexDataCollator.from_arguments(
                processing_class, args, vision_token_choices, vision_token_weights
            )
        elif (args.scheme, args.packing) not in (("batch", False), (data_collator.scheme, data_collator.packing)):
            raise ValueError(
                f"The arguments say `scheme`={args.scheme!r} and `packing`={args.packing}, the `data_collator` says "
                f"{data_collator.scheme!r} and {data_collator.packing}: leave one of them out."
            )
        elif args.cache_features not in (None, data_collator.cache_features):
            raise ValueError(
                f"The arguments say `cache_features`={args.cache_features!r}, the `data_collator` says "
                f"{data_collator.cache_features!r}: leave it out of the arguments."
            )
        if isinstance(kwargs.get("eval_dataset"), IterableDataset):
            raise ValueError("`eval_dataset` is an iterable data set, which has no length: load it without streaming.")
        self.vision_tokens = data_collator.callback
        if args.use_liger_kernel:
            if data_collator.scheme in NESTED:
                raise ValueError(
                    f"`use_liger_kernel`=True makes no logits, which `scheme`={data_collator.scheme!r} weighs: leave "
                    "one of them out."
                )
            register_liger()
        if data_collator.scheme in NESTED:
            kwargs.setdefault("compute_loss_func", data_collator.callback.compute_loss)
        if isinstance(train_dataset, IterableDataset):
            args.accelerator_config.dispatch_batches = False  # the main process would split images unlike prompts
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            processing_class=processing_class,
            callbacks=[CheckpointCallback(self), data_collator.callback, *(callbacks or ())],
            train_dataset=train_dataset,
            **kwargs,
        )
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(ProgressBar)
        self._logged_totals = torch.zeros(len(self.vision_tokens.totals), dtype=torch.float64)
        self._resumed_step = 0
        self._mark = None
        self._save_total_limit = self._pushes = None

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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the drawn count, and throughput since the last log, before anything reports them."""
        if "loss" in logs:
            totals = [float(total) for total in self.vision_tokens.totals.values()]
            totals = torch.tensor(totals, device=self.args.device, dtype=torch.float64)
            totals = self.accelerator.reduce(totals, "sum").cpu()
            so_far = dict(zip(self.vision_tokens.totals, totals.tolist()))
            new = dict(zip(self.vision_tokens.totals, (totals - self._logged_totals).tolist()))
            seconds = new["training_seconds"] / self.args.world_size
            logs["num_vision_tokens"] = self.vision_tokens.num_vision_tokens
            logs["tokens_per_second"] = new["tokens"] / seconds
            logs["images_per_second"] = new["images"] / seconds
            logs["skipped_rows"], logs["truncated_rows"] = int(so_far["skipped_rows"]), int(so_far["truncated_rows"])
            self._logged_totals = totals
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As in transformers. Checkpoints that a killed run left incomplete in `output_dir` are deleted first."""
        arguments = self.args
        if arguments.local_process_index == 0:
            clean_up(arguments.output_dir)
        self.accelerator.wait_for_everyone()
        is_last = resume_from_checkpoint is True
        checkpoint = get_last_checkpoint(arguments.output_dir) if is_last else resume_from_checkpoint
        if checkpoint and is_incomplete(checkpoint):
            raise ValueError(
                f"`resume_from_checkpoint`={str(checkpoint)!r} is half a checkpoint that a killed run left: name the "
                "one before it."
            )
        state = Path(checkpoint or "none", TRAINER_STATE_NAME)
        self._resumed_step = TrainerState.load_from_json(str(state)).global_step if state.is_file() else 0
        # The Trainer would do both before a checkpoint is whole.
        self._save_total_limit, arguments.save_total_limit = arguments.save_total_limit, None
        self._pushes, arguments.push_to_hub = arguments.push_to_hub, False
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            arguments.save_total_limit, arguments.push_to_hub = self._save_total_limit, self._pushes
            self.is_in_train = False  # an interruption leaves it, and what is saved by hand then is whole

    def set_initial_training_values(self, args, dataloader):
        """As in transformers, but with no epoch for a run that goes on from its last step: it takes no other."""
        num_train_epochs, *values, max_steps = super().set_initial_training_values(args, dataloader)
        return 0 if self._resumed_step >= max_steps else num_train_epochs, *values, max_steps

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers; with it begins each checkpoint, which is marked as incomplete."""
        if self.is_in_train and Path(output_dir or "").name == f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}":
            self._mark = mark_incomplete(output_dir)
        super().save_model(output_dir, _internal_call)

    def end_checkpoint(self) -> None:
        """Takes the mark off a written checkpoint. Only then older ones go, and it is published if asked for."""
        if self._mark is None:
            return
        mark, self._mark = self._mark, None
        self.accelerator.wait_for_everyone()
        mark.unlink(missing_ok=True)
        if self._pushes:
            self.publish_checkpoint(mark.with_suffix(""))
        if self.args.should_save and (self._save_total_limit or 0) > 0:
            # Kept are the last one, to go on from, and the best; the others go, oldest first.
            checkpoints = [Path(checkpoint) for checkpoint in sort_checkpoints(str(mark.parent))]
            kept = {checkpoints[-1]}
            if self.state.best_model_checkpoint is not None:
                kept.add(Path(self.state.best_model_checkpoint))
            surplus = max(0, len(checkpoints) - max(self._save_total_limit, len(kept)))
            for checkpoint in [checkpoint for checkpoint in checkpoints if checkpoint not in kept][:surplus]:
                delete_checkpoint(checkpoint)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """
        Exact-match accuracy at every count that is trained on. The tower runs once per image; processes share the
        rows, unless the model itself is shared out between them.

        Args:
            eval_dataset (sequence or `dict` of sequences, *optional*):
                Rows as [`to_example`] takes or returns them. Defaults to the Trainer's.
            ignore_keys: Has no effect; it is here because `Trainer.evaluate` has it.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`): The beginning of the names.

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
        counts = sort_choices(self.data_collator.vision_token_choices)
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
        return metrics
