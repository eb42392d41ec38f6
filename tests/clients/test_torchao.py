"""The scheme that `tests/test_modeling_backends.py` leaves out, which quantizes activations as well."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, TorchAoConfig

from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.data.synthetic import draw_scene


pytest.importorskip("torchao", minversion="0.18")  # before, what it quantizes cannot be saved
quantization = pytest.importorskip("torchao.quantization")

IMAGES = [draw_scene(5, index).image for index in range(3)]
TEXTS = ["<|image_pad|> which color?", "one <|image_pad|> and one <|image_pad|>: how tall is the red bar?"]
GENERATE = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(scope="module")
def quantized(both, tmp_path_factory):
    path = tmp_path_factory.mktemp("torchao")
    save_checkpoint(path / "checkpoint", *both)
    config = TorchAoConfig(
        quantization.Int8DynamicActivationInt8WeightConfig(),
        modules_to_not_convert=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    )
    model = AutoModelForImageTextToText.from_pretrained(path / "checkpoint", quantization_config=config).eval()
    model.save_pretrained(path / "quantized")
    return model, AutoModelForImageTextToText.from_pretrained(path / "quantized").eval()


def encode(processor, count):
    return processor(images=IMAGES, text=TEXTS, num_vision_tokens=count, padding=True, return_tensors="pt")


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


def test_only_the_language_model_is_quantized(quantized):
    for model in quantized:
        is_quantized = {name: type(weight.data) is not torch.Tensor for name, weight in model.named_parameters()}
        assert {name for name, found in is_quantized.items() if found} == {
            name for name in is_quantized if ".language_model.layers." in name and name.endswith("_proj.weight")
        }
        assert any(is_quantized.values())


@pytest.mark.parametrize("count", [4, 16, 36])
def test_answers_stay_close_at_every_count(both, quantized, count):
    plain, processor = both
    inputs = encode(processor, count)
    expected, logits = logits_of(plain, inputs), logits_of(quantized[0], inputs)
    assert 0 < (logits - expected).abs().max() < 0.1 * expected.abs().max()
    assert torch.equal(logits_of(quantized[1], inputs), logits)


def test_a_recounted_prompt_equals_an_encoded_one(both, quantized):
    processor = both[1]
    for model in quantized:
        for count in (4, [36, (2, 5), 9]):
            encoded = model.generate(**encode(processor, count), **GENERATE)
            recounted = model.generate(**encode(processor, 16), num_vision_tokens=count, **GENERATE)
            assert torch.equal(torch.stack(recounted.logits), torch.stack(encoded.logits))
