"""Answers kept while an evaluation runs, so that one that is stopped goes on where it was."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..checkpoints.fingerprint import digest, name_differences
from ..data.examples import Example, to_example
from ..inference.counts import parse_num_vision_tokens
from .sweep import Prediction, answer_questions, encode_questions


class _NotedRows:
    """Some rows of a data set as they are read, and the fingerprint of each."""

    def __init__(self, dataset, indices: Sequence[int]):
        self.dataset, self.indices, self.digests = dataset, indices, {}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Example:
        index = self.indices[place]
        example = to_example(self.dataset[index])
        self.digests[index] = _digest_row(example)
        return example


def _digest_row(example: Example) -> str:
    images = [digest(f"{image.mode}{image.size}".encode() + image.tobytes()) for image in example.images]
    return digest({**vars(example), "images": images})


def read_partial(path: str | Path, run: dict, dataset) -> list[Prediction]:
    """
    The answers that a stopped evaluation has left. The rows that they belong to are read again.

    Args:
        path (`str` or `Path`): The file, which need not be there.
        run (`dict`): Description of the evaluation; JSON values.
        dataset (sequence): Rows as [`to_example`] takes or returns them.

    Returns:
        `list[Prediction]`: Of whole batches; what was being written when it stopped is left out.

    Raises:
        ValueError: If the file holds answers of another evaluation, or about other rows.
    """
    path = Path(path)
    if not path.is_file():
        return []
    whole = path.read_text(encoding="utf-8").split("\n")[:-1]  # behind the last line break a line may be torn
    if not whole:
        return []
    before, *batches = map(json.loads, whole)
    how = "name another `output_dir`, or delete the file"
    if differing := name_differences(before, run):
        raise ValueError(f"{path} holds the answers of another evaluation, which differs in {differing}: {how}.")
    for index, known in (row for batch in batches for row in batch["rows"]):
        if _digest_row(to_example(dataset[index])) != known:
            raise ValueError(f"{path} holds answers about another data set: row {index} was another one; {how}.")
    predictions = [Prediction(**values) for batch in batches for values in batch["answers"]]
    for prediction in predictions:
        prediction.predictions = {
            parse_num_vision_tokens(name): answer for name, answer in prediction.predictions.items()
        }
    return predictions


def predict_on_and_on(
    path: str | Path,
    run: dict,
    model,
    processor,
    dataset,
    counts: Sequence[int | str],
    batch_size: int = 64,
    max_new_tokens: int = 16,
    show_progress: bool = True,
    indices: Sequence[int] | None = None,
) -> list[Prediction]:
    """
    As [`predict`], with every batch's answers written to a file, from which a later call goes on.

    Args:
        path (`str` or `Path`): The file; delete it when the answers are no longer needed.
        run (`dict`): Description of the evaluation; answers of another are refused.
        model, processor, dataset, counts, batch_size, max_new_tokens, show_progress: As for [`predict`].
        indices (`Sequence[int]`, *optional*): Rows to answer, rising. Defaults to all.
    """
    path = Path(path)
    results = read_partial(path, run, dataset)
    if not results:
        path.unlink(missing_ok=True)
    last = results[-1].index if results else -1
    rest = [index for index in (range(len(dataset)) if indices is None else indices) if index > last]
    was_training = model.training
    model.eval()
    rows = _NotedRows(dataset, rest)
    for targets, inputs in encode_questions(model, processor, rows, batch_size, show_progress, counts):
        answer_questions(model, processor, targets, inputs, counts, max_new_tokens)
        for target in targets:
            target.index = rest[target.index]
        results += targets
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        with path.open("r+" if not is_new else "w", encoding="utf-8") as file:
            if is_new:
                file.write(json.dumps(run) + "\n")
            else:
                _cut_torn_line(file)
            read = [(index, rows.digests.pop(index)) for index in dict.fromkeys(target.index for target in targets)]
            file.write(json.dumps({"rows": read, "answers": [asdict(target) for target in targets]}) + "\n")
    model.train(was_training)
    return results


def _cut_torn_line(file) -> None:
    text = file.read()
    end = text.rfind("\n") + 1
    file.seek(len(text[:end].encode()))
    file.truncate()
