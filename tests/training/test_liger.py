"""
Liger's kernels need Triton: on a machine without a GPU the tests that run them do so in Triton's interpreter, which
has to be chosen before Triton is imported, and therefore in a process of their own.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, SiglipVisionConfig, Trainer, TrainingArguments
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.qwen2 import modeling_qwen2

from tokenflex import TokenFlexConfig, TokenFlexForConditionalGeneration
from tokenflex.data.synthetic import SyntheticVQA
from tokenflex.modeling_tokenflex import TokenFlexCausalLMOutputWithPast
from tokenflex.towers.tiny import tiny_model_and_processor
from tokenflex.training import TokenFlexDataCollator
from tokenflex.training.liger import apply_liger_kernels, register_liger
from tokenflex.training.lora import add_adapters, lora_config


pytest.importorskip("liger_kernel")
from liger_kernel.transformers import monkey_patch  # noqa: E402
from liger_kernel.transformers.model import loss_utils  # noqa: E402


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
runs_kernels = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="run by test_kernels_in_the_interpreter, in another process"
)


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="the kernels are tested in this process")
def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-k", "kernels", "--import-mode=importlib", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.fixture(autouse=True)
def own_patches(monkeypatch):
    """What Liger replaces in transformers' modules is put back."""
    for module in (modeling_qwen2, modeling_gemma2):
        for name in ("apply_rotary_pos_emb", "Qwen2RMSNorm", "Qwen2MLP", "Gemma2RMSNorm", "Gemma2MLP"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(monkey_patch, "MODEL_TYPE_TO_APPLY_LIGER_FN", {**monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN})


@pytest.fixture(scope="module")
def processor():
    return tiny_model_and_processor(width=32)[1]


@pytest.fixture(scope="module")
def batch(processor):
    collator = TokenFlexDataCollator(processor, [4], [1.0])
    rows = SyntheticVQA(2, seed=1, questions_per_image=2)
    return {name: value.to(DEVICE) for name, value in collator([rows[0], rows[1]]).items()}


def tiny():
    return tiny_model_and_processor(width=32)[0].to(DEVICE).train()


def gemma(processor):
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = TokenFlexConfig(
        vision_config=SiglipVisionConfig(**size, image_size=64, patch_size=8),
        text_config=Gemma2Config(
            **size, num_key_value_heads=2, head_dim=8, vocab_size=len(processor.tokenizer),
            final_logit_softcapping=0.5, pad_token_id=0, bos_token_id=None, eos_token_id=2,
        ),
        image_token_id=processor.image_token_id,
        num_vision_tokens=36,
        vision_token_choices=[4, 36],
        vision_token_weights=[0.5, 0.5],
    )  # fmt: skip
    torch.manual_seed(0)
    return TokenFlexForConditionalGeneration(config).to(DEVICE).train()


def fused_in_torch(
    input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
    reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None, use_token_scaling=False,
    return_token_accuracy=False, return_predicted_tokens=False,
):  # fmt: skip
    logits = nn.functional.linear(input, weight)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return nn.functional.cross_entropy(logits.float(), target, ignore_index=ignore_index, reduction=reduction)


@pytest.fixture
def loss_in_torch(monkeypatch):
    monkeypatch.setattr(loss_utils.F, "liger_fused_linear_cross_entropy", fused_in_torch)


def only_head(model, **options):
    apply_liger_kernels(model, rope=False, rms_norm=False, swiglu=False, geglu=False, **options)
    return model


def loss_and_gradients(model, batch, **kwargs):
    model.zero_grad()
    output = model(**batch, **kwargs)
    output.loss.backward()
    return output, {name: weight.grad for name, weight in model.named_parameters()}


def assert_same_step(plain, model, apply, batch, **kwargs):
    """`plain` runs first, since Liger also replaces what is not the model's own."""
    output, gradients = loss_and_gradients(plain, batch, **kwargs)
    apply(model)
    fused, fused_gradients = loss_and_gradients(model, batch, **kwargs)
    assert type(fused) is TokenFlexCausalLMOutputWithPast
    assert fused.logits is None and output.logits is not None
    torch.testing.assert_close(fused.loss, output.loss, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(fused_gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("num_items_in_batch", [None, 7])
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_fused_head_has_the_plain_loss_and_gradients(processor, batch, loss_in_torch, family, num_items_in_batch):
    models = [gemma(processor) if family == "gemma2" else tiny() for _ in range(2)]
    assert_same_step(*models, only_head, batch, num_items_in_batch=num_items_in_batch)


def test_head_is_not_called_in_training(batch, loss_in_torch):
    model = only_head(tiny())
    calls = []
    model.lm_head.register_forward_hook(lambda *args: calls.append(1))
    model(**batch)
    assert not calls
    model(**{name: value for name, value in batch.items() if name != "labels"})
    assert len(calls) == 1


def test_without_labels_or_in_evaluation_the_forward_is_the_plain_one(batch):
    plain, fused = tiny(), only_head(tiny())
    without_labels = {name: value for name, value in batch.items() if name != "labels"}
    assert torch.equal(fused(**without_labels).logits, plain(**without_labels).logits)
    first, second = fused.eval()(**batch), plain.eval()(**batch)
    assert torch.equal(first.logits, second.logits) and torch.equal(first.loss, second.loss)
    assert isinstance(fused(**batch, return_dict=False), tuple)


def test_generation_is_the_plain_one(processor, batch):
    inputs = processor(images=SyntheticVQA(1, 2)[0]["image"], text="<|image_pad|>color?", return_tensors="pt")
    outputs = [
        model.eval().generate(**inputs.to(DEVICE), num_vision_tokens=4, max_new_tokens=4, do_sample=False)
        for model in (tiny(), only_head(tiny()))
    ]
    assert torch.equal(*outputs)


def test_part_of_the_positions_can_be_kept(batch, loss_in_torch):
    last = {**batch, "labels": batch["labels"][:, -5:], "logits_to_keep": 5}
    assert_same_step(tiny(), tiny(), only_head, last)


def test_two_losses_are_refused():
    with pytest.raises(ValueError, match="cross_entropy"):
        apply_liger_kernels(tiny(), cross_entropy=True)


def test_fused_loss_can_be_left_out(batch):
    model = only_head(tiny(), fused_linear_cross_entropy=False)
    assert model(**batch).logits is not None


def fit(model, tmp_path, **kwargs):
    collator = TokenFlexDataCollator(tiny_model_and_processor(width=32)[1])
    args = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=2, learning_rate=0.1,
        optim="sgd", logging_steps=1, save_strategy="no", remove_unused_columns=False, use_cpu=DEVICE == "cpu",
        report_to="none", disable_tqdm=True, per_device_eval_batch_size=2, prediction_loss_only=True, **kwargs,
    )  # fmt: skip
    data = SyntheticVQA(4, seed=1, questions_per_image=2)
    trainer = Trainer(
        model, args, data_collator=collator, train_dataset=data, eval_dataset=data, callbacks=[collator.callback]
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("adapters", [False, True])
def test_trainer_finds_the_fused_head(tmp_path, loss_in_torch, adapters):
    register_liger()
    runs, weights = [], []
    for use_liger_kernel in (False, True):
        model = tiny()
        made = []
        model.lm_head.register_forward_hook(lambda *args, made=made: made.append(1))
        torch.manual_seed(0)
        trained = add_adapters(model, lora_config(model)) if adapters else model
        only = {"rope": False, "rms_norm": False, "swiglu": False}
        runs.append(fit(trained, tmp_path, use_liger_kernel=use_liger_kernel, liger_kernel_config=only))
        weights.append(list(trained.parameters()))
        assert bool(made) != use_liger_kernel
    torch.testing.assert_close(*runs, rtol=1e-4, atol=0)
    for first, second in zip(*weights):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


@runs_kernels
@pytest.mark.parametrize("num_items_in_batch", [None, 7])
def test_kernels_of_the_head_have_the_plain_loss_and_gradients(batch, num_items_in_batch):
    assert_same_step(tiny(), tiny(), only_head, batch, num_items_in_batch=num_items_in_batch)


@runs_kernels
def test_kernels_of_the_language_model_have_the_plain_loss_and_gradients(batch):
    def apply(model):
        # Triton's interpreter hands a kernel plain floats, on which those of norms and layers call a tensor's methods.
        apply_liger_kernels(model, rms_norm=not INTERPRETED, swiglu=not INTERPRETED)
        assert modeling_qwen2.apply_rotary_pos_emb is monkey_patch.liger_rotary_pos_emb
        assert ("LigerRMSNorm" in str(model.model.language_model)) != INTERPRETED

    assert_same_step(tiny(), tiny(), apply, batch)


def test_options_reach_the_language_model():
    model = tiny()
    apply_liger_kernels(model, rope=False, rms_norm=False)
    assert "LigerSwiGLUMLP" in str(model.model.language_model)
    assert "LigerRMSNorm" not in str(model.model.language_model)
    assert modeling_qwen2.apply_rotary_pos_emb is not monkey_patch.liger_rotary_pos_emb
    assert "Liger" not in str(model.model.vision_tower) + str(model.model.multi_modal_projector)
