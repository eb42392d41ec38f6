"""Rows of visual question answering data, in the shapes people keep them in, as one `Example`."""

import re
import reprlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from .cells import BadRowError, as_text, is_missing
from .images import ImageError, decode_image
from .options import ask_with_options, find_letter, read_options


LLAVA_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
# Where texts place images: `<image>`, `<image1>`, `<image 1>`, `<|image_1|>`. The white space around belongs to it.
MARKER = re.compile(r"\s*<\|?image[ _]?([0-9]{0,3})\|?>\s*")
IMAGES, OPTIONS = ("images", "image"), ("options", "choices")
QUESTIONS, ANSWERS, FAMILIES = ("questions", "question"), ("answers", "answer"), ("families", "family")
TEXT_COLUMNS = (*QUESTIONS, *ANSWERS, *OPTIONS)


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
        options (`list[list[str]]`, *optional*):
            The options of each dialog's question, empty where it has none; the answers are then letters.
    """

    images: list[Image.Image]
    dialogs: list[list[dict]]
    families: list[str] | None = None
    skipped: int = 0
    references: list[list[str]] | None = None
    options: list[list[str]] | None = None


def to_example(row: "dict | Example", image_folder: str | Path | None = None) -> Example:
    """
    Normalizes one row.

    Args:
        row (`dict` or `Example`):
            `question` and `answer` (and `family`), lists `questions` and `answers` (and `families`), chat `messages`,
            or LLaVA's `conversations`, with the images they are about, if any: PIL images, encoded bytes or paths in
            `image` or `images`, or in the `image` or `path` of the messages' image parts. Several people's answers to
            one `question`, or to one of the `questions`, are a list, of strings or of VQA's `{"answer": ...}`:
            training uses the commonest, scores use all. With `options` or `choices`, a list for a `question` and a
            list of lists for `questions`, the answer is an option's letter, text or index.
        image_folder (`str` or `Path`, *optional*):
            Folder in which relative image paths start.

    Returns:
        [`Example`]

    Raises:
        BadRowError: If the row lacks a question, an answer or an image that its text places, nobody answers its last
            message, or an image cannot be decoded.

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
        return replace(row, images=_decode(row.images))
    if not isinstance(row, Mapping):
        raise BadRowError(f"it is a {type(row).__name__}, not a dict of columns")
    families = references = options = None
    if not is_missing(row.get("messages")):
        dialogs = [row["messages"]]
    elif not is_missing(row.get("conversations")):
        dialogs = [_from_llava(row["conversations"])]
    else:
        dialogs, families, references, options = _from_questions(row)
    dialogs = [_with_parts(dialog) for dialog in dialogs]
    images = _images(row, dialogs)
    dialogs = [_place_images(dialog, len(images)) for dialog in dialogs]
    if any(_up_to_images(dialog) != _up_to_images(dialogs[0]) for dialog in dialogs):
        raise BadRowError("its questions place the images differently, so that they cannot share them")
    images = _decode(_in_order(images, dialogs), image_folder)
    return Example(images, dialogs, families, references=references, options=options)


def _decode(images: list, image_folder: str | Path | None = None) -> list[Image.Image]:
    try:
        return [decode_image(image, image_folder) for image in images]
    except ImageError as error:
        raise BadRowError(str(error)) from None


def unused_columns(row: "dict | Example") -> list[str]:
    """
    The columns of a row that hold something of which [`to_example`] makes no use.

    Args:
        row (`dict` or `Example`): A row as [`to_example`] takes it.
    """
    if not isinstance(row, Mapping):
        return []
    held = [name for name, value in row.items() if not is_missing(value)]
    texts = next(([(name,)] for name in ("messages", "conversations") if name in held), None)
    texts = texts or [QUESTIONS, ANSWERS, FAMILIES, OPTIONS]
    used = {next((name for name in names if name in held), None) for names in [*texts, IMAGES]}
    return [name for name in held if name not in used]


def _cell(row: Mapping, names: tuple[str, ...]):
    """The first of several columns' cells that is not missing; one that is missing if all are."""
    cells = [row[name] for name in names if name in row]
    return next((cell for cell in cells if not is_missing(cell)), cells[-1] if cells else None)


def _images(row: Mapping, dialogs: list[list[dict]]) -> list:
    """The row's images, still encoded, from its column or else from the image parts, which are left as mere places."""
    images = _cell(row, IMAGES)
    images = list(images) if isinstance(images, (list, tuple)) else [] if is_missing(images) else [images]
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


def _in_order(images: list, dialogs: list[list[dict]]) -> list:
    """The images in order of appearance, where texts place them by number; the numbers are taken out."""
    parts = [[part for message in dialog for part in message["content"]] for dialog in dialogs]
    numbers = [[part.pop("number", None) for part in own if part["type"] == "image"] for own in parts][0]
    if not any(number is not None for number in numbers):
        return images
    if None in numbers or sorted(numbers) != list(range(1, len(images) + 1)):
        raise BadRowError(f"its text places the images {numbers}, but it has the images 1 to {len(images)}, once each")
    return [images[number - 1] for number in numbers]


def _is_stored_image(value) -> bool:
    return isinstance(value, dict) and value.keys() == {"bytes", "path"} and any(value.values())


def _from_questions(row: Mapping) -> tuple[list[list[dict]], list[str] | None, list | None, list | None]:
    """One dialog per question, the families of the questions, all answers if any has several, and the options."""
    questions, answers, options = (_cell(row, names) for names in (QUESTIONS, ANSWERS, OPTIONS))
    if not isinstance(questions, (list, tuple)):
        questions, answers, options = [questions], [answers], [options]
    answers = answers if isinstance(answers, (list, tuple)) else [answers]
    options = [None] * len(questions) if is_missing(options) else options
    if len(questions) != len(answers):
        raise BadRowError(f"{len(questions)} questions but {len(answers)} answers")
    if not questions:
        raise BadRowError("it has no questions")
    if not isinstance(options, (list, tuple)) or len(options) != len(questions):
        raise BadRowError(f"{len(questions)} questions but the options {reprlib.repr(options)}: give each a list")
    dialogs, references, texts = [], [], [read_options(choices) for choices in options]
    for question, given, choices, own in zip(questions, answers, options, texts):
        question, given = as_text("question", question), _answers(question, given)
        given = [find_letter(answer, choices) if own else as_text("answer", answer) for answer in given]
        references.append(given)
        (commonest, _), *_ = Counter(given).most_common(1)  # the first of those that are as common
        asked = ask_with_options(question, own) if own else question
        dialogs.append([{"role": "user", "content": asked}, {"role": "assistant", "content": commonest}])
    families = _cell(row, FAMILIES)
    if not is_missing(families):
        families = list(families) if isinstance(families, (list, tuple)) else [families] * len(dialogs)
        if len(families) != len(dialogs):
            raise BadRowError(f"{len(families)} families for {len(dialogs)} questions")
        families = ["all" if is_missing(family) else str(family) for family in families]
    several = any(len(given) > 1 for given in references)
    return dialogs, families or None, references if several else None, texts if any(texts) else None


def _answers(question: str, given) -> list:
    """The answers to one question, without those of people who said nothing, unless nobody said anything."""
    given = _inner(given)
    given = [_inner(answer) for answer in given] if isinstance(given, (list, tuple)) else [given]
    if not given:
        raise BadRowError(f"its question {reprlib.repr(question)} has no answers")
    said = [answer for answer in given if not is_missing(answer) and not (isinstance(answer, str) and answer == "")]
    return said or given


def _inner(answer):
    """The texts in VQA's `{"answer": ...}` or SQuAD's `{"text": ...}`, of one answer or of a column of them."""
    if not isinstance(answer, dict):
        return answer
    names = [name for name in ("answer", "text") if name in answer]
    if not names:
        raise BadRowError(f"its answer has {', '.join(map(repr, answer))} but neither 'answer' nor 'text'")
    return answer[names[0]]


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
    if not isinstance(messages, (list, tuple)) or not all(isinstance(message, Mapping) for message in messages):
        raise BadRowError("its messages are not a list of chat messages, each with a role and content")
    roles = [message.get("role") for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    known = all(role in ("user", "assistant") for role in turns) and turns[:1] == ["user"] and "assistant" in turns
    if not known or any(turns[i - 1] != "user" for i in range(1, len(turns)) if turns[i] == "assistant"):
        raise BadRowError(
            f"its messages have the roles {roles}: after at most one system message, each assistant answers a user"
        )
    if turns[-1] == "user":
        raise BadRowError(f"its messages have the roles {roles}: nobody answers the last user, so leave that turn out")
    return [{"role": message["role"], "content": _parts(message)} for message in messages]


def _parts(message: Mapping) -> list[dict]:
    """A message's content as parts, its white space as it is; a marker in a user's text places an image."""
    content, role = message.get("content"), message["role"]
    if isinstance(content, str):
        parts = [{"type": "text", "text": content}]
    elif isinstance(content, (list, tuple)) and all(isinstance(part, Mapping) for part in content):
        parts = [_part(part) for part in content]
    else:
        raise BadRowError(f"a message's content is {reprlib.repr(content)}: text or a list of parts is expected")
    if role == "user":
        parts = [piece for part in parts for piece in _split_markers(part)]
    parts = [part for part in parts if part["type"] == "image" or part["text"]]
    texts = "".join(part["text"] for part in parts if part["type"] == "text")
    has_images = any(part["type"] == "image" for part in parts)
    if role != "system" and not texts.strip() and not (role == "user" and has_images):
        raise BadRowError(f"{'an assistant' if role == 'assistant' else 'a user'}'s message is empty")
    if role == "assistant" and has_images:
        raise BadRowError("an assistant's message has an image: images stand in questions")
    try:
        texts.encode()
    except UnicodeEncodeError:
        raise BadRowError(f"a message's text {reprlib.repr(texts)} has half of a surrogate pair in it") from None
    return parts


def _split_markers(part: dict) -> list[dict]:
    if part["type"] == "image":
        return [part]
    first, *rest = MARKER.split(part["text"])
    parts = [{"type": "text", "text": first}]
    for number, text in zip(rest[::2], rest[1::2]):
        parts += [{"type": "image", **({"number": int(number)} if number else {})}, {"type": "text", "text": text}]
    return parts


def _part(part: Mapping) -> dict:
    # Tables fill the keys that a part lacks with None.
    part = {key: value for key, value in part.items() if not _is_filled_in(value)}
    kind, text = part.get("type"), part.get("text", "")
    if kind not in ("text", "image", "image_url"):
        raise BadRowError(f"a message has a part of type {reprlib.repr(kind)}: 'text' and 'image' are known")
    if not isinstance(text, str):
        raise BadRowError(f"a message's text is {reprlib.repr(text)}, not a text")
    images = [key for key in ("image", "path", "image_url", "url", "base64") if key in part]
    if kind == "text":
        if images:
            raise BadRowError(f"a text part of a message has {images[0]!r}: give the image a part of type 'image'")
        return {"type": "text", "text": text}
    if text:
        raise BadRowError(f"an image part of a message has the text {reprlib.repr(text)}: give it a part of its own")
    remote = [key for key in images if key not in ("image", "path")]
    if remote or kind == "image_url":
        raise BadRowError(
            f"an image part of a message has {(remote or ['image_url'])[0]!r}: images are read from `image` or "
            "`path`, and nothing is fetched from the network, so download it first"
        )
    value = part.get("image", part.get("path"))
    return {"type": "image"} if value is None else {"type": "image", "image": value}


def _is_filled_in(value) -> bool:
    return is_missing(value) or value == {"bytes": None, "path": None}


def _place_images(messages: list[dict], num_images: int) -> list[dict]:
    """One image part per image: where the row puts them, else before the first question."""
    found = sum(part["type"] == "image" for message in messages for part in message["content"])
    if found == 0 and num_images:
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = [{"type": "image"}] * num_images + first["content"]
    elif found != num_images:
        raise BadRowError(f"its text places {found} images, but it has {num_images}")
    return messages
