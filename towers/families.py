"""The families of fixed-count vision-language models in transformers that can be adopted, as a table."""

from dataclasses import dataclass, field

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Family:
    """
    Where the parts of a family's models stand, and what its processor writes around an image.

    Args:
        linear (`dict[str, str]`): For each layer of [`TokenFlexConnector`] the projector's; `gate_up` is both in one.
        kind (`str`, *optional*, defaults to `"mlp"`): The `projector_connector`.
        vision_tower, projector, language_model (`str`, *optional*): The parts' names in the model.
        image_token (`str`, *optional*): The processor's attribute that holds the token that is repeated.
        start, end (`tuple[str, ...]`, *optional*): The attributes of what stands before and behind an image.
        whole_image (`dict`, *optional*): Options of the image processor that keep it from cutting images into tiles.
        drops_class_token (`bool`, *optional*): Whether the class token is dropped. Defaults to what the config says.
        has_base_view (`bool`, *optional*): Whether tiles stand behind a view of the whole image, which alone is kept.
        reads_output (`bool`, *optional*): Whether the feature layer -1 is the tower's output, behind its last norm.
        downsample (`str`, *optional*): The config's field with the side of the blocks of patches, or 1 over it.
        pools_last (`bool`, *optional*): Whether the model itself pools, behind its projector.
    """

    linear: dict[str, str]
    kind: str = "mlp"
    vision_tower: str = "vision_tower"
    projector: str = "multi_modal_projector"
    language_model: str = "language_model"
    image_token: str = "image_token"
    start: tuple[str, ...] = ()
    end: tuple[str, ...] = ()
    whole_image: dict = field(default_factory=dict)
    drops_class_token: bool | None = None
    has_base_view: bool = False
    reads_output: bool = False
    downsample: str | None = None
    pools_last: bool = False


LLAVA = {"up": "linear_1", "down": "linear_2"}
IDEFICS = {
    "linear": {"down": "proj"},
    "kind": "linear",
    "vision_tower": "vision_model",
    "projector": "connector.modality_projection",
    "language_model": "text_model",
    "end": ("fake_image_token",),
    "whole_image": {"do_image_splitting": False},
    "reads_output": True,
    "downsample": "scale_factor",
}
FAMILIES = {
    "aya_vision": Family(
        {"norm": "layernorm", "gate_up": "linear_1", "down": "linear_2"},
        kind="swiglu",
        image_token="img_patch_token",
        start=("start_of_img_token", "tile_global_token"),
        end=("end_of_img_token",),
        whole_image={"crop_to_patches": False},
        downsample="downsample_factor",
    ),
    "fast_vlm": Family(LLAVA, reads_output=True),
    "idefics3": Family(**IDEFICS, start=("fake_image_token", "global_image_tag")),
    "internvl": Family(
        {"norm": "layer_norm", **LLAVA},
        start=("start_image_token",),
        end=("end_image_token",),
        whole_image={"crop_to_patches": False},
        reads_output=True,
        downsample="downsample_ratio",
    ),
    "llava": Family(LLAVA),
    "llava_next": Family(LLAVA, has_base_view=True),
    "llava_onevision": Family(LLAVA, has_base_view=True),
    "perception_lm": Family(LLAVA, whole_image={"vision_input_type": "vanilla"}, reads_output=True, pools_last=True),
    "smolvlm": Family(**IDEFICS, start=("fake_image_token", "global_image_token")),
    "vipllava": Family({"norm": "projector_layernorm", **LLAVA}, drops_class_token=True),
}
TWO_WAYS = "lets an image's tokens see each other in both directions, which the language models here do not"
NATIVE = "takes images at their own resolution, so that they have no fixed count of tokens to start from"
REFUSED = {
    "gemma3": TWO_WAYS,
    "gemma4": NATIVE,
    "glm4v": NATIVE,
    "kimi_k25": NATIVE,
    "minicpmv4_6": NATIVE,
    "mistral3": NATIVE,
    "paligemma": "lets an image's tokens and the question see each other in both directions",
    "pixtral": NATIVE,
    "qwen2_vl": NATIVE,
    "qwen2_5_vl": NATIVE,
    "qwen3_vl": NATIVE,
    "qwen3_5": NATIVE,
}


def find_family(checkpoint: str, config: PreTrainedConfig) -> Family:
    """
    Looks up how a checkpoint's family is built.

    Args:
        checkpoint (`str`): Hub id or folder, to be named in errors.
        config (`PreTrainedConfig`): Its configuration.

    Raises:
        ValueError: If the family is not known, or cannot be adopted.
    """
    kind = config.model_type
    known = f"Families that can be adopted: {', '.join(FAMILIES)}."
    inner = getattr(getattr(config, "vision_config", None), "model_type", None)
    for name in (kind, inner):
        if name in REFUSED:
            raise ValueError(f"`model`={checkpoint!r} is of type {name!r}, which {REFUSED[name]}. {known}")
    if kind not in FAMILIES:
        raise ValueError(f"`model`={checkpoint!r} is of type {kind!r}, which is not known. {known}")
    return FAMILIES[kind]
