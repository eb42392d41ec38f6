"""Rows of visual question answering data, in the shapes people keep them in, as one `Example`."""

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image


COLUMNS_HELP = (
    "a row needs `image` or `images`, and either `question`/`answer`, `questions`/`answers`, `messages` (roles and "
    "content) or LLaVA's `conversations`"
)
LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class BadRowError(ValueError):
    """A data row that cannot be used; the message says why, and once read from a file, which row of which file."""


@dataclass
class Example:
    """
    Args:
        images (`list[PIL.Image.Image]`): The images in order of appearance.
        dialogs (`list[list[dict]]`):
            Independent conversations about these images, each a list of chat messages that begins with all of them.
        families (`list[str]`, *optional*):
            The kind of question of each dialog, by which scores are told apart.
    """

    images: list[Image.Image]
    dialogs: list[list[dict]]
    families: list[str] | None = None


def to_example(row: dict, image_folder: str | Path | None = None) -> Example:
    """
    Normalises one row.

    Args:
        row (`dict`):
            `image` or `images` (PIL images, encoded bytes, or paths), with `question` and `answer` (and `family`),
            lists `questions` and `answers` (and `families`), chat `messages`, or LLaVA's `conversations`.
        image_folder (`str` or `Path`, *optional*):
            Where relative image paths start.

    Returns:
        [`Example`]

    Raises:
        BadRowError: If the row lacks an image, a question or an answer, or an image cannot be decoded.

    Example:

    ```python
    >>> from PIL import Image
    >>> from tokenflex.training.data import to_example

    >>> example = to_example({"image": Image.new("RGB", (8, 8)), "question": "dark?", "answer": "yes"})
    >>> example.dialogs[0][1]["content"]
    'yes'
    ```
    """
    images = row.get("images") if row.get("images") is not None else row.get("image")
    images = images if isinstance(images, (list, tuple)) else [] if images is None else [images]
    images = [decode_image(image, image_folder) for image in images]

    if row.get("messages") is not None:
        return Example(images, [_place_images(_check_roles(row["messages"]), len(images))])
    if row.get("conversations") is not None:
        return Example(images, [_place_images(_check_roles(_from_llava(row["conversations"])), len(images))])
    questions = row["questions"] if row.get("questions") is not None else row.get("question")
    answers = row["answers"] if row.get("answers") is not None else row.get("answer")
    questions = questions if isinstance(questions, (list, tuple)) else [questions]
    answers = answers if isinstance(answers, (list, tuple)) else [answers]
    if len(questions) != len(answers):
        raise BadRowError(f"{len(questions)} questions but {len(answers)} answers")
    if not questions:
        raise BadRowError("it has no questions")
    dialogs = []
    for question, answer in zip(questions, answers):
        for name, value in (("question", question), ("answer", answer)):
            if not isinstance(value, str) or not value.strip():
                raise BadRowError(f"its {name} is {value!r}; {COLUMNS_HELP}")
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        dialogs.append(_place_images(messages, len(images)))
    if not images:
        raise BadRowError(f"it has no image; {COLUMNS_HELP}")
    families = row["families"] if row.get("families") is not None else row.get("family")
    families = [families] * len(dialogs) if isinstance(families, str) else families
    if families is not None and len(families) != len(dialogs):
        raise BadRowError(f"{len(families)} families for {len(dialogs)} questions")
    return Example(images, dialogs, families)


def decode_image(value, image_folder: str | Path | None = None) -> Image.Image:
    """
    Opens and fully decodes an image given as PIL image, bytes, path or the `{"bytes", "path"}` of `datasets`.

    Raises:
        BadRowError: If it is missing or not a readable image.
    """
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    try:
        if isinstance(value, (str, Path)):
            value = Image.open(Path(image_folder or "") / value)
        elif isinstance(value, bytes):
            value = Image.open(io.BytesIO(value))
        if not isinstance(value, Image.Image):
            raise BadRowError(f"its image is {type(value).__name__}, not an image, bytes or a path")
        value.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadRowError(f"its image cannot be decoded ({error})") from None
    return value


def _from_llava(conversations) -> list[dict]:
    try:
        return [{"role": LLAVA_ROLES[turn["from"]], "content": turn["value"]} for turn in conversations]
    except (KeyError, TypeError) as error:
        raise BadRowError(f"its `conversations` are not LLaVA turns of `from` and `value` ({error!r})") from None


def _check_roles(messages) -> list[dict]:
    roles = [message.get("role") for message in messages] if isinstance(messages, list) else []
    if "assistant" not in roles or not set(roles) <= {"system", "user", "assistant"}:
        raise BadRowError(f"its messages have the roles {roles}: system, user and at least one assistant are expected")
    if any(message["role"] == "assistant" and not message.get("content") for message in messages):
        raise BadRowError("an assistant message is empty")
    return messages


def _place_images(messages: list[dict], num_images: int) -> list[dict]:
    """Content as parts, with one image part per image: where the row puts them, else before the first question."""
    placed = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            pieces = content.split("<image>") if message["role"] == "user" else [content]
            parts = [{"type": "text", "text": pieces[0].strip()}] if pieces[0].strip() else []
            for piece in pieces[1:]:
                parts += [{"type": "image"}] + ([{"type": "text", "text": piece.strip()}] if piece.strip() else [])
            content = parts
        placed.append({"role": message["role"], "content": content})
    found = sum(part.get("type") == "image" for message in placed for part in message["content"])
    if found == 0 and num_images:
        first = next(message for message in placed if message["role"] == "user")
        first["content"] = [{"type": "image"}] * num_images + first["content"]
    elif found != num_images:
        raise BadRowError(f"its text places {found} images, but it has {num_images}")
    return placed
