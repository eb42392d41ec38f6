"""The model under other attention kernels, precisions, devices, compilers, exporters and quantizers."""

import copy
import functools
import shutil

import pytest
import torch
import transformers
from helpers import compiles_checks
from packaging.version import Version
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedModel, TorchAoConfig
from transformers.exporters import DynamoConfig, DynamoExporter
from transformers.exporters.utils import decompose_multimodal
from transformers.quantizers import AutoQuantizationConfig

from tokenflex import TokenFlexForConditionalGeneration
from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.data.synthetic import draw_scene
from tokenflex.towers.tiny import tiny_model_and_processor


IMAGES = [draw_scene(5, index).image for index in range(3)]
TEXTS = ["<|image_pad|> which color?", "one <|image_pad|> and one <|image_pad|>: how tall is the red bar?"]


def encode(processor, count):
    return processor(images=IMAGES, text=TEXTS, num_vision_tokens=count, padding=True, return_tensors="pt")


def logits_of(model, inputs, **kwargs):
    """The logits at positions that are not padding, since kernels differ in what they leave at padding."""
    with torch.no_grad():
        return model(**inputs, **kwargs).logits[inputs["attention_mask"].bool()]


@pytest.fixture
def own():
    return tiny_model_and_processor()[0].eval()


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("backends") / "checkpoint"
    save_checkpoint(path, *tiny)
    return path


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_attention_kernels_agree(tiny, own, attention):
    if attention == "flex_attention" and shutil.which("g++") is None:
        pytest.skip("flex attention compiles a kernel, which needs a C++ compiler")
    model, processor = tiny
    own.set_attn_implementation(attention)
    assert own.model.language_model.config._attn_implementation == attention
    assert own.model.vision_tower.config._attn_implementation == attention
    for count in (4, [16, 36, (2, 5)]):
        inputs = encode(processor, count)
        torch.testing.assert_close(logits_of(own, inputs), logits_of(model, inputs), atol=1e-4, rtol=0)
    if attention != "flex_attention":  # the C++ that torch 2.13 writes for decoding on a CPU does not compile
        options = {"num_vision_tokens": 16, "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(own.generate(**inputs, **options), model.generate(**inputs, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_and_recounts_exactly(tiny, checkpoint, dtype):
    model, processor = tiny
    half = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype).eval()
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    inputs = encode(processor, 16)
    expected = logits_of(model, inputs)
    logits = logits_of(half, inputs)
    assert logits.dtype == dtype
    assert (logits.float() - expected).abs().max() < 0.05 * expected.abs().max()
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    recounted = half.generate(**inputs, num_vision_tokens=4, **options).logits
    encoded = half.generate(**encode(processor, 4), **options).logits
    assert torch.equal(torch.stack(recounted), torch.stack(encoded))


@pytest.mark.parametrize(
    "device_map",
    [
        pytest.param({"device_map": "auto"}, id="auto"),
        pytest.param({"device_map": "auto", "max_memory": {"cpu": "1MB"}}, id="auto with offload"),
        pytest.param(
            {
                "device_map": {
                    "model.vision_tower": "disk",
                    "model.multi_modal_projector": "cpu",
                    "model.language_model": "disk",
                    "lm_head": "disk",
                }
            },
            id="modules in two places",
        ),
    ],
)
def test_offloaded_models_answer_alike(tiny, checkpoint, tmp_path, device_map):
    model, processor = tiny
    loaded = AutoModelForImageTextToText.from_pretrained(checkpoint, offload_folder=tmp_path, **device_map).eval()
    inputs = encode(processor, 16)
    assert torch.equal(logits_of(loaded, inputs), logits_of(model, inputs))
    for count in (4, [36, (2, 5), 9]):
        options = {"num_vision_tokens": count, "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(loaded.generate(**inputs, **options), model.generate(**inputs, **options))


@compiles_checks
def test_forward_compiles_to_one_graph_per_count(tiny):
    model, processor = tiny
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for graphs, count in [(1, 4), (2, 16), (3, 36), (3, 4), (3, 16)]:
        inputs = encode(processor, count)
        logits = logits_of(compiled, inputs, num_vision_tokens=count, use_cache=False)
        torch.testing.assert_close(logits, logits_of(model, inputs), atol=1e-4, rtol=0)
        assert counter.frame_count == graphs


def test_one_compiled_decoding_graph_serves_every_count(tiny, own):
    model, processor = tiny
    torch._dynamo.reset()
    counter = CompileCounter()
    forward = own.forward
    step = torch.compile(forward, fullgraph=True, backend=counter)

    @functools.wraps(forward)
    def compile_decoding(*args, **kwargs):
        return (step if kwargs["input_ids"].shape[1] == 1 else forward)(*args, **kwargs)

    own.forward = compile_decoding
    for count in (4, 16, 36, [4, 36, (2, 5)]):
        inputs = encode(processor, 36)
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_vision_tokens": count}
        static = GenerationConfig(
            **{**own.generation_config.to_dict(), "cache_implementation": "static", "max_cache_len": 256}
        )
        output = own.generate(**inputs, **options, generation_config=static)
        assert torch.equal(output, model.generate(**inputs, **options))
    assert counter.frame_count == 1


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="exporters return no program before transformers 5.23"
)
@pytest.mark.parametrize("count", [4, 16, (2, 5)])
def test_exporters_give_one_program_per_count(tiny, count):
    model, processor = tiny
    inputs = dict(encode(processor, count))
    program = (
        DynamoExporter()
        .export(model, {**inputs, "num_vision_tokens": count, "use_cache": False}, DynamoConfig())
        .program
    )
    exported = program.module()(**inputs, num_vision_tokens=count)
    keep = inputs["attention_mask"].bool()
    torch.testing.assert_close(exported["logits"][keep], logits_of(model, inputs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("count", [4, 36])
def test_the_exported_projector_pools_to_its_count(tiny, count):
    model, processor = tiny
    parts = decompose_multimodal(model, dict(encode(processor, count)))
    projector, arguments = parts["multi_modal_projector"]
    assert projector is model.model.multi_modal_projector
    program = torch.export.export(projector, (), arguments, strict=False)
    vision_tokens = program.module()(**arguments)
    expected = model.get_image_features(encode(processor, count)["pixel_values"], num_vision_tokens=count)
    assert vision_tokens.shape == (3, count, model.config.text_config.hidden_size)
    torch.testing.assert_close(vision_tokens, expected.pooler_output, atol=1e-5, rtol=0)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_loading_spares_tower_and_projector(tiny, checkpoint, tmp_path, bits):
    pytest.importorskip("torchao", minversion="0.18")  # before, what it quantizes cannot be saved
    quantization = pytest.importorskip("torchao.quantization")
    granularity = pytest.importorskip("torchao.quantization.granularity")
    model, processor = tiny
    if bits == 8:
        scheme = quantization.Int8WeightOnlyConfig()
    else:
        scheme = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity.PerGroup(32))
    config = TorchAoConfig(scheme)
    loaded = AutoModelForImageTextToText.from_pretrained(checkpoint, quantization_config=config).eval()
    assert config.modules_to_not_convert is None, "the caller's config is left as it was"
    is_quantized = {name: type(weight.data) is not torch.Tensor for name, weight in loaded.named_parameters()}
    layers = [name for name in is_quantized if ".language_model.layers." in name and "_proj.weight" in name]
    assert layers and all(is_quantized[name] for name in layers)
    assert sum(is_quantized.values()) == len(layers)
    plain = copy.deepcopy(model)
    for name in layers:
        plain.get_parameter(name).data = loaded.get_parameter(name).dequantize().float()
    inputs = encode(processor, 16)
    torch.testing.assert_close(logits_of(loaded, inputs), logits_of(plain, inputs), atol=1e-4, rtol=0)
    assert not torch.equal(logits_of(plain, inputs), logits_of(model, inputs))
    options = {"max_new_tokens": 4, "do_sample": False, "num_vision_tokens": [4, 36, (2, 5)]}
    assert torch.equal(loaded.generate(**inputs, **options), plain.generate(**inputs, **options))
    loaded.save_pretrained(tmp_path / "quantized")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "quantized").eval()
    assert torch.equal(logits_of(again, inputs), logits_of(loaded, inputs))


def test_what_is_quantized_can_be_said(checkpoint):
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig(), modules_to_not_convert=["lm_head"])
    loaded = AutoModelForImageTextToText.from_pretrained(checkpoint, quantization_config=config)
    assert type(loaded.model.multi_modal_projector.connector.up.weight.data) is not torch.Tensor


@pytest.mark.parametrize(
    "config, name",
    [
        ({"load_in_4bit": True}, "llm_int8_skip_modules"),
        ({"load_in_8bit": True}, "llm_int8_skip_modules"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "llm_int8_skip_modules"),
        ({"quant_method": "quanto", "weights": "int8"}, "modules_to_not_convert"),
        ({"quant_method": "eetq", "weights": "int8"}, "modules_to_not_convert"),
    ],
    ids=str,
)
def test_quantization_that_a_dict_asks_for_spares_them_too(checkpoint, monkeypatch, config, name):
    taken = {}
    monkeypatch.setattr(
        PreTrainedModel, "from_pretrained", classmethod(lambda cls, path, **kwargs: taken.update(kwargs))
    )
    TokenFlexForConditionalGeneration.from_pretrained(checkpoint, quantization_config=config)
    read = AutoQuantizationConfig.from_dict(taken["quantization_config"])
    assert any("vision_tower" in pattern for pattern in getattr(read, name))
    assert name not in config
