"""
TokenFLEX beside transformers' InternVL, LLaVA-OneVision and Qwen3-VL, measured in one run.

    python benchmarks/peers.py --output_dir outputs/bench
    python benchmarks/peers.py --output_dir outputs/bench-gpu --size so400m-7b --device cuda --dtype bfloat16 \\
        --batch_sizes 1 8 --images 1 --stages tower projector prefill first_token memory
    python benchmarks/peers.py --output_dir outputs/bench-0.5b --size so400m-0.5b --peers --extras scaling \\
        --batch_sizes 1

The first takes about 27 minutes on two quiet cores. Each writes `results.json`, the table `results.md` and the plot
`results.png`. The last line printed is one JSON object.

A comparison has a pair: a peer, and a TokenFLEX of the same shapes over the same patches, images and prompts, at the
same number of tokens per image. `peer_models.py` says what is matched and what cannot be, `peer_stages.py` what each
stage is. The two take turns within each round, first one and then the other beginning, in one process; figures are
medians and quartiles, and ratios are the peer's over TokenFLEX's of the same round, so that above 1 TokenFLEX is
ahead. Weights are random, since only shapes decide what a step takes. Sequences have equal lengths, so that nobody
pads.

A batch of one image is measured in `--rounds` rounds, one of up to 8 images in 60 % of them and a larger one in 20 %;
memory twice, or once with more than 32 images. Training is measured with up to 8 images in a batch; with more than 32
only processing, the forward pass and memory are. Beside TokenFLEX's figures stands the limit that follows from their
operations and bytes, and from the rates that the machine reached in this run in bare matrix products and copies
(`limits.py`); processing has none.

Apart from the pairs, of TokenFLEX alone: `scaling`, what fewer tokens of the same 1,024 patches save up to the first
token, beside what the operations predict; `mixed`, a batch whose rows have 64, 144 and 256 tokens beside the rows of
each count run by themselves; `recount`, what re-counting encoded inputs costs beside a prefill (`recount.py`, which is
for CPUs); `second_question`, the first token of a question about an image whose features were kept.
"""

import argparse
import dataclasses
import gc
import json
import math
import time
from pathlib import Path

import recount
import torch
from limits import Rates, measure_rates
from peer_models import BUILDERS, NAMES, SIZES, Contender, build_alone, build_pair, draw_photos, grid_side
from peer_report import draw_plot, find_headline, write_table
from peer_stages import (
    STAGES,
    alternate,
    choose_rounds,
    count_flops,
    count_limits,
    encode,
    generate,
    prepare,
    seconds_of,
)
from training_runs import describe_machine, summarize

from tokenflex.checkpoints.files import write_file


COUNTS = (64, 144, 256)
EXTRAS = ("scaling", "mixed", "recount", "second_question")


def describe_pair(pair: tuple[Contender, Contender], peer: str, count: int, photos: list) -> dict:
    """Counts, on one image, of the things that are equal in a pair and those that are not."""
    described = {"peer": peer, "count": count, "patches": grid_side(peer, count) ** 2}
    for contender in pair:
        inputs = encode(contender, photos[:1], 1)
        projector = sum(parameter.numel() for parameter in contender.projector.parameters())
        tower = sum(parameter.numel() for parameter in contender.tower.parameters())
        language_model = sum(parameter.numel() for parameter in contender.model.model.language_model.parameters())
        described[contender.name] = {
            "image_tokens": int((inputs["input_ids"] == contender.image_token_id).sum()),
            "sequence_length": inputs["input_ids"].shape[1],
            "tower_parameters": tower - (projector if contender.has_projector_in_tower else 0),
            "projector_parameters": projector,
            "language_model_parameters": language_model,
            "first_token_flops": count_flops(lambda: generate(contender, inputs, 1)),  # noqa: B023
        }
    return described


def summarize_records(records: dict[str, list[dict]], stage: str) -> dict:
    """Medians and quartiles of TokenFLEX and its peer, and of the peer's figure over TokenFLEX's in each round."""
    own, other = ([record[stage] for record in taken] for taken in records.values())
    ratios = [theirs / ours for ours, theirs in zip(own, other)]
    return {"tokenflex": summarize(own), "peer_figure": summarize(other), "ratio": summarize(ratios)}


def measure_pair(
    args: argparse.Namespace, peer: str, count: int, photos: list, rates: Rates
) -> tuple[dict, list[dict]]:
    """The pair's description, and its cells: every stage at every batch size and number of images."""
    pair = build_pair(SIZES[args.size], peer, count, args.device, getattr(torch, args.dtype), args.seed)
    description = describe_pair(pair, peer, count, photos)
    cells = []
    for batch_size in args.batch_sizes:
        for num_images in args.images:
            shown = photos[: batch_size * num_images]
            length = description["tokenflex"]["sequence_length"] + (num_images - 1) * (count + 2)
            limits = count_limits(pair[0], count, batch_size, num_images, length, rates)
            for measurement, stages in STAGES.items():
                rounds, warmup = choose_rounds(measurement, len(shown), args.rounds)
                wanted = [stage for stage in stages if stage in args.stages]
                if not rounds or not wanted:
                    continue
                functions = {contender.name: prepare(measurement, contender, shown, batch_size) for contender in pair}
                records = alternate(functions, rounds, warmup)
                for stage in wanted:
                    if any(math.isnan(record[stage]) for taken in records.values() for record in taken):
                        continue  # the system does not say how much memory was held
                    cell = {
                        "stage": stage,
                        "peer": peer,
                        "count": count,
                        "batch_size": batch_size,
                        "images": num_images,
                    }
                    cell.update(summarize_records(records, stage))
                    if stage in limits:
                        achieved = limits[stage]["least"] / cell["tokenflex"]["median"]
                        cell["limit"] = {**limits[stage], "achieved": achieved}
                    cells.append(cell)
            cell = f"{NAMES[peer]}, {count} tokens, batch of {batch_size}, images per prompt: {num_images}"
            print(f"{time.strftime('%X')} {cell}", flush=True)
    return description, cells


def measure_scaling(contender: Contender, photos: list, batch_size: int, rounds: int, rates: Rates) -> list[dict]:
    """The speed-up of each count over the largest, measured in each round and as operations predict."""
    functions, limits = {}, {}
    for count in COUNTS:
        asked = dataclasses.replace(contender, options={"num_vision_tokens": count})
        passes = [prepare(name, asked, photos[:batch_size], batch_size) for name in ("forward", "first_token")]
        functions[count] = lambda passes=passes: passes[0]() | passes[1]()
        length = encode(asked, photos[:1], 1)["input_ids"].shape[1]
        limits[count] = count_limits(contender, count, batch_size, 1, length, rates)
    records = alternate(functions, rounds)
    rows = []
    for stage in ("first_token", "prefill"):
        for count in COUNTS:
            taken = [record[stage] for record in records[count]]
            largest = [record[stage] for record in records[max(COUNTS)]]
            speedup = summarize([slow / fast for slow, fast in zip(largest, taken)])
            predicted = limits[max(COUNTS)][stage]["flops"] / limits[count][stage]["flops"]
            seconds = summarize(taken)
            rows.append({
                "stage": stage,
                "batch_size": batch_size,
                "count": count,
                "seconds": seconds,
                "speedup": speedup,
                "predicted": predicted,
                "share": speedup["median"] / predicted,
                "limit": {**limits[count][stage], "achieved": limits[count][stage]["least"] / seconds["median"]},
            })  # fmt: skip
    return rows


def measure_mixed(contender: Contender, photos: list, rounds: int) -> dict:
    """One call for rows of all counts beside one call for the rows of each, in operations and in time."""
    counts = [*COUNTS, *COUNTS]
    together = encode(contender, photos[: len(counts)], len(counts))
    parts = [
        encode(dataclasses.replace(contender, options={"num_vision_tokens": count}), photos[:2], 2) for count in COUNTS
    ]
    functions = {
        "together": lambda: generate(contender, together, 1, num_vision_tokens=counts),
        "apart": lambda: [generate(contender, part, 1) for part in parts],
    }
    flops = {name: count_flops(function) for name, function in functions.items()}
    device = contender.model.device
    timed = {name: lambda function=function: seconds_of(function, device) for name, function in functions.items()}
    seconds = alternate(timed, rounds)
    return {
        "rows": counts,
        "flops": flops,
        "flops_ratio": flops["together"] / flops["apart"],
        "seconds": {name: summarize(taken) for name, taken in seconds.items()},
        "seconds_ratio": summarize([a / b for a, b in zip(seconds["together"], seconds["apart"])]),
    }


@torch.no_grad()
def measure_second_question(contender: Contender, photos: list, rounds: int) -> dict:
    """The first token of a question about a new image, and about one whose features were kept."""
    first = encode(contender, photos[:1], 1)
    kept = contender.model.get_image_features(first["pixel_values"])
    second = {name: value for name, value in first.items() if name != "pixel_values"}
    calls = []
    handle = contender.tower.register_forward_hook(lambda *_: calls.append(1))

    def ask(inputs, **options):
        calls.clear()
        seconds = seconds_of(lambda: generate(contender, inputs, 1, **options), contender.model.device)
        return {"seconds": seconds, "tower_calls": len(calls)}

    functions = {
        "first": lambda: ask(first),
        "second": lambda: ask(second, mm_encoder_outputs={"image": kept}),
    }
    records = alternate(functions, rounds)
    handle.remove()
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(records["second"], records["first"])]
    return {
        "tower_calls": {name: max(record["tower_calls"] for record in taken) for name, taken in records.items()},
        "seconds": {name: summarize([record["seconds"] for record in taken]) for name, taken in records.items()},
        "ratio": summarize(ratios),
    }


def measure_alone(args: argparse.Namespace, photos: list, rates: Rates) -> dict:
    """The measurements of TokenFLEX alone, at one resolution."""
    size = SIZES[args.size]
    contender = build_alone(size, max(COUNTS), args.device, getattr(torch, args.dtype), args.seed)
    figures = {}
    if "scaling" in args.extras:
        batch_sizes = [batch_size for batch_size in args.batch_sizes if batch_size <= 8]
        measured = [measure_scaling(contender, photos, batch_size, args.rounds, rates) for batch_size in batch_sizes]
        figures["scaling"] = [row for rows in measured for row in rows]
    if "mixed" in args.extras:
        figures["mixed"] = measure_mixed(contender, photos, args.rounds)
    if "second_question" in args.extras:
        figures["second_question"] = measure_second_question(contender, photos, args.rounds)
    if "recount" in args.extras:
        with torch.no_grad():
            model = recount.build_model()
            figures["recount"] = [recount.measure(model, 1, images, args.rounds, recounts=20) for images in (1, 4)]
    return figures


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = [stage for yielded in STAGES.values() for stage in yielded]
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder to write to.")
    parser.add_argument("--size", choices=SIZES, default="small", help="Shapes of all models. Default: %(default)s.")
    parser.add_argument("--device", default="cpu", help="Default: %(default)s.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="Default: %(default)s.")
    parser.add_argument(
        "--rounds", type=int, default=10, help="Timed rounds of a batch of one image. Default: %(default)s."
    )
    parser.add_argument("--peers", nargs="*", choices=BUILDERS, default=list(BUILDERS), help="Default: all.")
    parser.add_argument(
        "--num_vision_tokens",
        nargs="+",
        type=int,
        default=list(COUNTS),
        help="Tokens per image. Default: %(default)s.",
    )
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8, 32], help="Default: %(default)s.")
    parser.add_argument("--images", nargs="+", type=int, default=[1, 4], help="Per prompt. Default: %(default)s.")
    parser.add_argument("--stages", nargs="+", choices=stages, default=stages, help="Default: all.")
    parser.add_argument("--extras", nargs="*", choices=EXTRAS, default=list(EXTRAS), help="Default: all.")
    parser.add_argument("--seed", type=int, default=0, help="Of weights and images. Default: %(default)s.")
    args = parser.parse_args(argv)
    if wrong := [count for count in args.num_vision_tokens if round(count**0.5) ** 2 != count]:
        parser.error(f"`--num_vision_tokens` {wrong}: an image's tokens are a square of n x n, such as {COUNTS}.")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(
            f"`--device` {args.device} needs a CUDA GPU, and this machine has none: leave it out for the CPU."
        )
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    rates = measure_rates(args.device, getattr(torch, args.dtype))
    results = {
        "size": dataclasses.asdict(SIZES[args.size]) | {"name": args.size},
        "dtype": args.dtype,
        "seed": args.seed,
        "machine": describe_machine(),
        "rates": dataclasses.asdict(rates),
        "pairs": [],
        "cells": [],
        "alone": {},
    }
    photos = draw_photos(max(6, max(args.batch_sizes) * max(args.images)), args.seed)
    if args.extras:
        results["alone"] = measure_alone(args, photos, rates)
    for peer in args.peers:
        for count in args.num_vision_tokens:
            description, cells = measure_pair(args, peer, count, photos, rates)
            results["pairs"].append(description)
            results["cells"] += cells
            write_file(args.output_dir / "results.json", json.dumps(results, indent=1))
            gc.collect()
    results["headline"] = find_headline(results)
    write_file(args.output_dir / "results.json", json.dumps(results, indent=1))
    write_file(args.output_dir / "results.md", write_table(results))
    write_file(args.output_dir / "results.png", draw_plot(results))
    print(json.dumps(results["headline"]))


if __name__ == "__main__":
    main()
