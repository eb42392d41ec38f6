import io

import pytest
from PIL import Image

from tokenflex.research.analysis import analyze
from tokenflex.research.arms import DISTILL_EQUAL, FIXED, PAPER, share_of_steps
from tokenflex.research.report import markdown_report, plot_png


FLOPS = {arm.name: 2.0 for arm in (*FIXED, PAPER)} | {DISTILL_EQUAL.name: 5.0}


def runs(steps, arms, right):
    """Four seeds, all of which answer so many of a hundred questions right."""
    return [
        {
            "arm": arm.name,
            "num_images": 5,
            "compared_at": steps,
            "steps": steps,
            "seed": seed,
            "right": {str(count): [1] * right[arm.name] + [0] * (100 - right[arm.name]) for count in (4, 16, 36)},
            "families": ["a"] * 100,
            "images": [0] * 100,
            "cpu_seconds": 60,
        }
        for arm in arms
        for seed in range(4)
    ]


@pytest.fixture(scope="module")
def report():
    whole = {"fixed-4": 50, "fixed-16": 51, "fixed-36": 48, PAPER.name: 50, DISTILL_EQUAL.name: 53}
    shared = {"fixed-4": 40, "fixed-16": 50, "fixed-36": 60}
    results = runs(30, (*FIXED, PAPER, DISTILL_EQUAL), whole) + runs(share_of_steps(30), FIXED, shared)
    return analyze(results, FLOPS, {"Data-limited": (5, 30)}, {})


def rows(text, title):
    """The cells of the rows that start so, one table after the other."""
    return [line.strip("| ").split(" | ") for line in text.split("\n") if line.startswith(f"| {title} |")]


def test_one_flexible_model_instead_of_three(report):
    text = markdown_report(report)
    table = text[text.index("#### One flexible model instead of three") :]
    assert rows(table, "three fixed, 10 steps each: means in %") == [
        ["three fixed, 10 steps each: means in %", "40.0 ± 0.0", "50.0 ± 0.0", "60.0 ± 0.0", "", "1.00"]
    ]
    assert rows(table, PAPER.title) == [
        [
            PAPER.title,
            "+10.0 (+10.0 to +10.0)",
            "+0.0 (+0.0 to +0.0)",
            "-10.0 (-10.0 to -10.0)",
            "ahead, level, behind",
            "1.00",
        ]
    ]
    assert rows(table, DISTILL_EQUAL.title)[0][-2:] == ["ahead, ahead, behind", "2.50"]


def test_verdicts_stand_beside_the_fixed_model_of_as_many_steps_and_the_draw(report):
    text = markdown_report(report)
    assert rows(text, PAPER.title)[1][1:] == [
        "+0.0 (+0.0 to +0.0)", "-1.0 (-1.0 to -1.0)", "+2.0 (+2.0 to +2.0)", "level, behind, ahead"
    ]  # fmt: skip
    assert rows(text, "fixed 16")[1][1:] == ["+1.0 (+1.0 to +1.0)", "", "+1.0 (+1.0 to +1.0)", "ahead, ahead"]


def test_no_such_table_without_such_models(report):
    assert "instead of three" not in markdown_report({**report, "instead": {}})


def test_every_row_has_as_many_cells_as_its_head(report):
    for table in markdown_report(report).strip().split("\n\n"):
        if table.startswith("|"):
            assert len({line.count("|") for line in table.split("\n")}) == 1


def test_the_plot_does_without_curves(report):
    with_curves = {**report, "curves": {title: {"30 steps": report["regimes"]["Data-limited"]} for title in "ab"}}
    two_rows = {**with_curves, "regimes": dict.fromkeys("ab", report["regimes"]["Data-limited"])}
    one_row = {**two_rows, "curves": {}}
    sizes = [Image.open(io.BytesIO(plot_png(each))).size for each in (two_rows, one_row)]
    assert sizes == [(1500, 840), (1500, 420)]
