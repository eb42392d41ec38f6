"""TokenFLEX model configuration."""

import copy
import math
import operator
from collections.abc import Sequence

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .choices_tokenflex import (
    as_pair,
    check_vision_token_weights,
    follow_shape,
    format_size,
    resolve_patch_grid,
    resolve_vision_tokens,
    split_choice,
)


# The number of class tokens before a tower's patches; registers are counted by the tower's own configuration.
CLASS_TOKENS = {
    "clip_vision_model": 1,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "idefics3_vision": 0,
    "internvl_vision": 1,
    "siglip2_vision_model": 0,
    "siglip_vision_model": 0,
    "smolvlm_vision": 0,
    "vit": 1,
}
NAFLEX = "siglip2_vision_model"  # SigLIP 2's NaFlex towers, whose patches keep an image's shape
# The towers that take smaller images, and the argument by which they then interpolate their position embeddings.
INTERPOLATION = {
    **dict.fromkeys(("clip_vision_model", "siglip_vision_model", "vit"), {"interpolate_pos_encoding": True}),
    **dict.fromkeys(("dinov2", "dinov2_with_registers", "dinov3_vit", "internvl_vision", NAFLEX), {}),
}


def count_prefix_tokens(vision_config: PreTrainedConfig) -> int | None:
    """Counts the class tokens and registers before the patches of a tower's output; `None` for an unknown tower."""
    class_tokens = CLASS_TOKENS.get(vision_config.model_type)
    return None if class_tokens is None else class_tokens + getattr(vision_config, "num_register_tokens", 0)


def _as_config(config: dict | PreTrainedConfig | None, default: dict) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    options = dict(default if config is None else config)
    return AutoConfig.for_model(options.pop("model_type", default["model_type"]), **options)


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
        num_vision_tokens (`int` or `str`, *optional*, defaults to 256):
            The vision-token count per image when none is asked for.
        vision_token_choices (`list[int | str]`, *optional*, defaults to `[64, 144, 256]`):
            The counts that training draws from (the paper's). One with a resolution, such as `"64@224"`, lets the
            tower see the image shrunk to that many pixels, in training and wherever the count is asked for alone.
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
            The `choices` among which `"auto"` chooses, the cheapest first, the `tolerance` and what it `reads`, as
            `tokenflex calibrate` writes them. The head that chooses is kept with the weights.
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
    num_vision_tokens: int | str = 256
    vision_token_choices: list[int | str] | tuple[int | str, ...] | None = None
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
        is_siglip = self.vision_config.model_type in ("siglip_vision_model", NAFLEX)
        if is_siglip and getattr(self.vision_config, "vision_use_head", True):  # transformers 5.18 does not name it
            self.vision_config = copy.deepcopy(self.vision_config)
            self.vision_config.vision_use_head = False
        patches = 1 if self.max_num_patches is None else self.vision_config.num_patches
        if patches != math.isqrt(patches) ** 2:
            raise ValueError(
                f"`vision_config.num_patches`={patches}: give a square, such as {math.isqrt(patches) ** 2}."
            )
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
        return as_pair(self.vision_config.patch_size)

    @property
    def image_size(self) -> tuple[int, int]:
        """`tuple[int, int]`: Height and width in pixels of the images that the model takes."""
        if self.max_num_patches is not None:  # a square in which an image of any shape has its resolution
            return tuple(2 * math.isqrt(self.vision_config.num_patches) * patch for patch in self.patch_size)
        return as_pair(self.vision_config.image_size)

    @property
    def max_num_patches(self) -> int | None:
        """`int`, *optional*: The patches, or blocks of them, that a NaFlex tower sees an image of any shape as."""
        is_naflex = self.vision_config.model_type == NAFLEX
        return self.vision_config.num_patches // self.downsample_factor**2 if is_naflex else None

    @property
    def block_size(self) -> tuple[int, int]:
        """`tuple[int, int]`: Height and width in pixels of the patches, or blocks of them, that make one feature."""
        return tuple(patch * self.downsample_factor for patch in self.patch_size)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """`tuple[int, int]`: Rows and columns of the features that are pooled, patches or blocks of them."""
        return tuple(side // block for side, block in zip(self.image_size, self.block_size))

    def own_resolution(self, grid: tuple[int, int] = (1, 1)) -> tuple[int, int]:
        """
        (height, width) in pixels that the tower sees an image at by itself.

        Args:
            grid (`tuple[int, int]`, *optional*, defaults to `(1, 1)`): The grid whose shape a NaFlex tower follows.
        """
        if self.max_num_patches is None:
            return self.image_size
        return follow_shape(grid, max(self.max_num_patches, math.prod(grid)), self.image_size, self.block_size)

    def patch_grid_at(self, resolution: tuple[int, int], asked: str | None = None) -> tuple[int, int]:
        """
        The patch grid of an image that is shrunk to a resolution.

        Args:
            resolution (`tuple[int, int]`): (height, width) in pixels.
            asked (`str`, *optional*): The argument and its value, for errors. Defaults to `image_size`.

        Raises:
            ValueError: If a side is no multiple of the patch or too large, or the tower takes no smaller images.
        """
        if resolution != self.image_size:
            kind, (height, width) = self.vision_config.model_type, self.image_size
            if kind not in INTERPOLATION or (height != width and kind != "dinov3_vit"):
                raise ValueError(
                    f"{asked or f'`image_size`={format_size(resolution)}'}: a vision tower of type {kind!r} for "
                    f"images of {height}x{width} pixels takes no others. Square towers that do: "
                    f"{', '.join(INTERPOLATION)}."
                )
        return resolve_patch_grid(resolution, self.image_size, self.block_size, asked)

    def resolution_for(self, grid: tuple[int, int]) -> tuple[int, int]:
        """
        The resolution that goes with a grid where none is asked for: the largest of those `vision_token_choices` that
        have as many tokens, else the tower's own. A NaFlex tower, which sees images in the shapes that come with them,
        takes the grid's shape for the image's where none does.

        Args:
            grid (`tuple[int, int]`): (rows, columns) of the vision tokens.

        Returns:
            `tuple[int, int]`: (height, width) in pixels.
        """
        fitting, own = [], self.own_resolution(grid)
        for choice in self.vision_token_choices:
            count, resolution = split_choice(choice)
            resolution = resolution or own
            if count == math.prod(grid) and all(map(operator.ge, self.patch_grid_at(resolution), grid)):
                fitting.append(resolution)
        return max(fitting, key=math.prod, default=own)

    def resolutions_for(self, choices: Sequence[int | str], name: str = "num_vision_tokens") -> list[tuple[int, int]]:
        """
        Lists the resolutions that some choices let the vision tower see images at, each once.

        Args:
            choices (`Sequence[int | str]`): Counts, also with resolutions.
            name (`str`, *optional*, defaults to `"num_vision_tokens"`): The argument to name in errors.

        Raises:
            ValueError: If a choice is not allowed.
        """
        grids, sizes = resolve_vision_tokens(list(choices), len(choices), self, name)
        return list(dict.fromkeys(size or self.resolution_for(grid) for grid, size in zip(grids, sizes)))

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
        resolve_vision_tokens(self.num_vision_tokens, 1, self)
        if not self.vision_token_choices:
            raise ValueError("`vision_token_choices` is empty: give at least one vision-token count.")
        choices = list(self.vision_token_choices)
        resolve_vision_tokens(choices, len(choices), self, "vision_token_choices")
        check_vision_token_weights(self.vision_token_choices, self.vision_token_weights)
        if (chooser := self.vision_token_chooser) is not None:
            choices = chooser.get("choices")
            counts = [choice for choice in choices or () if not isinstance(choice, str)]
            is_rising = choices and len(set(choices)) == len(choices) and sorted(counts) == counts
            if not is_rising or not 0 <= chooser.get("tolerance", -1) <= 1:
                raise ValueError(
                    f"`vision_token_chooser`={chooser}: it needs rising `choices` and a `tolerance` from 0 to 1, as "
                    "`tokenflex calibrate` writes them."
                )
