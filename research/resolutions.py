"""
Counts against pairs of a count and a resolution, in small: which answer best within the time to their first token.

For each seed a tiny model is trained twice behind the same tower and base, for as many steps: at drawn counts of whole
images, and at drawn pairs. Both are asked on images that nothing was trained on.
"""

import json
import math
from argparse import ArgumentParser
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import transformers

from ..checkpoints.files import save_checkpoint, write_file
from ..data.examples import to_example
from ..data.synthetic import SyntheticVQA
from ..evaluation.cost import measure_cost
from ..evaluation.flops import count_flops
from ..evaluation.metrics import get_metric
from ..evaluation.sweep import predict
from .stages import TEST_SEED, load, train_base, train_stage, write_score


ARMS = {
    "counts": {4: 0.2, 16: 0.3, 36: 0.5},
    "pairs": {"4@32": 0.1, "16@48": 0.2, 16: 0.2, 36: 0.5},
}
TRAIN_STEPS = 2000  # behind the small recipes' tower and base
BATCH_SIZE = 32  # of the prompts whose first tokens are timed


def run_seed(seed: int, folder: Path, scale: float = 1.0, num_images: int = 1000) -> dict:
    """
    One seed of the experiment, from nothing to its scores. What a former call has finished is used again.

    Args:
        seed (`int`): The seed of weights, data and draws.
        folder (`Path`): Folder for everything.
        scale (`float`, *optional*, defaults to 1.0): Scales the steps of training.
        num_images (`int`, *optional*, defaults to 1000): The number of images to test on.

    Returns:
        `dict`: For each arm and choice `right` with a 1 or 0 for every question, `flops` to the first token and
        `milliseconds` to those of a batch; `families` and `images` of the questions.
    """
    folder = folder / str(seed)
    result = folder / f"result-{scale}-{num_images}.json"
    if result.is_file():
        return json.loads(result.read_text())
    base = train_base(folder, seed, scale)
    steps = ["--max_steps", str(math.ceil(scale * TRAIN_STEPS))]
    test, rate, right, flops = SyntheticVQA(num_images, TEST_SEED), get_metric("exact_match"), {}, {}
    for arm, weights in ARMS.items():
        model, processor = load(base)
        model.config.vision_token_choices, model.config.vision_token_weights = list(weights), list(weights.values())
        save_checkpoint(folder / f"{arm}_untrained", model, processor)
        model, processor = load(
            train_stage(folder / arm, "small/stage2.yaml", folder / f"{arm}_untrained", seed, *steps)
        )
        answers = predict(model, processor, test, list(weights), batch_size=128, show_progress=False)
        for choice in weights:
            right[f"{arm} {choice}"] = [int(answer.rate(rate, choice)) for answer in answers]
    side, milliseconds = model.config.image_size[0], {}
    # A count alone would be asked of the last model, whose choices name resolutions for some.
    whole = {c: c if isinstance(c, str) else f"{c}@{side}" for arm in ARMS.values() for c in arm}
    images = [to_example(test[i % len(test)]).images[0] for i in range(BATCH_SIZE)]
    cost = measure_cost(model, processor, images, answers[0].question, list(whole.values()))
    for arm, weights in ARMS.items():
        for choice in weights:
            milliseconds[f"{arm} {choice}"] = cost["milliseconds_to_first_token"][whole[choice]]
            flops[f"{arm} {choice}"] = count_flops(model.config, whole[choice]).total
    write_file(
        result,
        json.dumps({
            "seed": seed, "right": right, "flops": flops, "milliseconds": milliseconds,
            "families": [answer.family for answer in answers], "images": [answer.index for answer in answers],
        }),
    )  # fmt: skip
    return json.loads(result.read_text())


def table(results: Sequence[Mapping]) -> str:
    """
    The scores beside their costs, and for each count the best pair that computes no more, in Markdown.

    Args:
        results (`Sequence[Mapping]`): What [`run_seed`] returned, for each seed.
    """

    def score(name: str, minus: str | None = None) -> str:
        other = None if minus is None else [result["right"][minus] for result in results]
        return write_score([result["right"][name] for result in results], other, results[0])

    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(results)

    names = list(results[0]["right"])
    share = {name: mean(result["flops"][name] / result["flops"]["pairs 36"] for result in results) for name in names}
    milliseconds = {name: mean(result["milliseconds"][name] for result in results) for name in names}
    lines = ["| trained at | asked at | accuracy, % | FLOPs | ms |", "|---|---:|---:|---:|---:|"]
    for name in names:
        lines.append(f"| {' | '.join(name.split())} | {score(name)} | {share[name]:.0%} | {milliseconds[name]:.1f} |")
    lines += ["", "| count | pair | accuracy, points | FLOPs, points | ms |", "|---:|---:|---:|---:|---:|"]
    for name in names:
        if name.startswith("counts"):
            pairs = [n for n in names if n.startswith("pairs") and share[n] <= share[name]]
            best = max(pairs, key=lambda n: mean(sum(result["right"][n]) for result in results))
            lines.append(
                f"| {name.split()[1]} | {best.split()[1]} | {score(best, name)} | "
                f"{100 * (share[best] - share[name]):+.0f} | {milliseconds[best] - milliseconds[name]:+.1f} |"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m tokenflex.research.resolutions", description=__doc__.strip().split("\n")[0]
    )
    parser.add_argument("--output_dir", default="outputs/resolutions", help="Folder. Default: %(default)s.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Default: 0 1 2.")
    parser.add_argument("--scale", type=float, default=1.0, help="Scales the steps of training. Default: 1.")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = [run_seed(seed, Path(args.output_dir), args.scale) for seed in args.seeds]
    print(f"{len(results)} seeds, {torch.get_num_threads()} threads\n\n{table(results)}")  # noqa: T201


if __name__ == "__main__":
    main()
