"""
The cost and gain of flexible token counts in training: time of sampled, nested and packed steps, and of steps on kept
features, beside what they replace.

    python benchmarks/training.py --part all
    python benchmarks/training.py --part gpu

Parts: `draw` sampled counts beside the largest alone; `nested` one step at all counts beside a step at each; `packing`
packed beside padded rows; `table` speed and memory at each count; `features` kept features of a frozen tower beside
the tower; `gpu` that table and model FLOPs utilization for
SigLIP-so400m and Qwen2.5-1.5B in bfloat16, on CUDA only. `all` is all but the last.

Weights are random, since only shapes decide what a step takes. What is compared is trained in turns, a step of each at
a time over the same rows, so that a busy machine slows all alike: read the ratios. Times are of whole steps, with the
collator in them, and given as median and quartiles. The last line printed is one JSON object.
"""

import argparse
import copy
import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from training_runs import (
    COUNTS,
    WEIGHTS,
    QuestionRows,
    Run,
    build,
    describe_machine,
    make_rows,
    measure_apart,
    peak_memory_mib,
    print_table,
    sharing_runs,
    show,
    step_flops,
    summarize,
    take_turns,
)

from tokenflex import TokenFlexConfig, TokenFlexForConditionalGeneration
from tokenflex.training.train import freeze_parts


STEPS = {"draw": 40, "nested": 6, "packing": 30, "table": 8, "features": 6, "gpu": 20}
BATCH_SIZES = {"draw": 2, "nested": 2, "packing": 16, "table": 2, "features": 2, "gpu": 8}
RECIPE_BATCH_SIZE = 16  # of the embedded default
HOPPER_FLOPS = 989e12  # dense bfloat16 of an H100 or H200 (SXM), the vendor's figure
FEATURES = ((1, 16), (1, 64), (1, 256), (8, 16))  # images of a row, and the vision tokens of each
SAMPLED = dict(zip(COUNTS, WEIGHTS))


def fixed(counts=COUNTS) -> dict[str, dict]:
    return {str(count): {"choices": {count: 1.0}} for count in counts}


def seconds_by_count(*runs: Run) -> dict[int, dict]:
    """Summaries of the steps that were taken at each count."""
    records = [record for run in runs for record in run.records]
    counts = sorted({record["count"] for record in records})
    return {count: summarize([r["seconds"] for r in records if r["count"] == count]) for count in counts}


def expect(values: dict[int, float], weights: dict[int, float]) -> float:
    return sum(weight * values[count] for count, weight in weights.items())


def flops_ratio(model: TokenFlexForConditionalGeneration, text_tokens: float) -> float:
    """FLOPs of a step with counts drawn 2:3:5, on average, beside those at 256."""
    flops = {count: step_flops(model, [count], text_tokens) for count in COUNTS}
    return expect(flops, SAMPLED) / flops[256]


def measure_draw(shape: str, steps: int, warmup: int, batch_size: int, seed: int) -> dict:
    """A run that draws its counts 2:3:5, and one at 256, over the same rows."""
    model, processor = build(shape, seed)
    rows = make_rows(model, batch_size * (steps + warmup), seed)
    variants = {"sampled": {"choices": SAMPLED}, **fixed([256])}
    options = {"per_device_train_batch_size": batch_size, "seed": seed}
    sampled, largest = runs = sharing_runs(model, processor, rows, variants, **options).values()
    take_turns(dict(zip(variants, runs)), steps, warmup)
    by_count = seconds_by_count(*runs)
    if missing := set(COUNTS) - set(by_count):
        raise SystemExit(f"{steps} steps with seed {seed} never draw {sorted(missing)}: give more `--steps`.")
    medians = {count: summary["median"] for count, summary in by_count.items()}
    same = [a["seconds"] / b["seconds"] for a, b in zip(sampled.records, largest.records) if a["count"] == 256]
    text_tokens = sum(largest["tokens"]) / steps / batch_size - 256
    with torch.device("meta"):
        paper_ratio = flops_ratio(TokenFlexForConditionalGeneration(TokenFlexConfig()), text_tokens)
    figures = {
        "batch_size": batch_size,
        "text_tokens": round(text_tokens, 1),
        "drawn": {count: sampled["count"].count(count) for count in COUNTS},
        "seconds": by_count,
        "time_ratio": {
            "these_draws": sum(sampled["seconds"]) / sum(largest["seconds"]),
            "expected": expect(medians, SAMPLED) / medians[256],
        },
        "vision_token_ratio": {
            "these_draws": sum(sampled["vision_tokens"]) / sum(largest["vision_tokens"]),
            "expected": expect({count: count for count in COUNTS}, SAMPLED) / 256,
        },
        "flops_ratio_expected": {"this_model": flops_ratio(model, text_tokens), "paper_shapes": paper_ratio},
        "same_work_twice": summarize(same),
    }
    print(f"\n{shape}, batch {batch_size}, {figures['text_tokens']} text tokens per sample, {steps} steps of each")
    print_table(
        ["vision tokens", "drawn", "s per step"], [(c, figures["drawn"][c], show(by_count[c])) for c in COUNTS]
    )
    table = []
    for name, title, paper in (
        ("time_ratio", "time", "0.87 (13.0 h / 15.0 h)"),
        ("vision_token_ratio", "vision tokens", "0.72"),
    ):
        ratio = figures[name]
        table.append((title, f"{ratio['these_draws']:.3f}", f"{ratio['expected']:.3f}", paper))
    print_table(["sampled / fixed 256", f"these {steps} draws, seed {seed}", "expected at 2:3:5", "paper"], table)
    print(f"\nThe same count in both runs, sampled / fixed (1 but for noise): {show(figures['same_work_twice'])}")
    print(
        f"FLOPs, computed from shapes, sampled / fixed 256: {figures['flops_ratio_expected']['this_model']:.3f}; with "
        f"the paper's models and as much text it would be {paper_ratio:.3f}"
    )
    return figures


def measure_nested(shape: str, steps: int, warmup: int, batch_size: int, seed: int) -> dict:
    """A step at all three counts, and the three steps that it replaces."""
    model, processor = build(shape, seed)
    rows = make_rows(model, batch_size * (steps + warmup), seed)
    variants = {**fixed(), "nested": {"scheme": "nested"}, "distill": {"scheme": "distill"}}
    options = {"per_device_train_batch_size": batch_size, "seed": seed}
    runs = sharing_runs(model, processor, rows, variants, **options)
    take_turns(runs, steps, warmup)
    separate = np.array([runs[str(count)]["seconds"] for count in COUNTS])
    medians = {count: float(np.median(seconds)) for count, seconds in zip(COUNTS, separate)}
    figures = {
        "batch_size": batch_size,
        "seconds": {name: summarize(run["seconds"]) for name, run in runs.items()},
        "tower_parameters": sum(parameter.numel() for parameter in model.model.vision_tower.parameters()),
        "language_model_parameters": sum(p.numel() for p in model.model.language_model.layers.parameters()),
    }
    for name in ("nested", "distill"):
        seconds = np.array(runs[name]["seconds"])
        figures[name] = {
            "of_three_steps": summarize((seconds / separate.sum(0)).tolist()),
            "of_a_sampled_step": float(np.median(seconds)) / expect(medians, SAMPLED),
            "padding": 1 - sum(runs[name]["tokens"]) / sum(runs[name]["positions"]),
        }
    return figures


def print_nested(figures: dict[str, dict]) -> None:
    header = ["model (tower / language model)", "s at 64", "144", "256", "scheme", "s per step"]
    table = []
    for (shape, by_shape), scheme in itertools.product(figures.items(), ("nested", "distill")):
        sizes = [by_shape[f"{part}_parameters"] / 1e6 for part in ("tower", "language_model")]
        seconds, ratios = by_shape["seconds"], by_shape[scheme]
        table.append((
            f"{shape} ({sizes[0]:.0f}M / {sizes[1]:.0f}M)",
            *(f"{seconds[name]['median']:.3f}" for name in map(str, COUNTS)),
            scheme,
            show(seconds[scheme]),
            show(ratios["of_three_steps"], ".2f"),
            f"{ratios['of_a_sampled_step']:.2f}",
            f"{ratios['padding']:.1%}",
        ))  # fmt: skip
    print_table([*header, "/ the three steps", "/ a mean sampled step", "padding"], table)


def measure_packing(shape: str, steps: int, warmup: int, batch_size: int, seed: int) -> dict:
    """Two models from the same weights on the same rows of very different lengths, one with its rows packed."""
    model, processor = build(shape, seed)
    rows = make_rows(model, batch_size * (steps + warmup), seed, mixed=True)
    options = {"per_device_train_batch_size": batch_size, "seed": seed, "learning_rate": 1e-3}
    padded = Run(copy.deepcopy(model), processor, rows, **options)
    packed = Run(model, processor, rows, packing=True, **options)
    take_turns({"padded": padded, "packed": packed}, steps, warmup)
    lengths = [padded.trainer.data_collator.measure(rows[index])[0] for index in range(len(rows))]
    speedups = [a["seconds"] / b["seconds"] for a, b in zip(padded.records, packed.records)]
    differences = np.abs(np.array(padded["loss"]) - packed["loss"])
    figures = {
        "batch_size": batch_size,
        "tokens_per_row_at_256": dict(zip(("min", "10%", "median", "90%", "max"), np.percentile(
            lengths, [0, 10, 50, 90, 100]
        ).round().tolist())),
        "samples_per_second": {
            name: batch_size * steps / sum(run["seconds"]) for name, run in (("padded", padded), ("packed", packed))
        },
        "throughput_ratio": sum(padded["seconds"]) / sum(packed["seconds"]),
        "throughput_ratio_per_step": summarize(speedups),
        "padding": {
            name: 1 - sum(run["tokens"]) / sum(run["positions"])
            for name, run in (("padded", padded), ("packed", packed))
        },
        "loss_difference": {"mean": float(differences.mean()), "largest": float(differences.max())},
        "last_loss": {"padded": padded["loss"][-1], "packed": packed["loss"][-1]},
    }  # fmt: skip
    spread = ", ".join(f"{name} {length:.0f}" for name, length in figures["tokens_per_row_at_256"].items())
    print(f"\n{shape}, batch {batch_size}, {steps} steps; tokens per row with images at 256: {spread}")
    print_table(
        ["", "samples / s", "padding", "loss of the last step"],
        [
            (
                name,
                f"{figures['samples_per_second'][name]:.2f}",
                f"{figures['padding'][name]:.1%}",
                f"{figures['last_loss'][name]:.5f}",
            )
            for name in ("padded", "packed")
        ],
    )
    print(
        f"\nPacked / padded throughput: {figures['throughput_ratio']:.2f} over the run, "
        f"{show(figures['throughput_ratio_per_step'], '.2f')} per step; mean absolute difference of losses: "
        f"{figures['loss_difference']['mean']:.1e}, largest {figures['loss_difference']['largest']:.1e}"
    )
    return figures


def memory_of(shape: str, variant: dict, batch_size: int, seed: int) -> dict:
    """Peak resident memory of a process that does nothing but train three steps."""
    libraries = peak_memory_mib()
    model, processor = build(shape, seed)
    run = Run(
        model, processor, make_rows(model, 3 * batch_size, seed), per_device_train_batch_size=batch_size, **variant
    )
    take_turns({"": run}, 3, 0)
    return {"peak": peak_memory_mib(), "libraries": libraries}


def measure_table(
    shape: str, steps: int, warmup: int, batch_size: int, seed: int, with_flops: bool = False, **options
) -> dict:
    """Speed and peak memory at each count and nested; sampling follows from these by its weights."""
    model, processor = build(shape, seed)
    counts = model.config.vision_token_choices
    weights = dict(zip(counts, model.config.vision_token_weights))
    variants = {**fixed(counts), "nested": {"scheme": "nested"}}
    rows = make_rows(model, batch_size * (steps + warmup), seed)
    options = {"per_device_train_batch_size": batch_size, "seed": seed, **options}
    runs = sharing_runs(model, processor, rows, variants, **options)
    take_turns(runs, steps, warmup)
    text_tokens = sum(runs[str(counts[0])]["tokens"]) / steps / batch_size - counts[0]
    figures = {}
    for name, run in runs.items():
        if "gpu_bytes" in run.records[0]:
            memory = {"peak": round(max(run["gpu_bytes"]) / 2**20)}
        else:
            memory = measure_apart(memory_of, shape, variants[name], batch_size, seed)
        figures[name] = {
            "seconds": summarize(run["seconds"]),
            "tokens_per_step": sum(run["tokens"]) / steps,
            "memory_mib": memory,
        }
    by_count = {count: figures[str(count)] for count in counts}
    figures["batch, 2:3:5"] = {
        "seconds": {"median": expect({c: figure["seconds"]["median"] for c, figure in by_count.items()}, weights)},
        "tokens_per_step": expect({c: figure["tokens_per_step"] for c, figure in by_count.items()}, weights),
        "memory_mib": max((figure["memory_mib"] for figure in by_count.values()), key=lambda memory: memory["peak"]),
    }
    if with_flops:
        flops = {count: batch_size * step_flops(model, [count], text_tokens) for count in counts}
        for name, figure in figures.items():
            if name == "nested":
                figure["flops_per_step"] = batch_size * step_flops(model, counts, text_tokens)
            else:
                figure["flops_per_step"] = flops[int(name)] if name.isdigit() else expect(flops, weights)
            figure["flops_utilization"] = figure["flops_per_step"] / figure["seconds"]["median"] / HOPPER_FLOPS
    for figure in figures.values():
        seconds = figure["seconds"]["median"]
        figure["samples_per_second"] = batch_size / seconds
        figure["tokens_per_second"] = figure["tokens_per_step"] / seconds
    print(f"\n{shape}, batch {batch_size}, {text_tokens:.0f} text tokens per sample, {steps} steps of each")
    header = ["vision tokens or scheme", "s per step", "samples / s", "tokens / s", "peak memory, MiB"]
    print_table(
        [*header, *(["MFU"] if with_flops else [])],
        [
            (
                name,
                show(figure["seconds"]) if "steps" in figure["seconds"] else f"{figure['seconds']['median']:.3f}",
                f"{figure['samples_per_second']:.2f}",
                f"{figure['tokens_per_second']:.0f}",
                figure["memory_mib"]["peak"],
                *([f"{figure['flops_utilization']:.1%}"] if with_flops else []),
            )
            for name, figure in figures.items()
        ],
    )
    return {"batch_size": batch_size, "text_tokens": round(text_tokens, 1), "variants": figures}


def measure_features(shape: str, steps: int, warmup: int, batch_size: int, seed: int) -> dict:
    """Steps behind a frozen tower, and steps on its features that an earlier epoch has kept."""
    model, processor = build(shape, seed)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    options = {"per_device_train_batch_size": batch_size, "seed": seed}
    figures = {}
    for frozen in (["vision_tower"], ["vision_tower", "language_model"]):
        freeze_parts(model, frozen)
        for num_images, count in FEATURES:
            num_rows, size = batch_size * (steps + warmup), model.config.image_size[0]
            rows = QuestionRows(size, num_rows, seed, num_images=num_images)
            with tempfile.TemporaryDirectory() as folder:
                variant = {"choices": {count: 1.0}}
                variants = {"tower": variant, "features": {**variant, "cache_features": folder}}
                tower, kept = sharing_runs(model, processor, rows, variants, **options).values()
                for row in rows:
                    batch = kept.trainer.data_collator.collate([row])
                    kept.trainer.vision_tokens._features.serve(kept.trainer._prepare_inputs(batch))
                take_turns({"tower": tower, "features": kept}, steps, warmup)
            trained = "projector" if "language_model" in frozen else "projector, language model"
            figures[f"{trained}, {num_images} x {count}"] = {
                "samples_per_second": {
                    name: batch_size * steps / sum(run["seconds"]) for name, run in (("tower", tower), ("kept", kept))
                },
                "throughput_ratio": sum(tower["seconds"]) / sum(kept["seconds"]),
                "throughput_ratio_per_step": summarize([a / b for a, b in zip(tower["seconds"], kept["seconds"])]),
            }
    print(f"\n{shape}, batch {batch_size}, {steps} steps of each")
    print_table(
        ["trained, images x vision tokens", "samples / s, tower", "kept features", "ratio", "ratio per step"],
        [
            (
                name,
                *(f"{speed:.3f}" for speed in figure["samples_per_second"].values()),
                f"{figure['throughput_ratio']:.2f}",
                show(figure["throughput_ratio_per_step"], ".2f"),
            )
            for name, figure in figures.items()
        ],
    )
    return figures


def measure_gpu(shape: str, steps: int, warmup: int, batch_size: int, seed: int, workers: int) -> dict:
    """The table at the paper's tower and a language model of 1.5B, under bfloat16 autocast over float32 weights."""
    options = {"bf16": True, "dataloader_num_workers": workers}
    figures = measure_table(shape, steps, warmup, batch_size, seed, with_flops=True, **options)
    print(
        "\nMFU: (6 * weights * tokens + attention) / seconds, tower forward and backward included, against "
        f"{HOPPER_FLOPS / 1e12:.0f} TFLOP/s, dense bfloat16 of an H100 or H200 (the vendor's figure)."
    )
    return figures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    per_part = "Default: " + ", ".join("{} {}".format(*item) for item in STEPS.items()) + "."
    batches = "Default: " + ", ".join("{} {}".format(*item) for item in BATCH_SIZES.items()) + "."
    parser.add_argument(
        "--part", choices=[*STEPS, "all"], default="all", help="Part to measure. Default: %(default)s."
    )
    parser.add_argument("--steps", type=int, help=f"Timed steps of each variant. {per_part}")
    parser.add_argument("--batch_size", type=int, help=f"Samples per step. {batches} The tiny model always has 16.")
    parser.add_argument("--warmup", type=int, default=2, help="Steps that are not timed. Default: %(default)s.")
    parser.add_argument("--seed", type=int, default=0, help="Of weights, rows and draws. Default: %(default)s.")
    parser.add_argument(
        "--workers", type=int, default=4, help="Data loader's processes, `gpu` only. Default: %(default)s."
    )
    parser.add_argument("--dry_run", action="store_true", help="Tiny shapes on any machine: the figures mean nothing.")
    parser.add_argument("--output", type=Path, help="File to write the JSON object to.")
    args = parser.parse_args(argv)
    if args.part == "gpu" and not (torch.cuda.is_available() or args.dry_run):
        parser.error("`--part gpu` needs a CUDA GPU, and this machine has none: use `--dry_run` to try the code.")

    figures = {}
    for part in [part for part in STEPS if part != "gpu"] if args.part == "all" else [args.part]:
        print(f"\n## {part}")
        shared = {
            "steps": args.steps or STEPS[part],
            "warmup": args.warmup,
            "batch_size": args.batch_size or BATCH_SIZES[part],
            "seed": args.seed,
        }

        def shape(name: str) -> str:
            return "dry run" if args.dry_run else name

        if part == "draw":
            figures[part] = measure_draw(shape("language-heavy"), **shared)
        elif part == "nested":
            names = dict.fromkeys((shape("language-heavy"), shape("tower-heavy")))
            figures[part] = {name: measure_nested(name, **shared) for name in names}
            print_nested(figures[part])
        elif part == "packing":
            figures[part] = measure_packing(shape("packing"), **shared)
        elif part == "table":
            tiny = measure_table("tiny", **{**shared, "batch_size": RECIPE_BATCH_SIZE})
            large = shape("language-heavy")
            figures[part] = {"tiny": tiny, large: measure_table(large, **shared)}
        elif part == "features":
            figures[part] = measure_features(shape("ViT-S/14 + SmolLM2-135M"), **shared)
        else:
            figures[part] = measure_gpu(shape("so400m + Qwen2.5-1.5B"), **shared, workers=args.workers)
    report = json.dumps({**figures, "machine": describe_machine(), "seed": args.seed})
    if args.output:
        args.output.write_text(f"{report}\n")
    print(f"\n{report}")


if __name__ == "__main__":
    main()
