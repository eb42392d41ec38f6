import json
import os

import pytest

from tokenflex.evaluation import paper_table
from tokenflex.evaluation.paper_table import BENCHMARKS, LMMS_EVAL, PAPER, VLMEVALKIT, markdown_table, read_scores


# Each in the shape that VLMEvalKit writes it in, with the percentage that it stands for.
VLMEVALKIT_FILES = {
    "MMStar_acc.csv": ('"split","Overall","coarse perception"\n"none","0.5425","0.7"\n', 54.25),
    "OCRBench_score.json": (json.dumps({"Text Recognition": 200, "Final Score": 645, "Final Score Norm": 64.5}), 64.5),
    "AI2D_TEST_acc.csv": ('"split","Overall","atomStructure"\n"none","0.793","0.8"\n', 79.3),
    "HallusionBench_score.csv": (
        '"split","aAcc","fAcc","qAcc"\n"Overall","60","30","33"\n"VD","1","2","3"\n"VS","1","2","3"\n',
        41.0,
    ),
    "MMBench_DEV_EN_V11_acc.csv": ('"split","Overall","AR"\n"dev","0.79","0.8"\n', 79.0),
    "MMVet_gpt-4-turbo_score.csv": ('"Category","tot","acc"\n"rec","187","50"\n"Overall","218","48.5"\n', 48.5),
    "MathVista_MINI_gpt-4o-mini_score.csv": (
        '"Task&Skill","tot","prefetch","hit","prefetch_rate","acc"\n"Overall","1000","700","546","70","54.6"\n'
        '"scientific reasoning","122","70","60","57","49"\n',
        54.6,
    ),
    "MMMU_DEV_VAL_acc.csv": ('"split","Overall","Art"\n"dev","0.4","0.5"\n"validation","0.496","0.6"\n', 49.6),
}
LMMS_EVAL_RESULTS = {
    "mmstar": ({"alias": "mmstar", "average,none": 0.5425, "math,none": 0.4, "average_stderr,none": "N/A"}, 54.25),
    "ocrbench": ({"ocrbench_accuracy,none": 0.645, "ocrbench_accuracy_stderr,none": "N/A"}, 64.5),
    "ai2d": ({"exact_match,flexible-extract": 0.793, "exact_match_stderr,flexible-extract": 0.01}, 79.3),
    "hallusion_bench_image": ({"aAcc,none": 60.0, "qAcc,none": 33.0, "fAcc,none": 30.0}, 41.0),
    "mmvet": ({"gpt_eval_score,none": 48.5}, 48.5),
    "mathvista_testmini_cot": ({"llm_as_judge_eval,none": 54.6}, 54.6),
    "mmmu_val": ({"mmmu_acc,none": 0.496, "mmmu_acc_stderr,none": "N/A"}, 49.6),
}


def write_vlmevalkit(folder, count="64", names=tuple(VLMEVALKIT_FILES)):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / f"tokenflex-{count}_{name}").write_text(VLMEVALKIT_FILES[name][0])


def write_lmms_eval(folder, model_args="pretrained=a/b,num_vision_tokens=64", tasks=tuple(LMMS_EVAL_RESULTS), **more):
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "results": {task: LMMS_EVAL_RESULTS[task][0] for task in tasks},
        "config": {"model": "tokenflex", "model_args": model_args, "limit": None, **more},
    }
    file = folder / f"20260101_00000{len(list(folder.iterdir()))}_results.json"
    file.write_text(json.dumps(report))
    return file


def test_every_score_of_vlmevalkit_is_read_in_percent(tmp_path):
    write_vlmevalkit(tmp_path)
    scores = read_scores([tmp_path])
    names = [benchmark.name for benchmark in BENCHMARKS]
    expected = {(VLMEVALKIT, "64", name): pytest.approx(p) for name, (_, p) in zip(names, VLMEVALKIT_FILES.values())}
    assert scores.percent == expected and not scores.notes


@pytest.mark.parametrize("model_args", ["num_vision_tokens=64,pretrained=a/b", {"num_vision_tokens": 64}])
def test_every_score_of_lmms_eval_is_read_in_percent(tmp_path, model_args):
    write_lmms_eval(tmp_path / "checkpoint", model_args)
    names = [benchmark.name for benchmark in BENCHMARKS if benchmark.task]
    expected = {(LMMS_EVAL, "64", name): pytest.approx(p) for name, (_, p) in zip(names, LMMS_EVAL_RESULTS.values())}
    assert len(expected) == 7
    assert read_scores([tmp_path]).percent == expected


def test_results_of_several_models_are_no_row(tmp_path):
    write_lmms_eval(tmp_path / "one", tasks=["mmstar"])
    write_lmms_eval(tmp_path / "one", "num_vision_tokens=144,pretrained=a/b", tasks=["mmstar"])
    for count, weights in (("64", "first"), ("144", "first")):
        write_vlmevalkit(tmp_path / "two" / f"tokenflex-{count}" / "T20260101", count)
        (tmp_path / "two" / f"tokenflex-{count}" / "tokenflex.json").write_text(json.dumps({"weights": weights}))
    assert len(read_scores([tmp_path]).models) == 2
    (tmp_path / "two" / "tokenflex-144" / "tokenflex.json").write_text('{"weights": "second"}')
    with pytest.raises(ValueError, match=r"VLMEvalKit's results of several models, .*(first|second) \("):
        read_scores([tmp_path])
    write_lmms_eval(tmp_path / "one", "pretrained=a/c,num_vision_tokens=64", tasks=["ai2d"])
    with pytest.raises(ValueError, match=r"lmms-eval's results of several models, a/b \(.*a/c \("):
        read_scores([tmp_path / "one"])


def test_table_shows_measured_above_paper(tmp_path):
    write_vlmevalkit(tmp_path)
    write_vlmevalkit(tmp_path, "8x12", ["MMStar_acc.csv"])
    lines = markdown_table(read_scores([tmp_path])).splitlines()
    head, _, *rows = [line for line in lines if line.startswith("|")]
    assert head.split(" | ")[2:] == [*(benchmark.name for benchmark in BENCHMARKS), "mean |"]
    assert rows == [
        "| 64 | measured | 54.2 | 64.5 | 79.3 | 41.0 | 79.0 | 48.5 | 54.6 | 49.6 | 58.8 |",
        "| 64 | paper | 54.4 | 64.5 | 79.4 | 42.2 | 79.0 | 49.0 | 54.6 | 49.6 | 59.1 |",
        "| 8x12 | measured | 54.2 |  |  |  |  |  |  |  |  |",
        "| 144 | measured |  |  |  |  |  |  |  |  |  |",
        "| 144 | paper | 56.5 | 69.8 | 80.8 | 43.0 | 79.5 | 51.6 | 57.5 | 50.0 | 61.1 |",
        "| 256 | measured |  |  |  |  |  |  |  |  |  |",
        "| 256 | paper | 57.3 | 71.4 | 81.0 | 44.4 | 79.9 | 51.0 | 56.5 | 50.6 | 61.5 |",
    ]
    missing = [line for line in lines if line.startswith("- ")]
    everything = ", ".join(benchmark.name for benchmark in BENCHMARKS)
    assert missing == [
        f"- VLMEvalKit, 8x12 vision tokens: {everything.removeprefix('MMStar, ')}",
        f"- VLMEvalKit, 144 vision tokens: {everything}",
        f"- VLMEvalKit, 256 vision tokens: {everything}",
    ]


def test_named_counts_stand_below_the_numbers(tmp_path):
    for count in ("auto", "low", "8x12"):
        write_vlmevalkit(tmp_path, count, ["MMStar_acc.csv"])
    rows = markdown_table(read_scores([tmp_path])).split("\n")
    measured = [row.split("|")[1].strip() for row in rows if "| measured |" in row]
    assert measured == ["64", "8x12", "144", "256", "auto", "low"]


def test_means_of_the_paper_show_its_gains():
    fixed = {"64": 57.5, "144": 60.1, "256": 61.1}
    gains = {count: round(sum(row) / len(row) - fixed[count], 1) for count, row in PAPER.items()}
    assert gains == {"64": 1.6, "144": 1.0, "256": 0.4}


def test_each_harness_has_its_table(tmp_path):
    write_vlmevalkit(tmp_path / "outputs/tokenflex-64/T20260101_Gabc")
    write_lmms_eval(tmp_path / "lmms")
    table = markdown_table(read_scores([tmp_path / "outputs", tmp_path / "lmms"]))
    assert table.index("**VLMEvalKit**") < table.index("**lmms-eval**")
    assert "- lmms-eval, 64 vision tokens: MMBench v1.1\n" in table


def test_links_count_once_and_the_newest_run_wins(tmp_path):
    run = tmp_path / "tokenflex-64/T1"
    write_vlmevalkit(run, names=["MMStar_acc.csv"])
    file = run / "tokenflex-64_MMStar_acc.csv"
    (run.parent / file.name).symlink_to(file)
    assert not read_scores([tmp_path]).notes
    newer = tmp_path / "tokenflex-64/T0" / file.name
    newer.parent.mkdir()
    newer.write_text(file.read_text().replace("0.5425", "0.6"))
    os.utime(file, (1, 1))
    scores = read_scores([tmp_path])
    assert scores.percent == {(VLMEVALKIT, "64", "MMStar"): 60.0}
    assert scores.notes == [f"{file}: older than {newer}"]


def test_scores_that_are_none_are_left_out_and_named(tmp_path):
    write_lmms_eval(tmp_path, tasks=["mmstar"])
    part = write_lmms_eval(tmp_path, tasks=["ocrbench"], limit=8.0)
    no_count = write_lmms_eval(tmp_path, "pretrained=a/b", ["ai2d"])
    empty = write_lmms_eval(tmp_path, tasks=[])
    report = json.loads(empty.read_text())
    report["results"]["mathvista_testmini_cot"] = {"llm_as_judge_eval,none": None}
    empty.write_text(json.dumps(report))
    scores = read_scores([tmp_path])
    assert scores.percent == {(LMMS_EVAL, "64", "MMStar"): 54.25}
    table = markdown_table(scores)
    for file, reason in ((part, "--limit 8.0"), (no_count, "num_vision_tokens"), (empty, "llm_as_judge_eval")):
        assert any(line.startswith(f"- {file}") and reason in line for line in table.splitlines())


@pytest.mark.parametrize("judge", ["gpt-4-turbo", "qwen-72b"])
def test_any_judge_is_recognized_and_other_data_sets_are_not(tmp_path, judge):
    text = VLMEVALKIT_FILES["MMVet_gpt-4-turbo_score.csv"][0]
    (tmp_path / f"tokenflex-64_MMVet_{judge}_score.csv").write_text(text)
    for other in (f"MMVet_Hard_{judge}_score", f"MMVet_{judge}_score_fine", "MMStar_KO_acc"):
        (tmp_path / f"tokenflex-64_{other}.csv").write_text("x\n1\n")
    (tmp_path / "tokenflex-64_MMVet.xlsx").write_bytes(b"predictions")
    assert read_scores([tmp_path]).percent == {(VLMEVALKIT, "64", "MMVet"): 48.5}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenflex-64_MMStar_acc.csv", '"split","Total"\n"none","0.5"\n'),
        ("tokenflex-64_MMMU_DEV_VAL_acc.csv", '"split","Overall"\n"dev","0.4"\n"test","0.5"\n'),
        ("tokenflex-64_OCRBench_score.json", "{"),
        ("20260101_000000_results.json", "not JSON"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} is not the results file that its name says"):
        read_scores([tmp_path])


def test_folders_without_scores_are_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere, which does not exist"):
        read_scores([tmp_path / "nowhere"])
    (tmp_path / "predictions.json").write_text("[]")
    with pytest.raises(ValueError, match=r"No scores in .*looked at 1 JSON and CSV files"):
        read_scores([tmp_path])


def test_command_prints_and_writes_the_table(tmp_path, capsys):
    write_vlmevalkit(tmp_path / "results")
    paper_table.main([str(tmp_path / "results"), "--output", str(tmp_path / "table.md")])
    assert capsys.readouterr().out.strip() == (tmp_path / "table.md").read_text().strip()


def test_command_says_in_one_line_what_is_wrong(tmp_path, capsys):
    with pytest.raises(SystemExit):
        paper_table.main([str(tmp_path / "nowhere")])
    assert "nowhere, which does not exist" in capsys.readouterr().err.splitlines()[-1]
