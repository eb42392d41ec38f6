"""A checkpoint's own code in vLLM, where this package is not installed."""

import json
import os
import subprocess
import sys

import torch
from helpers import chat_prompt
from transformers import AutoModelForImageTextToText, AutoProcessor

import tokenflex  # noqa: F401
from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.data.synthetic import draw_scene


QUESTION = "which color is the paper?"
SCRIPT = """
import json, sys

sys.modules["tokenflex"] = None  # as if it were not there
from PIL import Image
from vllm import LLM, SamplingParams

path, requests = sys.argv[1], json.loads(sys.argv[2])
llm = LLM(path, dtype="float32", max_model_len=1024, enforce_eager=True, trust_remote_code=True, seed=0)
greedy = SamplingParams(temperature=0, max_tokens=8)
for asked in requests:
    images = [Image.open(image) for image in asked["images"]]
    prompt = {"prompt": asked["prompt"], "mm_processor_kwargs": asked["options"]}
    try:
        [output] = llm.generate([prompt | {"multi_modal_data": {"image": images}}], greedy, use_tqdm=False)
        said = [output.prompt_token_ids, list(output.outputs[0].token_ids)]
    except Exception as error:
        said = f"{error} {error.__cause__}"
    print("SAID", json.dumps(said))
"""


def expected(model, processor, images, options):
    inputs = processor(images=images, text=chat_prompt(processor, images, QUESTION), return_tensors="pt", **options)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    length = inputs["input_ids"].shape[1]
    return [output[0, :length].tolist(), output[0, length:].tolist()]


def test_answers_as_generate_does(pristine, tmp_path):
    model, processor = pristine
    # vLLM applies no `suppress_tokens`; an untrained model would answer with image tokens.
    model.lm_head.weight.data[processor.image_token_id] = 0
    save_checkpoint(tmp_path / "checkpoint", model, processor)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint")
    processor = AutoProcessor.from_pretrained(tmp_path / "checkpoint")
    images = [draw_scene(5, index).image for index in range(2)]
    images += [images[0].resize((64, 32)), images[1].resize((32, 64))]
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    cases = [([0], {"num_vision_tokens": count}) for count in (4, 36, 16, 4)]
    cases += [([0, 1], {"num_vision_tokens": 16}), ([1, 0], {"num_vision_tokens": 16})]
    cases += [([2, 3], {"num_vision_tokens": 16, "match_aspect_ratio": True})]
    # An option of a request is also a default of the config and the processor that vLLM loads for it: no list is.
    refused = [([0, 1], {"num_vision_tokens": [16, 4]}), ([0, 1], {"crop_to_patches": [True, False]})]
    requests = [
        {
            "prompt": chat_prompt(processor, which, QUESTION),
            "images": [str(tmp_path / f"{index}.png") for index in which],
            "options": options,
        }
        for which, options in [*cases, *refused]
    ]
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "checkpoint"), json.dumps(requests)]
    environment = {"VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    run = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-5000:]
    said = [json.loads(line.removeprefix("SAID ")) for line in run.stdout.splitlines() if line.startswith("SAID ")]
    assert "`crop_to_patches` has 2 entries for 1 images" in said.pop()
    assert "'num_vision_tokens' expected int" in said.pop()
    for (which, options), found in zip(cases, said, strict=True):
        assert found == expected(model, processor, [images[index] for index in which], options), (which, options)
