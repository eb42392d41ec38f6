"""TokenFLEX inside vLLM: its Transformers backend, with a vision-token count for each image of a request."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from itertools import compress

import PIL.Image
import torch
from transformers import BatchFeature
from vllm.model_executor.models.transformers.causal import CausalMixin
from vllm.model_executor.models.transformers.multimodal import (
    MultiModalDummyInputsBuilder,
    MultiModalMixin,
    MultiModalProcessingInfo,
    MultiModalProcessor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageSize
from vllm.multimodal.processing import ProcessorInputs, PromptReplacement, PromptUpdateDetails

from ..choices_tokenflex import count_tokens, resolve_named_count, sort_choices
from ..processing_tokenflex import read_image
from .counts import parse_num_vision_tokens


PER_IMAGE = ("num_vision_tokens", "crop_to_patches")


def lists_in(options: Mapping[str, object]) -> list[str]:
    """The names of the options that have an entry for each image."""
    return [name for name in PER_IMAGE if isinstance(options.get(name), list)]


def options_of(index: int, options: Mapping[str, object]) -> dict:
    """The options of one image alone."""
    return {**options, **{name: options[name][index] for name in lists_in(options)}}


class TokenFlexProcessingInfo(MultiModalProcessingInfo):
    """What vLLM asks about images before it has any."""

    def get_hf_processor(self, **kwargs):
        # One for all requests: it takes their options when it is called.
        return super().get_hf_processor()

    @cached_property
    def largest_count(self) -> int | tuple[int, int] | str:
        """The count that memory is reserved for: the largest trained, or the engine's own if that is larger."""
        return sort_choices([self.get_hf_processor().num_vision_tokens, *self.get_hf_config().vision_token_choices])[
            -1
        ]

    @cached_property
    def largest_size(self) -> ImageSize:
        """The size of an image that makes the most tokens. Tiles and grids by shape are full at some shapes alone."""
        processor = self.get_hf_processor()
        height, width = processor.image_size
        sides = range(1, 1 + max(processor.max_patches, *processor.patch_grid))
        sizes = [ImageSize(width * columns, height * rows) for rows in sides for columns in sides]
        return max(sizes, key=self._get_num_image_tokens)

    def get_image_size_with_most_features(self) -> ImageSize:
        return self.largest_size

    def parse_mm_data(self, mm_data, **kwargs):
        """As in vLLM, whose own conversion of images knows no 16 bits: they are read as everywhere else."""
        images = mm_data.get("image")
        images = [images] if isinstance(images, PIL.Image.Image) else images
        if isinstance(images, (list, tuple)):
            images = [read_image(image) if isinstance(image, PIL.Image.Image) else image for image in images]
            mm_data = {**mm_data, "image": images}
        return super().parse_mm_data(mm_data, **kwargs)

    def _get_num_image_tokens(self, size: ImageSize) -> int:
        options = {"image_sizes": [(size.height, size.width)], "num_vision_tokens": self.largest_count}
        return self.get_hf_processor()._get_num_multimodal_tokens(**options)["num_image_tokens"][0]


class TokenFlexMultiModalProcessor(MultiModalProcessor):
    """
    Processes the images of a request, of which each may have its own count. An image is kept under its own count
    alone, so that it is found again at another place in another request.
    """

    def get_dummy_inputs(self, *args, **kwargs) -> ProcessorInputs:
        """As in vLLM, at the count that memory is reserved for."""
        options = {"num_vision_tokens": self.info.largest_count}
        return replace(super().get_dummy_inputs(*args, **kwargs), hf_processor_mm_kwargs=options)

    def apply(self, inputs: ProcessorInputs, timing_ctx):
        """
        As in vLLM, with counts as command lines and requests write them.

        Raises:
            ValueError: If a count is not allowed or more than what is reserved, or a text holds image tokens.
        """
        num_images = inputs.mm_data_items.get_all_counts().get("image", 0)
        image_token_id = self.info.get_hf_config().image_token_id
        found = inputs.prompt.count(image_token_id)
        if found != num_images:
            token = self.info.get_hf_processor().image_token
            raise ValueError(
                f"The prompt holds {found} image tokens ({token}) for {num_images} images: write one each."
            )
        options = self._resolve_options(inputs.hf_processor_mm_kwargs, num_images)
        return super().apply(replace(inputs, hf_processor_mm_kwargs=options), timing_ctx)

    def _resolve_options(self, kwargs: Mapping[str, object], num_images: int) -> dict:
        options = {"num_vision_tokens": self.info.get_hf_processor().num_vision_tokens}
        options |= {**kwargs, **kwargs.get("images_kwargs", {})}
        options.pop("images_kwargs", None)
        choices = self.info.get_hf_config().vision_token_choices
        counts = resolve_named_count(parse_num_vision_tokens(options["num_vision_tokens"]), choices)
        if counts == "auto":
            raise ValueError("`num_vision_tokens`='auto' needs `tokenflex serve`: in vLLM no model chooses a count.")
        options["num_vision_tokens"] = counts
        for name in lists_in(options):
            if len(options[name]) != num_images:
                raise ValueError(
                    f"`{name}` lists {len(options[name])} entries for {num_images} images: give one for each."
                )
        return options

    def _get_mm_hashes(self, inputs: ProcessorInputs):
        options = inputs.hf_processor_mm_kwargs
        if not lists_in(options):
            return super()._get_mm_hashes(inputs)
        hashes = []
        for i, image in enumerate(inputs.mm_data_items["image"].data):
            own = replace(
                inputs,
                mm_data_items=self.info.parse_mm_data({"image": [image]}, validate=False),
                mm_uuid_items={name: items[i : i + 1] for name, items in (inputs.mm_uuid_items or {}).items()},
                hf_processor_mm_kwargs=options_of(i, options),
            )
            hashes += super()._get_mm_hashes(own)["image"]
        return {"image": hashes}

    def _get_cache_missing_processor_kwargs(self, inputs: ProcessorInputs, mm_is_cached):
        options = dict(super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached))
        missing = [not is_cached for is_cached in mm_is_cached.get("image", ())]
        return options | {name: list(compress(options[name], missing)) for name in lists_in(options)}

    def _apply_hf_processor_main(self, mm_items, hf_kwargs: Mapping[str, object]):
        if lists_in(hf_kwargs) and "image" in mm_items:
            each = [
                self._apply_hf_processor_main(
                    self.info.parse_mm_data({"image": [image]}, validate=False), options_of(i, hf_kwargs)
                )
                for i, image in enumerate(mm_items["image"].data)
            ]
            names = each[0].keys() - {"attention_mask"}  # of the dummy text, which vLLM drops
            return BatchFeature({name: torch.cat([fields[name] for fields in each]) for name in names})
        try:
            fields = super()._apply_hf_processor_main(mm_items, hf_kwargs)
        except ValueError as error:
            # vLLM's own text shows the images in full, and not what is wrong.
            raise error if error.__cause__ is None else ValueError(str(error.__cause__)) from None
        reserved = self.info.get_max_image_tokens()
        largest = max(fields.get("image_replacement_sizes", ()), default=0)
        if largest > reserved:
            raise ValueError(
                f"An image has {largest} vision tokens, and this engine has reserved {reserved} for each: ask for "
                f"fewer, or start it with --mm-processor-kwargs '{{\"num_vision_tokens\": N}}'."
            )
        return fields

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        # vLLM takes the commonest token of an image's text for the one that holds it, which fails at one token.
        token_id = self.info.get_hf_config().image_token_id
        texts = [item.pop("image_replacement_ids").data.tolist() for item in out_mm_kwargs.get("image", ())]
        replacements = [PromptUpdateDetails.select_token_id(text, token_id) for text in texts]
        return [PromptReplacement("image", [token_id], replacements.__getitem__)] if texts else []

    def _get_num_image_patches(self, hf_inputs, mm_data, num_images: int) -> torch.Tensor:
        hf_inputs.pop("image_shapes", None)  # no argument of the tower's
        # Images of several requests are joined, so that each has one: (0, 0) is the one that goes with the count.
        hf_inputs.setdefault("image_resolutions", torch.zeros_like(torch.as_tensor(hf_inputs["vision_token_grids"])))
        return torch.as_tensor(hf_inputs.pop("num_tiles", [1] * num_images))


@MULTIMODAL_REGISTRY.register_processor(
    TokenFlexMultiModalProcessor, info=TokenFlexProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class TokenFlexForConditionalGeneration(MultiModalMixin, CausalMixin):
    """
    vLLM's Transformers backend; it joins each image's tiles, and never answers with image tokens. The tower sees no
    more images at once than when vLLM measured its memory, which counts tokens: at small counts many images have few.
    """

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        info = MULTIMODAL_REGISTRY.get_processing_info(vllm_config.model_config)
        budget = vllm_config.scheduler_config.max_num_batched_tokens
        self.rows_at_once = max(1, budget // count_tokens(info.largest_count))

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits = super().compute_logits(hidden_states)
        if logits is not None:  # not of the other ranks' share
            logits[..., self.config.image_token_id] = -torch.inf
        return logits

    def _get_features(self, modality: str, pixel_values: torch.Tensor, **kwargs):
        features = []
        for start in range(0, len(pixel_values), self.rows_at_once):
            rows = slice(start, start + self.rows_at_once)
            others = {name: value[rows] for name, value in kwargs.items()}
            features += super()._get_features(modality, pixel_values[rows], **others)
        return features

    def _process_vision_input(self, modality: str, pixel_values, num_patches: torch.Tensor, **kwargs):
        tiles = iter(super()._process_vision_input(modality, pixel_values, num_patches, **kwargs))
        return [torch.cat([next(tiles) for _ in range(count)]) for count in num_patches.flatten().tolist()]
