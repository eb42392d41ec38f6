"""The cost of a training step: floating-point operations, counted while a step runs."""

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..data.synthetic import SyntheticVQA
from ..towers.tiny import tiny_model_and_processor
from ..training.collator import TokenFlexDataCollator
from ..training.train import freeze_parts
from .arms import Arm
from .baselines import shrink_image, use_gelu
from .runs import Size


def step_flops(arm: Arm, size: Size) -> float:
    """
    The expected FLOPs of one step's forward and backward pass, by the counts' weights. The optimizer's are left out:
    they are the same for every step, so that arms with fewer steps are a little cheaper than this says.

    Args:
        arm (`Arm`): Arm to train.
        size (`Size`): Size of the experiment.

    Example:

    ```python
    >>> from tokenflex.research.arms import FIXED, NESTED
    >>> from tokenflex.research.flops import step_flops
    >>> from tokenflex.research.runs import Size

    >>> size = Size(width=32, tower_steps=1, base_steps=1, steps=1, num_images=2, batch_size=2)
    >>> small, _, large = (step_flops(arm, size) for arm in FIXED)
    >>> small < large < step_flops(NESTED, size) < 3 * large
    True
    ```
    """
    model, processor = tiny_model_and_processor(width=size.width)
    if arm.projector == "gelu":
        use_gelu(model, seed=0)
    if arm.downsampled:
        model, processor = shrink_image(model, processor, arm.choices[0])
    else:
        freeze_parts(model, ["vision_tower"])
    collator = TokenFlexDataCollator(processor, arm.choices, arm.weights, scheme=arm.scheme)
    rows = SyntheticVQA(size.batch_size, 0, size.questions)
    batch = collator.collate([rows[i] for i in range(size.batch_size)])
    if arm.scheme in ("nested", "distill"):
        return _count(model, collator.arrange(batch, list(arm.choices))[0])
    flops = (_count(model, collator.arrange(batch, [count])[0]) for count in arm.choices)
    return sum(weight * number for weight, number in zip(arm.weights, flops))


def _count(model, batch: dict) -> int:
    # The fused attention of CPUs is not counted, the plain one is.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch).logits.sum().backward()
    return counter.get_total_flops()
