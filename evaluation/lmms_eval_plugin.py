"""Target of the entry point `lmms_eval.models`, for `lmms-eval --model tokenflex` where both are installed."""


def manifests():
    """The manifest of the chat model; lmms-eval imports the model itself only when it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="tokenflex", chat_class_path="tokenflex.evaluation.lmms_eval_model.TokenFlexChat")
