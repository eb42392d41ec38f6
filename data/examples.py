"""Rows of visual question answering data, in the shapes people keep them in, as one `Example`."""

import reprlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from .images import ImageError, decode_image


COLUMNS_HELP = (
    "a row needs `question`/`answer`, `questions`/`answers`, `messages` (roles and content) or LLaVA's "
    "`conversations`, and `image` or `images` unless it is text alone"
)
LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class BadRowError(ValueError):
    """A data row that cannot be used; the message says why, and once read from a file, which row of which file."""


@dataclass
class Example:
    """
    Args:
        images (`list[PIL.Image.Image]`): The images in order of appearance; none if the row is text alone.
        dialogs (`list[list[dict]]`):
            Independent conversations about these images, each a list of chat messages that begins with all of them.
        families (`list[str]`, *optional*):
            The kind of question of each dialog, by which scores are told apart.
        skipped (`int`, *optional*, defaults to 0):
            Number of unusable rows that were passed over to reach this one.
        references (`list[list[str]]`, *optional*):
            All answers that were given to each dialog's question, where the row has several; the dialog holds the
            commonest of them.
    """

    images: list[Image.Image]
    dialogs: list[list[dict]]
    families: list[str] | None = None
    skipped: int = 0
    references: list[list[str]] | None = None


def to_example(row: "dict | Example", image_folder: str | Path | None = None) -> Example:
    """
    Normalizes one row.

    Args:
        row (`dict` or `Example`):
            `question` and `answer` (and `family`), lists `questions` and `answers` (and `families`), chat `messages`,
            or LLaVA's `conversations`, with the images they are about, if any: PIL images, encoded bytes or paths in
            `image` or `images`, or in the `image` or `path` of the messages' image parts. Several people's answers to
            one `question`, or to one of the `questions`, are a list, of strings or of VQA's `{"answer": ...}`:
            training uses the commonest, scores use all.
        image_folder (`str` or `Path`, *optional*):
            Folder in which relative image paths start.

    Returns:
        [`Example`]

    Raises:
        BadRowError: If the row lacks a question, an answer or an image that its text places, or an image cannot be
            decoded.

    Example:

    ```python
    >>> from PIL import Image
    >>> from tokenflex.data.examples import to_example

    >>> example = to_example({"image": Image.new("RGB", (8, 8)), "question": "dark?", "answer": "yes"})
    >>> [part["type"] for part in example.dialogs[0][0]["content"]]
    ['image', 'text']
    >>> to_example({"question": "is water wet?", "answer": "yes"}).images
    []
    ```
    """
    if isinstance(row, Example):
        return row
    families = references = None
    if row.get("messages") is not None:
        dialogs = [row["messages"]]
    elif row.get("conversations") is not None:
        dialogs = [_from_llava(row["conversations"])]
    else:
        dialogs, families, references = _from_questions(row)
    dialogs = [_with_parts(dialog) for dialog in dialogs]
    images = _images(row, dialogs)
    dialogs = [_place_images(dialog, len(images)) for dialog in dialogs]
    if any(_up_to_images(dialog) != _up_to_images(dialogs[0]) for dialog in dialogs):
        raise BadRowError("its questions place the images differently, so that they cannot share them")
    try:
        images = [decode_image(image, image_folder) for image in images]
    except ImageError as error:
        raise BadRowError(str(error)) from None
    return Example(images, dialogs, families, references=references)


def _images(row: dict, dialogs: list[list[dict]]) -> list:
    """The row's images, still encoded, from its column or else from the image parts, which are left as mere places."""
    images = row["images"] if row.get("images") is not None else row.get("image")
    images = list(images) if isinstance(images, (list, tuple)) else [] if images is None else [images]
    parts = [part for dialog in dialogs for message in dialog for part in message["content"]]
    inline = [part.pop("image") for part in parts if "image" in part]
    if images and inline:
        raise BadRowError(
            f"it has {len(images)} images in a column and {len(inline)} in its messages: give all in the one or the "
            "other"
        )
    if not images and not inline:
        for name, value in row.items():
            if isinstance(value, (Image.Image, bytes)) or _is_stored_image(value):
                raise BadRowError(f"it has no image, but its column {name!r} looks like one: rename it to `image`")
    return images or inline


def _is_stored_image(value) -> bool:
    return isinstance(value, dict) and value.keys() == {"bytes", "path"} and any(value.values())


def _from_questions(row: dict) -> tuple[list[list[dict]], list[str] | None, list[list[str]] | None]:
    """One dialog per question, the families of the questions, and all answers where a question has several."""
    questions = row["questions"] if row.get("questions") is not None else row.get("question")
    answers = row["answers"] if row.get("answers") is not None else row.get("answer")
    if not isinstance(questions, (list, tuple)):
        questions, answers = [questions], [answers]
    answers = answers if isinstance(answers, (list, tuple)) else [answers]
    if len(questions) != len(answers):
        raise BadRowError(f"{len(questions)} questions but {len(answers)} answers")
    if not questions:
        raise BadRowError("it has no questions")
    dialogs, references = [], []
    for question, given in zip(questions, answers):
        question, given = _as_text("question", question), _inner(given)
        given = [_inner(answer) for answer in given] if isinstance(given, (list, tuple)) else [given]
        # Of ten people some say nothing.
        given = [_as_text("answer", answer) for answer in [a for a in given if a not in (None, "")] or given]
        if not given:
            raise BadRowError(f"its question {reprlib.repr(question)} has no answers")
        references.append(given)
        (commonest, _), *_ = Counter(given).most_common(1)  # the first of those that are as common
        dialogs.append([{"role": "user", "content": question}, {"role": "assistant", "content": commonest}])
    families = row["families"] if row.get("families") is not None else row.get("family")
    families = families if isinstance(families, (list, tuple, type(None))) else [str(families)] * len(dialogs)
    if families is not None and len(families) != len(dialogs):
        raise BadRowError(f"{len(families)} families for {len(dialogs)} questions")
    return dialogs, families, references if any(len(given) > 1 for given in references) else None


def _inner(answer):
    """The texts in VQA's `{"answer": ...}` or SQuAD's `{"text": ...}`, of one answer or of a column of them."""
    if not isinstance(answer, dict):
        return answer
    names = [name for name in ("answer", "text") if name in answer]
    if not names:
        raise BadRowError(f"its answer has {', '.join(map(repr, answer))} but neither 'answer' nor 'text'")
    return answer[names[0]]


def _as_text(name: str, value) -> str:
    value = str(value) if type(value) in (int, float) else value
    if not isinstance(value, str) or not value.strip():
        raise BadRowError(f"its {name} is {reprlib.repr(value)}, not a text; {COLUMNS_HELP}")
    return value


def _from_llava(conversations) -> list[dict]:
    try:
        return [{"role": LLAVA_ROLES[turn["from"]], "content": turn["value"]} for turn in conversations]
    except (KeyError, TypeError) as error:
        raise BadRowError(f"its `conversations` are not LLaVA turns of `from` and `value` ({error!r})") from None


def _up_to_images(dialog: list[dict]) -> list[dict]:
    parts = dialog[0]["content"]
    last = max((i for i, part in enumerate(parts) if part["type"] == "image"), default=-1)
    return parts[: last + 1]


def _with_parts(messages) -> list[dict]:
    """The same messages with their contents as parts, once their roles are known to make a conversation."""
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, dict) for message in messages):
        raise BadRowError("its messages are not a list of chat messages, each with a role and content")
    roles = [message.get("role") for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    known = all(role in ("user", "assistant") for role in turns) and turns[:1] == ["user"] and "assistant" in turns
    if not known or any(turns[i - 1] != "user" for i in range(1, len(turns)) if turns[i] == "assistant"):
        raise BadRowError(
            f"its messages have the roles {roles}: after at most one system message, each assistant answers a user"
        )
    return [{"role": message["role"], "content": _parts(message)} for message in messages]


def _parts(message: dict) -> list[dict]:
    """A message's content as parts; `<image>` in a user's text places an image."""
    content = message.get("content")
    if isinstance(content, str):
        pieces = content.split("<image>") if message["role"] == "user" else [content]
        parts = [{"type": "text", "text": pieces[0].strip()}]
        for piece in pieces[1:]:
            parts += [{"type": "image"}, {"type": "text", "text": piece.strip()}]
    elif isinstance(content, (list, tuple)) and all(isinstance(part, dict) for part in content):
        parts = [_part(part) for part in content]
    else:
        raise BadRowError(f"a message's content is {reprlib.repr(content)}: text or a list of parts is expected")
    parts = [part for part in parts if part["type"] == "image" or part["text"]]
    texts = "".join(part["text"] for part in parts if part["type"] == "text")
    if message["role"] == "assistant" and not texts.strip():
        raise BadRowError("an assistant's message is empty")
    try:
        texts.encode()
    except UnicodeEncodeError:
        raise BadRowError(f"a message's text {reprlib.repr(texts)} has half of a surrogate pair in it") from None
    return parts


def _part(part: dict) -> dict:
    # Tables fill the keys that a part lacks with None.
    part = {key: value for key, value in part.items() if value is not None}
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text", ""), str):
            raise BadRowError(f"a message's text is {reprlib.repr(part['text'])}, not a text")
        return {"type": "text", "text": part.get("text", "")}
    if kind not in ("image", "image_url"):
        raise BadRowError(f"a message has a part of type {reprlib.repr(kind)}: 'text' and 'image' are known")
    remote = [key for key in ("image_url", "url", "base64") if key in part]
    if remote or kind == "image_url":
        raise BadRowError(
            f"an image part of a message has {(remote or ['image_url'])[0]!r}: images are read from `image` or "
            "`path`, and nothing is fetched from the network, so download it first"
        )
    value = part.get("image", part.get("path"))
    return {"type": "image"} if value is None else {"type": "image", "image": value}


def _place_images(messages: list[dict], num_images: int) -> list[dict]:
    """One image part per image: where the row puts them, else before the first question."""
    found = sum(part["type"] == "image" for message in messages for part in message["content"])
    if found == 0 and num_images:
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = [{"type": "image"}] * num_images + first["content"]
    elif found != num_images:
        raise BadRowError(f"its text places {found} images, but it has {num_images}")
    return messages
