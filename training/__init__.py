"""Training at drawn vision-token counts."""

from ..data.examples import to_example
from .collator import TokenFlexDataCollator
from .sampling import draw_num_vision_tokens


__all__ = ["TokenFlexDataCollator", "draw_num_vision_tokens", "to_example"]
