"""Vision-token counts as command lines, requests and JSON files write them."""

import re
import reprlib

from ..choices_tokenflex import (
    NAMED_COUNTS,
    resolve_named_count,
    resolve_vision_tokens,
    sort_choices,
    split_choice,
)


def parse_num_vision_tokens(text: str | int | list | tuple | None):
    """
    Reads a vision-token count as a command line, a request or a JSON file writes it.

    Args:
        text (`str`, `int`, `list` or `tuple`, *optional*):
            `"64"`, `"8x12"` (rows x columns), either with a resolution in pixels (`"64@224"`), `"low"`, `"high"`,
            `"auto"`, several of them with commas between, or what is no text: a number, or a list with one entry per
            image.

    Returns:
        `int`, `tuple[int, int]`, `str`, a list of these or `None`: A count, a grid, a name, or one of them per image.

    Raises:
        ValueError: If it is none of these.

    Example:

    ```python
    >>> from tokenflex.inference.counts import parse_num_vision_tokens

    >>> [parse_num_vision_tokens(text) for text in ("64", "8x12", "low", "64,8x12", [64, "8x12"])]
    [64, (8, 12), 'low', [64, (8, 12)], [64, (8, 12)]]
    ```
    """
    if isinstance(text, str) and "," in text:
        text = [part.strip() for part in text.split(",")]
    if isinstance(text, list):
        parsed = [None if isinstance(part, list) else parse_num_vision_tokens(part) for part in text]
        if not any(part in NAMED_COUNTS or isinstance(part, list) or part is None for part in parsed):
            return parsed
    elif isinstance(text, str):
        if text in NAMED_COUNTS:
            return text
        if "@" in text:
            split_choice(text)
            return text
        if match := re.fullmatch(r"\s*(\d+)(?:\s*x\s*(\d+))?\s*", text):
            return (int(match[1]), int(match[2])) if match[2] else int(match[1])
    elif text is None or (isinstance(text, (int, tuple)) and not isinstance(text, bool)):
        return text
    raise ValueError(
        f"`num_vision_tokens`={reprlib.repr(text)}: give a count such as 64, a grid such as 8x12, either with a "
        f"resolution such as 64@224, a list with one of these per image, or one of {', '.join(NAMED_COUNTS)}."
    )


class RequestCounts:
    """
    Finds the counts of a request's images. In order: what the request asks for (a count or grid, a list of one per
    image, `"low"`, `"high"` or `"auto"`), each image's `detail`, the server's default.

    Args:
        processor ([`TokenFlexProcessor`]): The checkpoint's processor.
        config ([`TokenFlexConfig`]): The checkpoint's configuration.
        num_vision_tokens (`int`, `tuple[int, int]` or `str`, *optional*):
            The count of requests that ask for none. Defaults to the processor's.
        can_choose (`bool`, *optional*, defaults to `True`):
            Whether the server lets a checkpoint choose that has learned to.

    Raises:
        ValueError: If the checkpoint cannot do the default.
    """

    def __init__(
        self,
        processor,
        config,
        num_vision_tokens: int | tuple[int, int] | str | None = None,
        can_choose: bool = True,
    ):
        self.processor = processor
        self.config, self.choices = config, sort_choices(config.vision_token_choices)
        self.can_choose = can_choose and config.vision_token_chooser is not None
        default = processor.num_vision_tokens if num_vision_tokens is None else num_vision_tokens
        self.default = resolve_named_count(parse_num_vision_tokens(default), self.choices)
        self.fallback = processor.num_vision_tokens if self.default == "auto" else self.default
        self.resolve(None, [None])

    def resolve(
        self, asked, details: list[str | None], match_aspect_ratio: bool | None = None
    ) -> int | tuple[int, int] | list | str:
        """
        Args:
            asked (`int`, `list` or `str`, *optional*): The request's `num_vision_tokens`.
            details (`list[str | None]`): Each image's `detail`.
            match_aspect_ratio (`bool`, *optional*):
                Whether grids will follow the images' shapes, which takes any integer. Defaults to the processor's.

        Returns:
            `int`, `tuple[int, int]`, a list or `"auto"`: `"auto"` if the model is to choose.

        Raises:
            ValueError: If `asked` is nothing of that kind, or the checkpoint cannot do it.
        """
        if asked is not None or set(details) <= {None}:
            counts = (
                self.default if asked is None else resolve_named_count(parse_num_vision_tokens(asked), self.choices)
            )
            if counts == "auto" and not self.can_choose:
                raise ValueError(
                    "`num_vision_tokens`='auto': this checkpoint has not learned to choose. Run `tokenflex "
                    f"calibrate` on it, or ask for 'low' ({self.choices[0]}), 'high' ({self.choices[-1]}) or any "
                    "count."
                )
        # As OpenAI has it, `auto` leaves the choice to the server: to the model if it has learned to choose.
        elif set(details) == {"auto"} and self.can_choose:
            counts = "auto"
        else:
            counts = [
                self.fallback if detail in (None, "auto") else resolve_named_count(detail, self.choices)
                for detail in details
            ]
        if details and counts != "auto":
            matches = self.processor.match_aspect_ratio if match_aspect_ratio is None else match_aspect_ratio
            sizes = [(1, 1)] * len(details) if matches else None
            resolve_vision_tokens(counts, len(details), self.config, image_shapes=sizes)
        return counts
