"""
The paper's table, measured: scores of lmms-eval and VLMEvalKit at each vision-token count, with the paper's beneath.

    tokenflex paper-table outputs/vlmevalkit outputs/lmms_eval --output docs/paper-table.md
"""

import csv
import json
import re
from argparse import ArgumentParser
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoints.files import write_file
from ..choices_tokenflex import count_tokens
from ..inference.counts import parse_num_vision_tokens
from .vlmevalkit import CLAIM


# TokenFLEX's rows of the main table of arXiv 2504.03154.
PAPER = {
    "64": (54.4, 64.5, 79.4, 42.2, 79.0, 49.0, 54.6, 49.6),
    "144": (56.5, 69.8, 80.8, 43.0, 79.5, 51.6, 57.5, 50.0),
    "256": (57.3, 71.4, 81.0, 44.4, 79.9, 51.0, 56.5, 50.6),
}
COUNT = r"\d+(?:x\d+)?(?:@\d+(?:x\d+)?)?|low|high|auto"
VLMEVALKIT, LMMS_EVAL = "VLMEvalKit", "lmms-eval"


@dataclass(frozen=True)
class Benchmark:
    """
    Where harnesses write a benchmark's score. Several metrics are averaged.

    Args:
        name (`str`): As in the paper.
        dataset (`str`): VLMEvalKit's data set, a pattern: where a model judges, its name follows.
        row (`str`, *optional*): The entry by which the row with the score is known.
        columns (`tuple[str, ...]`): The columns with the score.
        task (`str`, *optional*): lmms-eval's task, if it has the benchmark.
        metrics (`tuple[str, ...]`): The task's metrics with the score.
        scales (`tuple[int, int]`): Factors that turn VLMEvalKit's and lmms-eval's scores into percent.
    """

    name: str
    dataset: str
    row: str | None
    columns: tuple[str, ...]
    task: str | None
    metrics: tuple[str, ...]
    scales: tuple[int, int]


HALLUSION_METRICS = ("aAcc", "fAcc", "qAcc")
BENCHMARKS = (
    Benchmark("MMStar", "MMStar", None, ("Overall",), "mmstar", ("average",), (100, 100)),
    Benchmark("OCRBench", "OCRBench", None, ("Final Score Norm",), "ocrbench", ("ocrbench_accuracy",), (1, 100)),
    Benchmark("AI2D", "AI2D_TEST", None, ("Overall",), "ai2d", ("exact_match",), (100, 100)),
    Benchmark(
        "HallusionBench",
        "HallusionBench",
        "Overall",
        HALLUSION_METRICS,
        "hallusion_bench_image",
        HALLUSION_METRICS,
        (1, 1),
    ),
    Benchmark("MMBench v1.1", "MMBench_DEV_EN_V11", "dev", ("Overall",), None, (), (100, 1)),
    Benchmark("MMVet", r"MMVet_(?!Hard).+", "Overall", ("acc",), "mmvet", ("gpt_eval_score",), (1, 1)),
    Benchmark(
        "MathVista",
        r"MathVista_MINI(_.+)?",
        "Overall",
        ("acc",),
        "mathvista_testmini_cot",
        ("llm_as_judge_eval",),
        (1, 1),
    ),
    Benchmark("MMMU", "MMMU_DEV_VAL", "validation", ("Overall",), "mmmu_val", ("mmmu_acc",), (100, 100)),
)


@dataclass
class Scores:
    """
    Args:
        percent (`dict`): The score of each (harness, count, benchmark).
        sources (`dict`): The file that each came from.
        models (`dict`): A file of each (harness, model): what lmms-eval was given, a fingerprint for VLMEvalKit.
        notes (`list[str]`): Finds that were not used, with the reasons.
    """

    percent: dict[tuple[str, str, str], float] = field(default_factory=dict)
    sources: dict[tuple[str, str, str], Path] = field(default_factory=dict)
    models: dict[tuple[str, str], Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, harness: str, count: str, benchmark: str, percent: float, source: Path) -> None:
        """Takes a score, from the newest file where there are several."""
        key = (harness, count, benchmark)
        older = self.sources.get(key)
        if older is not None and older.stat().st_mtime > source.stat().st_mtime:
            older, source, percent = source, older, self.percent[key]
        if older is not None:
            self.notes.append(f"{older}: older than {source}")
        self.percent[key], self.sources[key] = percent, source


def read_scores(paths: Iterable[str | Path]) -> Scores:
    """
    Reads the results files of both harnesses.

    Args:
        paths (iterable of `str` or `Path`):
            Files, or folders to look through: `*_results.json` of lmms-eval, and `tokenflex-64_MMStar_acc.csv` and the
            like of VLMEvalKit.

    Returns:
        `Scores`: The scores in them.

    Raises:
        ValueError: If a path does not exist, none holds results, a results file cannot be read, or those of one
            harness are of several models.
    """
    scores, files = Scores(), {}
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"`paths` names {path}, which does not exist: give folders or files of results.")
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        # VLMEvalKit links the newest run's files into the folder above.
        files |= {file.resolve(): file for file in found if file.suffix in (".json", ".csv") and file.is_file()}
    for file in files:
        try:
            _read_vlmevalkit(file, scores) or _read_lmms_eval(file, scores)
        except (KeyError, IndexError, TypeError, ValueError, csv.Error) as error:
            raise ValueError(f"{file} is not the results file that its name says: {error!r}") from error
    for harness in {harness for harness, _ in scores.models}:
        models = [f"{model} ({file})" for (other, model), file in scores.models.items() if other == harness]
        if len(models) > 1:
            raise ValueError(f"`paths` names {harness}'s results of several models, {', '.join(models)}: give one's.")
    if not scores.percent:
        found = "; ".join(scores.notes) or f"looked at {len(files)} JSON and CSV files"
        raise ValueError(
            f"No scores in {', '.join(map(str, paths))}: expected `*_results.json` of lmms-eval or "
            f"`tokenflex-64_MMStar_acc.csv` and the like of VLMEvalKit ({found})."
        )
    return scores


def _read_vlmevalkit(file: Path, scores: Scores) -> bool:
    name = re.fullmatch(rf"tokenflex-({COUNT})_(.+)_(acc|score)\.(csv|json)", file.name)
    if name is None:
        return False
    for benchmark in BENCHMARKS:
        if not re.fullmatch(benchmark.dataset, name[2]):
            continue
        text = file.read_text(encoding="utf-8")
        rows = list(csv.DictReader(text.splitlines())) if name[4] == "csv" else json.loads(text)
        rows = rows if isinstance(rows, list) else [rows]
        (row,) = rows if len(rows) == 1 else [row for row in rows if benchmark.row in row.values()]
        values = [float(row[column]) for column in benchmark.columns]
        percent = sum(values) / len(values) * benchmark.scales[0]
        scores.add(VLMEVALKIT, name[1], benchmark.name, percent, file)
        claim = next((folder / CLAIM for folder in file.parents[:2] if (folder / CLAIM).is_file()), None)
        if claim is not None:
            scores.models.setdefault((VLMEVALKIT, json.loads(claim.read_text())["weights"]), file)
    return True


def _read_lmms_eval(file: Path, scores: Scores) -> bool:
    if not file.name.endswith("_results.json"):
        return False
    report = json.loads(file.read_text(encoding="utf-8"))
    if "config" not in report or not str(report["config"].get("model")).startswith("tokenflex"):
        return False
    arguments = report["config"]["model_args"]
    if isinstance(arguments, dict):
        arguments = ",".join(f"{name}={value}" for name, value in arguments.items())
    count = re.search(rf"(?:^|,)\s*num_vision_tokens=({COUNT})", arguments)
    if count is None:
        scores.notes.append(f"{file}: its `model_args` name no num_vision_tokens")
        return True
    if report["config"].get("limit") not in (None, -1):
        scores.notes.append(f"{file}: it was run on a part of the questions (--limit {report['config']['limit']})")
        return True
    for benchmark in BENCHMARKS:
        row = report["results"].get(benchmark.task, {})
        # Keys are "metric,filter".
        values = {key.split(",")[0]: value for key, value in row.items() if key.split(",")[0] in benchmark.metrics}
        if not values:
            continue
        if any(not isinstance(values.get(metric), (int, float)) for metric in benchmark.metrics):
            scores.notes.append(f"{file}: {benchmark.task} has no number for {', '.join(benchmark.metrics)}: {values}")
            continue
        percent = sum(values.values()) / len(values) * benchmark.scales[1]
        scores.add(LMMS_EVAL, count[1], benchmark.name, percent, file)
        if model := re.search(r"(?:^|,)\s*pretrained=([^,]+)", arguments):
            scores.models.setdefault((LMMS_EVAL, model[1]), file)
    return True


def markdown_table(scores: Scores) -> str:
    """
    One table per harness: for each count a row of measured scores and, for the paper's counts, one of the paper's.
    Missing scores stay empty and are listed; a mean is given over all eight benchmarks only.

    Args:
        scores (`Scores`): Scores from [`read_scores`].
    """
    names = [benchmark.name for benchmark in BENCHMARKS]
    harnesses = sorted({harness for harness, _, _ in scores.percent})
    lines, missing = [], []
    for harness in harnesses:
        counts = {count for other, count, _ in scores.percent if other == harness} | PAPER.keys()
        lines += [f"**{harness}**, in %", "", "| vision tokens |  | " + " | ".join([*names, "mean"]) + " |"]
        lines.append("|---:|---|" + "---:|" * (len(names) + 1))
        for count in sorted(counts, key=_order):
            measured = [scores.percent.get((harness, count, name)) for name in names]
            lines.append(_row(count, "measured", measured))
            if count in PAPER:
                lines.append(_row(count, "paper", PAPER[count]))
            left_out = [name for name, value in zip(names, measured) if value is None]
            missing += [f"- {harness}, {count} vision tokens: {', '.join(left_out)}"] if left_out else []
        lines.append("")
    if missing:
        lines += ["Not measured:", "", *missing, ""]
    if scores.notes:
        lines += ["Found but not used:", "", *(f"- {note}" for note in scores.notes), ""]
    return "\n".join(lines)


def _order(count: str) -> tuple[bool, float, str]:
    """Counts and grids by their tokens, then names."""
    is_name = not count[0].isdigit()
    return is_name, 0 if is_name else count_tokens(parse_num_vision_tokens(count)), count


def _row(count: str, label: str, values: Iterable[float | None]) -> str:
    values = list(values)
    mean = None if None in values else sum(values) / len(values)
    return "| " + " | ".join([count, label, *("" if v is None else f"{v:.1f}" for v in [*values, mean])]) + " |"


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="tokenflex paper-table",
        description="The paper's table from results of lmms-eval and VLMEvalKit.",
    )
    parser.add_argument("paths", nargs="+", help="Results files, or folders with them.")
    parser.add_argument("--output", help="A Markdown file to write as well.")
    args = parser.parse_args(argv)
    try:
        table = markdown_table(read_scores(args.paths))
    except ValueError as error:
        parser.error(str(error))
    if args.output:
        write_file(Path(args.output), table)
    print(table)  # noqa: T201


if __name__ == "__main__":
    main()
