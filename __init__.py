"""TokenFLEX: one vision-language model, any number of vision tokens (arXiv 2504.03154)."""

import importlib
from typing import TYPE_CHECKING

from .registration import register_with_auto_classes


if TYPE_CHECKING:
    from .configuration_tokenflex import (
        TokenFlexConfig,
        match_vision_token_grid,
        resolve_vision_token_grid,
        resolve_vision_token_grids,
    )
    from .image_cache_tokenflex import ImageFeatureCache
    from .modeling_tokenflex import (
        TokenFlexForConditionalGeneration,
        TokenFlexModel,
        TokenFlexPreTrainedModel,
        TokenFlexProjector,
        pooling_weights,
    )
    from .placeholders_tokenflex import recount_vision_tokens
    from .processing_tokenflex import TokenFlexProcessor


__version__ = "0.1.0"

# Where the public names are; they are imported when they are first asked for, and torch with them.
_MODULES = {
    "ImageFeatureCache": "image_cache_tokenflex",
    "TokenFlexConfig": "configuration_tokenflex",
    "TokenFlexForConditionalGeneration": "modeling_tokenflex",
    "TokenFlexModel": "modeling_tokenflex",
    "TokenFlexPreTrainedModel": "modeling_tokenflex",
    "TokenFlexProcessor": "processing_tokenflex",
    "TokenFlexProjector": "modeling_tokenflex",
    "match_vision_token_grid": "configuration_tokenflex",
    "pooling_weights": "modeling_tokenflex",
    "recount_vision_tokens": "placeholders_tokenflex",
    "resolve_vision_token_grid": "configuration_tokenflex",
    "resolve_vision_token_grids": "configuration_tokenflex",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]


register_with_auto_classes()
