import contextlib
import dataclasses
import json
import logging
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import transformers
from PIL import Image

from tokenflex.cli import main
from tokenflex.research import reproduce as module
from tokenflex.research.arms import ARMS, BASELINES, DISTILL_EQUAL, FIXED, PAPER, share_of_steps
from tokenflex.research.reproduce import CLAIM_SEEDS, SIZES, claim_plan, curves, plan, regimes, reproduce
from tokenflex.research.runs import CLAIM_TEST_SEED, TEST_SEED, Size


SIZE = Size(width=32, tower_steps=2, base_steps=2, steps=4, num_images=4, batch_size=2, questions=2, test_images=4)
SMALL_PLAN = [*FIXED, PAPER, DISTILL_EQUAL, BASELINES[1]]


@pytest.fixture(scope="module", autouse=True)
def verbosity():
    """The command is quiet; what is tested after it is not."""
    before, ours = transformers.logging.get_verbosity(), logging.getLogger("tokenflex").level
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()
    logging.getLogger("tokenflex").setLevel(ours)


def small_plan(size, seeds):
    return [run for run in plan(size, seeds) if run.arm in SMALL_PLAN]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "plan", small_plan)
        reproduce(folder, SIZE, [0], workers=2)
    return folder


def test_every_claim_has_its_runs():
    size = SIZES["cpu"]
    runs = plan(size, [0, 1, 2])
    assert len(runs) == len({run.name for run in runs})
    held = {(run.arm.name, run.num_images, run.steps) for run in runs}
    limited, rich = regimes(size).values()
    assert {(name, *limited) for name in ARMS} <= held
    assert {(arm.name, *rich) for arm in (*FIXED, PAPER, DISTILL_EQUAL)} <= held
    for points in curves(size).values():
        assert {(arm.name, *point[1:]) for point in points for arm in (*FIXED, PAPER)} <= held
    assert {run.seed for run in runs} == {0, 1, 2}


def test_the_claim_has_its_runs_and_no_others():
    size = SIZES["cpu"]
    runs = claim_plan(size, CLAIM_SEEDS)
    assert len(runs) == len({run.name for run in runs}) == 20 * 2 * (5 + 3)
    assert {run.seed for run in runs} == set(range(100, 120)), "of which nobody had seen any"
    for images, steps in regimes(size).values():
        found = {(run.arm.name, run.steps) for run in runs if run.num_images == images}
        shared = {(arm.name, share_of_steps(steps)) for arm in FIXED}
        assert found == {(arm.name, steps) for arm in (*FIXED, PAPER, DISTILL_EQUAL)} | shared


def test_the_claim_is_tested_on_images_of_its_own_and_goes_on(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(module.SIZES, "cpu", SIZE)
    main(["reproduce", "--claim", "--output_dir", str(tmp_path), "--seeds", "100", "--workers", "1"])
    assert capsys.readouterr().out.count("#### One flexible model instead of three") == 2
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["size"] == {**dataclasses.asdict(SIZE), "test_seed": CLAIM_TEST_SEED} and report["curves"] == {}
    for title, table in report["regimes"].items():
        assert list(table) == [arm.name for arm in (*FIXED, PAPER, DISTILL_EQUAL)]
        assert list(report["instead"][title]["gain"]) == [PAPER.name, DISTILL_EQUAL.name]
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()}
    assert len(before) == 1 + 16
    assert reproduce(tmp_path, SIZE, [100], workers=1, claim=True)["instead"] == report["instead"]
    assert before == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()}
    with pytest.raises(ValueError, match=rf"differs in test_seed \({TEST_SEED}, not {CLAIM_TEST_SEED}\)"):
        reproduce(folder, SIZE, [0], claim=True)


def test_seeds_of_the_command_line(monkeypatch, tmp_path):
    asked = []

    def stop(output_dir, size, seeds, *args):
        asked.append(list(seeds))
        raise ValueError("enough")

    monkeypatch.setattr(module, "reproduce", stop)
    for options in ([], ["--claim"], ["--claim", "--seeds", "7"]):
        with pytest.raises(SystemExit, match="enough"):
            main(["reproduce", "--output_dir", str(tmp_path), *options])
    assert asked == [[0, 1, 2], list(CLAIM_SEEDS), [7]]


def test_report_is_written_as_data_table_and_plot(folder):
    report = json.loads((folder / "report.json").read_text())
    assert report["size"] == dataclasses.asdict(SIZE) and report["seeds"] == [0]
    assert report["cpu_minutes"] > 0 and report["machine"]["workers"] == 2
    table = (folder / "report.md").read_text()
    for title, rows in report["regimes"].items():
        assert title in table
        assert all(ARMS[name].title in table for name in rows)
    assert "| fixed 4 | **" in table
    Image.open(folder / "report.png").load()


def test_equal_compute_takes_fewer_steps(folder):
    limited = next(iter(json.loads((folder / "report.json").read_text())["regimes"].values()))
    row = limited[DISTILL_EQUAL.name]
    assert row["steps"] < limited[PAPER.name]["steps"] == SIZE.steps
    assert 0.5 < row["flops"] < 1.5


def test_finished_runs_are_not_run_again(folder, monkeypatch):
    before = {file.name: file.stat().st_mtime_ns for file in (folder / "runs").iterdir()}
    gone = folder / "runs" / f"{PAPER.name}-4-4-0.json"
    result = json.loads(gone.read_text())
    gone.unlink()
    monkeypatch.setattr(module, "plan", small_plan)
    reproduce(folder, SIZE, [0], workers=1)
    after = {file.name: file.stat().st_mtime_ns for file in (folder / "runs").iterdir()}
    assert {name for name in before if before[name] != after[name]} == {gone.name}
    again = json.loads(gone.read_text())
    assert {**again, "cpu_seconds": 0} == {**result, "cpu_seconds": 0}


def test_another_size_is_refused(folder):
    with pytest.raises(ValueError, match=r"`output_dir`.*differs in steps \(4, not 5\): name a new folder"):
        reproduce(folder, dataclasses.replace(SIZE, steps=5))


def copy_of(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_another_version_is_refused(folder, tmp_path, monkeypatch):
    copied = copy_of(folder, tmp_path)
    monkeypatch.setattr(module.transformers, "__version__", "5.0")
    with pytest.raises(ValueError, match=r"differs in transformers \(.*, not 5.0\)"):
        reproduce(copied, SIZE, [0])


def test_results_that_do_not_say_of_which_experiment_are_refused(folder, tmp_path):
    copied = copy_of(folder, tmp_path)
    (copied / "experiment.json").unlink()
    shutil.rmtree(copied / "runs")
    with pytest.raises(ValueError, match=r"another experiment.*width \(None, not 32\)"):
        reproduce(copied, SIZE, [0])


@pytest.mark.parametrize("change", ["seed", "base"])
def test_a_result_of_another_run_is_refused(folder, tmp_path, monkeypatch, change):
    monkeypatch.setattr(module, "plan", small_plan)
    copied = copy_of(folder, tmp_path)
    if change == "seed":
        name = f"{PAPER.name}-4-4"
        (copied / "runs" / f"{name}-0.json").replace(copied / "runs" / f"{name}-1.json")
        with pytest.raises(ValueError, match=r"draw-235-4-4-1.json is another run's result.*'seed': 0"):
            reproduce(copied, SIZE, [1])
    else:
        base = copied / "runs" / "base-swiglu-0.json"
        base.write_text(json.dumps({**json.loads(base.read_text()), "weights": "other"}))
        with pytest.raises(ValueError, match=r"another run's result, which differs in base \(\w+, not other\)"):
            reproduce(copied, SIZE, [0])


def test_no_run_begins_from_another_base(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "plan", small_plan)
    copied = copy_of(folder, tmp_path)
    (copied / "runs" / f"{PAPER.name}-4-4-0.json").unlink()
    (copied / "bases" / "base-swiglu-0.pt").write_bytes((copied / "bases" / "base-gelu-0.pt").read_bytes())
    with pytest.raises(ValueError, match="base-swiglu-0.pt is not the base"):
        reproduce(copied, SIZE, [0], workers=1)


def test_a_failing_run_is_not_hidden_and_loses_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "plan", lambda size, seeds: small_plan(size, seeds)[:1])
    module._claim(tmp_path, SIZE)
    done = tmp_path / "runs" / "base-swiglu-0.json"  # but its weights are gone
    done.parent.mkdir()
    done.write_text('{"cpu_seconds": 1, "weights": "gone"}')
    with pytest.raises(FileNotFoundError, match="base-swiglu-0.pt"):
        reproduce(tmp_path, SIZE, [0], workers=1)
    assert [file.name for file in (tmp_path / "runs").iterdir()] == [done.name]
    assert not (tmp_path / "report.json").exists()


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_seeds_are_checked(seeds, tmp_path):
    with pytest.raises(ValueError, match="`seeds`"):
        reproduce(tmp_path, SIZE, seeds)
    assert not any(tmp_path.iterdir())


def test_workers_are_checked(tmp_path):
    with pytest.raises(ValueError, match="`workers`=0"):
        reproduce(tmp_path, SIZE, [0], workers=0)


def test_command_line(folder, monkeypatch, capsys):
    monkeypatch.setattr(module, "plan", small_plan)
    monkeypatch.setitem(module.SIZES, "cpu", SIZE)
    main(["reproduce", "--output_dir", str(folder), "--seeds", "0", "--workers", "1"])
    last = json.loads(capsys.readouterr().out.strip().split("\n")[-1])
    assert set(last["gain"]) == {"4", "16", "36"} and last["seeds"] == [0]


SCRIPT = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # which processes in the background ignore from their start
from tokenflex.research.reproduce import reproduce
from tokenflex.research.runs import Size

if __name__ == "__main__":
    size = Size(width=32, tower_steps=1, base_steps=1, steps=100000, num_images=4, batch_size=2, test_images=1)
    reproduce({folder!r}, size, [0], workers=2)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_runs_end_with_the_experiment(number, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT.format(folder=str(tmp_path / "out")))
    parent = subprocess.Popen([sys.executable, tmp_path / "script.py"], stderr=subprocess.DEVNULL)
    try:
        children = []
        while not (tmp_path / "out" / "runs").exists():  # two runs that would take hours are under way then
            with contextlib.suppress(subprocess.TimeoutExpired):
                raise AssertionError(f"it ended by itself: {parent.wait(timeout=0.2)}")
            children = psutil.Process(parent.pid).children(recursive=True)
        parent.send_signal(number)
        assert parent.wait(timeout=120) != 0
        assert not psutil.wait_procs(children, timeout=120)[1]
    finally:
        parent.kill()
