"""What the entry point `lmms_eval.models` names, so that `lmms-eval --model tokenflex` works where both are installed."""


def manifests():
    """The manifest of the chat model; lmms-eval imports the model itself only when it is asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="tokenflex", chat_class_path="tokenflex.evaluation.lmms_eval_model.TokenFlexChat")
