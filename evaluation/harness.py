"""Common part of evaluation harnesses: a checkpoint that answers conversations at one vision-token count."""

import difflib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForImageTextToText

from ..checkpoints.adapters import load_processor
from ..choices_tokenflex import NAMED_COUNTS, resolve_named_count, sort_choices
from ..data.images import decode_image, fetch, is_address
from ..data.videos import expand_videos
from ..inference.counts import parse_num_vision_tokens
from ..inference.decoding import GREEDY
from ..placeholders_tokenflex import at_count
from .answers import mask_answers


@dataclass
class Answer:
    """
    Args:
        text (`str`): The answer.
        input_tokens (`int`):
            Tokens of the prompt, vision tokens included; where the count chose itself, those of the pass that chooses
            too.
        vision_tokens (`int`): The vision tokens among them.
        output_tokens (`int`): Tokens of the answer, its end included.
    """

    text: str
    input_tokens: int
    vision_tokens: int
    output_tokens: int


class HarnessModel:
    """
    A checkpoint as harnesses ask it. Meant to stand before a harness's own base class among a class's bases.

    Args:
        pretrained (`str`):
            A checkpoint folder or Hub id.
        num_vision_tokens (`int`, `str` or `tuple[int, int]`, *optional*):
            The vision-token count of every image, or the grid, as `(rows, columns)` or `"8x12"`; or `"low"`, `"high"`,
            or `"auto"` for a count that each question chooses. Defaults to the checkpoint's.
        device (`str`, *optional*):
            Device of the model; `"auto"` spreads it over all GPUs. Defaults to the GPU if there is one.
        dtype (`str`, *optional*, defaults to `"auto"`):
            The weights' dtype; `"auto"` is the checkpoint's.
        attn_implementation (`str`, *optional*):
            As in transformers.
        unknown:
            Refused by name.

    Raises:
        ValueError: If the count is not allowed, the checkpoint cannot choose one, or an argument is unknown.
    """

    def __init__(
        self,
        pretrained: str,
        num_vision_tokens: int | str | tuple[int, int] | None = None,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        **unknown,
    ):
        known = [*inspect.signature(type(self)).parameters, *inspect.signature(HarnessModel).parameters]
        known = [name for name in dict.fromkeys(known) if name not in ("unknown", "options")]
        for name, value in unknown.items():
            nearest = difflib.get_close_matches(name, known, n=1)
            meant = f" Did you mean `{nearest[0]}`?" if nearest else ""
            raise ValueError(f"Unknown model argument `{name}`={value!r}.{meant} Known: {', '.join(known)}.")
        super().__init__()
        self.processor = load_processor(pretrained)
        num_vision_tokens = _parse_count(num_vision_tokens)
        if num_vision_tokens not in NAMED_COUNTS:
            self.processor.count_vision_tokens([(1, 1)], num_vision_tokens)
        self.model = AutoModelForImageTextToText.from_pretrained(
            pretrained,
            dtype=dtype,
            device_map=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            attn_implementation=attn_implementation,
        ).eval()
        self.device = self.model.device
        if num_vision_tokens is None:
            # `generate` would follow it whatever the prompt is encoded at.
            num_vision_tokens = _parse_count(getattr(self.model.generation_config, "num_vision_tokens", None))
        choices = self.model.config.vision_token_choices
        num_vision_tokens = resolve_named_count(num_vision_tokens, choices)
        if num_vision_tokens == "auto" and self.model.config.vision_token_chooser is None:
            raise ValueError(
                f"`num_vision_tokens`='auto': {pretrained} has not learned to choose. Run `tokenflex calibrate` on "
                f"it, or name a count such as {sort_choices(choices)[-1]}."
            )
        self.num_vision_tokens = num_vision_tokens

    def answer(self, conversations: Sequence[list[dict]], **options) -> list[Answer]:
        """
        Answers conversations, all in one batch.

        Args:
            conversations (`Sequence[list[dict]]`):
                Messages in transformers' chat format, each with a list of parts of type `text`, `image` or `video`.
            options:
                Of `generate`, such as `max_new_tokens`; greedy where they do not say otherwise.

        Returns:
            `list[Answer]`: One per conversation.

        Raises:
            ValueError: If a part is of another type, or its image cannot be read.
        """
        conversations = [[_read(message) for message in conversation] for conversation in conversations]
        default = self.processor.num_vision_tokens
        conversations, counts = zip(
            *(expand_videos(messages, num_vision_tokens=default) for messages in conversations)
        )
        count = {} if self.num_vision_tokens is None else {"num_vision_tokens": self.num_vision_tokens}
        smallest = sort_choices(self.model.config.vision_token_choices)[0]
        is_auto = self.num_vision_tokens == "auto"
        encoded_at = count.get("num_vision_tokens", sum(counts, []) or None)
        inputs = self.processor.apply_chat_template(
            list(conversations),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "num_vision_tokens": smallest if is_auto else encoded_at},
        )
        output = self.model.generate(
            **inputs.to(self.device), **count, **{**GREEDY, **options, "return_dict_in_generate": True}
        )
        answers = output.sequences[:, inputs["input_ids"].shape[1] :]
        prompt_tokens = inputs["attention_mask"].sum(-1)
        vision_tokens = (inputs["input_ids"] == self.processor.image_token_id).sum(-1)
        if is_auto and output.get("num_vision_tokens") is not None:
            answered_at, chosen = torch.zeros_like(vision_tokens), output.num_vision_tokens
            chosen = chosen.tolist() if isinstance(chosen, torch.Tensor) else chosen
            for choice in set(chosen) - {0}:
                asked = at_count(inputs, choice, self.model.config)["input_ids"] == self.processor.image_token_id
                rows = torch.tensor([other == choice for other in chosen], device=asked.device)
                answered_at[rows] = asked.sum(-1)[rows]
            # The text has been read to choose, and then with its images.
            prompt_tokens, vision_tokens = 2 * (prompt_tokens - vision_tokens) + answered_at, answered_at
        output_tokens = mask_answers(answers, self.model.generation_config.eos_token_id).sum(-1)
        lengths = prompt_tokens, vision_tokens, output_tokens
        texts = self.processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [Answer(text.strip(), *counts) for text, *counts in zip(texts, *(n.tolist() for n in lengths))]


def _parse_count(value):
    """One count or grid for all images; the list of a JSON file, which has no tuples, is a grid."""
    return tuple(value) if isinstance(value, list) else parse_num_vision_tokens(value)


def _read(message: dict) -> dict:
    """The message with its images decoded as in training."""
    parts = []
    for part in message["content"]:
        if part["type"] not in ("text", "image", "video"):
            raise ValueError(f"A message has a part of type {part['type']!r}: TokenFLEX takes text, image and video.")
        if part.get("image") is not None:
            image = part["image"]
            part = {**part, "image": decode_image(fetch(image) if is_address(image) else image)}
        parts.append(part)
    return {**message, "content": parts}
