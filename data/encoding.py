"""One row as the tokens that are trained on, or the reason why not: what checks rows is what collates them."""

from collections.abc import Iterator
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import NamedTuple

from .cells import BadRowError
from .examples import Example, to_example
from .placing import tokenize_prompts


class LongRowError(BadRowError):
    """A data row that is longer than `max_length`."""


class EncodedRow(NamedTuple):
    """
    Args:
        example ([`Example`]): The row.
        input_ids (`list[int]`): Its tokens, one placeholder for each image.
        labels (`list[int]`): Those of answers up to and with their end token, -100 elsewhere.
        segment_ids (`list[int]`): 0 for what several questions share, then the number of each.
        is_cut (`bool`): True if its end was left out.
    """

    example: Example
    input_ids: list[int]
    labels: list[int]
    segment_ids: list[int]
    is_cut: bool = False


def encode_row(
    row: dict | Example,
    processor,
    image_folder: str | Path | None = None,
    num_vision_tokens: int | None = None,
    max_length: int | None = None,
    truncate: bool = False,
) -> EncodedRow:
    """
    Encodes one row for training.

    Args:
        row (`dict` or `Example`): A row as [`to_example`] takes or returns it.
        processor ([`TokenFlexProcessor`]): The model's processor.
        image_folder (`str` or `Path`, *optional*): Folder in which relative image paths start.
        num_vision_tokens (`int`, *optional*): The count at which `max_length` is measured. Defaults to the
            processor's.
        max_length (`int`, *optional*): The longest row in tokens. Defaults to no limit.
        truncate (`bool`, *optional*, defaults to `False`): Whether a longer row is cut at its end, never in or before
            an image, in place of refused.

    Returns:
        [`EncodedRow`]

    Raises:
        BadRowError: If the row cannot be trained on; [`LongRowError`] if only for its length.

    Example:

    ```python
    >>> from tokenflex.data.encoding import encode_row
    >>> from tokenflex.towers.tiny import tiny_model_and_processor

    >>> _, processor = tiny_model_and_processor()
    >>> row = encode_row({"question": "two and two?", "answer": " 4"}, processor)
    >>> processor.decode([token for token in row.labels if token != -100])
    ' 4<|im_end|>'
    ```
    """
    example = to_example(row, image_folder)
    _refuse_tokens(example, processor)
    dialogs = [_encode_dialog(dialog, processor) for dialog in example.dialogs]
    encoded = _share_prefix(example, dialogs, processor)
    if max_length is None:
        return encoded
    needed, uncuttable = measure_row(encoded, processor, num_vision_tokens)
    if truncate and uncuttable > max_length:
        raise BadRowError(
            f"it needs {uncuttable} tokens up to its last image and its first answer token, but `max_length` is "
            f"{max_length}: truncation never cuts an image, so raise `max_length` to {uncuttable} or use fewer vision "
            "tokens"
        )
    if needed <= max_length:
        return encoded
    if not truncate:
        raise LongRowError(
            f"it needs {needed} tokens, but `max_length` is {max_length}: raise `max_length` to {needed}, use fewer "
            "vision tokens, or choose `on_long_row` 'skip' or 'truncate'"
        )
    _, *columns, _ = encoded
    return EncodedRow(example, *(column[: len(column) - needed + max_length] for column in columns), is_cut=True)


def measure_row(row: EncodedRow, processor, num_vision_tokens: int | None = None) -> tuple[int, int]:
    """
    The tokens of a row with its images at a count, and how many of them truncation cannot spare: up to its last image
    and the first token of an answer.

    Args:
        row ([`EncodedRow`]): The row.
        processor ([`TokenFlexProcessor`]): The model's processor.
        num_vision_tokens (`int`, *optional*): The count. Defaults to the processor's.
    """
    sizes = [(image.height, image.width) for image in row.example.images]
    added = sum(processor.count_vision_tokens(sizes, num_vision_tokens)) - len(sizes)
    places = [i for i, token in enumerate(row.input_ids) if token == processor.image_token_id]
    first_answer = next(i for i, label in enumerate(row.labels) if label != -100)
    return len(row.input_ids) + added, max([*places, first_answer]) + 1 + added


def _refuse_tokens(example: Example, processor) -> None:
    texts = [text for dialog in example.dialogs for message in dialog for text in _texts(message["content"])]
    for token in [*processor.tokenizer.all_special_tokens, processor.image_token]:
        if any(token in text for text in texts):
            raise BadRowError(f"its text contains {token!r}, which has a meaning of its own to the model")


def _texts(content: str | list[dict]) -> list[str]:
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def split_answers(dialog: list[dict], processor) -> Iterator[tuple[str, bool]]:
    """
    The rendered dialog in pieces, with `True` for answers: what the model has to say, up to and with the end token.

    Args:
        dialog (`list[dict]`): Chat messages, of which an assistant's is the last.
        processor ([`TokenFlexProcessor`]): The model's processor.

    Raises:
        BadRowError: If the chat template refuses the dialog, or answers cannot be found in what it makes of it.
    """
    done = ""
    for i, message in enumerate(dialog):
        if message["role"] != "assistant":
            continue
        try:
            prompt = processor.apply_chat_template(dialog[:i], add_generation_prompt=True)
            text = processor.apply_chat_template(dialog[: i + 1])
        except Exception as error:  # templates raise whatever they like
            raise BadRowError(f"the chat template refuses it ({error})") from None
        text = _as_prompted(text, prompt, message)
        answer = text[len(prompt) :].rstrip()  # templates put a line break behind the end token
        if not (text.startswith(prompt) and prompt.startswith(done) and answer):
            raise BadRowError(
                "what the chat template makes of it does not begin with the prompt that it makes of the turns before "
                f"an answer, ...{prompt[-40:]!r}, so that the answer cannot be told: give each answer a row of its "
                "own, or the processor a template that writes turns alike whatever follows"
            )
        yield prompt[len(done) :], False
        yield answer, True
        done = prompt + answer


def _as_prompted(text: str, prompt: str, answer: dict) -> str:
    """The text behind a prompt that a template writes with other white space than it does in front of an answer."""
    written = "".join(prompt.split())
    if text.startswith(prompt) or not "".join(text.split()).startswith(written):
        return text
    place = 0
    for _ in written:
        place += len(text[place:]) - len(text[place:].lstrip()) + 1
    said = "".join(_texts(answer["content"]))
    return prompt + said[: len(said) - len(said.lstrip())] + text[place:].lstrip()


def _encode_dialog(dialog: list[dict], processor) -> tuple[list[int], list[int]]:
    texts, are_answers = zip(*split_answers(dialog, processor))
    whole, first = tokenize_prompts(["".join(texts), texts[0]], processor)["input_ids"]
    encoded = [first, *tokenize_prompts(list(texts[1:]), processor, add_special_tokens=False)["input_ids"]]
    if list(chain(*encoded)) != whole:
        # Some tokenizers put a space before each text, and prompts are encoded from their beginning, not turn by turn,
        # when answers are generated. Turns stay apart where a token would reach from a prompt into its answer.
        wholes = [[], *tokenize_prompts(list(accumulate(texts)), processor)["input_ids"]]
        if all(later[: len(earlier)] == earlier for earlier, later in pairwise(wholes)):
            encoded = [later[len(earlier) :] for earlier, later in pairwise(wholes)]
    ids, labels = [], []
    for tokens, is_answer in zip(encoded, are_answers):
        ids.extend(tokens)
        labels.extend(tokens if is_answer else [-100] * len(tokens))
    if all(label == -100 for label in labels):
        raise BadRowError("the tokenizer has no tokens for its answers")
    end = processor.tokenizer.eos_token_id
    if end is not None and processor.tokenizer.decode(ids[-1:], skip_special_tokens=True):
        ids.append(end)  # some templates leave it to whoever trains
        labels.append(end)
    return ids, labels


def _share_prefix(example: Example, dialogs: list[tuple[list[int], list[int]]], processor) -> EncodedRow:
    """Puts what all dialogs begin with first and only once, then the rest of each as a segment of its own."""
    shared = 0
    if len(dialogs) > 1:
        for tokens in zip(*(ids for ids, _ in dialogs)):
            if len(set(tokens)) > 1:
                break
            shared += 1
        # At most up to an answer's last prompt token, from which its first token is predicted.
        starts = [next(i for i, label in enumerate(labels) if label != -100) for _, labels in dialogs]
        shared = min(shared, *(start - 1 for start in starts))
    prefix, prefix_labels = dialogs[0][0][:shared], dialogs[0][1][:shared]
    row = EncodedRow(example, list(prefix), list(prefix_labels), [0] * shared)
    for number, (ids, labels) in enumerate(dialogs, start=1 if len(dialogs) > 1 else 0):
        row.input_ids.extend(ids[shared:])
        row.labels.extend(labels[shared:])
        row.segment_ids.extend([number] * (len(ids) - shared))
    placeholders = row.input_ids.count(processor.image_token_id)
    if placeholders != len(example.images):
        raise BadRowError(
            f"it has {len(example.images)} images, but what its dialogs share holds {placeholders} image placeholders "
            f"({processor.image_token}): questions about the same images must place them alike"
        )
    return row
