"""
Time to the first token, and of a training step, where a smaller count also lets the vision tower see a smaller image.

    python benchmarks/resolutions.py

SigLIP-so400m-patch14-384 before Qwen2.5-0.5B, random weights in float32, batches of one. Choices take turns, so that a
busy machine slows all alike: read the ratios. A training step is forward, backward and plain gradient descent over all
weights. FLOPs are counted by `tokenflex.evaluation.flops`. The last line printed is one JSON object.
"""

import argparse
import json
import statistics
import time

import torch
from training_runs import SHAPES, build, describe_machine, print_table

from tokenflex.evaluation.flops import count_flops


SHAPE = "so400m + Qwen2.5-0.5B"
SHAPES[SHAPE] = {**SHAPES["so400m + Qwen2.5-1.5B"], "language_model": (896, 4864, 24, 14, 2)}
CHOICES = [256, 144, 64, "144@336", "64@224"]
LARGEST = 256
MIXTURES = {"2:3:5": (0.2, 0.3, 0.5), "5:3:2": (0.5, 0.3, 0.2), "3:1:1": (0.6, 0.2, 0.2)}  # the first is the paper's
DRAWN = ("64@224", "144@336", 256)
QUESTION = "<|image_pad|> which color is the large circle, and how many dots are there?"


def take_turns(step, rounds: int) -> dict[int | str, list[float]]:
    """Seconds of each choice in each round; the first round is not counted."""
    seconds = {choice: [] for choice in CHOICES}
    for number in range(rounds + 1):
        for choice in CHOICES:
            start = time.perf_counter()
            step(choice)
            if number:
                seconds[choice].append(time.perf_counter() - start)
    return seconds


def describe(seconds: dict[int | str, list[float]]) -> dict[int | str, dict[str, float]]:
    """The median of each choice, and that of the largest over it, round by round, with its least and most."""
    figures = {}
    for choice, values in seconds.items():
        ratios = sorted(largest / value for largest, value in zip(seconds[LARGEST], values))
        figures[choice] = {
            "seconds": statistics.median(values),
            "speed_up": statistics.median(ratios),
            "least": ratios[0],
            "most": ratios[-1],
        }
    return figures


def show(figures: dict[str, float]) -> tuple[str, str]:
    ratio = f"{figures['speed_up']:.2f} ({figures['least']:.2f}–{figures['most']:.2f})"
    return f"{figures['seconds']:.2f}", ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="Rounds of first tokens. Default: %(default)s.")
    parser.add_argument("--steps", type=int, default=1, help="Rounds of training steps. Default: %(default)s.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the weights. Default: %(default)s.")
    args = parser.parse_args()
    model, processor = build(SHAPE, args.seed)
    image = torch.zeros(3, *processor.image_size, dtype=torch.uint8)
    inputs = dict(processor(images=image, text=QUESTION, return_tensors="pt"))
    text_tokens = inputs["input_ids"].shape[1] - LARGEST
    flops = {choice: count_flops(model.config, choice, text_tokens) for choice in CHOICES}

    def answer(choice):
        model.generate(**inputs, num_vision_tokens=choice, max_new_tokens=1, do_sample=False)

    first = describe(take_turns(answer, args.rounds))
    print(f"\n{SHAPE}, {text_tokens} text tokens")
    by_flops = {choice: flops[LARGEST].total / flops[choice].total for choice in CHOICES}
    rows = [(choice, *show(first[choice]), f"{by_flops[choice]:.2f}") for choice in CHOICES]
    print_table(["choice", "s to first token", "times as fast", "by FLOPs"], rows)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def train(choice):
        batch = processor(images=image, text=QUESTION, num_vision_tokens=choice, return_tensors="pt")
        model(
            **batch, labels=batch["input_ids"].where(batch["input_ids"] != processor.image_token_id, -100)
        ).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step = describe(take_turns(train, args.steps))
    mixtures = {
        name: sum(w * step[choice]["seconds"] for w, choice in zip(weights, DRAWN)) / step[LARGEST]["seconds"]
        for name, weights in MIXTURES.items()
    }
    print_table(["choice", "s per training step", "times as fast"], [(c, *show(step[c])) for c in CHOICES])
    mixed = ", ".join(f"{ratio:.2f} drawn {name}" for name, ratio in mixtures.items())
    print(f"\nA step of {', '.join(map(str, DRAWN))} over one at {LARGEST}: {mixed}")
    figures = {"shape": SHAPE, "first_token": first, "training_step": step, "mixtures": mixtures}
    print(json.dumps({**figures, "machine": describe_machine()}))


if __name__ == "__main__":
    main()
