"""The model card: built from a checkpoint, its provenance and its evaluations, never typed in."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from transformers import AutoConfig

from ..checkpoints.provenance import ADOPTED, is_hub_id, read_provenance
from ..choices_tokenflex import parse_choice, sort_choices
from ..evaluation.report import markdown_table
from .checkpoint import count_parameters


TEMPLATE = Path(__file__).with_name("card.md")
TASK = "visual-question-answering"


@dataclass
class Evaluation:
    """
    One evaluation of a checkpoint, as `tokenflex eval` or `tokenflex quickstart` wrote it.

    Args:
        folder (`Path`): Folder of its `results.json` and `results.png`.
        report (`dict`): The content of `results.json`.
    """

    folder: Path
    report: dict

    @property
    def datasets(self) -> list[str]:
        names = self.report.get("dataset") or [self.folder.resolve().name]
        return [names] if isinstance(names, str) else names

    @property
    def title(self) -> str:
        names = " ".join(" + ".join(self.datasets).split())
        return f"{names}, {self.report['dataset_split']}" if self.report.get("dataset_split") else names

    @property
    def slug(self) -> str:
        """Its name in file names and metadata."""
        return slugify(f"{self.title} {self.metric}")

    @property
    def hub_dataset(self) -> str | None:
        """The data set's id, if it is one on the Hub."""
        return self.datasets[0] if len(self.datasets) == 1 and is_hub_id(self.datasets[0]) else None

    @property
    def metric(self) -> str:
        return self.report.get("metric", "exact_match")

    @property
    def scores(self) -> dict[str, float]:
        """The mean over families at every count."""
        return self.report["mean"]

    @property
    def file(self) -> str:
        return f"evaluation/{self.slug}/results.json"

    @property
    def plot(self) -> str | None:
        return f"evaluation/{self.slug}/results.png" if (self.folder / "results.png").is_file() else None

    def files(self) -> dict[str, Path]:
        """Its published files, by the path in the repository."""
        files = {self.file: self.folder / "results.json"}
        return files | ({self.plot: self.folder / "results.png"} if self.plot else {})


def slugify(name: str) -> str:
    """
    A name in the letters that paths have.

    Args:
        name (`str`): Any name.

    Example:

    ```python
    >>> from tokenflex.hub.card import slugify

    >>> slugify("someone/shapes, test")
    'someone-shapes-test'
    ```
    """
    return re.sub(r"[^\w.]+", "-", name.lower()).strip("-.") or "evaluation"


def read_evaluation(folder: str | Path) -> Evaluation:
    """
    Reads what `tokenflex eval` wrote.

    Args:
        folder (`str` or `Path`): Its `output_dir`.

    Raises:
        ValueError: If the folder holds no evaluation.
    """
    folder = Path(folder)
    file = folder / "results.json"
    how = (
        "Run `tokenflex eval --model_name_or_path CHECKPOINT --dataset DATA --output_dir FOLDER` first, or leave "
        "scores out with `--without_evaluation`."
    )
    if not file.is_file():
        raise ValueError(f"`evaluation`={str(folder)!r} holds no results.json. {how}")
    try:
        report = json.loads(file.read_text())
        markdown_table(report), report["mean"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"`evaluation`: {file} is no report of an evaluation. {how}") from None
    return Evaluation(folder, report)


def build_card(
    checkpoint: str | Path,
    repo_id: str,
    evaluations: Sequence[Evaluation] = (),
    license: str | None = None,
    languages: Sequence[str] = ("en",),
    datasets: Sequence[str] = (),
    base_models: Sequence[str] = (),
    tags: Sequence[str] = (),
    question: str = "What does the picture show?",
) -> ModelCard:
    """
    A checkpoint's model card. Every figure in it comes from a file: scores and costs from the evaluations, the way it
    was made from its provenance.

    Args:
        checkpoint (`str` or `Path`): The checkpoint's folder.
        repo_id (`str`): Repository that it is going to, for the code in the card.
        evaluations (`Sequence[Evaluation]`, *optional*): As [`read_evaluation`] returns them.
        license (`str`, *optional*): The checkpoint's, as the Hub abbreviates it, such as `"apache-2.0"`.
        languages (`Sequence[str]`, *optional*, defaults to `("en",)`): Languages that it understands.
        datasets (`Sequence[str]`, *optional*): Hub ids of training data, beside those that the provenance names.
        base_models (`Sequence[str]`, *optional*): Hub ids of what it was built from, beside those of the provenance.
        tags (`Sequence[str]`, *optional*): Further tags.
        question (`str`, *optional*): Question of the card's example.

    Returns:
        [`~huggingface_hub.ModelCard`]: The card, with `model-index` in its metadata.
    """
    config = AutoConfig.from_pretrained(checkpoint)
    provenance = read_provenance(checkpoint)
    bases = list(dict.fromkeys([*provenance["base_models"], *base_models]))
    used = [name for stage in provenance["stages"] for name in stage.get("data", []) if is_hub_id(name)]
    # The Hub shows results only of a model that has a name in the metadata.
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=list(dict.fromkeys(["tokenflex", "vision-language-model", *tags])),
        language=list(languages),
        license=license,
        base_model=[name for name in bases if is_hub_id(name)] or None,
        datasets=list(dict.fromkeys([*used, *datasets])) or None,
        metrics=sorted({evaluation.metric for evaluation in evaluations}) or None,
        model_name=repo_id.split("/")[-1] if evaluations else None,
        eval_results=[result for evaluation in evaluations for result in eval_results(evaluation)] or None,
    )
    choices, weights = config.vision_token_choices, config.vision_token_weights
    rows, columns = config.patch_grid
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        config=config,
        rows=rows * config.downsample_factor,
        columns=columns * config.downsample_factor,
        is_trained=[stage["stage"] for stage in provenance["stages"][-1:]] != [ADOPTED],
        largest=min(rows, columns),
        size=config.image_size,
        parameters=count_parameters(checkpoint),
        choices=", ".join(
            f"{count} (drawn {weight / sum(weights):.0%} of the time)" for count, weight in zip(choices, weights)
        ),
        counts=choices,
        question=question,
        license=license,
        base_models=[(name, is_hub_id(name), _license(name)) for name in bases],
        untrained=sort_choices({parse_choice(n) for e in evaluations for n in e.scores if n != "auto"} - set(choices)),
        stages=provenance["stages"],
        image_processors=sorted(
            {
                e.report["machine"]["image_processor"]
                for e in evaluations
                if "image_processor" in e.report.get("machine", {})
            }
        ),
        evaluations=[
            {
                "title": re.sub(r"([|*_<>\\[\]`])", r"\\\1", evaluation.title),
                "metric": evaluation.metric,
                "table": markdown_table(evaluation.report),
                "plot": evaluation.plot,
                "file": evaluation.file,
                "machine": evaluation.report.get("machine"),
                "interval": evaluation.report.get("interval"),
                "latency_batch_size": evaluation.report.get("latency_batch_size"),
            }
            for evaluation in evaluations
        ],
    )


def eval_results(evaluation: Evaluation) -> list[EvalResult]:
    """
    The evaluation as the cards' `model-index` takes it: one result per count, unrounded.

    Args:
        evaluation ([`Evaluation`]): The evaluation.
    """
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=evaluation.hub_dataset or evaluation.slug,
            dataset_name=evaluation.title,
            dataset_split=evaluation.report.get("dataset_split"),
            metric_type=evaluation.metric,
            metric_name=f"{evaluation.metric.replace('_', ' ')} at {count} vision tokens",
            metric_value=score,
            metric_args={"num_vision_tokens": parse_choice(count)},
        )
        for count, score in evaluation.scores.items()
    ]


def eval_results_yaml(evaluation: Evaluation, task_id: str) -> dict[str, str]:
    """
    The evaluation as the Hub's `.eval_results` takes it, for a data set that is a benchmark there.

    Args:
        evaluation ([`Evaluation`]): The evaluation.
        task_id (`str`): The task's name in the benchmark's `eval.yaml`.

    Returns:
        `dict[str, str]`: The YAML of each count, by its path in the repository.

    Raises:
        ValueError: If the evaluation's data is not a data set of the Hub.
    """
    if evaluation.hub_dataset is None:
        raise ValueError(
            f"`eval_task_id`={task_id!r}: {evaluation.title} is not one data set of the Hub, and no benchmark there. "
            "Leave it out, or evaluate on the benchmark's id."
        )
    files = {}
    for count, score in evaluation.scores.items():
        notes = f"{evaluation.metric}, num_vision_tokens={count}"
        entry = EvalResultEntry(dataset_id=evaluation.hub_dataset, task_id=task_id, value=score, notes=notes)
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
        files[f".eval_results/{evaluation.slug}-{count}.yaml"] = text
    return files


def _license(model_id: str) -> str | None:
    """The license that the model's own card names, if it can be read."""
    if not is_hub_id(model_id):
        return None
    try:
        return ModelCard.load(model_id).data.license
    except Exception:  # whatever keeps it from being read, the card then sends its reader there
        return None
