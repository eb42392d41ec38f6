"""
Encodes an image once and asks many questions about it at several vision-token counts: the vision tower runs a single
time.

    python examples/ask_many.py --model_name_or_path outputs/demo/checkpoint --image outputs/demo/question.png \
        --questions "which color is the paper?" "what shape is it?" --num_vision_tokens 4 16 36
"""

import argparse

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import tokenflex  # noqa: F401 - registers the Auto classes
from tokenflex.choices_tokenflex import parse_choice
from tokenflex.data.images import decode_image


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ask many questions about one image, encoded once.")
    parser.add_argument("--model_name_or_path", required=True, help="Checkpoint folder or Hub id.")
    parser.add_argument("--image", required=True, help="An image file.")
    parser.add_argument("--questions", required=True, nargs="+", help="The questions, answered as one batch.")
    parser.add_argument(
        "--num_vision_tokens", type=parse_choice, nargs="+", help="Default: the model config's choices."
    )
    parser.add_argument("--max_new_tokens", type=int, default=32, help="Longest answer. Default: %(default)s.")
    return parser.parse_args()


@torch.no_grad()
def ask(model, processor, image, questions: list[str], counts: list[int | str], max_new_tokens: int = 32) -> dict:
    """The answers to all questions, a list for each count."""
    dialogs = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        for question in questions
    ]
    prompts = processor.apply_chat_template(dialogs, add_generation_prompt=True)
    inputs = processor(images=[image] * len(questions), text=prompts, padding=True, return_tensors="pt").to(
        model.device
    )

    pixel_values = inputs.pop("pixel_values")  # the same for every question; several rows where it is cut into tiles
    kept = []
    for size in model.config.resolutions_for(counts):
        views = pixel_values[: len(pixel_values) // len(questions)]
        features = model.get_image_features(views, num_vision_tokens=1, image_size=size)
        features.last_hidden_state = features.last_hidden_state.repeat(len(questions), 1, 1)
        features.image_resolutions *= len(questions)
        kept.append(features)
    answers = {}
    for count in counts:
        output = model.generate(
            **inputs, mm_encoder_outputs={"image": kept}, num_vision_tokens=count, max_new_tokens=max_new_tokens
        )
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers[count] = [text.strip() for text in texts]
    return answers


def main() -> None:
    args = parse_args()
    processor = AutoProcessor.from_pretrained(args.model_name_or_path)
    model = AutoModelForImageTextToText.from_pretrained(args.model_name_or_path, device_map="auto").eval()
    counts = args.num_vision_tokens or model.config.vision_token_choices
    answers = ask(model, processor, decode_image(args.image), args.questions, counts, args.max_new_tokens)
    for number, question in enumerate(args.questions):
        print(question)
        for count in counts:
            print(f"{count:>5} vision tokens: {answers[count][number]}")


if __name__ == "__main__":
    main()
