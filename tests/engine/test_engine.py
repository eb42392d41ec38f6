"""vLLM's engine against transformers' `generate`: the same prompts, the same tokens, whatever was asked before."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import chat_prompt
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

import tokenflex  # noqa: F401
from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.data.synthetic import draw_scene


A, B, C = (draw_scene(5, index).image for index in range(3))
WIDE, TALL = A.resize((128, 64)), B.resize((100, 160))
QUESTION = "which color is the paper?"
NEW_TOKENS = 8


@pytest.fixture(scope="module", params=["tiny", "adopted", "naflex", "demo"])
def checkpoint(request, tmp_path_factory):
    if request.param != "demo":
        path = tmp_path_factory.mktemp("engine") / "checkpoint"
        fixture = "pristine" if request.param == "tiny" else f"pristine_{request.param}"
        save_checkpoint(path, *request.getfixturevalue(fixture))
        return path
    path = Path(os.environ.get("TOKENFLEX_DEMO", "outputs/demo/checkpoint"))
    return path if path.is_dir() else pytest.skip(f"no {path}: run `make demo` first")


@pytest.fixture
def label(request):
    return request.node.callspec.params["checkpoint"]


@pytest.fixture(scope="module")
def reference(checkpoint):
    return AutoModelForImageTextToText.from_pretrained(checkpoint).eval(), AutoProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def engine(checkpoint):
    """Started with 64 tokens, which is what it has reserved for an image, however many tiles that makes."""
    llm = LLM(
        str(checkpoint),
        dtype="float32",
        max_model_len=1024,
        max_num_batched_tokens=256,  # the tower then sees four images at once
        enforce_eager=True,
        seed=0,
        mm_processor_kwargs={"num_vision_tokens": 64},
        limit_mm_per_prompt={"image": 4},
    )
    yield llm
    llm.llm_engine.engine_core.shutdown()


def request(processor, images, question=QUESTION, **options):
    asked = {"prompt": chat_prompt(processor, images, question)}
    return asked | ({"multi_modal_data": {"image": images}, "mm_processor_kwargs": options} if images else {})


def expected(reference, images, question=QUESTION, **options):
    """The prompt's ids, the ids that `generate` answers with, and their log probabilities."""
    model, processor = reference
    options = {"num_vision_tokens": 64, **options} if images else {}
    text = chat_prompt(processor, images, question)
    inputs = processor(images=images or None, text=text, return_tensors="pt", **options)
    output = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    scores = [float(torch.log_softmax(step[0], -1)[token]) for step, token in zip(output.scores, ids)]
    return inputs["input_ids"][0].tolist(), ids, scores


def answers(engine, requests):
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=0)
    for output in engine.generate(requests, greedy, use_tqdm=False):
        [completion] = output.outputs
        scores = [step[token].logprob for step, token in zip(completion.logprobs, completion.token_ids)]
        yield output.prompt_token_ids, list(completion.token_ids), scores


CASES = {
    "text only": ([], {}),
    "the engine's count": ([A], {}),
    "4 tokens": ([A], {"num_vision_tokens": 4}),
    "16 tokens": ([A], {"num_vision_tokens": 16}),
    "36 tokens": ([A], {"num_vision_tokens": 36}),
    "a grid": ([B], {"num_vision_tokens": (2, 5)}),
    "two images": ([A, B], {"num_vision_tokens": 16}),
    "three images": ([C, A, B], {"num_vision_tokens": 9}),
    "the same image twice": ([A, A], {"num_vision_tokens": 16}),
    "a count for each image": ([A, B], {"num_vision_tokens": [16, 4]}),
    "these, exchanged": ([B, A], {"num_vision_tokens": [16, 4]}),
    "the same image at two": ([A, A], {"num_vision_tokens": [16, 4]}),
    "a count and a grid": ([A, B, C], {"num_vision_tokens": [36, (3, 2), 1]}),
    "a pair": ([A], {"num_vision_tokens": "16@48"}),
    "a pair by arguments": ([A], {"num_vision_tokens": 4, "image_size": 32}),
    "a pair for each image": ([A, B, A], {"num_vision_tokens": [16, "4@32", "4@48"]}),
    "16 bits": ([Image.fromarray(np.asarray(A.convert("L")).astype(np.uint16) * 256)], {"num_vision_tokens": 16}),
    "by shape": ([WIDE], {"num_vision_tokens": 20, "match_aspect_ratio": True}),
    "by shapes": ([WIDE, TALL], {"num_vision_tokens": [20, 7], "match_aspect_ratio": True}),
    "sizes like the tower's": (
        [A.resize((64, 32)), B.resize((32, 64))],
        {"num_vision_tokens": 16, "match_aspect_ratio": True},
    ),
    "tiles": ([WIDE], {"num_vision_tokens": 16, "crop_to_patches": True, "max_patches": 2}),
    "tiles of one of two": (
        [WIDE, TALL],
        {"num_vision_tokens": 16, "crop_to_patches": [False, True], "max_patches": 3},
    ),
    "tiles at two counts": ([WIDE, TALL], {"num_vision_tokens": [9, 4], "crop_to_patches": True, "max_patches": 3}),
    "tiles by shape": (
        [WIDE, TALL],
        {"num_vision_tokens": 10, "crop_to_patches": True, "max_patches": 3, "match_aspect_ratio": True},
    ),
}


def compare(engine, reference, cases, compared, where):
    asked = [request(reference[1], images, **options) for images, options in cases.values()]
    for (name, (images, options)), found in zip(cases.items(), answers(engine, asked), strict=True):
        ids, tokens, scores = expected(reference, images, **options)
        difference = max(abs(a - b) for a, b in zip(found[2], scores))
        compared.append(
            (where, name, len(ids), "equal" if found[:2] == (ids, tokens) else "NOT EQUAL", f"{difference:.0e}")
        )
        assert found[0] == ids, name
        assert found[1] == tokens, name
        torch.testing.assert_close(found[2], scores, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_alone(engine, reference, compared, label, name):
    compare(engine, reference, {name: CASES[name]}, compared, f"{label}, alone")


def test_together(engine, reference, compared, label):
    """In one batch, in the other order, so that every cache holds something of everything."""
    compare(engine, reference, dict(reversed(CASES.items())), compared, f"{label}, in one batch")


def test_count_of_an_image_changes(engine, reference, compared, label):
    counts = {
        f"{count} tokens, {i}.": ([A], {"num_vision_tokens": count}) for i, count in enumerate((4, 36, 4, 16, 36))
    }
    compare(engine, reference, counts, compared, f"{label}, in turn")


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ([A], {"num_vision_tokens": 5, "match_aspect_ratio": False}, "`num_vision_tokens`=5"),
        ([A], {"num_vision_tokens": "16@20"}, "`num_vision_tokens`='16@20'"),
        ([A], {"num_vision_tokens": [16, 4]}, "lists 2 entries for 1 images"),
        ([A], {"num_vision_tokens": "auto"}, "needs `tokenflex serve`"),
        ([A], {"num_vision_tokens": "lots"}, "`num_vision_tokens`='lots'"),
        ([A, B], {"crop_to_patches": [True]}, "lists 1 entries for 2 images"),
        (
            [WIDE],
            {"crop_to_patches": True, "max_patches": 3, "match_aspect_ratio": False},
            r"19[24] vision tokens, and this .* reserved 6[46]",
        ),
        ([A] * 5, {"num_vision_tokens": 4}, "At most 4 image"),
        ([A], {"num_vision_token": 4}, "did you mean `num_vision_tokens`"),
    ],
)
def test_refused_with_the_reason(engine, reference, images, options, message):
    with pytest.raises((ValueError, VLLMValidationError), match=message):
        list(answers(engine, [request(reference[1], images, **options)]))


def test_image_tokens_in_texts_are_refused(engine, reference):
    asked = request(reference[1], [A], f"{reference[1].image_token} {QUESTION}", num_vision_tokens=4)
    with pytest.raises(ValueError, match="2 image tokens .* for 1 images"):
        list(answers(engine, [asked]))
