"""The table and the plot of a sweep over vision-token counts."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
from matplotlib.figure import Figure  # noqa: E402

from ..checkpoints.files import write_file  # noqa: E402
from ..choices_tokenflex import count_tokens, parse_choice  # noqa: E402


COSTS = {
    "gflops_to_first_token": ("GFLOP to first token", ".3g"),
    "milliseconds_to_first_token": ("ms to first token", ".1f"),
    "tokens_per_second": ("tokens / s", ".0f"),
    "peak_memory_mib": ("peak MiB", ".0f"),
}


def markdown_table(report: Mapping) -> str:
    """
    One row per count: accuracy of each family, their mean and its 95 % interval, replies to multiple-choice questions
    that choose no option, and what it costs. Below it, how each
    count's accuracy over all questions differs from the largest count's.

    Args:
        report (`Mapping`):
            [`score`]'s result, with [`measure_cost`]'s when costs were measured, and what [`compare`] returns, when it
            was compared.
    """
    families, measured = list(report["questions"]), [name for name in COSTS if report.get(name)]
    several, intervals = len(families) > 1, report.get("interval")

    unparsed = report.get("unparsed")

    def row(first, values, mean, interval, costs=None, missed=""):
        cells = [first, *values, *([mean] if several else []), *([interval] if intervals else [])]
        cells += [missed] if unparsed else []
        return "| " + " | ".join([*cells, *(costs or [""] * len(measured))]) + " |"

    names = [family.replace("|", "\\|") for family in families]
    titles = [COSTS[name][0] for name in measured]
    lines = [row("vision tokens", names, "mean", "95 % of means" if several else "95 %", titles, "unparsed")]
    lines.append("|" + "---:|" * (lines[0].count(" | ") + 1))
    for count, accuracy in report["accuracy"].items():
        costs = [(report[name].get(count), COSTS[name][1]) for name in measured]
        costs = ["" if value is None else format(value, spec) for value, spec in costs]
        interval = "–".join(map(_percent, intervals[count])) if intervals else ""
        name = f"auto ({report['vision_tokens'][count]:.1f} read)" if count == "auto" else str(count)
        missed = str(unparsed[count]) if unparsed else ""
        mean = _percent(report["mean"][count])
        lines.append(row(name, map(_percent, accuracy.values()), mean, interval, costs, missed))
    majority = list(report["majority"].values())
    lines.append(row("commonest answer", map(_percent, majority), _percent(sum(majority) / len(majority)), ""))
    for count, test in report.get("against_largest", {}).items():
        lines += [""] if lines[-1].startswith("|") else []
        bounds = f"{100 * test['low']:+.1f} to {100 * test['high']:+.1f}"
        lines.append(
            f"- {count} against the largest count, over all questions: {100 * test['difference']:+.1f} points "
            f"({bounds}), p = {test['p_value']:.2g}"
        )
    return "\n".join(lines) + "\n"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def plot_png(report: Mapping, title: str) -> bytes:
    """
    Accuracy of each family and, where measured, time to first token, against the count. Where counts have resolutions,
    mean accuracy against that time.

    Args:
        report (`Mapping`): As for [`markdown_table`].
        title (`str`): The plot's title.

    Returns:
        `bytes`: A PNG image.
    """
    counts = [count for count in report["accuracy"] if count != "auto"]
    has_resolutions = any("@" in str(count) for count in counts)
    positions = [i if has_resolutions else count_tokens(parse_choice(count)) for i, count in enumerate(counts)]
    times = report.get("milliseconds_to_first_token")
    figure = Figure(figsize=(10.5 if times else 7.5, 4.6), dpi=110, layout="constrained")
    figure.suptitle(title.replace("$", r"\$"))  # dollars would begin a formula
    axes = figure.subplots(1, 2 if times else 1, squeeze=False, width_ratios=[1.7, 1] if times else None)[0]
    families = list(report["questions"])
    colors = matplotlib.colormaps["tab10"]
    for i, family in enumerate(families):
        values = [100 * report["accuracy"][count][family] for count in counts]
        axes[0].plot(positions, values, marker="o", markersize=4, linewidth=1.2, color=colors(i % 10), label=family)
    if len(families) > 1:
        values = [100 * report["mean"][count] for count in counts]
        axes[0].plot(positions, values, marker="s", linewidth=2.6, color="black", label="mean")
        if "auto" in report["accuracy"]:
            place = len(counts) if has_resolutions else report["vision_tokens"]["auto"]
            mean = 100 * report["mean"]["auto"]
            axes[0].plot(place, mean, marker="*", markersize=15, linestyle="", color="crimson", label="mean, auto")
    axes[0].set_ylabel(f"{report.get('metric', 'exact_match').replace('_', ' ')}, %")
    axes[0].set_ylim(top=101.5)
    axes[0].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    if times and has_resolutions:
        for count in report["accuracy"]:
            place, star = (times[count], 100 * report["mean"][count]), count == "auto"
            axes[1].plot(*place, marker="*" if star else "o", color="crimson" if star else "black")
            axes[1].annotate(str(count), place, xytext=(4, -11), textcoords="offset points", fontsize=8)
        axes[1].set_xlabel("time to first token, ms")
        axes[1].set_ylabel("mean, %")
        axes[1].set_xlim(0, 1.15 * max(times.values()))
        axes[1].grid(alpha=0.25)
    elif times:
        axes[1].plot(positions, [times[count] for count in counts], marker="o", color="black")
        if "auto" in times:
            axes[1].plot(report["vision_tokens"]["auto"], times["auto"], marker="*", markersize=15, color="crimson")
        axes[1].set_ylabel("time to first token, ms")
        axes[1].set_ylim(0, 1.1 * max(times.values()))
    for axis in axes[: 1 if has_resolutions else 2]:
        axis.set_xlabel("vision tokens per image" + (" @ pixels" if has_resolutions else ""))
        axis.set_xticks(positions, list(map(str, counts)) if has_resolutions else None)
        axis.grid(alpha=0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def save_report(folder: str | Path, report: dict, predictions: Sequence, title: str) -> None:
    """
    Writes `results.json`, `results.md`, `results.png` and, if there are any, `predictions.jsonl`.

    Args:
        folder (`str` or `Path`): Folder for the files.
        report (`dict`): As for [`markdown_table`].
        predictions (`Sequence[Prediction]`): Every answer.
        title (`str`): The plot's title.
    """
    folder = Path(folder)
    write_file(folder / "results.json", json.dumps(report, indent=2) + "\n")
    write_file(folder / "results.md", markdown_table(report))
    write_file(folder / "results.png", plot_png(report, title))
    lines = [json.dumps(asdict(prediction), ensure_ascii=False) for prediction in predictions]
    if lines:
        write_file(folder / "predictions.jsonl", "\n".join(lines) + "\n")
