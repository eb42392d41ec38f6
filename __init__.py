"""TokenFLEX: one vision-language model, any number of vision tokens (arXiv 2504.03154)."""

import os
import sys


# Threads of OpenMP, which torch loads, are to sleep while they wait for each other: those that spin keep a core from
# the one they wait for as soon as there is other work. Figures stand in docs/performance.md, "Beside other work".
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .choices_tokenflex import match_vision_token_grid, resolve_vision_token_grid, resolve_vision_tokens
from .configuration_tokenflex import TokenFlexConfig
from .modeling_tokenflex import (
    TokenFlexForConditionalGeneration,
    TokenFlexModel,
    TokenFlexPreTrainedModel,
)
from .placeholders_tokenflex import at_count
from .processing_tokenflex import TokenFlexProcessor
from .vision_tokenflex import TokenFlexProjector, pooling_weights


__version__ = "0.1.0"

AutoConfig.register("tokenflex", TokenFlexConfig, exist_ok=True)
AutoModel.register(TokenFlexConfig, TokenFlexModel, exist_ok=True)
AutoModelForImageTextToText.register(TokenFlexConfig, TokenFlexForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(TokenFlexConfig, TokenFlexForConditionalGeneration, exist_ok=True)
AutoProcessor.register(TokenFlexConfig, TokenFlexProcessor, exist_ok=True)


__all__ = [
    "TokenFlexConfig",
    "TokenFlexForConditionalGeneration",
    "TokenFlexModel",
    "TokenFlexPreTrainedModel",
    "TokenFlexProcessor",
    "TokenFlexProjector",
    "at_count",
    "match_vision_token_grid",
    "pooling_weights",
    "resolve_vision_token_grid",
    "resolve_vision_tokens",
]
