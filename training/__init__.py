"""Training at drawn vision-token counts."""

from .collator import TokenFlexDataCollator
from .data import to_example
from .sampling import draw_num_vision_tokens


__all__ = ["TokenFlexDataCollator", "draw_num_vision_tokens", "to_example"]
