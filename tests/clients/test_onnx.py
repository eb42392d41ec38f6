"""The code of `docs/export.md` against PyTorch."""

import ast
import re
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import parse

from tokenflex.data.synthetic import draw_scene


pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.skipif(
    parse(transformers.__version__) < parse("5.23"), reason="transformers.exporters.ExportedModel is new in 5.23"
)

COUNTS = (4, 16, 36)
KEPT = (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)
IMAGES = [draw_scene(5, index).image for index in range(3)]
TEXTS = ["<|image_pad|> which color?", "one <|image_pad|> and one <|image_pad|>: how tall is the red bar?"]


@pytest.fixture(scope="module")
def documented():
    """Imports and definitions of the documentation, without their use."""
    page = (Path(__file__).parents[2] / "docs/export.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names, code = {}, ast.parse(block)
    code.body = [node for node in code.body if isinstance(node, KEPT)]
    exec(compile(code, "export.md", "exec"), names)
    return names


@pytest.fixture(scope="module")
def parts(both, documented, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    documented["export"](both[0], encode(both[1], 16).data, COUNTS, folder)
    names = {path.stem: onnxruntime.InferenceSession(path) for path in folder.glob("*.onnx")}
    assert names.keys() == {"image_encoder", "embedding", "decoder", *(f"projector_{count}" for count in COUNTS)}
    return names


def encode(processor, counts, texts=TEXTS, images=IMAGES, return_tensors="pt"):
    return processor(images=images, text=texts, num_vision_tokens=counts, padding=True, return_tensors=return_tensors)


def vision_tokens(parts, pixel_values, count):
    (patches,) = parts["image_encoder"].run(["patch_features"], {"pixel_values": pixel_values.numpy()})
    return torch.from_numpy(parts[f"projector_{count}"].run(None, {"patch_features": patches})[0])


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("num_images", [1, 3])
def test_vision_tokens_are_the_models(both, parts, count, num_images):
    model, processor = both
    pixel_values = encode(processor, count)["pixel_values"][:num_images]
    with torch.no_grad():
        expected = model.get_image_features(pixel_values, num_vision_tokens=count).pooler_output
    assert expected.shape == (num_images, count, model.config.text_config.hidden_size)
    torch.testing.assert_close(vision_tokens(parts, pixel_values, count), expected, atol=1e-5, rtol=0)


def test_an_encoder_at_a_resolution_gives_the_models_vision_tokens(both, tmp_path):
    from transformers.exporters import ExportedModel, OnnxConfig, OnnxExporter
    from transformers.exporters.utils import decompose_multimodal

    class SmallImageEncoder(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model.model

        def forward(self, pixel_values):
            return {"patch_features": self.model.encode_images(pixel_values, (32, 32)).last_hidden_state}

    model, processor = both
    sample = encode(processor, 16).data
    projector, inputs = decompose_multimodal(model, sample)["multi_modal_projector"]
    with torch.no_grad():
        patches = model.model.encode_images(sample["pixel_values"], (32, 32)).last_hidden_state
        expected = model.get_image_features(sample["pixel_values"], "4@32").pooler_output
    inputs |= {"patch_features": patches, "grids": [(2, 2)], "patch_grids": [model.config.patch_grid_at((32, 32))]}
    parts = {"encoder": (SmallImageEncoder(model), {"pixel_values": sample["pixel_values"]})}
    parts["projector"] = projector, inputs
    components = {
        name: OnnxExporter().export(*part, OnnxConfig(dynamic=True)).components["model"]
        for name, part in parts.items()
    }
    ExportedModel(components, OnnxExporter.export_format, model.config).save_pretrained(tmp_path)
    encoder, projector = (onnxruntime.InferenceSession(tmp_path / f"{name}.onnx") for name in parts)
    for num_images in (1, 3):
        (seen,) = encoder.run(["patch_features"], {"pixel_values": sample["pixel_values"][:num_images].numpy()})
        (tokens,) = projector.run(None, {"patch_features": seen})
        torch.testing.assert_close(torch.from_numpy(tokens), expected[:num_images], atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("rows", [[0], [1], [0, 1], [1, 0, 0]])
def test_logits_are_the_models_whatever_is_padded_or_cached(both, parts, count, rows):
    model, processor = both
    images = [image for row in rows for image in (IMAGES[:1] if row == 0 else IMAGES[1:])]
    inputs = encode(processor, count, [TEXTS[row] for row in rows], images)
    mask = inputs["attention_mask"]
    assert bool((mask == 0).any()) == (len(set(rows)) > 1)
    with torch.no_grad():
        expected = model(**inputs).logits
    ids = inputs["input_ids"]
    embeddings = torch.from_numpy(parts["embedding"].run(None, {"input": ids.numpy()})[0])
    embeddings[ids == processor.image_token_id] = vision_tokens(parts, inputs["pixel_values"], count).flatten(0, 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    past = [value for value in parts["decoder"].get_inputs() if len(value.shape) == 4]  # keys and values
    length = ids.shape[1]
    for ends in ([length], [length - 3, length], [5, length - 1, length]):
        cache = {value.name: torch.zeros(len(ids), int(value.shape[1]), 0, int(value.shape[3])) for value in past}
        logits, start = [], 0
        for end in ends:
            feed = {"inputs_embeds": embeddings[:, start:end], "position_ids": positions[:, start:end], **cache}
            feed = {name: value.contiguous().numpy() for name, value in feed.items()}
            chunk, *values = parts["decoder"].run(None, {**feed, "attention_mask": mask[:, :end].contiguous().numpy()})
            cache = dict(zip(cache, map(torch.from_numpy, values)))
            logits.append(torch.from_numpy(chunk))
            start = end
        keep = mask.bool()
        torch.testing.assert_close(torch.cat(logits, dim=1)[keep], expected[keep], atol=1e-4, rtol=0)


@pytest.mark.parametrize("counts", [[4, 4, 4], [16, 16, 16], [36, 36, 36], [36, 4, 16]])
def test_greedy_answers_are_those_of_generate(both, parts, documented, counts):
    model, processor = both
    inputs = encode(processor, counts)
    expected = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)[:, -8:]
    arrays = encode(processor, counts, return_tensors="np")
    answers = documented["generate"](parts, arrays, counts, processor.image_token_id, [], max_new_tokens=8)
    end = model.generation_config.eos_token_id
    assert end not in answers, "`min_new_tokens` changes nothing here"
    assert answers.tolist() == expected.tolist()


def test_generating_stops_when_every_answer_has_ended(both, parts, documented):
    processor = both[1]
    arguments = parts, encode(processor, 4, return_tensors="np"), [4, 4, 4], processor.image_token_id
    whole = documented["generate"](*arguments, [], max_new_tokens=8)
    ends = [row[2] for row in whole.tolist()]
    length = max(next(i for i, token in enumerate(row) if token in ends) for row in whole.tolist()) + 1
    answers = documented["generate"](*arguments, ends, max_new_tokens=8)
    assert answers.tolist() == whole[:, :length].tolist()
    assert length < 8
