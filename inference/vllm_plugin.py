"""Function that vLLM calls as it starts, in each of its processes: entry point group `vllm.general_plugins`."""

from ..modeling_tokenflex import TokenFlexForConditionalGeneration


def register() -> None:
    """
    Lets vLLM serve TokenFLEX checkpoints without remote code. Its Transformers backend looks for the architecture in
    `transformers`; configuration, model and processor come from the Auto classes, which know them once this module is
    imported. May be called more than once.
    """
    import transformers  # not before the model: importing processors makes transformers a new module

    transformers.TokenFlexForConditionalGeneration = TokenFlexForConditionalGeneration
