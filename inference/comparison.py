"""One question about an image at several vision-token counts, from one run of the vision tower."""

import statistics
import time
from dataclasses import dataclass

import torch
from PIL import Image
from transformers.generation import BaseStreamer

from ..placeholders_tokenflex import at_count, seen_resolutions
from .control_tokens import refuse_control_tokens
from .decoding import GREEDY


MAX_QUESTION_LENGTH = 1000


@dataclass(frozen=True)
class AskedQuestion:
    """
    A question about an image that the vision tower has seen.

    Args:
        inputs (`dict`): Arguments of `generate`, with the tower's features in place of the pixels.
        tower_milliseconds (`float`): Time that the tower took.
    """

    inputs: dict
    tower_milliseconds: float


@dataclass(frozen=True)
class Answer:
    """
    One count's answer.

    Args:
        text (`str`): The answer.
        grid (`tuple[int, int]`): (rows, columns) of the vision tokens.
        prompt_tokens (`int`): Number of tokens that the language model read, vision tokens among them.
        milliseconds_to_first_token (`float`):
            From the tower's features to the answer's first token, pooling, projector and prefill: the median of three.
        resolution (`tuple[int, int]`, *optional*): (height, width) in pixels that the tower saw, if not its own.
    """

    text: str
    grid: tuple[int, int]
    prompt_tokens: int
    milliseconds_to_first_token: float
    resolution: tuple[int, int] | None = None


class _FirstTokenClock(BaseStreamer):
    """Notes how long the prompt is, which `generate` puts first, and when the first token of the answer is there."""

    prompt_tokens = time = None

    def put(self, value):
        if self.prompt_tokens is None:
            self.prompt_tokens = value.shape[-1]
        elif self.time is None:
            self.time = time.perf_counter()

    def end(self):
        pass


@torch.no_grad()
def ask(model, processor, image: Image.Image, question: str) -> AskedQuestion:
    """
    Runs the vision tower, once for all counts of a resolution. The image is not cut into tiles.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model.
        processor ([`TokenFlexProcessor`]): Its processor.
        image (`PIL.Image.Image`): The image.
        question (`str`): The question.

    Returns:
        [`AskedQuestion`]: For [`answer_at`] and [`choose_count`].

    Raises:
        ValueError: If the question is empty, longer than 1000 characters or holds a control token.
    """
    question = question.strip()
    if not question:
        raise ValueError("Type a question about the image.")
    if len(question) > MAX_QUESTION_LENGTH:
        raise ValueError(
            f"The question has {len(question)} characters, and {MAX_QUESTION_LENGTH} are allowed: shorten it."
        )
    refuse_control_tokens("question", question, processor.tokenizer)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    options = {"crop_to_patches": False, "return_tensors": "pt"}
    inputs = dict(processor(images=image, text=prompt, **options).to(model.device))
    start = time.perf_counter()
    pixel_values, config = inputs.pop("pixel_values"), model.config
    asked = [at_count(inputs, choice, config) for choice in [None, *config.vision_token_choices]]
    sizes = dict.fromkeys([seen_resolutions(prompt, config)[0] for prompt in asked] + [config.own_resolution()])
    features = [model.get_image_features(pixel_values, 1, image_size=size, return_dict=True) for size in sizes]
    features[-1].last_hidden_state[0, 0, 0].item()  # a GPU returns before it is done; a number has to be waited for
    milliseconds = 1000 * (time.perf_counter() - start)
    inputs["mm_encoder_outputs"] = {"image": features}
    return AskedQuestion(inputs, milliseconds)


def answer_at(model, processor, asked: AskedQuestion, num_vision_tokens: int, max_new_tokens: int = 64) -> Answer:
    """
    Answers at one count, greedily, so that answers differ by their counts alone.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model.
        processor ([`TokenFlexProcessor`]): Its processor.
        asked ([`AskedQuestion`]): Question from [`ask`].
        num_vision_tokens (`int`): The vision-token count.
        max_new_tokens (`int`, *optional*, defaults to 64): The longest answer in tokens.

    Returns:
        [`Answer`]

    Raises:
        ValueError: If the count is not allowed.
    """
    prompt = at_count(asked.inputs, num_vision_tokens, model.config)
    [grid], [resolution] = prompt["vision_token_grids"].tolist(), seen_resolutions(prompt, model.config)
    resolution = None if resolution == model.config.own_resolution() else resolution
    options = {**GREEDY, "num_vision_tokens": num_vision_tokens}
    milliseconds = []
    for length in (1, 1, max_new_tokens):
        clock = _FirstTokenClock()
        start = time.perf_counter()
        output = model.generate(**asked.inputs, **options, max_new_tokens=length, streamer=clock)
        milliseconds.append(1000 * (clock.time - start))
    reply = processor.decode(output[0, asked.inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return Answer(reply.strip(), tuple(grid), clock.prompt_tokens, statistics.median(milliseconds), resolution)


def choose_count(model, asked: AskedQuestion) -> tuple[int, float]:
    """
    The count that `"auto"` chooses, and how many milliseconds the choosing took.

    Raises:
        ValueError: If the model has not been calibrated.
    """
    start = time.perf_counter()
    [count] = model.choose_vision_tokens(**asked.inputs)
    return count, 1000 * (time.perf_counter() - start)
