"""`tokenflex generate`: answers a question about an image at one or several vision-token counts."""

from argparse import ArgumentParser

import torch
from transformers import AutoModelForImageTextToText

from ..checkpoints.adapters import load_processor
from ..choices_tokenflex import resolve_named_count
from ..data.images import ImageError, decode_image
from .control_tokens import refuse_control_tokens
from .counts import parse_num_vision_tokens


def answer(
    model,
    processor,
    image,
    question: str,
    num_vision_tokens: int | tuple[int, int] | str | None = None,
    max_new_tokens: int = 64,
) -> str:
    """
    Answers one question about one image.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model.
        processor ([`TokenFlexProcessor`]): Its processor.
        image (`PIL.Image.Image`): The image.
        question (`str`): The question.
        num_vision_tokens (`int`, `tuple[int, int]` or `str`, *optional*):
            The vision-token count, the grid, or `"low"`, `"high"` or `"auto"`. Defaults to the processor's.
        max_new_tokens (`int`, *optional*, defaults to 64): The longest answer in tokens.

    Returns:
        `str`: The answer.

    Raises:
        ValueError: If the count is not allowed, or the question holds a control token.
    """
    return _answer(model, processor, image, question, num_vision_tokens, max_new_tokens)[0]


def _answer(model, processor, image, question, num_vision_tokens, max_new_tokens) -> tuple[str, int | str | None]:
    """The answer, and the count if it was chosen."""
    refuse_control_tokens("question", question, processor.tokenizer)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt").to(model.device)
    options = {"num_vision_tokens": num_vision_tokens, "max_new_tokens": max_new_tokens}
    output = model.generate(**inputs, **options, return_dict_in_generate=True)
    chosen = output.get("num_vision_tokens")
    chosen = chosen.tolist() if isinstance(chosen, torch.Tensor) else chosen
    reply = processor.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return reply.strip(), None if chosen is None else chosen[0]


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="tokenflex generate", description="Answer a question about an image.")
    parser.add_argument("--model_name_or_path", required=True, help="Checkpoint folder or Hub id.")
    parser.add_argument("--image", required=True, help="An image file.")
    parser.add_argument("--question", required=True, help="The question.")
    parser.add_argument(
        "--num_vision_tokens",
        nargs="+",
        help="One answer for each count, grid such as 8x12, `low`, `high` or `auto`. Default: the config's choices.",
    )
    parser.add_argument("--max_new_tokens", type=int, default=64, help="Longest answer. Default: %(default)s.")
    args = parser.parse_args(argv)
    counts = [parse_num_vision_tokens(count) for count in args.num_vision_tokens or ()]
    try:
        image = decode_image(args.image)
    except ImageError as error:
        raise ValueError(f"`image`={args.image!r}: {error}.") from None
    processor = load_processor(args.model_name_or_path)
    model = AutoModelForImageTextToText.from_pretrained(args.model_name_or_path, device_map="auto")
    choices = model.config.vision_token_choices
    for count in counts or choices:
        count = resolve_named_count(count, choices)
        reply, chosen = _answer(model, processor, image, args.question, count, args.max_new_tokens)
        name = f"{count[0]}x{count[1]}" if isinstance(count, tuple) else chosen or count
        print(f"{name!s:>5} vision tokens{' (auto)' if chosen else ''}: {reply}")  # noqa: T201
