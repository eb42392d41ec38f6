import copy

import pytest
import torch
from helpers import chat_prompt, give_chooser

from tokenflex.data.synthetic import draw_scene


IMAGE = draw_scene(5, 0).image
QUESTION, HARD = "which color is the paper?", "how many dots are there?"


@pytest.fixture(scope="session")
def encode():
    """Encodes a question behind images, as the chat template has it."""

    def encode(processor, images, question, **options):
        text = chat_prompt(processor, images, question)
        return processor(images=images or None, text=text, return_tensors="pt", **options)

    return encode


@pytest.fixture(scope="module")
def calibrated(tiny, encode):
    """A model that takes the smallest count for one question and the largest for a hard one."""
    model, processor = copy.deepcopy(tiny[0]), tiny[1]
    easy, hard = (model.read_questions(**encode(processor, [IMAGE], text))[0] for text in (QUESTION, HARD))
    weight = 10 * (hard - easy) / (hard - easy).square().sum()
    weights = torch.stack([torch.zeros_like(weight)] * 2 + [weight])
    give_chooser(model, [4, 16, 36], weights, bias=[0.0, 0.0, -float(weight @ (easy + hard)) / 2])
    return model, processor
