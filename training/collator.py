"""Batches for the Trainer: labels on answers only, one image behind several questions, the count drawn per step."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import ProcessorMixin
from transformers.utils import logging

from ..choices_tokenflex import check_vision_token_weights, resolve_vision_tokens, sort_choices
from ..data.encoding import EncodedRow, encode_row, measure_row
from ..data.examples import Example
from ..data.placing import place_images
from ..placeholders_tokenflex import at_count, encoded_grids, first_placeholders
from .callback import VisionTokenCallback
from .packing import pack_rows, stack_rows
from .sampling import draw_num_vision_tokens
from .schemes import NESTED, SCHEMES


logger = logging.get_logger(__name__)


class TokenFlexDataCollator:
    """
    Collates rows of images, questions and answers for `transformers.Trainer` and draws each micro-batch's vision-token
    count. Independent questions about one image share its tower pass and its vision tokens: they stand behind each
    other in one row, and `segment_ids` keeps them from seeing each other.

    A collator cannot know where training stands, so it brings a callback that does: the batch is encoded at the
    largest count, and re-counted to the step's draw when the model is called. Without the callback the count is drawn
    by (seed, number of the batch within its data loader's process), which does not survive a resume.

    Args:
        processor ([`TokenFlexProcessor`]):
            The model's processor.
        vision_token_choices (`Sequence[int | str]`, *optional*):
            The counts to draw from, each also with a resolution, such as `"64@224"`, at which the vision tower then
            sees the images. Defaults to the model config's.
        vision_token_weights (`Sequence[float]`, *optional*):
            One weight per count. Defaults to the model config's.
        seed (`int`, *optional*):
            The seed of the draws. Defaults to the Trainer's `args.seed`, or 0 without the callback.
        scheme (`str`, *optional*, defaults to `"batch"`):
            `"batch"` draws one count for each micro-batch (paper), `"sample"` one for each sample; `"nested"` trains
            on all counts in every step, behind one pass of the vision tower, and averages the losses by the weights;
            `"distill"` is nested, with the smaller counts also following the largest count's distribution of answers.
        packing (`bool`, *optional*, defaults to `False`):
            Whether samples of a micro-batch are put behind each other into as few rows as they fit, kept apart by
            positions and attention. The loss is the same, the padding is gone.
        max_length (`int`, *optional*):
            The longest sample in tokens, its images at the largest count; what is longer is cut at its end, never in
            or before an image.
        distillation_weight (`float`, *optional*, defaults to 1.0):
            With `scheme="distill"`, the weight of the divergence beside the loss.
        distillation_temperature (`float`, *optional*, defaults to 1.0):
            With `scheme="distill"`, what logits are divided by before distributions are compared.
        distillation_from_base (`bool`, *optional*, defaults to `False`):
            With `scheme="distill"` and adapters, whether every count, the largest too, follows what the model without
            its adapters answers at the largest count, so that what it knew there is kept. It costs one more forward
            pass at that count.
        cache_features (`str` or `Path`, *optional*):
            Folder to keep the features of a frozen vision tower in, by a [`FeatureCache`]: images that come again do
            without it.

    Raises:
        ValueError: If only one of choices and weights is given, they do not fit each other, or an argument is out of
            its range.

    Example:

    ```python
    >>> from tokenflex.training import TokenFlexDataCollator
    >>> from tokenflex.data.synthetic import SyntheticVQA
    >>> from tokenflex.towers.tiny import tiny_model_and_processor

    >>> model, processor = tiny_model_and_processor()
    >>> collator = TokenFlexDataCollator(processor, vision_token_choices=[4, 16], vision_token_weights=[0.5, 0.5])
    >>> batch = collator([SyntheticVQA(num_images=1, seed=0)[0]])
    >>> model(**batch).loss.ndim
    0
    ```

    Training is `Trainer(model, args, data_collator=collator, callbacks=[collator.callback], ...)`, and for the schemes
    "nested" and "distill" also `compute_loss_func=collator.callback.compute_loss`.
    """

    def __init__(
        self,
        processor,
        vision_token_choices: Sequence[int | str] | None = None,
        vision_token_weights: Sequence[float] | None = None,
        seed: int | None = None,
        scheme: str = "batch",
        packing: bool = False,
        max_length: int | None = None,
        distillation_weight: float = 1.0,
        distillation_temperature: float = 1.0,
        distillation_from_base: bool = False,
        cache_features: str | Path | None = None,
    ):
        if (vision_token_choices is None) != (vision_token_weights is None):
            raise ValueError(
                "Give `vision_token_choices` and `vision_token_weights` together, or neither for the model config's."
            )
        if not isinstance(processor, ProcessorMixin):
            raise ValueError(
                f"`processor` is a {type(processor).__name__}: give the model's processor, as "
                "`AutoProcessor.from_pretrained` loads it."
            )
        if vision_token_choices is not None:
            choices = list(vision_token_choices)
            resolve_vision_tokens(choices, len(choices), processor, "vision_token_choices")
            check_vision_token_weights(vision_token_choices, vision_token_weights)
        if scheme not in SCHEMES:
            raise ValueError(f"`scheme`={scheme!r}: the schemes are {', '.join(SCHEMES)}.")
        if distillation_weight <= 0 or distillation_temperature <= 0:
            raise ValueError(
                f"`distillation_weight`={distillation_weight} and "
                f"`distillation_temperature`={distillation_temperature} have to be above 0; "
                "without distillation the scheme is 'nested'."
            )
        if distillation_from_base and scheme != "distill":
            raise ValueError(
                f"`distillation_from_base`=True with `scheme`={scheme!r}, which has no teacher: use 'distill'."
            )
        self.processor = processor
        self.vision_token_choices = vision_token_choices
        self.vision_token_weights = vision_token_weights
        self.seed = seed
        self.scheme = scheme
        self.packing = packing
        self.max_length = max_length
        self.distillation_weight = distillation_weight
        self.distillation_temperature = distillation_temperature
        self.distillation_from_base = distillation_from_base
        self.cache_features = cache_features
        self.check_distillation()
        self.callback = VisionTokenCallback(self)
        self._num_batches = 0

    @classmethod
    def from_arguments(
        cls,
        processor,
        args,
        vision_token_choices: Sequence[int | str] | None = None,
        vision_token_weights: Sequence[float] | None = None,
        max_length: int | None = None,
    ) -> "TokenFlexDataCollator":
        """
        Makes the collator that arguments describe.

        Args:
            processor ([`TokenFlexProcessor`]): The model's processor.
            args ([`TokenFlexTrainingArguments`]): Where scheme, packing, distillation and seed stand.
            vision_token_choices (`Sequence[int | str]`, *optional*): The counts to draw from. Defaults to the model
                config's.
            vision_token_weights (`Sequence[float]`, *optional*): One weight per choice.
            max_length (`int`, *optional*): The longest sample in tokens, to which longer ones are cut.
        """
        return cls(
            processor,
            vision_token_choices,
            vision_token_weights,
            seed=args.seed,
            scheme=args.scheme,
            packing=args.packing,
            max_length=max_length,
            distillation_weight=args.distillation_weight,
            distillation_temperature=args.distillation_temperature,
            distillation_from_base=args.distillation_from_base,
            cache_features=args.cache_features,
        )

    def __call__(self, rows: Sequence[dict | Example]) -> dict[str, torch.Tensor]:
        """
        Args:
            rows (`Sequence[dict | Example]`): Rows as [`to_example`] takes them or returns them.

        Returns:
            `dict[str, torch.Tensor]`: With the callback, what [`~TokenFlexDataCollator.collate`] returns, which waits
            for its step; without it the batch is drawn and packed already.
        """
        self.callback.refuse_removed_columns(rows)
        batch = self.collate(rows)
        return self._arrange_alone(batch) if self.callback.args is None else batch

    def collate(self, rows: Sequence[dict | Example]) -> dict[str, torch.Tensor]:
        """
        Collates a batch at the largest count, whatever is drawn.

        Args:
            rows (`Sequence[dict | Example]`): Rows as [`to_example`] takes them or returns them.

        Returns:
            `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` and `labels` of shape
            `(batch_size, sequence_length)`, and `segment_ids` where a row has several questions; if there are images,
            `pixel_values` of shape `(num_tiles, num_channels, height, width)` and `vision_token_grids` of shape
            `(num_tiles, 2)`, where an uncut image is one tile, and `image_shapes` and `num_tiles` as the processor
            returns them. `num_skipped_rows` and `num_truncated_rows` count the unusable rows that were passed over and
            those that were cut, if there are any.

        Raises:
            BadRowError: If a row cannot be trained on.
            ValueError: If the counts are not known.
        """
        if self.vision_token_choices is None:
            raise ValueError(
                "The counts are not known: give the Trainer `callbacks=[collator.callback]`, which reads them off the "
                "model's config, or pass `vision_token_choices` and `vision_token_weights`."
            )
        encoded = [
            encode_row(row, self.processor, None, self.largest_choice, self.max_length, truncate=True) for row in rows
        ]
        batch = self._pad(encoded)
        images = [image for row in encoded for image in row.example.images]
        if images:
            batch = place_images(batch, self.processor(images=images, return_tensors="pt"), self.processor)
            batch = self.recount(batch, self.largest_choice)
        skipped = sum(row.example.skipped for row in encoded)
        truncated = sum(row.is_cut for row in encoded)
        counted = {"num_skipped_rows": skipped, "num_truncated_rows": truncated}
        return {**batch, **{name: torch.tensor([number]) for name, number in counted.items() if number}}

    @property
    def largest_choice(self) -> int | str:
        """`int` or `str`: The choice with the most tokens, of those the one with the highest resolution."""
        return sort_choices(self.vision_token_choices)[-1]

    def check_distillation(self) -> None:
        """
        Raises:
            ValueError: If there is no smaller count to distil into.
        """
        if self.scheme != "distill" or self.vision_token_choices is None:
            return
        choices = zip(self.vision_token_choices, self.vision_token_weights)
        if not any(weight for choice, weight in choices if choice != self.largest_choice):
            raise ValueError(
                f"`scheme`='distill' with `vision_token_choices`={list(self.vision_token_choices)} and "
                f"`vision_token_weights`={list(self.vision_token_weights)}: a smaller count with a weight above 0 has "
                "to learn from the largest. Add one, or use the scheme 'batch'."
            )

    def measure(self, row: dict | Example) -> tuple[int, int]:
        """
        The tokens of a row with its images at the largest count, and how many of them truncation cannot spare: up to
        its last image and the first token of an answer.

        Args:
            row (`dict` or `Example`): A row as [`to_example`] takes or returns it.
        """
        return measure_row(encode_row(row, self.processor), self.processor, self.largest_choice)

    def draw(self, step: int, micro_step: int = 0, samples: Sequence[int] = (0,)) -> list[int | str]:
        """
        The counts that a micro-batch trains at.

        Args:
            step (`int`): The optimizer step, counted from 0.
            micro_step (`int`, *optional*, defaults to 0): The micro-batch within the step.
            samples (`Sequence[int]`, *optional*): The micro-batch's samples, counted within the step.

        Returns:
            `list[int | str]`: One choice; with `scheme="sample"` one for each sample, nested all choices.
        """
        place = (self.vision_token_choices, self.vision_token_weights, self.seed or 0, step)
        if self.scheme == "sample":
            return [draw_num_vision_tokens(*place, sample=sample) for sample in samples]
        if self.scheme == "batch":
            return [draw_num_vision_tokens(*place, micro_step)]
        return list(self.vision_token_choices)

    def arrange(
        self, batch: dict[str, torch.Tensor], counts: list[int | str], one_row: bool = False
    ) -> tuple[dict[str, torch.Tensor], torch.LongTensor | None]:
        """
        Makes of a batch at the largest count what a step trains on.

        Args:
            batch (`dict[str, torch.Tensor]`): A batch as [`~TokenFlexDataCollator.collate`] returns it.
            counts (`list[int | str]`): The choices that [`~TokenFlexDataCollator.draw`] returned.
            one_row (`bool`, *optional*, defaults to `False`): Pack in the form that flash attention takes.

        Returns:
            `tuple[dict[str, torch.Tensor], torch.LongTensor | None]`: The model's inputs, and, if the batch was
            nested, the row of every position among the rows of all counts, -1 for padding.
        """
        processor = self.processor
        pad_token_id = processor.tokenizer.pad_token_id
        nested = self.scheme in NESTED and "vision_token_grids" in batch
        if nested:
            batch = stack_rows([self.recount(batch, count) for count in counts], pad_token_id)
        elif "vision_token_grids" in batch:
            if self.scheme == "sample":
                input_ids = batch["input_ids"]
                first = first_placeholders(input_ids, encoded_grids(batch, processor), processor.image_token_id)
                counts = [counts[row] for row in (first // input_ids.shape[1]).tolist()]
            batch = self.recount(batch, counts if self.scheme == "sample" else counts[0])
        if not nested and not self.packing:
            return batch, None
        batch, rows = pack_rows(batch, processor.image_token_id, pad_token_id, one_row)
        return batch, rows if nested else None

    def recount(self, batch: dict[str, torch.Tensor], num_vision_tokens: int | str | list) -> dict[str, torch.Tensor]:
        """
        The batch with every image at `num_vision_tokens`, or a list with one count per tile.

        Args:
            batch (`dict[str, torch.Tensor]`): A batch with images, at any count.
            num_vision_tokens (`int`, `str` or a list): The choice for all images, or one per tile.
        """
        return at_count(batch, num_vision_tokens, self.processor, self.processor.tokenizer.pad_token_id)

    def _arrange_alone(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.scheme in NESTED:
            raise ValueError(
                f"`scheme`={self.scheme!r} changes the loss: give the Trainer `callbacks=[collator.callback]` and "
                "`compute_loss_func=collator.callback.compute_loss`."
            )
        if self.cache_features is not None:
            raise ValueError(
                f"`cache_features`={str(self.cache_features)!r} needs to know the model: give the Trainer "
                "`callbacks=[collator.callback]`."
            )
        if self._num_batches == 0:
            logger.warning(
                "`TokenFlexDataCollator` draws without its callback, by the number of its batch: a resumed run will "
                "draw other counts. Give the Trainer `callbacks=[collator.callback]`."
            )
        self._num_batches += 1
        batch = {
            name: value for name, value in batch.items() if name not in ("num_skipped_rows", "num_truncated_rows")
        }
        counts = self.draw(self._num_batches - 1, samples=range(len(batch["input_ids"])))
        return self.arrange(batch, counts)[0]

    def _pad(self, rows: Sequence[EncodedRow]) -> dict[str, torch.Tensor]:
        length = max(len(row.input_ids) for row in rows)
        pad_token_id = self.processor.tokenizer.pad_token_id

        def padded(columns: list[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([column + [fill] * (length - len(column)) for column in columns])

        segment_ids = padded([row.segment_ids for row in rows], -1)
        batch = {
            "input_ids": padded([row.input_ids for row in rows], 0 if pad_token_id is None else pad_token_id),
            "attention_mask": (segment_ids >= 0).long(),
            "labels": padded([row.labels for row in rows], -100),
        }
        return {**batch, "segment_ids": segment_ids} if (segment_ids > 0).any() else batch
