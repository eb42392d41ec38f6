"""The collator's hand in the Trainer: it knows the step, applies its draw when the model is called, and counts."""

import time
import weakref
from collections import Counter
from collections.abc import Sequence

import torch
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, is_peft_model
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import TrainerCallback
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import logging

from ..choices_tokenflex import count_tokens, sort_choices, split_choice
from ..data.examples import QUESTIONS
from .feature_cache import FeatureCache, check_frozen
from .schemes import NESTED, nested_loss


logger = logging.get_logger(__name__)

QUESTION_COLUMNS = {*QUESTIONS, "messages", "conversations"}


class VisionTokenCallback(TrainerCallback):
    """
    Tells a [`TokenFlexDataCollator`] where training stands, and arranges each batch for its step by a forward
    pre-hook; made by the collator. The schemes "nested" and "distill" also need its
    [`~VisionTokenCallback.compute_loss`].

    Args:
        collator ([`TokenFlexDataCollator`]): The collator that made it.

    Attributes:
        args (`TrainingArguments`): The Trainer's; `None` as long as there is none.
        num_vision_tokens (`float`): The mean of the counts that the last step trained at.
        histogram (`collections.Counter`): How often each count was drawn since training began, resumed parts included.
        totals (`dict[str, torch.Tensor]`): `tokens` (without padding), `vision_tokens`, `images` (tiles count one by
            one), `skipped_rows` and `truncated_rows` that this process met since it began, and the `training_seconds`
            without those of evaluating and saving.
    """

    # One for each model: an interrupted training leaves its hook for the next collator to remove.
    _hooks = weakref.WeakKeyDictionary()

    def __init__(self, collator):
        self.collator = collator
        self._asked = (collator.vision_token_choices, collator.vision_token_weights, collator.seed)
        self.args = None
        self.step = 0
        self.micro_step = 0
        self.drawn = []
        self.histogram = Counter()
        counted = ("tokens", "vision_tokens", "images", "skipped_rows", "truncated_rows", "training_seconds")
        self.totals = dict.fromkeys(counted, 0)
        self._since = 0.0
        self._features = None
        self._places = None
        self._rows = None
        self._asked_base = None

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
                f"`label_smoothing_factor`={args.label_smoothing_factor}: the Trainer smooths against unshifted "
                "labels for models outside transformers. Use 0."
            )
        if args.accelerator_config.dispatch_batches:
            raise ValueError(
                "`accelerator_config.dispatch_batches`=True splits a batch's images unlike its prompts. Use False."
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"`args.n_gpu`={args.n_gpu}: one process with several GPUs would split a batch's images unlike its "
                "prompts. Start one process for each GPU, with `accelerate launch` or `torchrun --nproc_per_node "
                f"{args.n_gpu}`, or let this one see a single GPU: `CUDA_VISIBLE_DEVICES=0`."
            )
        self._adopt(args, model)

    def _adopt(self, args, model):
        """Takes from a Trainer what the collator was not told; of several Trainers the one that trains next."""
        choices, weights, seed = self._asked
        collator, config = self.collator, model.config
        collator.vision_token_choices = list(config.vision_token_choices if choices is None else choices)
        collator.vision_token_weights = list(config.vision_token_weights if weights is None else weights)
        collator.seed = args.seed if seed is None else seed
        collator.check_distillation()
        self._check_resolutions(config)
        if collator.distillation_from_base:
            self._check_base(model)
        if collator.cache_features is not None:
            self._check_features(model)
        self.args = args

    def _check_resolutions(self, config):
        collator, choices = self.collator, self.collator.vision_token_choices
        sizes = config.resolutions_for(choices, "vision_token_choices")
        keeps_shapes = config.max_num_patches is not None and collator.processor.match_aspect_ratio
        keeps_shapes = keeps_shapes and not all(split_choice(choice)[1] for choice in choices)
        if not keeps_shapes and (len(sizes) == 1 or collator.scheme == "batch"):
            return
        if AcceleratorState().distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"`scheme`={collator.scheme!r} with `vision_token_choices`={choices} and `match_aspect_ratio`="
                f"{collator.processor.match_aspect_ratio} under FSDP or DeepSpeed: the vision tower runs once for "
                "each resolution that a batch holds, and processes that share weights have to do alike. Use the "
                "strategy `ddp`, or the scheme 'batch' or a single resolution, and with a NaFlex tower choices that "
                "name it or a processor without `match_aspect_ratio`."
            )

    def _check_base(self, model):
        if not is_peft_model(model):
            raise ValueError(
                "`distillation_from_base`=True: the teacher is the model without its adapters, and this one has none. "
                "Give it some (`--lora_rank 16`, or `add_adapters`), or leave it out: the largest count teaches then."
            )
        if AcceleratorState().distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                "`distillation_from_base`=True under FSDP or DeepSpeed: the teacher runs the tower where there are "
                "images, and processes that share weights have to do alike. Use the strategy `ddp`, or leave it out."
            )

    def _check_features(self, model):
        check_frozen(model)
        if AcceleratorState().distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"`cache_features`={str(self.collator.cache_features)!r} under FSDP or DeepSpeed: the vision tower "
                "runs where images are new, and processes that share weights have to do alike. Use the strategy "
                "`ddp`, or leave it out."
            )

    def refuse_removed_columns(self, rows: Sequence) -> None:
        """
        Raises:
            ValueError: If the Trainer has taken from rows what the collator reads of them.
        """
        removes = self.args is not None and self.args.remove_unused_columns
        for row in rows:
            if isinstance(row, dict) and (not row or (removes and not QUESTION_COLUMNS & row.keys())):
                raise ValueError(
                    "`remove_unused_columns`=True: the Trainer has taken from the rows all columns that the model's "
                    f"`forward` does not name, and left {sorted(row)}. Use `remove_unused_columns=False`: the "
                    "collator reads the columns."
                )

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        if isinstance(train_dataloader, DataLoaderDispatcher):
            raise ValueError(
                "The rows are an iterable data set, whose batches accelerate would hand out from one process, with a "
                'batch\'s images split unlike its prompts: set `accelerator_config={"dispatch_batches": False}`.'
            )
        self._adopt(args, model)
        collator = self.collator
        if collator.cache_features is not None:
            precision = AcceleratorState().mixed_precision
            self._features = FeatureCache(collator.cache_features, model, collator.processor, precision)
            if state.is_world_process_zero:
                self._features.say_size(collator.vision_token_choices)
        self._since = time.perf_counter()
        register_fsdp_forward_method(model, "get_image_features")  # evaluation calls it outside `forward`
        self._remove_hook(model)
        self._hooks[model] = model.register_forward_pre_hook(self._arrange, with_kwargs=True)
        self.histogram.clear()
        for step in range(state.global_step):
            for micro_step in range(args.gradient_accumulation_steps):
                samples = self._samples(micro_step, args.per_device_train_batch_size)
                self.histogram.update(self.collator.draw(step, micro_step, samples))

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step
        self.micro_step = 0
        self.drawn = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self._rows is not None:
            self._refuse_other_losses()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.totals["training_seconds"] += now - self._since
        self._since = now

    def on_save(self, args, state, control, **kwargs):
        self._since = time.perf_counter()

    def on_evaluate(self, args, state, control, **kwargs):
        self._since = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None and "loss" in logs:
            logs["num_vision_tokens"] = self.num_vision_tokens
            state.log_history[-1]["num_vision_tokens"] = self.num_vision_tokens

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._remove_hook(model)
        drawn = sum(self.histogram.values())
        if drawn and state.is_world_process_zero:
            times = {choice: self.histogram[choice] for choice in sort_choices(self.histogram)}
            shares = (f"{choice}: {number} ({number / drawn:.1%})" for choice, number in times.items())
            logger.warning(f"Vision-token counts drawn over {state.global_step} steps: {', '.join(shares)}.")

    def compute_loss(self, outputs, labels: torch.LongTensor, num_items_in_batch: int | torch.Tensor | None = None):
        """
        Computes the loss of the batch that the model was last called with: that of all its counts if the scheme is
        "nested" or "distill", else the usual one. For the Trainer's `compute_loss_func`.

        Args:
            outputs ([`~transformers.utils.ModelOutput`]): The model's, with `logits`.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The batch's, as it was collated.
            num_items_in_batch (`int` or `torch.Tensor`, *optional*): The labeled tokens of all the step's
                micro-batches.

        Returns:
            `torch.Tensor`: The loss.
        """
        logits, places, rows, asked = outputs["logits"], self._places, self._rows, self._asked_base
        self._places = self._rows = self._asked_base = None
        collator, weights, base_logits = self.collator, self.collator.vision_token_weights, None
        if places is not None:
            labels = labels.flatten()[places.clamp(min=0)].where(places >= 0, -100)
        if asked is not None:
            model, batch = asked
            with torch.no_grad(), model.disable_adapter():
                base_logits = model(**batch, use_cache=False)["logits"].flatten(0, 1)
            base_logits = base_logits[places[:, 1:][labels[:, 1:] != -100] - 1]
            if rows is None:
                rows, weights = torch.zeros_like(labels), [1.0]
        if rows is None:
            return ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch)
        return nested_loss(
            logits,
            labels,
            rows,
            weights,
            num_items_in_batch,
            teacher=collator.vision_token_choices.index(collator.largest_choice),
            distillation_weight=collator.distillation_weight if collator.scheme == "distill" else 0.0,
            temperature=collator.distillation_temperature,
            base_logits=base_logits,
        )

    def _refuse_other_losses(self):
        raise ValueError(
            f"`scheme`={self.collator.scheme!r} weighs the losses of the counts: give the Trainer "
            "`compute_loss_func=collator.callback.compute_loss`. TRL's SFTTrainer computes a loss of its own beside "
            "it: use `Trainer`, or the scheme 'batch' or 'sample'."
        )

    def _remove_hook(self, model):
        if model in self._hooks:
            self._hooks.pop(model).remove()

    def _samples(self, micro_step: int, batch_size: int) -> range:
        """The samples of a micro-batch, counted over all micro-batches and processes of the step."""
        args = self.args
        first = (micro_step * args.world_size + args.process_index) * args.per_device_train_batch_size
        return range(first, first + batch_size)

    @torch.compiler.disable
    def _arrange(self, model, args, kwargs):
        kwargs = dict(kwargs)
        skipped, truncated = kwargs.pop("num_skipped_rows", 0), kwargs.pop("num_truncated_rows", 0)
        self._places = self._rows = self._asked_base = None
        if not (model.training and torch.is_grad_enabled()):  # a callback may generate without `model.eval()`
            return args, kwargs
        collator = self.collator
        # With a `compute_loss_func` the Trainer keeps labels back: each position's place stands in for its label.
        keeps_labels = "labels" not in kwargs
        if keeps_labels:
            ids = kwargs["input_ids"]
            kwargs["labels"] = torch.arange(ids.numel(), device=ids.device).view_as(ids)
        elif collator.scheme in NESTED:
            self._refuse_other_losses()
        counts = collator.draw(self.step, self.micro_step, self._samples(self.micro_step, len(kwargs["input_ids"])))
        self.micro_step += 1
        self.drawn += [count_tokens(choice) for choice in counts]
        self.histogram.update(counts)
        language_model = model.get_decoder()
        one_row = "flash" in (language_model.config._attn_implementation or "")
        arranged, self._rows = collator.arrange(kwargs, counts, one_row)
        if keeps_labels:
            self._places = arranged.pop("labels")
        if collator.distillation_from_base:
            self._asked_base = model, {name: value for name, value in kwargs.items() if name != "labels"}
        grids = arranged.get("vision_token_grids")
        mask = arranged.get("attention_mask")
        self.totals["tokens"] += arranged["input_ids"].numel() if mask is None else mask.sum()
        self.totals["vision_tokens"] += 0 if grids is None else grids.prod(-1).sum()
        self.totals["images"] += 0 if grids is None else len(arranged["pixel_values"])
        self.totals["skipped_rows"] += skipped
        self.totals["truncated_rows"] += truncated
        if self._features is not None:
            arranged = self._features.serve(arranged)
            if self._asked_base is not None:
                self._asked_base = model, self._features.serve(self._asked_base[1])
        arranged.setdefault("use_cache", False)  # the language model's own default would keep keys and values
        return args, arranged

    def __getstate__(self):
        of_this_process = ("_features", "_places", "_rows", "_asked_base")
        return {**self.__dict__, **dict.fromkeys(of_this_process)}
