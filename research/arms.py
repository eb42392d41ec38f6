"""The models to compare: training, data and size of each."""

from dataclasses import dataclass, replace

from ..towers.tiny import VISION_TOKEN_CHOICES, VISION_TOKEN_WEIGHTS


NUM_PATCHES = 64


@dataclass(frozen=True)
class Arm:
    """
    One way to train, starting from the same base model as all others of its seed.

    Args:
        name (`str`): A short name, also of files.
        title (`str`): Name in tables.
        choices (`tuple[int, ...]`): The counts that training uses.
        weights (`tuple[float, ...]`): One weight per count.
        scheme (`str`, *optional*, defaults to `"batch"`): One of `SCHEMES`.
        projector (`str`, *optional*, defaults to `"swiglu"`): Or `"gelu"`, see [`use_gelu`].
        downsampled (`bool`, *optional*, defaults to `False`):
            Whether to make the image so small that its patches are the vision tokens, instead of pooling them. The
            tower is trained then, which it is not elsewhere: it has to get used to small images.
        equal_compute (`bool`, *optional*, defaults to `False`):
            Whether to give it the FLOPs of the paper's draw, and so fewer steps, instead of as many steps.
    """

    name: str
    title: str
    choices: tuple[int, ...]
    weights: tuple[float, ...]
    scheme: str = "batch"
    projector: str = "swiglu"
    downsampled: bool = False
    equal_compute: bool = False

    @property
    def counts(self) -> tuple[int, ...]:
        """The counts it is tested at: its own alone where it cannot do others."""
        return self.choices if self.downsampled else tuple(sorted({*VISION_TOKEN_CHOICES, *self.choices}))


FIXED = tuple(Arm(f"fixed-{n}", f"fixed {n}", (n,), (1.0,)) for n in VISION_TOKEN_CHOICES)
PAPER = Arm("draw-235", "drawn 2:3:5 (paper)", VISION_TOKEN_CHOICES, VISION_TOKEN_WEIGHTS)
EVEN = Arm("draw-111", "drawn 1:1:1", VISION_TOKEN_CHOICES, (1 / 3,) * 3)
NESTED = Arm("nested", "nested", VISION_TOKEN_CHOICES, (1 / 3,) * 3, "nested")
DISTILL = Arm("distill", "distill", VISION_TOKEN_CHOICES, (1 / 3,) * 3, "distill")
DISTILL_EQUAL = replace(DISTILL, name="distill-flops", title="distill, equal compute", equal_compute=True)
UNPOOLED = Arm("fixed-64", "fixed 64, pooled at inference only", (NUM_PATCHES,), (1.0,))
GELU = replace(PAPER, name="draw-235-gelu", title="drawn 2:3:5, GELU MLP", projector="gelu")
DOWNSAMPLED = tuple(
    replace(
        arm,
        name=f"small-{arm.choices[0]}",
        title=f"image of {arm.choices[0]} patches, tower trained",
        downsampled=True,
    )
    for arm in FIXED
)

FLEXIBLE = (PAPER, EVEN, NESTED, DISTILL, DISTILL_EQUAL)
BASELINES = (UNPOOLED, GELU, *DOWNSAMPLED)
ARMS = {arm.name: arm for arm in (*FIXED, *FLEXIBLE, *BASELINES)}


def share_of_steps(steps: int) -> int:
    """
    The steps of each fixed model where all of them together get as many, to within rounding, as one flexible model.

    Args:
        steps (`int`): The flexible model's.
    """
    return max(1, round(steps / len(FIXED)))
