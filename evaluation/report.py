"""The table and the plot of a sweep over vision-token counts."""

import io
from collections.abc import Mapping

import matplotlib


matplotlib.use("Agg")
from matplotlib.figure import Figure  # noqa: E402


def markdown_table(report: Mapping) -> str:
    """
    One row per count: accuracy of each family, their mean, time to first token.

    Args:
        report (`Mapping`):
            [`score`]'s result, with `milliseconds_to_first_token` per count when it was measured.
    """
    families, times = list(report["questions"]), report.get("milliseconds_to_first_token")
    several = len(families) > 1

    def row(first, values, mean, last):
        cells = [first, *values, *([mean] if several else []), *([last] if times else [])]
        return "| " + " | ".join(cells) + " |"

    names = [family.replace("|", "\\|") for family in families]
    lines = [row("vision tokens", names, "mean", "ms to first token")]
    lines.append("|" + "---:|" * (lines[0].count(" | ") + 1))
    for count, accuracy in report["accuracy"].items():
        time = f"{times[count]:.1f}" if times else ""
        lines.append(row(str(count), map(_percent, accuracy.values()), _percent(report["mean"][count]), time))
    majority = list(report["majority"].values())
    lines.append(row("commonest answer", map(_percent, majority), _percent(sum(majority) / len(majority)), ""))
    return "\n".join(lines) + "\n"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def plot_png(report: Mapping, title: str) -> bytes:
    """
    Accuracy of each family and, where measured, time to first token, against the count.

    Args:
        report (`Mapping`): As for [`markdown_table`].
        title (`str`): The plot's title.

    Returns:
        `bytes`: A PNG image.
    """
    counts = list(report["accuracy"])
    times = report.get("milliseconds_to_first_token")
    figure = Figure(figsize=(10.5 if times else 7.5, 4.6), dpi=110, layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, 2 if times else 1, squeeze=False, width_ratios=[1.7, 1] if times else None)[0]
    families = list(report["questions"])
    colors = matplotlib.colormaps["tab10"]
    for i, family in enumerate(families):
        values = [100 * report["accuracy"][count][family] for count in counts]
        axes[0].plot(counts, values, marker="o", markersize=4, linewidth=1.2, color=colors(i % 10), label=family)
    if len(families) > 1:
        values = [100 * report["mean"][count] for count in counts]
        axes[0].plot(counts, values, marker="s", linewidth=2.6, color="black", label="mean")
    axes[0].set_ylabel("exact match, %")
    axes[0].set_ylim(top=101.5)
    axes[0].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    if times:
        axes[1].plot(counts, [times[count] for count in counts], marker="o", color="black")
        axes[1].set_ylabel("time to first token, ms")
        axes[1].set_ylim(0, 1.1 * max(times.values()))
    for axis in axes:
        axis.set_xlabel("vision tokens per image")
        axis.set_xticks(counts)
        axis.grid(alpha=0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
