"""Answers kept while an evaluation runs, so that one that is stopped goes on where it was."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from torch.utils.data import Subset

from ..inference.counts import parse_num_vision_tokens
from .sweep import Prediction, answer_questions, encode_questions


def read_partial(path: str | Path, run: dict) -> list[Prediction]:
    """
    The answers that a stopped evaluation has left.

    Args:
        path (`str` or `Path`): The file, which need not be there.
        run (`dict`): Description of the evaluation; JSON values.

    Returns:
        `list[Prediction]`: Of whole batches; what was being written when it stopped is left out.

    Raises:
        ValueError: If the file holds answers of another evaluation.
    """
    path = Path(path)
    if not path.is_file():
        return []
    whole = path.read_text(encoding="utf-8").split("\n")[:-1]  # behind the last line break a line may be torn
    if not whole:
        return []
    before = json.loads(whole[0])
    if before != run:
        differing = [f"{name} ({before.get(name)}, not {run[name]})" for name in run if before.get(name) != run[name]]
        raise ValueError(
            f"{path} holds the answers of another evaluation, which differs in {', '.join(differing)}: name another "
            "`output_dir`, or delete the file."
        )
    predictions = [Prediction(**values) for line in whole[1:] for values in json.loads(line)]
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
    results = read_partial(path, run)
    if not results:
        path.unlink(missing_ok=True)
    last = results[-1].index if results else -1
    rest = [index for index in (range(len(dataset)) if indices is None else indices) if index > last]
    was_training = model.training
    model.eval()
    for targets, inputs in encode_questions(model, processor, Subset(dataset, rest), batch_size, show_progress):
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
            file.write(json.dumps([asdict(target) for target in targets]) + "\n")
    model.train(was_training)
    return results


def _cut_torn_line(file) -> None:
    text = file.read()
    end = text.rfind("\n") + 1
    file.seek(len(text[:end].encode()))
    file.truncate()
