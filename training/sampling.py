"""The vision-token count of a training step, a pure function of (seed, global step, micro step)."""

import bisect
import hashlib
from collections.abc import Sequence
from itertools import accumulate

from ..choices_tokenflex import check_vision_token_weights


def draw_num_vision_tokens(
    choices: Sequence[int | str],
    weights: Sequence[float],
    seed: int,
    step: int,
    micro_step: int = 0,
    sample: int | None = None,
) -> int | str:
    """
    Draws the vision-token count of one micro-batch (paper, claim "draws the token count at random per step"). There is
    no state: every rank and every resumed run draws the same, whatever else was drawn before.

    Args:
        choices (`Sequence[int | str]`): The counts to draw from, also with resolutions (`"64@224"`).
        weights (`Sequence[float]`): One weight per count; they need not sum to one.
        seed (`int`): The run's seed.
        step (`int`): The optimizer step, counted from 0.
        micro_step (`int`, *optional*, defaults to 0): The micro-batch within the step, counted from 0.
        sample (`int`, *optional*):
            The sample within the step, counted from 0 over all its micro-batches and processes, to draw for it alone,
            however the step is divided; `micro_step` then has no say.

    Returns:
        `int` or `str`: One of `choices`.

    Raises:
        ValueError: If weights do not fit the choices.

    Example:

    ```python
    >>> from tokenflex.training import draw_num_vision_tokens

    >>> [draw_num_vision_tokens([64, 144, 256], [2, 3, 5], seed=0, step=step) for step in range(4)]
    [144, 144, 144, 256]
    ```
    """
    check_vision_token_weights(choices, weights)
    place = micro_step if sample is None else f"sample {sample}"
    digest = hashlib.sha256(f"{seed}/{step}/{place}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64 * sum(weights)
    return choices[min(bisect.bisect_right(list(accumulate(weights)), position), len(choices) - 1)]
