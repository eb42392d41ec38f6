"""Batches for the Trainer: labels on answers only, one image behind several questions, the count drawn per step."""

from collections.abc import Sequence

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from ..configuration_tokenflex import (
    check_vision_token_weights,
    resolve_vision_token_grid,
    resolve_vision_token_grids,
)
from ..placeholders_tokenflex import recount_vision_tokens
from .data import Example, to_example
from .sampling import draw_num_vision_tokens


logger = logging.get_logger(__name__)


class TokenFlexDataCollator:
    """
    Collates rows of images, questions and answers for `transformers.Trainer` and draws each micro-batch's vision-token
    count. Independent questions about one image share its tower pass and its vision tokens: they stand behind each
    other in one row, and `segment_ids` keeps them from seeing each other.

    A collator cannot know where training stands, so it brings a callback that does: the batch is encoded at the largest
    count, and re-counted to the step's draw when the model is called. Without the callback the count is drawn by
    (seed, number of the batch within its data loader's process), which does not survive a resume.

    Args:
        processor ([`TokenFlexProcessor`]):
            The model's processor.
        vision_token_choices (`Sequence[int]`, *optional*):
            The counts to draw from. Defaults to the model config's.
        vision_token_weights (`Sequence[float]`, *optional*):
            One weight per count. Defaults to the model config's.
        seed (`int`, *optional*):
            The seed of the draws. Defaults to the Trainer's `args.seed`, or 0 without the callback.

    Raises:
        ValueError: If only one of choices and weights is given, or they do not fit each other.

    Example:

    ```python
    >>> from tokenflex.training import TokenFlexDataCollator
    >>> from tokenflex.training.synthetic import SyntheticVQA
    >>> from tokenflex.training.tiny import tiny_model_and_processor

    >>> model, processor = tiny_model_and_processor()
    >>> collator = TokenFlexDataCollator(processor, vision_token_choices=[4, 16], vision_token_weights=[0.5, 0.5])
    >>> batch = collator([SyntheticVQA(num_images=1, seed=0)[0]])
    >>> model(**batch).loss.ndim
    0
    ```

    Training is `Trainer(model, args, data_collator=collator, callbacks=[collator.callback], ...)`.
    """

    def __init__(
        self,
        processor,
        vision_token_choices: Sequence[int] | None = None,
        vision_token_weights: Sequence[float] | None = None,
        seed: int | None = None,
    ):
        if (vision_token_choices is None) != (vision_token_weights is None):
            raise ValueError(
                "Give `vision_token_choices` and `vision_token_weights` together, or neither to use the model config's."
            )
        if vision_token_choices is not None:
            for i, count in enumerate(vision_token_choices):
                resolve_vision_token_grid(count, processor.patch_grid, f"vision_token_choices[{i}]")
            check_vision_token_weights(vision_token_choices, vision_token_weights)
        self.processor = processor
        self.vision_token_choices = vision_token_choices
        self.vision_token_weights = vision_token_weights
        self.seed = seed
        self.callback = VisionTokenCallback(self)
        self.follows_trainer = False
        self._num_batches = 0

    def __call__(self, rows: Sequence[dict | Example]) -> dict[str, torch.Tensor]:
        """
        Args:
            rows (`Sequence[dict | Example]`): Rows as [`to_example`] takes them or returns them.

        Returns:
            `dict[str, torch.Tensor]`: `input_ids`, `attention_mask`, `labels` and `segment_ids` of shape
            `(batch_size, sequence_length)`, `pixel_values` of shape `(num_tiles, num_channels, height, width)` and
            `vision_token_grids` of shape `(num_tiles, 2)`, where an uncut image is one tile; `image_sizes` and
            `num_tiles` as the processor returns them.
        """
        if self.vision_token_choices is None:
            raise ValueError(
                "The counts are not known: give the Trainer `callbacks=[collator.callback]`, which reads them off the "
                "model's config, or pass `vision_token_choices` and `vision_token_weights`."
            )
        examples = [to_example(row) for row in rows]
        batch = self._pad(self._encode(examples))
        images = [image for example in examples for image in example.images]
        if not images:
            return batch
        batch = place_images(batch, self.processor(images=images, return_tensors="pt"), self.processor)
        count = max(self.vision_token_choices) if self.follows_trainer else self._draw_alone()
        return self.recount(batch, count)

    def recount(self, batch: dict[str, torch.Tensor], num_vision_tokens: int) -> dict[str, torch.Tensor]:
        """The batch with every image at `num_vision_tokens`."""
        processor = self.processor
        sizes = batch.get("image_sizes")
        sizes = None if sizes is None else sizes.tolist()
        num_tiles = len(batch["vision_token_grids"])
        grids = resolve_vision_token_grids(num_vision_tokens, num_tiles, processor.patch_grid, image_sizes=sizes)
        return recount_vision_tokens(batch, grids, processor.image_token_id, processor.tokenizer.pad_token_id)

    def _draw_alone(self) -> int:
        if self._num_batches == 0:
            logger.warning(
                "`TokenFlexDataCollator` draws without its callback, by the number of its batch: a resumed run will "
                "draw other counts. Give the Trainer `callbacks=[collator.callback]`."
            )
        self._num_batches += 1
        return draw_num_vision_tokens(
            self.vision_token_choices, self.vision_token_weights, self.seed or 0, self._num_batches - 1
        )

    def _encode(self, examples: Sequence[Example]) -> list[tuple[list[int], list[int], list[int]]]:
        """(input ids, labels, segment ids) of each example, with one placeholder per image."""
        pieces, owners = [], []
        for index, example in enumerate(examples):
            for number, dialog in enumerate(example.dialogs):
                for text, is_answer in self._split_answers(dialog):
                    pieces.append(text)
                    owners.append((index, number, is_answer))
        encoded = self.processor.tokenizer(pieces, add_special_tokens=False)["input_ids"]
        dialogs = [[([], []) for _ in example.dialogs] for example in examples]
        for ids, (index, number, is_answer) in zip(encoded, owners):
            dialogs[index][number][0].extend(ids)
            dialogs[index][number][1].extend(ids if is_answer else [-100] * len(ids))
        return [self._share_prefix(dialogs[i], len(example.images)) for i, example in enumerate(examples)]

    def _split_answers(self, dialog: list[dict]) -> list[tuple[str, bool]]:
        """The rendered dialog in pieces; answers, up to and with their end token, are what the model has to say."""
        processor, pieces, done = self.processor, [], ""
        for i, message in enumerate(dialog):
            if message["role"] != "assistant":
                continue
            prompt = processor.apply_chat_template(dialog[:i], add_generation_prompt=True)
            text = processor.apply_chat_template(dialog[: i + 1])
            answer = text[len(prompt) :].rstrip()  # templates put a line break behind the end token
            pieces += [(prompt[len(done) :], False), (answer, True)]
            done = prompt + answer
        return [piece for piece in pieces if piece[0]]

    def _share_prefix(
        self, dialogs: list[tuple[list[int], list[int]]], num_images: int
    ) -> tuple[list[int], list[int], list[int]]:
        """Puts what all dialogs begin with first and only once, then the rest of each as a segment of its own."""
        shared = 0
        if len(dialogs) > 1:
            for tokens in zip(*(ids for ids, _ in dialogs)):
                if len(set(tokens)) > 1:
                    break
                shared += 1
            # At most up to an answer's last prompt token, from which its first token is predicted.
            starts = [next(i for i, label in enumerate(labels) if label != -100) for _, labels in dialogs]
            shared = min(shared, *(start - 1 for start in starts))
        prefix, prefix_labels = dialogs[0][0][:shared], dialogs[0][1][:shared]
        row = (list(prefix), list(prefix_labels), [0] * shared)
        for number, (ids, labels) in enumerate(dialogs, start=1 if len(dialogs) > 1 else 0):
            row[0].extend(ids[shared:])
            row[1].extend(labels[shared:])
            row[2].extend([number] * (len(ids) - shared))
        placeholders = row[0].count(self.processor.image_token_id)
        if placeholders != num_images:
            raise ValueError(
                f"A row has {num_images} images but what its dialogs share holds {placeholders} image placeholders "
                f"({self.processor.image_token}): questions and answers must not contain that token, and questions "
                "about the same images must place them alike."
            )
        return row

    def _pad(self, rows: list[tuple[list[int], list[int], list[int]]]) -> dict[str, torch.Tensor]:
        length = max(len(ids) for ids, _, _ in rows)
        pad_token_id = self.processor.tokenizer.pad_token_id

        def padded(column: int, fill: int) -> torch.Tensor:
            return torch.tensor([row[column] + [fill] * (length - len(row[column])) for row in rows])

        segment_ids = padded(2, -1)
        return {
            "input_ids": padded(0, 0 if pad_token_id is None else pad_token_id),
            "attention_mask": (segment_ids >= 0).long(),
            "labels": padded(1, -100),
            "segment_ids": segment_ids,
        }


def place_images(
    batch: dict[str, torch.Tensor], processed_images: dict[str, torch.Tensor], processor
) -> dict[str, torch.Tensor]:
    """
    Joins prompts that hold one placeholder per image with the processed images; every tile gets one vision token, to be
    re-counted.

    Args:
        batch (`dict[str, torch.Tensor]`): Tensors that run along the sequence.
        processed_images (`dict[str, torch.Tensor]`): What the processor makes of the images alone.
        processor ([`TokenFlexProcessor`]): The processor.

    Returns:
        `dict[str, torch.Tensor]`: Both, with a placeholder and a grid of (1, 1) for each tile.
    """
    num_tiles = processed_images.get("num_tiles")
    if num_tiles is not None:
        batch = {**batch, "vision_token_grids": torch.ones(len(num_tiles), 2, dtype=torch.long)}
        grids = [(1, tiles) for tiles in num_tiles.tolist()]
        batch = recount_vision_tokens(batch, grids, processor.image_token_id, processor.tokenizer.pad_token_id)
    grids = torch.ones(len(processed_images["pixel_values"]), 2, dtype=torch.long)
    return {**batch, **processed_images, "vision_token_grids": grids}


class VisionTokenCallback(TrainerCallback):
    """Tells the draws of a [`TokenFlexDataCollator`] where training stands; made by the collator."""

    def __init__(self, collator: TokenFlexDataCollator):
        self.collator = collator
        self.step = 0
        self.micro_step = 0
        self.num_vision_tokens = None
        self._hook = None

    def on_init_end(self, args, state, control, model=None, **kwargs):
        """Evaluation may come before training: what the collator has to know is known once the Trainer is made."""
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
        if collator.seed is None:
            collator.seed = args.seed
        collator.follows_trainer = True

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._remove_hook()
        self._hook = model.register_forward_pre_hook(self._recount, with_kwargs=True)

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step
        self.micro_step = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is not None and "loss" in logs:
            logs["num_vision_tokens"] = self.num_vision_tokens
            state.log_history[-1]["num_vision_tokens"] = self.num_vision_tokens

    def on_train_end(self, args, state, control, **kwargs):
        self._remove_hook()

    def _remove_hook(self):
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _recount(self, model, args, kwargs):
        if not model.training:
            return None
        collator = self.collator
        self.num_vision_tokens = draw_num_vision_tokens(
            collator.vision_token_choices, collator.vision_token_weights, collator.seed, self.step, self.micro_step
        )
        self.micro_step += 1
        if kwargs.get("vision_token_grids") is None:
            return None
        return args, collator.recount(kwargs, self.num_vision_tokens)

    def __getstate__(self):
        return {**self.__dict__, "_hook": None}  # the hook belongs to the process that trains
