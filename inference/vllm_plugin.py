"""Function that vLLM calls as it starts, in each of its processes: entry point group `vllm.general_plugins`."""


def register() -> None:
    """
    Lets vLLM serve TokenFLEX checkpoints without remote code: configuration and processor come from the Auto classes,
    which know them once this package is imported. May be called more than once.
    """
    from vllm import ModelRegistry

    architecture = "TokenFlexForConditionalGeneration"
    ModelRegistry.register_model(architecture, f"tokenflex.inference.vllm_model:{architecture}")
