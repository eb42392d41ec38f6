"""TokenFLEX model configuration, and the arithmetic of vision-token counts and grids."""

import copy
import functools
import math
import operator
from collections.abc import Sequence

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig


NAMED_COUNTS = ("low", "high", "auto")


def resolve_named_count(num_vision_tokens, choices: Sequence[int]):
    """
    Replaces `"low"` and `"high"` by the smallest and the largest count that was trained; all else stays as it is.

    Args:
        num_vision_tokens (`int`, `tuple[int, int]`, `str` or a list, *optional*): A count, grid, name or list.
        choices (`Sequence[int]`): The config's `vision_token_choices`.

    Raises:
        ValueError: If it is a text that names no count.
    """
    if not isinstance(num_vision_tokens, str):
        return num_vision_tokens
    if num_vision_tokens not in NAMED_COUNTS:
        raise ValueError(
            f"`num_vision_tokens`={num_vision_tokens!r}: give a count, a grid, or one of {', '.join(NAMED_COUNTS)}."
        )
    return {"low": min(choices), "high": max(choices)}.get(num_vision_tokens, num_vision_tokens)


def resolve_vision_token_grid(
    num_vision_tokens: int | tuple[int, int], patch_grid: tuple[int, int], name: str = "num_vision_tokens"
) -> tuple[int, int]:
    """
    Maps a vision-token count to the grid that the patch grid is pooled to. Nothing is rounded: a count that the rule
    does not allow is refused.

    Args:
        num_vision_tokens (`int` or `tuple[int, int]`):
            The number of vision tokens of one image, a square `n * n` with `n` at most the shorter side of
            `patch_grid`; or the grid itself as `(rows, columns)`, each side within `patch_grid`.
        patch_grid (`tuple[int, int]`):
            Rows and columns of the vision tower's patch grid.
        name (`str`, *optional*, defaults to `"num_vision_tokens"`):
            The argument to name in errors.

    Returns:
        `tuple[int, int]`: The grid as (rows, columns).

    Raises:
        ValueError: If the count is not an integer, not a square, smaller than 1 or larger than the patch grid. The
            message names the nearest counts that are allowed.

    Example:

    ```python
    >>> from tokenflex import resolve_vision_token_grid

    >>> resolve_vision_token_grid(144, patch_grid=(27, 27))
    (12, 12)
    ```
    """
    max_rows, max_columns = patch_grid
    if isinstance(num_vision_tokens, tuple):
        try:
            rows, columns = (_as_integer(side) for side in num_vision_tokens)
        except (TypeError, ValueError):
            rows = columns = 0
        if not (1 <= rows <= max_rows and 1 <= columns <= max_columns):
            raise ValueError(
                f"`{name}`={num_vision_tokens!r}: a grid is (rows, columns), two integers from (1, 1) to the patch "
                f"grid ({max_rows}, {max_columns})."
            )
        return rows, columns

    max_side = min(patch_grid)
    try:
        count = _as_integer(num_vision_tokens)
    except TypeError:
        raise ValueError(
            f"`{name}`={num_vision_tokens!r} ({type(num_vision_tokens).__name__}): a vision-token count is an integer "
            f"n*n with n from 1 to {max_side}, or a tuple (rows, columns)."
        ) from None
    side = math.isqrt(max(count, 0))
    if count < 1 or side * side != count or side > max_side:
        lower = min(max(side, 1), max_side)
        nearest = sorted({lower**2, min(lower + 1, max_side) ** 2}, key=lambda allowed: abs(allowed - count))
        nearest = " or ".join(map(str, sorted(nearest if 1 < count < max_side**2 else nearest[:1])))
        raise ValueError(
            f"`{name}`={count}: a vision-token count is a square n*n with n from 1 to {max_side} (the patch grid is "
            f"{max_rows} x {max_columns}), or a tuple (rows, columns). Nearest: {nearest}."
        )
    return side, side


def match_vision_token_grid(
    num_vision_tokens: int, image_size: tuple[int, int], patch_grid: tuple[int, int], name: str = "num_vision_tokens"
) -> tuple[int, int]:
    """
    The grid of at most `num_vision_tokens` tokens that is nearest to an image's shape. Near is measured against the
    ideal grid, which has exactly that many tokens and exactly that shape: the sum of both sides' ratios to it, as
    logarithms. A square image gets the square grid.

    Args:
        num_vision_tokens (`int`):
            The most tokens to use, from 1 to the number of patches; it need not be a square.
        image_size (`tuple[int, int]`):
            (height, width) of the image in pixels.
        patch_grid (`tuple[int, int]`):
            Rows and columns of the vision tower's patch grid.
        name (`str`, *optional*, defaults to `"num_vision_tokens"`):
            The argument to name in errors.

    Returns:
        `tuple[int, int]`: The grid as (rows, columns).

    Raises:
        ValueError: If the count is not an integer from 1 to the number of patches.

    Example:

    ```python
    >>> from tokenflex import match_vision_token_grid

    >>> match_vision_token_grid(144, image_size=(720, 1280), patch_grid=(27, 27))
    (9, 16)
    ```
    """
    max_rows, max_columns = patch_grid
    try:
        count = _as_integer(num_vision_tokens)
    except TypeError:
        count = 0
    if not 1 <= count <= max_rows * max_columns:
        raise ValueError(
            f"`{name}`={num_vision_tokens!r}: with `match_aspect_ratio`, a vision-token count is an integer from 1 to "
            f"{max_rows * max_columns} (the patch grid is {max_rows} x {max_columns})."
        )
    return _nearest_grid(count, *image_size, max_rows, max_columns)


@functools.lru_cache(maxsize=4096)
def _nearest_grid(count: int, height: int, width: int, max_rows: int, max_columns: int) -> tuple[int, int]:
    ideal_rows, ideal_columns = math.sqrt(count * height / width), math.sqrt(count * width / height)
    # For each number of rows only the two integers around the ideal number of columns can be nearest.
    candidates = {
        (rows, max(1, min(columns, count // rows, max_columns)))
        for rows in range(1, min(max_rows, count) + 1)
        for columns in (math.floor(ideal_columns), math.ceil(ideal_columns))
    }
    return min(
        sorted(candidates),
        key=lambda grid: abs(math.log(grid[0] / ideal_rows)) + abs(math.log(grid[1] / ideal_columns)),
    )


def resolve_vision_token_grids(
    num_vision_tokens: int | tuple[int, int] | Sequence[int | tuple[int, int]],
    num_images: int,
    patch_grid: tuple[int, int],
    name: str = "num_vision_tokens",
    image_shapes: Sequence[tuple[int, int]] | None = None,
    num_tiles: Sequence[int] | None = None,
) -> list[tuple[int, int]]:
    """
    Maps one count for all images, or a list with one count per image, to one grid per image.

    Args:
        num_vision_tokens (`int`, `tuple[int, int]` or a list of these):
            An integer or a `(rows, columns)` tuple holds for all images; a list has one entry per image.
        num_images (`int`):
            The number of images that the vision tower sees: tiles count one by one.
        patch_grid (`tuple[int, int]`):
            Rows and columns of the vision tower's patch grid.
        name (`str`, *optional*, defaults to `"num_vision_tokens"`):
            The argument to name in errors.
        image_shapes (sequence of `tuple[int, int]`, *optional*):
            (height, width) of each image: an integer count is then matched to the image's shape
            ([`match_vision_token_grid`]) in place of a square.
        num_tiles (sequence of `int`, *optional*):
            Number of tiles of each image. A list of counts may then have one entry per image or one per tile.

    Returns:
        `list[tuple[int, int]]`: One (rows, columns) per image.

    Raises:
        ValueError: If an entry is not allowed (see [`resolve_vision_token_grid`]), or a list has another length than
            `num_images`.
    """
    if not isinstance(num_vision_tokens, list):
        counts, names = [num_vision_tokens] * num_images, [name] * num_images
    else:
        counts, names = num_vision_tokens, [f"{name}[{i}]" for i in range(len(num_vision_tokens))]
        if num_tiles is not None and len(counts) == len(num_tiles):
            counts = [count for count, tiles in zip(counts, num_tiles) for _ in range(tiles)]
            names = [entry for entry, tiles in zip(names, num_tiles) for _ in range(tiles)]
    if len(counts) != num_images:
        in_tiles = f" cut into {num_images} tiles" if num_tiles is not None else ""
        raise ValueError(
            f"`{name}` lists {len(num_vision_tokens)} counts for {len(num_tiles or range(num_images))} "
            f"images{in_tiles}: give one count per image in order of appearance, or a single integer for all of them."
        )
    if image_shapes is None:
        return [resolve_vision_token_grid(count, patch_grid, entry) for count, entry in zip(counts, names)]
    if len(image_shapes) != num_images:
        raise ValueError(f"`image_shapes` holds {len(image_shapes)} sizes for {num_images} images: give one each.")
    return [
        resolve_vision_token_grid(count, patch_grid, entry)
        if isinstance(count, tuple)
        else match_vision_token_grid(count, tuple(size), patch_grid, entry)
        for count, entry, size in zip(counts, names, image_shapes)
    ]


# The number of class tokens before a tower's patches; registers are counted by the tower's own configuration.
CLASS_TOKENS = {
    "clip_vision_model": 1,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "idefics3_vision": 0,
    "internvl_vision": 1,
    "siglip_vision_model": 0,
    "smolvlm_vision": 0,
    "vit": 1,
}


def count_prefix_tokens(vision_config: PreTrainedConfig) -> int | None:
    """
    Counts the class tokens and registers that a tower's output holds before its patches; `None` for an unknown tower.
    """
    class_tokens = CLASS_TOKENS.get(vision_config.model_type)
    return None if class_tokens is None else class_tokens + getattr(vision_config, "num_register_tokens", 0)


def _as_integer(value) -> int:
    if isinstance(value, bool):
        raise TypeError("a bool is not a count")
    return operator.index(value)


def _as_config(config: dict | PreTrainedConfig | None, default: dict) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    options = dict(default if config is None else config)
    return AutoConfig.for_model(options.pop("model_type", default["model_type"]), **options)


def _as_pair(value) -> tuple[int, int]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value, value)


DEFAULT_VISION_CONFIG = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
DEFAULT_TEXT_CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}


@strict
class TokenFlexConfig(PreTrainedConfig):
    r"""
    Configuration of a TokenFLEX model ([arXiv 2504.03154](https://huggingface.co/papers/2504.03154)). The defaults are
    the paper's: a SigLIP-so400m-patch14-384 tower, a Qwen2.5-7B language model and 64, 144 or 256 vision tokens drawn
    with the weights 2:3:5.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*, defaults to SigLIP-so400m-patch14-384):
            The vision tower's configuration. A pooling head is turned off, since the model reads patch features.
        text_config (`dict` or `PreTrainedConfig`, *optional*, defaults to Qwen2.5-7B):
            The language model's configuration.
        image_token_id (`int`, *optional*, defaults to 151655):
            The placeholder token of one vision token (`<|image_pad|>` in Qwen2.5's vocabulary).
        num_vision_tokens (`int`, *optional*, defaults to 256):
            The vision-token count per image when none is asked for.
        vision_token_choices (`list[int]`, *optional*, defaults to `[64, 144, 256]`):
            The counts that training draws from (the paper's).
        vision_token_weights (`list[float]`, *optional*, defaults to `[0.2, 0.3, 0.5]`):
            One weight per choice; they are normalized when drawing.
        vision_feature_layer (`int` or `list[int]`, *optional*, defaults to -1):
            The tower's hidden state that feeds the projector; -1 is the tower's output, which all but CLIP normalize.
            The features of several layers are put side by side.
        num_prefix_tokens (`int`, *optional*):
            Number of class tokens and registers before the patches of the tower's output; they are dropped. Known
            for SigLIP, CLIP, DINOv2, DINOv3, InternViT and ViT; must be given for other towers.
        downsample_factor (`int`, *optional*, defaults to 1):
            The side of the blocks of patches that are put into one feature each before pooling (pixel unshuffle).
        projector_connector (`str`, *optional*, defaults to `"swiglu"`):
            What stands between pooled features and the language model: the paper's `"swiglu"`, `"mlp"` or `"linear"`.
        projector_hidden_size (`int`, *optional*, defaults to the language model's hidden size):
            The inner width of the connector. The paper does not state it.
        projector_hidden_act (`str`, *optional*, defaults to `"silu"`):
            The activation of the connector.
        projector_bias (`bool`, *optional*):
            Whether the connector's layers have a bias. By default they have, except in `"swiglu"`.
        projector_norm_eps (`float`, *optional*):
            The epsilon of a layer norm before the connector. By default there is none.
        projector_pools_last (`bool`, *optional*, defaults to `False`):
            Whether features are pooled behind the connector, as PerceptionLM's are.
        vision_token_chooser (`dict`, *optional*):
            The rising `choices` among which `"auto"` chooses, and the `tolerance`, as `tokenflex calibrate` writes
            them. The head that chooses is kept with the weights.
        initializer_range (`float`, *optional*, defaults to 0.02):
            The standard deviation of the projector's initial weights.
        tie_word_embeddings (`bool`, *optional*, defaults to the text config's):
            Whether to share input and output embeddings. The text config is made to say the same.

    Example:

    ```python
    >>> from tokenflex import TokenFlexConfig

    >>> config = TokenFlexConfig()
    >>> config.patch_grid, config.vision_token_choices
    ((27, 27), [64, 144, 256])
    ```
    """

    model_type = "tokenflex"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_outputs"]
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 151655
    num_vision_tokens: int = 256
    vision_token_choices: list[int] | tuple[int, ...] | None = None
    vision_token_weights: list[float | int] | tuple[float | int, ...] | None = None
    vision_token_chooser: dict | None = None
    vision_feature_layer: int | list[int] = -1
    num_prefix_tokens: int | None = None
    downsample_factor: int = 1
    projector_connector: str = "swiglu"
    projector_hidden_size: int | None = None
    projector_hidden_act: str = "silu"
    projector_bias: bool | None = None
    projector_norm_eps: float | None = None
    projector_pools_last: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs):
        if kwargs.get("model_type", self.model_type) != self.model_type:
            raise ValueError(
                f"The checkpoint is of type {kwargs['model_type']!r}, not {self.model_type!r}: load it with the Auto "
                "classes, or make a TokenFLEX checkpoint of it with `tokenflex build`."
            )
        # vLLM and SGLang read this entry; the other classes add theirs when they are saved.
        kwargs.setdefault("auto_map", {"AutoModel": "modeling_tokenflex.TokenFlexModel"})
        self.vision_config = _as_config(self.vision_config, DEFAULT_VISION_CONFIG)
        self.text_config = _as_config(self.text_config, DEFAULT_TEXT_CONFIG)
        super().__post_init__(**kwargs)
        is_siglip = self.vision_config.model_type == "siglip_vision_model"
        if is_siglip and getattr(self.vision_config, "vision_use_head", True):  # transformers 5.18 does not name it
            self.vision_config = copy.deepcopy(self.vision_config)
            self.vision_config.vision_use_head = False
        known = count_prefix_tokens(self.vision_config)
        if self.num_prefix_tokens is None:
            self.num_prefix_tokens = known
        if self.num_prefix_tokens is None or known not in (None, self.num_prefix_tokens):
            raise ValueError(
                f"`num_prefix_tokens`={self.num_prefix_tokens} for a vision tower of type "
                f"{self.vision_config.model_type!r}: "
                + (f"it has {known}." if known is not None else "say how many class tokens and registers it has.")
                + f" Known towers: {', '.join(CLASS_TOKENS)}."
            )
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = self.text_config.tie_word_embeddings
        elif self.text_config.tie_word_embeddings != self.tie_word_embeddings:
            self.text_config = copy.deepcopy(self.text_config)
            self.text_config.tie_word_embeddings = self.tie_word_embeddings
        if self.projector_hidden_size is None:
            self.projector_hidden_size = self.text_config.hidden_size
        if self.projector_connector not in ("swiglu", "mlp", "linear"):
            raise ValueError(f"`projector_connector`={self.projector_connector!r}: it is swiglu, mlp or linear.")
        if self.projector_bias is None:
            self.projector_bias = self.projector_connector != "swiglu"
        if (self.vision_token_choices is None) != (self.vision_token_weights is None):
            raise ValueError(
                f"`vision_token_choices`={self.vision_token_choices} and `vision_token_weights`="
                f"{self.vision_token_weights}: give both, or neither for 64, 144 and 256 at 2:3:5."
            )
        if self.vision_token_choices is None:
            self.vision_token_choices, self.vision_token_weights = [64, 144, 256], [0.2, 0.3, 0.5]
        self.check_vision_tokens()

    @property
    def patch_size(self) -> tuple[int, int]:
        """`tuple[int, int]`: Height and width of a patch in pixels."""
        return _as_pair(self.vision_config.patch_size)

    @property
    def image_size(self) -> tuple[int, int]:
        """`tuple[int, int]`: Height and width in pixels of the images that the vision tower takes."""
        return _as_pair(self.vision_config.image_size)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """`tuple[int, int]`: Rows and columns of the features that are pooled, patches or blocks of them."""
        blocks = (patch * self.downsample_factor for patch in self.patch_size)
        return tuple(side // block for side, block in zip(self.image_size, blocks))

    @property
    def vision_feature_size(self) -> int:
        """`int`: The width of the features that are pooled."""
        num_layers = 1 if isinstance(self.vision_feature_layer, int) else len(self.vision_feature_layer)
        return self.vision_config.hidden_size * num_layers * self.downsample_factor**2

    def check_vision_tokens(self):
        """
        Checks the counts and weights.

        Raises:
            ValueError: If a count does not fit the patch grid, or weights do not fit the choices.
        """
        resolve_vision_token_grid(self.num_vision_tokens, self.patch_grid)
        if not self.vision_token_choices:
            raise ValueError("`vision_token_choices` is empty: give at least one vision-token count.")
        for i, count in enumerate(self.vision_token_choices):
            resolve_vision_token_grid(count, self.patch_grid, f"vision_token_choices[{i}]")
        check_vision_token_weights(self.vision_token_choices, self.vision_token_weights)
        if (chooser := self.vision_token_chooser) is not None:
            choices = chooser.get("choices")
            if not choices or sorted(set(choices)) != list(choices) or not 0 <= chooser.get("tolerance", -1) <= 1:
                raise ValueError(
                    f"`vision_token_chooser`={chooser}: it needs rising `choices` and a `tolerance` from 0 to 1, as "
                    "`tokenflex calibrate` writes them."
                )


def check_vision_token_weights(choices: Sequence[int], weights: Sequence[float]) -> None:
    """
    Checks that there is one finite, non-negative weight per count, not all of them zero.

    Raises:
        ValueError: If that does not hold; the message names both lists.
    """
    if len(choices) != len(weights):
        raise ValueError(
            f"`vision_token_weights` has {len(weights)} entries for {len(choices)} `vision_token_choices` "
            f"({list(weights)} for {list(choices)}): give one weight per choice."
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or sum(weights) <= 0:
        raise ValueError(
            f"`vision_token_weights`={list(weights)}: weights are finite, not negative and not all zero, such as "
            "[0.2, 0.3, 0.5]."
        )
