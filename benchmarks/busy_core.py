"""
What other work on the machine costs, by how OpenMP's threads wait for each other.

    python benchmarks/busy_core.py

One process keeps a core busy while another generates or trains with the embedded tiny model, or multiplies matrices of
a large one's sizes. The ways to wait take turns in rounds, each in a new process; medians of the rounds are printed.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time


WAYS = {
    "spinning": {"GOMP_SPINCOUNT": "300000"},  # what libgomp does unless told otherwise
    "sleeping": {},  # what importing tokenflex sets
    "one thread": {"OMP_NUM_THREADS": "1"},
}
SECONDS = 5


def _generate():
    from tokenflex.data.synthetic import draw_scene
    from tokenflex.towers.tiny import tiny_model_and_processor

    model, processor = tiny_model_and_processor()
    inputs = processor(images=draw_scene(1, 0).image, text="<|image_pad|>which color?", return_tensors="pt")
    return lambda: model.eval().generate(**inputs, max_new_tokens=16, min_new_tokens=16, do_sample=False)


def _train():
    from tokenflex.data.synthetic import SyntheticVQA
    from tokenflex.towers.tiny import tiny_model_and_processor
    from tokenflex.training import TokenFlexDataCollator

    model, processor = tiny_model_and_processor()
    batch = TokenFlexDataCollator(processor, [36], [1.0])([SyntheticVQA(16, 0)[i] for i in range(16)])
    return lambda: model.train()(**batch, use_cache=False).loss.backward()


def _multiply():
    import torch

    import tokenflex  # noqa: F401

    matrices, inputs = [torch.randn(1024, 4096) for _ in range(6)], torch.randn(256, 1024)

    def multiply():
        outputs = inputs
        for matrix in matrices:
            outputs = outputs @ matrix @ matrix.T / 4096

    return multiply


WORK = {"generate 16 tokens": _generate, "a training step": _train, "large products": _multiply}


def _time_work(name: str) -> None:
    """Prints the median milliseconds of a piece of work."""
    work, times = WORK[name](), []
    for _ in range(3):
        work()
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - start))
    print(statistics.median(times))


def _compare_ways(rounds: int) -> None:
    unset = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    print("| | busy cores | " + " | ".join(f"{way}, ms" for way in WAYS) + " |")
    print("|---|---:|" + "---:|" * len(WAYS))
    for work in WORK:
        for busy in (0, 1):
            times = {way: [] for way in WAYS}
            others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
            for _ in range(rounds):
                for way, variables in WAYS.items():
                    command = [sys.executable, __file__, "--work", work]
                    done = subprocess.run(
                        command, env=unset | variables, stdout=subprocess.PIPE, text=True, check=True
                    )
                    times[way].append(float(done.stdout.split()[-1]))
            for other in others:
                other.kill()
            print(f"| {work} | {busy} | " + " | ".join(f"{statistics.median(times[way]):.0f}" for way in WAYS) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--rounds", type=int, default=3, help="Default: %(default)s.")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        _time_work(args.work)
    else:
        _compare_ways(args.rounds)


if __name__ == "__main__":
    main()
