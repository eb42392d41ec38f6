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
    families = list(report["questions"])
    columns = [*families, "mean"] if families != ["all"] else ["all"]
    times = report.get("milliseconds_to_first_token")
    header = ["vision tokens", *columns, *(["ms to first token"] if times else [])]
    lines = ["| " + " | ".join(header) + " |", "|" + "---:|" * len(header)]
    for count, accuracy in report["accuracy"].items():
        cells = [str(count), *(f"{100 * accuracy[column]:.1f}" for column in columns)]
        lines.append("| " + " | ".join(cells + ([f"{times[count]:.1f}"] if times else [])) + " |")
    majority = report["majority"]
    cells = ["commonest answer", *(f"{100 * majority[family]:.1f}" for family in families)]
    if "mean" in columns:
        cells.append(f"{100 * sum(majority.values()) / len(majority):.1f}")
    lines.append("| " + " | ".join(cells + ([""] if times else [])) + " |")
    return "\n".join(lines) + "\n"


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
        values = [100 * report["accuracy"][count]["mean"] for count in counts]
        axes[0].plot(counts, values, marker="s", linewidth=2.6, color="black", label="mean")
    axes[0].set_ylabel("exact match, %")
    axes[0].set_ylim(top=101.5)
    axes[0].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    if times:
        axes[1].plot(counts, [times[count] for count in counts], marker="o", color="black")
        axes[1].set_ylabel("time to first token, ms")
        axes[1].set_ylim(bottom=0)
    for axis in axes:
        axis.set_xlabel("vision tokens per image")
        axis.set_xticks(counts)
        axis.grid(alpha=0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
