"""`tokenflex label`: a model's own answers at one count, as data to tune its other counts on. No labels are needed."""

import json
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForImageTextToText
from transformers.utils import logging

from ..checkpoints.adapters import load_processor
from ..checkpoints.files import write_file
from ..checkpoints.fingerprint import fingerprint
from ..choices_tokenflex import parse_choice
from ..data.examples import to_example
from ..data.images import ImageError, decode_image
from .progress import predict_on_and_on


logger = logging.get_logger(__name__)

PARTIAL = "answers.partial.jsonl"
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
UNKNOWN = "?"  # in the place of an answer, where a row has to have one


class ImageQuestions(Sequence):
    """
    The images of a folder and of those below it, in order of their names, each with some questions of a list in turn.
    Files that cannot be read are named in a warning, and left out.

    Args:
        folder (`str` or `Path`): The folder.
        questions (`Sequence[str]`): The questions.
        questions_per_image (`int`, *optional*, defaults to 1): The number of questions about each image.

    Raises:
        ValueError: If there are no images or not as many questions.
    """

    def __init__(self, folder: str | Path, questions: Sequence[str], questions_per_image: int = 1):
        files = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in SUFFIXES)
        self.files = [file for file in files if _is_readable(file)]
        if not self.files:
            raise ValueError(f"`images`={str(folder)!r}: there are no image files in this folder.")
        if not 1 <= questions_per_image <= len(questions):
            raise ValueError(
                f"`questions_per_image`={questions_per_image}: the file of questions holds {len(questions)}."
            )
        self.questions, self.questions_per_image = list(questions), questions_per_image

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        first = index * self.questions_per_image
        asked = [self.questions[(first + i) % len(self.questions)] for i in range(self.questions_per_image)]
        file = self.files[index]  # beyond the end an IndexError, which ends a loop
        return {"image": str(file.resolve()), "questions": asked, "answers": [UNKNOWN] * len(asked)}


def _is_readable(file: Path) -> bool:
    try:
        decode_image(str(file))
    except ImageError as error:
        logger.warning(f"{file} is left out: {error}")
        return False
    return True


def label(
    model,
    processor,
    rows: Sequence,
    output_dir: str | Path,
    num_vision_tokens: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    show_progress: bool = True,
) -> Path:
    """
    Lets a model answer the questions of a data set and writes `rows.jsonl`, a data set with its answers in the place
    of others, to tune it on with `scheme="distill"`. Stopped, it goes on where it was. An empty answer, and one that
    is cut at `max_new_tokens`, is left out.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model.
        processor ([`TokenFlexProcessor`]): Its processor.
        rows (`Sequence`):
            Rows as [`to_example`] takes or returns them, such as [`ImageQuestions`]; of a conversation the last
            question is asked. Images that are no files are written to `images/`.
        output_dir (`str` or `Path`): The folder.
        num_vision_tokens (`int`, *optional*): The count to answer at. Defaults to the model's own.
        batch_size (`int`, *optional*, defaults to 16): Questions answered at a time.
        max_new_tokens (`int`, *optional*, defaults to 128): The longest answer in tokens.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to draw a progress bar.

    Returns:
        `Path`: The data set.

    Raises:
        ValueError: If no answer is left.

    Example:

    ```python
    >>> import tempfile
    >>> from tokenflex.data.synthetic import SyntheticVQA
    >>> from tokenflex.evaluation.label import label
    >>> from tokenflex.towers.tiny import tiny_model_and_processor

    >>> model, processor = tiny_model_and_processor()  # random weights, whose answers hardly ever end
    >>> model.generation_config.eos_token_id = list(range(200))
    >>> path = label(model, processor, SyntheticVQA(2, seed=0), tempfile.mkdtemp(), show_progress=False)
    >>> path.name
    'rows.jsonl'
    ```
    """
    output_dir = Path(output_dir)
    count = model.config.num_vision_tokens if num_vision_tokens is None else num_vision_tokens
    run = {**fingerprint(model, processor), "rows": len(rows), "counts": [count], "max_new_tokens": max_new_tokens}
    options = (model, processor, rows, [count], batch_size, max_new_tokens, show_progress)
    partial = output_dir / PARTIAL
    answers = predict_on_and_on(partial, json.loads(json.dumps(run)), *options)
    by_row = defaultdict(list)
    for answer in answers:
        by_row[answer.index].append("" if answer.cut else answer.predictions[count])
    lines = [
        json.dumps(row, ensure_ascii=False)
        for index, said in by_row.items()
        for row in _answered(rows[index], said, f"{index:06}", output_dir)
    ]
    if not lines:
        raise ValueError(
            f"None of the {len(answers)} answers ended within `max_new_tokens`={max_new_tokens}: allow longer ones."
        )
    write_file(output_dir / "rows.jsonl", "".join(f"{line}\n" for line in lines))
    partial.unlink(missing_ok=True)
    return output_dir / "rows.jsonl"


def _answered(row, answers: list[str], name: str, output_dir: Path) -> list[dict]:
    """The row with these answers: one of questions about the same images, or a row for each conversation."""
    example = to_example(row)
    kept = [(dialog, answer) for dialog, answer in zip(example.dialogs, answers) if answer]
    if not kept:
        return []
    if isinstance(row, dict) and isinstance(row.get("image"), str):
        file = Path(row["image"])
        images = [str(file.resolve()) if file.is_file() else row["image"]]
    else:
        images = [output_dir / "images" / f"{name}-{i}.png" for i in range(len(example.images))]
        for file, image in zip(images, example.images):
            file.parent.mkdir(exist_ok=True)
            image.save(file)
        images = [str(file.relative_to(output_dir)) for file in images]
    dialogs = [
        [*dialog[:-1], {"role": "assistant", "content": [{"type": "text", "text": answer}]}] for dialog, answer in kept
    ]
    if all(_is_question(dialog) for dialog in dialogs):
        questions = [dialog[0]["content"][-1]["text"] for dialog in dialogs]
        return [{"images": images, "questions": questions, "answers": [answer for _, answer in kept]}]
    return [{"images": images, "messages": dialog} for dialog in dialogs]


def _is_question(dialog: list[dict]) -> bool:
    """Whether a conversation is one question behind its images."""
    kinds = [part["type"] for part in dialog[0]["content"]]
    return len(dialog) == 2 and kinds[-1] == "text" and "text" not in kinds[:-1]


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="tokenflex label",
        description="Write a checkpoint's answers about images as a data set, to tune its other counts on.",
    )
    parser.add_argument("--model_name_or_path", required=True, help="Checkpoint folder or Hub id.")
    parser.add_argument("--images", required=True, help="Folder of images, with those of its folders.")
    parser.add_argument("--questions", required=True, help="Text file with a question in each line.")
    parser.add_argument("--questions_per_image", type=int, default=1, help="Asked in turn. Default: %(default)s.")
    parser.add_argument("--num_vision_tokens", type=parse_choice, help="Count to answer at. Default: the model's own.")
    parser.add_argument("--batch_size", type=int, default=16, help="Questions answered at a time.")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="The longest answer in tokens.")
    parser.add_argument("--output_dir", required=True, help="Folder for `rows.jsonl`.")
    args = parser.parse_args(argv)
    if not Path(args.questions).is_file():
        raise ValueError(f"`questions`={args.questions!r}: there is no such file.")
    lines = Path(args.questions).read_text(encoding="utf-8").splitlines()
    rows = ImageQuestions(args.images, [line.strip() for line in lines if line.strip()], args.questions_per_image)
    processor = load_processor(args.model_name_or_path)
    model = AutoModelForImageTextToText.from_pretrained(args.model_name_or_path, device_map="auto")
    options = {name: getattr(args, name) for name in ("num_vision_tokens", "batch_size", "max_new_tokens")}
    path = label(model, processor, rows, args.output_dir, **options)
    print(f"Saved {path}: answers to {sum(1 for _ in path.open())} of {len(rows)} images' questions")  # noqa: T201
