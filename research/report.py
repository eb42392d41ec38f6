"""Tables and plots of the experiment."""

import io
from collections.abc import Mapping

import matplotlib


matplotlib.use("Agg")
from matplotlib.figure import Figure  # noqa: E402

from ..towers.tiny import VISION_TOKEN_CHOICES  # noqa: E402
from .arms import ARMS, DISTILL, EVEN, FIXED, NESTED, PAPER  # noqa: E402


PAPER_GAINS = ("+1.6", "+1.0", "+0.4")  # paper: flexible against fixed at the small, the middle and the large count
COUNTS = tuple(map(str, VISION_TOKEN_CHOICES))
INTERVALS = "(intervals that hold together in each row, in 95 % of cases)"


def markdown_report(report: Mapping) -> str:
    """
    Args:
        report (`Mapping`): Report from [`reproduce`].

    Returns:
        `str`: For each regime what every model scores and costs, what the flexible ones gain, what fixed ones lose
        away from their count and, where these were trained, what one flexible model gains over three fixed ones that
        share its steps; then the curves.
    """
    lines = []
    for title, table in report["regimes"].items():
        lines += [f"### {title}", "", "Mean over families in %, ± standard deviation over seeds:", ""]
        lines += [*_accuracies(table), "", f"Points above the fixed model at its own count {INTERVALS}:", ""]
        lines += [
            *_gains(table),
            "",
            f"Points between a fixed model away from its count and the paper's draw there {INTERVALS}:",
            "",
        ]
        lines += [*_losses(table), ""]
        if title in report["instead"]:
            lines += ["#### One flexible model instead of three", ""]
            lines += [f"Points above fixed models that share its steps, each at its own count {INTERVALS}:", ""]
            lines += [*_shared(report["instead"][title], table), ""]
    for title, points in report["curves"].items():
        lines += [f"### {title}", "", *_curve(points), ""]
    return "\n".join(lines)


def _row(*cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _head(*cells) -> list[str]:
    return [_row(*cells), "|---|" + "---:|" * (len(cells) - 1)]


def _points(difference: Mapping | None) -> str:
    if difference is None:
        return ""
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * difference[name] for name in ("mean", "low", "high")))


def _differences(differences: Mapping) -> list[str]:
    """A cell for each count, and the verdicts."""
    verdicts = ", ".join(difference["verdict"] for difference in differences.values())
    return [*(_points(differences.get(count)) for count in COUNTS), verdicts]


def _percent(accuracy: Mapping | None) -> str:
    if accuracy is None:
        return ""
    return f"{100 * accuracy['mean']:.1f}" + (
        "" if accuracy["spread"] is None else f" ± {100 * accuracy['spread']:.1f}"
    )


def _accuracies(table: Mapping) -> list[str]:
    lines = _head("trained", *(f"@{count}" for count in COUNTS), "steps", "FLOPs", "CPU minutes", "seeds")
    for name, row in table.items():
        cells = [_percent(row["accuracy"].get(count)) for count in COUNTS]
        if ARMS[name] in FIXED:
            cells = [f"**{cell}**" if int(n) in ARMS[name].choices else cell for n, cell in zip(COUNTS, cells)]
        seeds = len(next(iter(row["accuracy"].values()))["seeds"])
        lines.append(
            _row(ARMS[name].title, *cells, row["steps"], f"{row['flops']:.2f}", f"{row['cpu_minutes']:.1f}", seeds)
        )
    return lines


def _gains(table: Mapping) -> list[str]:
    lines = _head("trained", *(f"@{count}" for count in COUNTS), "against the fixed model")
    for name, row in table.items():
        if "gain" in row:
            lines.append(_row(ARMS[name].title, *_differences(row["gain"])))
    return [*lines, _row("paper, at 64 / 144 / 256", *PAPER_GAINS, "")]


def _losses(table: Mapping) -> list[str]:
    lines = _head("trained", *(f"used at {count}" for count in COUNTS), "against the draw")
    for fixed in FIXED:
        lines.append(_row(fixed.title, *_differences(table[fixed.name]["away"])))
    return lines


def _shared(instead: Mapping, table: Mapping) -> list[str]:
    lines = _head("trained", *(f"@{count}" for count in COUNTS), "against the fixed models", "FLOPs")
    scores = [_percent(instead["accuracy"][count]) for count in COUNTS]
    title = f"three fixed, {instead['steps']} steps each: means in %"
    lines.append(_row(title, *scores, "", f"{instead['flops']:.2f}"))
    for name, gain in instead["gain"].items():
        lines.append(_row(ARMS[name].title, *_differences(gain), f"{table[name]['flops']:.2f}"))
    return lines


def _curve(points: Mapping) -> list[str]:
    lines = _head("", *(f"fixed / drawn @{count}" for count in COUNTS), *(f"gain @{count}" for count in COUNTS))
    for label, table in points.items():
        drawn = table[PAPER.name]
        pairs = [
            f"{100 * table[fixed.name]['accuracy'][n]['mean']:.1f} / {100 * drawn['accuracy'][n]['mean']:.1f}"
            for n, fixed in zip(COUNTS, FIXED)
        ]
        lines.append(_row(label, *pairs, *(_points(drawn["gain"][count]) for count in COUNTS)))
    return lines


def plot_png(report: Mapping) -> bytes:
    """
    Accuracy against the count in each regime above, the paper's draw's gain over images and over steps, if any, below.

    Args:
        report (`Mapping`): Report from [`reproduce`].

    Returns:
        `bytes`: A PNG image.
    """
    rows = [report[name] for name in ("regimes", "curves") if report[name]]
    figure = Figure(figsize=(15, 4.2 * len(rows)), dpi=100, layout="constrained")
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    above, *below = [part.subplots(1, len(row)) for part, row in zip(parts, rows)]
    below = below[0] if below else ()
    styles = {PAPER: ("black", 2.4), EVEN: ("tab:gray", 1.2), NESTED: ("tab:blue", 1.2), DISTILL: ("tab:red", 1.2)}
    for axes, (title, table) in zip(above, report["regimes"].items()):
        for arm in FIXED:
            values = [100 * table[arm.name]["accuracy"][count]["mean"] for count in COUNTS]
            line = axes.plot(
                VISION_TOKEN_CHOICES, values, linestyle="--", linewidth=1, label=f"{arm.title} (own: square)"
            )
            own = VISION_TOKEN_CHOICES.index(arm.choices[0])
            axes.plot(VISION_TOKEN_CHOICES[own], values[own], marker="s", markersize=8, color=line[0].get_color())
        for arm, (color, width) in styles.items():
            if arm.name in table:
                values = [100 * table[arm.name]["accuracy"][count]["mean"] for count in COUNTS]
                axes.plot(VISION_TOKEN_CHOICES, values, marker="o", color=color, linewidth=width, label=arm.title)
        axes.set(
            title=title, xlabel="vision tokens per image", ylabel="mean over families, %", xticks=VISION_TOKEN_CHOICES
        )
        axes.legend(fontsize=8)
    for axes, (title, points) in zip(below, report["curves"].items()):
        for number, count in enumerate(COUNTS):
            gains = [table[PAPER.name]["gain"][count] for table in points.values()]
            means = [100 * gain["mean"] for gain in gains]
            errors = [[100 * abs(gain[end] - gain["mean"]) for gain in gains] for end in ("low", "high")]
            where = [position + 0.06 * (number - 1) for position in range(len(gains))]
            axes.errorbar(where, means, errors, marker="o", capsize=3, label=f"@{count}")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(title=title, ylabel=f"{PAPER.title} above fixed, points")
        axes.set_xticks(range(len(points)), points)
        axes.legend(fontsize=8)
    for axes in (*above, *below):
        axes.grid(alpha=0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
