"""The benchmark's headline, its table in Markdown and its plot."""

import io
from collections.abc import Iterable, Sequence

import matplotlib
from peer_models import NAMES
from peer_stages import ANSWERED, DECODED


matplotlib.use("Agg")
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import NullLocator  # noqa: E402


TITLES = {
    "processing": "image processing + tokenizing",
    "tower": "tower",
    "projector": "pooling + projector",
    "prefill": "prefill",
    "first_token": "time to first token",
    "decode": "decode",
    "throughput": "batched throughput",
    "training": "training step",
    "memory": "peak memory",
}
UNITS = {"processing": "images / s", "decode": "tokens / s", "throughput": "answers' images / s", "memory": "MiB"}
EXPLANATIONS = {
    "decode": f"Calls of {DECODED} tokens, the first not counted.",
    "throughput": f"From images in memory to answers of {ANSWERED} tokens with processing; the limit leaves it out.",
    "training": "Forward, backward and AdamW; the limit leaves out AdamW.",
    "memory": "Weights and inputs, and what a call of one token adds at its peak; the limit is weights, cache and "
    "activations as counted.",
}


def figure_of(cell: dict, seconds: float) -> float:
    """A table's cell for seconds, or for bytes: milliseconds, units per second, MiB."""
    images = cell["batch_size"] * cell["images"]
    if cell["stage"] == "decode":
        return cell["batch_size"] * (DECODED - 1) / seconds
    if cell["stage"] in ("processing", "throughput"):
        return images / seconds
    return seconds / 2**20 if cell["stage"] == "memory" else 1000 * seconds


def find_headline(results: dict) -> dict:
    """
    The ratios of the cell that tables and plot begin with, and what the bars ask for:

    - `ratios`: the peer's figure over TokenFLEX's, by stage, peer and count;
    - `processing_ratios`: the same of processing the largest batch;
    - `prefill_over_fastest_peer`: TokenFLEX's prefill in a pair over the peer's, of the peer where that is the most;
    - what was measured of TokenFLEX alone.
    """
    cells = results["cells"]
    batch_size, images = main_cell(cells)
    here = [cell for cell in cells if (cell["batch_size"], cell["images"]) == (batch_size, images)]
    ratios = {}
    for cell in here:
        by_peer = ratios.setdefault(cell["stage"], {}).setdefault(cell["peer"], {})
        by_peer[str(cell["count"])] = cell["ratio"]["median"]
    headline = {"batch_size": batch_size, "images": images, "ratios": ratios}
    processing = [cell for cell in cells if cell["stage"] == "processing" and cell["images"] == images]
    if processing:
        largest = max(cell["batch_size"] for cell in processing)
        by_peer = {}
        for cell in processing:
            if cell["batch_size"] == largest:
                by_peer.setdefault(cell["peer"], {})[str(cell["count"])] = cell["ratio"]["median"]
        headline["processing_ratios"] = {"batch_size": largest, **by_peer}
    prefill = [cell for cell in here if cell["stage"] == "prefill"]
    if prefill:
        headline["prefill_over_fastest_peer"] = {}
        for count in dict.fromkeys(cell["count"] for cell in prefill):
            fastest = min((c for c in prefill if c["count"] == count), key=lambda cell: cell["ratio"]["median"])
            ratio = {name: round(1 / value, 3) for name, value in fastest["ratio"].items() if name != "steps"}
            quartiles = {"first_quartile": ratio["third_quartile"], "third_quartile": ratio["first_quartile"]}
            headline["prefill_over_fastest_peer"][str(count)] = {"peer": fastest["peer"], **ratio, **quartiles}
    alone = results["alone"]
    if "scaling" in alone:
        headline["share_of_predicted_speedup"] = {
            f"{row['stage']}, batch {row['batch_size']}, {row['count']} over 256": round(row["share"], 3)
            for row in alone["scaling"]
            if row["count"] < 256
        }
    if "mixed" in alone:
        headline["mixed_batch"] = {
            "flops_ratio": round(alone["mixed"]["flops_ratio"], 3),
            "seconds_ratio": alone["mixed"]["seconds_ratio"]["median"],
        }
    if "recount" in alone:
        headline["recount_percent_of_prefill"] = max(row["percent"] for row in alone["recount"])
    if "second_question" in alone:
        second = alone["second_question"]
        headline["second_question"] = {
            "tower_calls": second["tower_calls"]["second"],
            "seconds_ratio": second["ratio"]["median"],
        }
    return headline


def main_cell(cells: list[dict]) -> tuple[int, int]:
    """The batch size and number of images that stand first: batches of 8, or nearest to it, with fewest images."""
    batch_sizes = {cell["batch_size"] for cell in cells}
    batch_size = min(batch_sizes, key=lambda size: abs(size - 8), default=8)
    return batch_size, min((cell["images"] for cell in cells), default=1)


def write_table(results: dict) -> str:
    cells, peers = results["cells"], list(dict.fromkeys(cell["peer"] for cell in results["cells"]))
    batch_size, images = main_cell(cells)
    rates, machine = results["rates"], results["machine"]
    sections = [
        "# TokenFLEX beside its peers",
        f"Measured: size `{results['size']['name']}`, {results['dtype']}, "
        + ", ".join(f"{name} {value}" for name, value in machine.items())
        + f", seed {results['seed']}; {rates['flops_per_second'] / 1e9:.0f} GFLOP/s in a bare matrix product and "
        f"{rates['bytes_per_second'] / 1e9:.1f} GB/s in a bare copy. Ratios are the peer's figure over TokenFLEX's, "
        "of time or of memory, medians with quartiles over rounds: **above 1, TokenFLEX is ahead**.",
    ]
    if cells:
        sections += [
            f"## Ratios at a batch of {batch_size}, images per prompt: {images}",
            _headline_table(cells, peers, batch_size, images),
        ]
    if results["alone"]:
        sections += ["## TokenFLEX alone", *_alone_sections(results["alone"])]
    if cells:
        sections += ["## What was paired", _pairs_table(results["pairs"])]
    for stage in TITLES:
        rows = [cell for cell in cells if cell["stage"] == stage]
        if rows:
            sections += [f"## {TITLES[stage].capitalize()}", *_stage_section(stage, rows, peers)]
    return "\n\n".join(sections) + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join(str(value) for value in row)} |" for row in rows)])


def _show(summary: dict) -> str:
    return f"{summary['median']:.2f} ({summary['first_quartile']:.2f}–{summary['third_quartile']:.2f})"


def _headline_table(cells: list[dict], peers: list[str], batch_size: int, images: int) -> str:
    counts = sorted({cell["count"] for cell in cells}, reverse=True)
    ratios = {
        (cell["stage"], cell["peer"], cell["count"]): _show(cell["ratio"])
        for cell in cells
        if (cell["batch_size"], cell["images"]) == (batch_size, images)
    }
    header = ["", *(f"{NAMES[peer]}, {count}" for count in counts for peer in peers)]
    stages = [stage for stage in TITLES if any(key[0] == stage for key in ratios)]
    return _table(
        header,
        [
            [TITLES[stage], *(ratios.get((stage, peer, count), "") for count in counts for peer in peers)]
            for stage in stages
        ],
    )


def _alone_sections(alone: dict) -> list[str]:
    sections = []
    if "scaling" in alone:
        header = [
            "",
            "batch",
            "tokens",
            "ms",
            "limit, ms",
            "achieved",
            "times as fast as 256",
            "predicted by FLOPs",
            "share of it",
        ]
        rows = []
        for row in alone["scaling"]:
            milliseconds = {name: 1000 * value for name, value in row["seconds"].items()}
            limit = [f"{1000 * row['limit']['least']:.1f}", f"{row['limit']['achieved']:.0%}"]
            speedup = [_show(row["speedup"]), f"{row['predicted']:.2f}", f"{row['share']:.0%}"]
            figures = [_show(milliseconds), *limit, *speedup]
            rows.append([TITLES[row["stage"]], row["batch_size"], row["count"], *figures])
        sections += ["Fewer tokens of the same patches:", _table(header, rows)]
    lines = []
    if "mixed" in alone:
        mixed = alone["mixed"]
        lines.append(
            f"- A batch of rows at {', '.join(map(str, mixed['rows']))} tokens takes {mixed['flops_ratio']:.3f} times "
            f"the operations, and {_show(mixed['seconds_ratio'])} times the time, of the rows of each count by "
            "themselves."
        )
    if "recount" in alone:
        percent = max(row["percent"] for row in alone["recount"])
        lines.append(
            f"- Re-counting encoded inputs from 64 to 256 tokens takes at most {percent:.3f} % of a prefill at 256 "
            "(SmolLM2-135M's shapes, 1 and 4 images)."
        )
    if "second_question" in alone:
        second = alone["second_question"]
        lines.append(
            "- A second question about an image whose features were kept calls the tower "
            f"{second['tower_calls']['second']} times (the first {second['tower_calls']['first']}), and its first "
            f"token takes {_show(second['ratio'])} of the first question's time."
        )
    return [*sections, "\n".join(lines)] if lines else sections


def _pairs_table(pairs: list[dict]) -> str:
    header = [
        "peer", "tokens", "patches", "image tokens in the prompt", "tokens of the prompt",
        "language model, parameters", "tower", "projector", "FLOPs to first token, one image, M",
    ]  # fmt: skip
    rows = []
    for pair in pairs:
        own, other = pair["tokenflex"], pair[pair["peer"]]
        both = [
            f"{own[name]:,} / {other[name]:,}"
            for name in (
                "image_tokens", "sequence_length",
                "language_model_parameters", "tower_parameters", "projector_parameters",
            )
        ]  # fmt: skip
        flops = f"{own['first_token_flops'] / 1e6:,.0f} / {other['first_token_flops'] / 1e6:,.0f}"
        rows.append([NAMES[pair["peer"]], pair["count"], pair["patches"], *both, flops])
    note = (
        "TokenFLEX / peer. FLOPs by torch's counter, attention with all pairs. LLaVA-OneVision's last image token is "
        "a newline."
    )
    return f"{_table(header, rows)}\n\n{note}"


def _stage_section(stage: str, cells: list[dict], peers: list[str]) -> list[str]:
    unit = UNITS.get(stage, "ms")
    found = {(cell["images"], cell["batch_size"], cell["count"], cell["peer"]): cell for cell in cells}
    shapes = list(dict.fromkeys(key[:3] for key in sorted(found)))
    has_limit = any("limit" in cell for cell in cells)
    columns = ["GFLOP", "MB", f"limit, {unit}", "achieved"] if stage != "memory" else [f"limit, {unit}", "achieved"]
    rows = []
    for shape in shapes:
        here = {peer: found[*shape, peer] for peer in peers if (*shape, peer) in found}
        first = next(iter(here.values()))
        row = [*shape, f"{figure_of(first, first['tokenflex']['median']):,.1f}"]
        if has_limit:
            limit = first["limit"]
            counted = [
                f"{limit[name] / divisor:,.2f}" for name, divisor in (("flops", 1e9), ("bytes", 1e6)) if name in limit
            ]
            row += [*counted, f"{figure_of(first, limit['least']):,.1f}", f"{limit['achieved']:.0%}"]
        row += [_show(here[peer]["ratio"]) if peer in here else "" for peer in peers]
        rows.append(row)
    beside = f"tokenflex, {unit}" + (f" (pair of {NAMES[peers[0]]})" if len(peers) > 1 else "")
    header = ["images", "batch", "tokens", beside, *(columns if has_limit else []), *(NAMES[peer] for peer in peers)]
    explanation = [EXPLANATIONS[stage]] if stage in EXPLANATIONS else []
    return [*explanation, _table(header, rows)]


def draw_plot(results: dict) -> bytes:
    """The ratios of the headline's cell by stage and peer, with quartiles, as PNG."""
    cells = results["cells"]
    batch_size, images = main_cell(cells)
    cells = [cell for cell in cells if (cell["batch_size"], cell["images"]) == (batch_size, images)]
    counts = sorted({cell["count"] for cell in cells}, reverse=True)
    peers = list(dict.fromkeys(cell["peer"] for cell in cells))
    stages = [stage for stage in TITLES if any(cell["stage"] == stage for cell in cells)]
    figure = Figure(figsize=(13, 1 + 3.2 * max(1, len(counts))), dpi=110, layout="constrained")
    axes = figure.subplots(max(1, len(counts)), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    colors = matplotlib.colormaps["tab10"]
    for axis, count in zip(axes, counts):
        for number, peer in enumerate(peers):
            here = {cell["stage"]: cell["ratio"] for cell in cells if (cell["peer"], cell["count"]) == (peer, count)}
            places = [stages.index(stage) + 0.27 * (number - (len(peers) - 1) / 2) for stage in here]
            medians = [ratio["median"] for ratio in here.values()]
            below = [ratio["median"] - ratio["first_quartile"] for ratio in here.values()]
            above = [ratio["third_quartile"] - ratio["median"] for ratio in here.values()]
            axis.errorbar(places, medians, [below, above], fmt="o", color=colors(number), capsize=3, label=NAMES[peer])
            for place, median, up in zip(places, medians, above):
                options = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "color": colors(number)}
                axis.annotate(f"{median:.2f}", (place, median + up), (0, 4), **options, annotation_clip=True)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_title(f"{count} tokens per image", fontsize=10)
        axis.set_ylabel("peer / tokenflex")
        axis.set_yscale("log")
        axis.grid(axis="y", alpha=0.3)
    medians = [cell["ratio"]["median"] for cell in cells]
    if medians:
        axes[0].set_ylim(0.7 * min(medians), 1.5 * max(medians))
        ticks = [
            tick
            for tick in (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10)
            if min(medians) / 2 < tick < 2 * max(medians)
        ]
        axes[0].set_yticks(ticks, [str(tick) for tick in ticks])
        axes[0].yaxis.set_minor_locator(NullLocator())
        axes[0].legend(ncols=len(peers), fontsize=8, loc="upper right")
        axes[-1].set_xticks(range(len(stages)), [TITLES[stage].replace(" + ", " +\n") for stage in stages], fontsize=9)
    figure.suptitle(
        f"Time or memory of the peer over tokenflex's (above 1, tokenflex is ahead)\nbatch of {batch_size}, images "
        f"per prompt: {images}; medians, bars are quartiles",
        fontsize=10,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
