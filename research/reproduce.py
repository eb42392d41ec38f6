"""`tokenflex reproduce`: the paper's experiment in small, from nothing to its tables, verdicts and curves."""

import json
import logging
import os
import platform
import signal
import threading
import time
from argparse import ArgumentParser
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, replace
from multiprocessing import get_context, parent_process
from multiprocessing.synchronize import Event
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm

from .. import __version__
from ..checkpoints.files import write_file
from ..checkpoints.fingerprint import digest, name_differences
from .analysis import analyze
from .arms import BASELINES, DISTILL_EQUAL, FIXED, FLEXIBLE, PAPER, Arm, share_of_steps
from .flops import step_flops
from .report import markdown_report, plot_png
from .runs import CLAIM_TEST_SEED, Run, Size, base_file, train_and_test, train_base


SIZES = {
    "cpu": Size(width=96, tower_steps=700, base_steps=600, steps=500, num_images=250),
    "gpu": Size(width=192, tower_steps=1600, base_steps=1400, steps=1000, num_images=500, batch_size=32),
}
CLAIM_SEEDS = range(100, 120)  # nobody had looked at any when the protocol in docs/experiments.md was written


def regimes(size: Size) -> dict[str, tuple[int | None, int]]:
    """The main tables: title to (images, steps)."""
    epochs = size.steps * size.batch_size / size.num_images
    return {
        f"Data-limited: {size.num_images:,} images, {size.steps} steps ({epochs:.0f} epochs)": (
            size.num_images,
            size.steps,
        ),
        f"Data-rich: {size.steps * size.batch_size:,} images, each seen once": (None, size.steps),
    }


def curves(size: Size) -> dict[str, list[tuple[str, int | None, int]]]:
    """Title to points, each (label, images, steps)."""
    many, fresh = 4 * size.num_images, size.steps * size.batch_size
    return {
        f"Over images, {size.steps} steps each": [
            (f"{size.num_images:,} images", size.num_images, size.steps),
            (f"{many:,} images", many, size.steps),
            (f"{fresh:,} images", None, size.steps),
        ],
        f"Over steps, {size.num_images:,} images gone over again": [
            (f"{steps} steps", size.num_images, steps) for steps in (size.steps // 2, size.steps)
        ],
        "Over steps, every image seen once": [
            (f"{steps} steps", None, steps) for steps in (size.steps // 2, size.steps)
        ],
    }


def plan(size: Size, seeds: Iterable[int]) -> list[Run]:
    """Every run, the main table's first; an arm of equal compute stands here with the steps it is compared at."""
    limited, rich = regimes(size).values()
    kinds = [(arm, *limited) for arm in (*FIXED, *FLEXIBLE)]
    kinds += [(arm, *rich) for arm in (*FIXED, PAPER, DISTILL_EQUAL)]
    kinds += [(arm, *limited) for arm in BASELINES]
    for points in curves(size).values():
        kinds += [(arm, *point[1:]) for point in points for arm in (*FIXED, PAPER)]
    return [Run(arm, seed, steps, num_images) for arm, num_images, steps in dict.fromkeys(kinds) for seed in seeds]


def claim_plan(size: Size, seeds: Iterable[int]) -> list[Run]:
    """The runs that decide the paper's claim: those of the main tables, and fixed models that share the steps."""
    kinds = []
    for num_images, steps in regimes(size).values():
        kinds += [(arm, num_images, steps) for arm in (*FIXED, PAPER, DISTILL_EQUAL)]
        kinds += [(arm, num_images, share_of_steps(steps)) for arm in FIXED]
    return [Run(arm, seed, steps, num_images) for arm, num_images, steps in kinds for seed in seeds]


def reproduce(
    output_dir: str | Path, size: Size, seeds: Sequence[int] = (0, 1, 2), workers: int = 2, claim: bool = False
) -> dict:
    """
    Trains and tests everything that `output_dir` does not hold yet, then writes the report. An interrupted experiment
    goes on when it is called again.

    Args:
        output_dir (`str` or `Path`): Folder for bases, runs, `report.json`, `report.md` and `report.png`.
        size (`Size`): Size of the experiment.
        seeds (`Sequence[int]`, *optional*, defaults to `(0, 1, 2)`):
            The seeds of weights, data and draws; each gives one run of every kind.
        workers (`int`, *optional*, defaults to 2): Runs at a time, each with its share of the CPU's threads.
        claim (`bool`, *optional*, defaults to `False`):
            Whether to train only what decides the paper's claim, and to test it on images of its own: fixed models,
            the paper's draw and `distill` at equal FLOPs, on few images and on fresh ones, beside fixed models that
            have a third of the steps each.

    Returns:
        `dict`: The content of `report.json`: [`analyze`]'s figures, and their cost.

    Raises:
        ValueError: If `seeds` is empty, names one twice or one outside 0 to 999, `workers` is below 1, or `output_dir`
            holds another experiment's results: of another size, version or machine, or from other bases.
    """
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed < 1000 for seed in seeds):
        raise ValueError(f"`seeds`={list(seeds)}: at least one, from 0 to 999, none twice; spread needs three.")
    if workers < 1:
        raise ValueError(f"`workers`={workers}: at least one run at a time.")
    output_dir, start = Path(output_dir), time.perf_counter()
    size = replace(size, test_seed=CLAIM_TEST_SEED) if claim else size
    _claim(output_dir, size)
    runs = claim_plan(size, seeds) if claim else plan(size, seeds)
    _check_results(output_dir, runs)
    flops = {arm.name: step_flops(arm, size) for arm in dict.fromkeys(run.arm for run in runs)}
    _run_all(output_dir, runs, flops, size, workers)
    bases = dict.fromkeys(_base_name(run.arm, run.seed) for run in runs)
    results = [_read(output_dir, run.name) for run in runs]
    report = {
        "size": asdict(size),
        "seeds": list(seeds),
        "flops_per_step": flops,
        "cpu_minutes": sum(done["cpu_seconds"] for done in (*results, *(_read(output_dir, n) for n in bases))) / 60,
        "last_call_minutes": (time.perf_counter() - start) / 60,
        "machine": {**_machine(), "cpus": available_cpus(), "workers": workers},
        **analyze(results, flops, regimes(size), {} if claim else curves(size)),
    }
    write_file(output_dir / "report.json", json.dumps(report, indent=2))
    write_file(output_dir / "report.md", markdown_report(report))
    write_file(output_dir / "report.png", plot_png(report))
    return report


def _file(output_dir: Path, name: str) -> Path:
    return output_dir / "runs" / f"{name}.json"


def _read(output_dir: Path, name: str) -> dict:
    return json.loads(_file(output_dir, name).read_text())


def _base_name(arm: Arm, seed: int) -> str:
    return f"base-{arm.projector}-{seed}"


def _claim(output_dir: Path, size: Size) -> None:
    """Results of one experiment do not mix with another's."""
    file = output_dir / "experiment.json"
    ours = {**asdict(size), "tokenflex": __version__, **_machine()}
    is_new = not file.is_file() and not any((output_dir / name).exists() for name in ("bases", "runs"))
    theirs = ours if is_new else json.loads(file.read_text()) if file.is_file() else {}
    if differing := name_differences(theirs, ours):
        raise ValueError(
            f"`output_dir`={str(output_dir)!r} holds runs of another experiment, which differs in {differing}: name a "
            "new folder."
        )
    write_file(file, json.dumps(ours, indent=2))


def _machine() -> dict[str, str]:
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _check_results(output_dir: Path, runs: Iterable[Run]) -> None:
    """Refuses results under a run's name that are another run's, or began from another base."""
    for run in runs:
        file = _file(output_dir, run.name)
        base = _file(output_dir, _base_name(run.arm, run.seed))
        if file.is_file():
            known = json.loads(file.read_text())
            began = json.loads(base.read_text())["weights"] if base.is_file() else None
            ours = {**_describe(run), "base": began}
            if differing := name_differences({name: known.get(name) for name in ours}, ours):
                raise ValueError(f"{file} is another run's result, which differs in {differing}: delete it.")


def _describe(run: Run) -> dict:
    described = {**asdict(run.arm), "seed": run.seed, "compared_at": run.steps, "num_images": run.num_images}
    return {"run": json.loads(json.dumps(described))}


def _run_all(output_dir: Path, runs: Sequence[Run], flops: Mapping[str, float], size: Size, workers: int) -> None:
    """Runs wait for their base, and a base with another projector for the tower that comes with the first."""
    waiting = {}
    for run in runs:
        job = (_train_run, run, _steps(run, flops), size, output_dir)
        waiting.setdefault(_base_name(run.arm, run.seed), []).append((run.name, job))
    for arm, seed in dict.fromkeys((run.arm, run.seed) for run in runs if run.arm.projector != PAPER.projector):
        job = (_train_base, arm, seed, size, output_dir)
        waiting[_base_name(PAPER, seed)].insert(0, (_base_name(arm, seed), job))  # others wait for it
    ready = [
        (_base_name(PAPER, seed), (_train_base, PAPER, seed, size, output_dir))
        for seed in dict.fromkeys(run.seed for run in runs)
    ]
    total = len(runs) + len(waiting)
    context = get_context("spawn")
    stop = context.Event()
    threads = max(1, available_cpus() // workers)
    with (
        tqdm(total=total, unit="run", desc="Experiment") as progress,
        ProcessPoolExecutor(workers, context, _start_worker, (threads, stop)) as pool,
    ):
        running = {}
        try:
            while ready or running:
                finished = [name for name, _ in ready if _file(output_dir, name).is_file()]
                running |= {pool.submit(*job): name for name, job in ready if name not in finished}
                if not finished:
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        future.result()
                        finished.append(running.pop(future))
                progress.update(len(finished))
                ready = [job for name in finished for job in waiting.pop(name, [])]
        except BaseException:
            stop.set()  # whatever is running is not waited for
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def available_cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _steps(run: Run, flops: Mapping[str, float]) -> int:
    """The run's, or as many as cost what the paper's draw does."""
    share = flops[PAPER.name] / flops[run.arm.name] if run.arm.equal_compute else 1
    return max(1, round(run.steps * share))


def _start_worker(threads: int, stop: Event) -> None:
    """A worker ends with its parent, however that ends, and leaves an interrupt from the keyboard to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for wait_for_end in (stop.wait, parent_process().join):
        threading.Thread(target=lambda wait=wait_for_end: (wait(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)
    _be_quiet()


def _be_quiet() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("tokenflex").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _train_base(arm: Arm, seed: int, size: Size, output_dir: Path) -> None:
    seconds = train_base(arm, seed, size, output_dir / "bases")
    weights = digest(base_file(output_dir / "bases", arm, seed).read_bytes())
    write_file(_file(output_dir, _base_name(arm, seed)), json.dumps({"cpu_seconds": seconds, "weights": weights}))


def _train_run(run: Run, steps: int, size: Size, output_dir: Path) -> None:
    base = base_file(output_dir / "bases", run.arm, run.seed)
    weights = digest(base.read_bytes())
    if weights != _read(output_dir, _base_name(run.arm, run.seed))["weights"]:
        raise ValueError(f"{base} is not the base that this experiment trained: name a new folder.")
    result = train_and_test(run, steps, size, output_dir / "bases")
    write_file(_file(output_dir, run.name), json.dumps({**result, **_describe(run), "base": weights}))


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="tokenflex reproduce",
        description="The paper's experiment in small: fixed models, the flexible one and baselines, at every count.",
    )
    parser.add_argument(
        "--output_dir", default="outputs/reproduce", help="Folder for everything. Default: %(default)s."
    )
    parser.add_argument(
        "--size", choices=list(SIZES), default="cpu", help="For two CPU cores, or for one GPU. Default: %(default)s."
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="Default: 0 1 2; with --claim 100 to 119.")
    parser.add_argument("--workers", type=int, help="Runs at a time. Default: one per CPU, at most 12.")
    parser.add_argument(
        "--claim", action="store_true", help="Train only what decides the paper's claim, see docs/experiments.md."
    )
    args = parser.parse_args(argv)
    _be_quiet()
    workers = min(available_cpus(), 12) if args.workers is None else args.workers
    seeds = args.seeds or (list(CLAIM_SEEDS) if args.claim else [0, 1, 2])
    report = reproduce(args.output_dir, SIZES[args.size], seeds, workers, args.claim)
    print(markdown_report(report))  # noqa: T201
    summary = {name: report[name] for name in ("seeds", "cpu_minutes", "last_call_minutes")}
    limited = next(iter(report["regimes"].values()))[PAPER.name]["gain"]
    summary["gain"] = {
        count: {name: round(v, 4) if isinstance(v, float) else v for name, v in gain.items()}
        for count, gain in limited.items()
    }
    print(json.dumps(summary))  # noqa: T201
