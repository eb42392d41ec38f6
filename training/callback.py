"""The collator's hand in the Trainer: it knows the step, applies its draw when the model is called, and keeps count."""

from collections import Counter

import torch
from accelerate.data_loader import DataLoaderDispatcher
from transformers import TrainerCallback
from transformers.utils import logging

from .schemes import NestedLoss


logger = logging.get_logger(__name__)


class VisionTokenCallback(TrainerCallback):
    """
    Tells a [`TokenFlexDataCollator`] where training stands, and arranges each batch for its step by a forward pre-hook;
    made by the collator.

    Args:
        collator ([`TokenFlexDataCollator`]): The collator that made it.

    Attributes:
        num_vision_tokens (`float`): The mean of the counts that the last step trained at.
        histogram (`collections.Counter`): How often each count was drawn since training began, resumed parts included.
        totals (`dict[str, torch.Tensor]`): `tokens` (without padding), `vision_tokens`, `images` (tiles count one by
            one), `skipped_rows` and `truncated_rows` that this process met since it began.
    """

    def __init__(self, collator):
        self.collator = collator
        self.step = 0
        self.micro_step = 0
        self.drawn = []
        self.histogram = Counter()
        self.totals = {"tokens": 0, "vision_tokens": 0, "images": 0, "skipped_rows": 0, "truncated_rows": 0}
        self._args = None
        self._loss = None

    @property
    def num_vision_tokens(self) -> float | None:
        if not self.drawn:
            return None
        mean = sum(self.drawn) / len(self.drawn)
        return int(mean) if mean.is_integer() else mean

    def on_init_end(self, args, state, control, model=None, **kwargs):
        """
        Evaluation may come before training: what the collator has to know is known once the Trainer is made, and with
        it the `model`.
        """
        if args.label_smoothing_factor:
            raise ValueError(
                f"`label_smoothing_factor`={args.label_smoothing_factor}: the Trainer smooths against unshifted labels "
                "for models outside transformers. Use 0."
            )
        if args.accelerator_config.dispatch_batches:
            raise ValueError(
                "`accelerator_config.dispatch_batches`=True splits a batch's images unlike its prompts. Use False."
            )
        collator = self.collator
        if collator.vision_token_choices is None:
            collator.vision_token_choices = list(model.config.vision_token_choices)
            collator.vision_token_weights = list(model.config.vision_token_weights)
        collator.check_distillation()
        if collator.seed is None:
            collator.seed = args.seed
        collator.follows_trainer = True

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        if isinstance(train_dataloader, DataLoaderDispatcher):
            raise ValueError(
                "The rows are an iterable data set, whose batches accelerate would hand out from one process, with a "
                'batch\'s images split unlike its prompts: set `accelerator_config={"dispatch_batches": False}`.'
            )
        self._args = args
        self._remove_hook(model)
        model._vision_token_hook = model.register_forward_pre_hook(self._arrange, with_kwargs=True)
        collator = self.collator
        # A model with adapters calls the loss function of the one inside it.
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        if isinstance(model.loss_function, NestedLoss):  # left by a training that was interrupted
            model.loss_function = model.loss_function.fallback
        if collator.scheme in ("nested", "distill"):
            choices = collator.vision_token_choices
            weight = collator.distillation_weight if collator.scheme == "distill" else 0.0
            self._loss = NestedLoss(
                model.loss_function,
                collator.vision_token_weights,
                choices.index(max(choices)),
                weight,
                collator.distillation_temperature,
            )
            model.loss_function = self._loss
        self.histogram.clear()
        for step in range(state.global_step):
            for micro_step in range(args.gradient_accumulation_steps):
                samples = self._samples(micro_step, args.per_device_train_batch_size)
                self.histogram.update(collator.draw(step, micro_step, samples))

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step
        self.micro_step = 0
        self.drawn = []

    def on_step_end(self, args, state, control, **kwargs):
        if self._loss is not None and self._loss.rows is not None:
            raise ValueError(
                f"`scheme`={self.collator.scheme!r} weighs the losses of the counts in the model's `loss_function`, which "
                "was not called: TRL's SFTTrainer and Liger compute the loss without it. Use `Trainer` without Liger, or "
                "the scheme 'batch' or 'sample'."
            )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None and "loss" in logs:
            logs["num_vision_tokens"] = self.num_vision_tokens
            state.log_history[-1]["num_vision_tokens"] = self.num_vision_tokens

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._remove_hook(model)
        if self._loss is not None:
            model = model.get_base_model() if hasattr(model, "get_base_model") else model
            model.loss_function = self._loss.fallback
            self._loss = None
        drawn = sum(self.histogram.values())
        if drawn and state.is_world_process_zero:
            shares = (f"{count}: {times} ({times / drawn:.1%})" for count, times in sorted(self.histogram.items()))
            logger.warning(f"Vision-token counts drawn over {state.global_step} steps: {', '.join(shares)}.")

    @staticmethod
    def _remove_hook(model):
        """Also one that another collator's interrupted training has left."""
        if hasattr(model, "_vision_token_hook"):
            model._vision_token_hook.remove()
            del model._vision_token_hook

    def _samples(self, micro_step: int, batch_size: int) -> range:
        """The samples of a micro-batch, counted over all micro-batches and processes of the step."""
        args = self._args
        first = (micro_step * args.world_size + args.process_index) * args.per_device_train_batch_size
        return range(first, first + batch_size)

    @torch.compiler.disable
    def _arrange(self, model, args, kwargs):
        kwargs = dict(kwargs)
        skipped, truncated = kwargs.pop("num_skipped_rows", 0), kwargs.pop("num_truncated_rows", 0)
        if self._loss is not None:
            self._loss.rows = None
        if not model.training:
            return args, kwargs
        collator = self.collator
        counts = collator.draw(self.step, self.micro_step, self._samples(self.micro_step, len(kwargs["input_ids"])))
        self.micro_step += 1
        self.drawn += counts
        self.histogram.update(counts)
        language_model = model.get_decoder()
        one_row = "flash" in (language_model.config._attn_implementation or "")
        arranged, rows = collator.arrange(kwargs, counts, one_row)
        if rows is not None:
            self._loss.rows = rows
        grids = arranged.get("vision_token_grids")
        mask = arranged.get("attention_mask")
        self.totals["tokens"] += arranged["input_ids"].numel() if mask is None else mask.sum()
        self.totals["vision_tokens"] += 0 if grids is None else grids.prod(-1).sum()
        self.totals["images"] += 0 if grids is None else len(arranged["pixel_values"])
        self.totals["skipped_rows"] += skipped
        self.totals["truncated_rows"] += truncated
        arranged.setdefault("use_cache", False)  # the language model's own default would keep keys and values
        return args, arranged

    def __getstate__(self):
        return {**self.__dict__, "_loss": None}  # it belongs to the process that trains
