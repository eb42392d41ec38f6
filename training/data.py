"""Rows of visual question answering data, in the shapes people keep them in, as one `Example`."""

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps


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


def to_example(row: "dict | Example", image_folder: str | Path | None = None) -> Example:
    """
    Normalises one row.

    Args:
        row (`dict` or `Example`):
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
    >>> [part["type"] for part in example.dialogs[0][0]["content"]]
    ['image', 'text']
    ```
    """
    if isinstance(row, Example):
        return row
    images = row.get("images") if row.get("images") is not None else row.get("image")
    images = images if isinstance(images, (list, tuple)) else [] if images is None else [images]
    images = [decode_image(image, image_folder) for image in images]
    if not images:
        raise BadRowError(f"it has no image; {COLUMNS_HELP}")

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
        question, answer = (str(v) if type(v) in (int, float) else v for v in (question, answer))
        for name, value in (("question", question), ("answer", answer)):
            if not isinstance(value, str) or not value.strip():
                raise BadRowError(f"its {name} is {value!r}, not a text; {COLUMNS_HELP}")
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        dialogs.append(_place_images(messages, len(images)))
    if any(_up_to_images(dialog) != _up_to_images(dialogs[0]) for dialog in dialogs):
        raise BadRowError("its questions place the images differently, so that they cannot share them")
    families = row["families"] if row.get("families") is not None else row.get("family")
    families = families if isinstance(families, (list, tuple, type(None))) else [str(families)] * len(dialogs)
    if families is not None and len(families) != len(dialogs):
        raise BadRowError(f"{len(families)} families for {len(dialogs)} questions")
    return Example(images, dialogs, families)


def decode_image(value, image_folder: str | Path | None = None) -> Image.Image:
    """
    Opens, fully decodes and turns upright an image given as PIL image, bytes, path or the `{"bytes", "path"}` of `datasets`.

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
        value = ImageOps.exif_transpose(value)
        value.load()
    except BadRowError:
        raise
    except Exception as error:  # decoders raise whatever they like on damaged files
        raise BadRowError(f"its image cannot be decoded ({type(error).__name__}: {error})") from None
    if value.mode == "F":
        raise BadRowError("its image has PIL mode F (floating point), whose range is unknown")
    if 0 in value.size:
        raise BadRowError(f"its image has no pixels ({value.width} x {value.height})")
    return value


def _from_llava(conversations) -> list[dict]:
    try:
        return [{"role": LLAVA_ROLES[turn["from"]], "content": turn["value"]} for turn in conversations]
    except (KeyError, TypeError) as error:
        raise BadRowError(f"its `conversations` are not LLaVA turns of `from` and `value` ({error!r})") from None


def _up_to_images(dialog: list[dict]) -> list[dict]:
    parts = dialog[0]["content"]
    last = max(i for i, part in enumerate(parts) if part.get("type") == "image")
    return parts[: last + 1]


def _check_roles(messages) -> list[dict]:
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, dict) for message in messages):
        raise BadRowError("its messages are not a list of chat messages, each with a role and content")
    roles = [message.get("role") for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    answered = all(turns[i - 1] == "user" for i in range(1, len(turns)) if turns[i] == "assistant")
    if set(turns) != {"user", "assistant"} or turns[0] != "user" or not answered:
        raise BadRowError(
            f"its messages have the roles {roles}: after at most one system message, each assistant answers a user"
        )
    return messages


def _parts(message: dict) -> list[dict]:
    """A message's content as parts; `<image>` in a user's text places an image."""
    content = message.get("content")
    if isinstance(content, str):
        pieces = content.split("<image>") if message["role"] == "user" else [content]
        parts = [{"type": "text", "text": pieces[0].strip()}]
        for piece in pieces[1:]:
            parts += [{"type": "image"}, {"type": "text", "text": piece.strip()}]
    elif isinstance(content, (list, tuple)) and all(isinstance(part, dict) for part in content):
        # Tables fill the keys that a part lacks with None.
        parts = [{key: value for key, value in part.items() if value is not None} for part in content]
        unknown = [part.get("type") for part in parts if part.get("type") not in ("text", "image")]
        if unknown:
            raise BadRowError(f"a message has a part of type {unknown[0]!r}: 'text' and 'image' are known")
        parts = [{"type": "image"} if part["type"] == "image" else part for part in parts]
    else:
        raise BadRowError(f"a message's content is {content!r}: text or a list of parts is expected")
    parts = [part for part in parts if part.get("text") or part.get("type") == "image"]
    if message["role"] == "assistant" and not "".join(part.get("text", "") for part in parts).strip():
        raise BadRowError("an assistant's message is empty")
    return parts


def _place_images(messages: list[dict], num_images: int) -> list[dict]:
    """Content as parts, with one image part per image: where the row puts them, else before the first question."""
    placed = [{"role": message["role"], "content": _parts(message)} for message in messages]
    found = sum(part.get("type") == "image" for message in placed for part in message["content"])
    if found == 0 and num_images:
        first = next(message for message in placed if message["role"] == "user")
        first["content"] = [{"type": "image"}] * num_images + first["content"]
    elif found != num_images:
        raise BadRowError(f"its text places {found} images, but it has {num_images}")
    return placed
