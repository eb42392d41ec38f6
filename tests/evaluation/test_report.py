import io
import json

import pytest
from PIL import Image

from tokenflex.evaluation.report import markdown_table, plot_png
from tokenflex.evaluation.sweep import Prediction, score


COUNTS = [4, 16, 36]


def report(families=("color", "count"), times=True):
    predictions = [
        Prediction(i, family, "q", "red", {count: "red" if (i + count) % 3 else "blue" for count in COUNTS})
        for i, family in enumerate(families * 5)
    ]
    scores = score(predictions, COUNTS)
    costs = {
        "milliseconds_to_first_token": {4: 1.25, 16: 2.0, 36: 3.5},
        "tokens_per_second": {4: 812.3, 16: 640.2, 36: 299.9},
        "peak_memory_mib": {4: 1024.4, 16: None, 36: 2048.0},
    }
    return {**scores, **costs} if times else scores


def cells(table):
    lines = table.strip().split("\n")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]]


@pytest.mark.parametrize("families", [("color", "count"), ("color",), ("all",)])
@pytest.mark.parametrize("times", [False, True])
def test_table_has_one_row_per_count_and_the_majority(families, times):
    table = cells(markdown_table(report(families, times)))
    assert [row[0] for row in table] == ["vision tokens", "4", "16", "36", "commonest answer"]
    assert len({len(row) for row in table}) == 1
    costs = ["ms to first token", "tokens / s", "peak MiB"]
    assert table[0][-3:] == costs if times else not set(costs) & set(table[0])
    assert all(family in table[0] for family in families)


def test_table_holds_the_scores():
    scores = report()
    table = cells(markdown_table(scores))
    columns = {name: i for i, name in enumerate(table[0])}
    for row, count in zip(table[1:], COUNTS):
        for family in ("color", "count"):
            assert float(row[columns[family]]) == pytest.approx(100 * scores["accuracy"][count][family], abs=0.051)
        assert float(row[columns["mean"]]) == pytest.approx(100 * scores["mean"][count], abs=0.051)
        assert float(row[columns["ms to first token"]]) == pytest.approx(
            scores["milliseconds_to_first_token"][count], abs=0.051
        )
    assert [row[columns["tokens / s"]] for row in table[1:4]] == ["812", "640", "300"]
    assert [row[columns["peak MiB"]] for row in table[1:4]] == ["1024", "", "2048"]  # unknown values stay empty
    assert float(table[-1][columns["mean"]]) == pytest.approx(100.0)


def test_unparsed_replies_stand_beside_the_scores():
    predictions = [
        Prediction(0, "all", "q", "A", {4: "A or B", 16: "A"}),
        Prediction(1, "all", "q", "B", {4: "?", 16: "B"}),
    ]
    scores = score(predictions, [4, 16], "multiple_choice")
    table = cells(markdown_table(scores))
    assert table[0][-1] == "unparsed" and [row[-1] for row in table[1:]] == ["2", "0", ""]
    assert len({len(row) for row in table}) == 1
    assert "unparsed" not in markdown_table(score(predictions, [4, 16]))


def test_intervals_choices_and_differences_stand_beside_the_scores():
    scores = report()
    for name in ("accuracy", "mean", "milliseconds_to_first_token", "tokens_per_second", "peak_memory_mib"):
        scores[name]["auto"] = scores[name][16]
    scores["interval"] = {count: [0.5, 0.625] for count in [*COUNTS, "auto"]}
    scores["vision_tokens"] = {4: 4, 16: 16, 36: 36, "auto": 17.25}
    scores["against_largest"] = {4: {"difference": -0.125, "low": -0.25, "high": 0.0, "p_value": 0.0123}}
    table = markdown_table(scores)
    rows = cells(table.split("\n\n")[0])
    assert rows[4][0] == "auto (17.2 read)" and rows[4][rows[0].index("95 % of means")] == "50.0–62.5"
    assert "- 4 against the largest count, over all questions: -12.5 points (-25.0 to +0.0), p = 0.012" in table
    Image.open(io.BytesIO(plot_png(scores, "a title"))).load()


def test_separator_has_as_many_columns_as_the_header():
    header, separator = markdown_table(report()).split("\n")[:2]
    assert header.count("|") == separator.count("|")


@pytest.mark.parametrize("families", [("color", "count"), ("all",), tuple(f"family {i}" for i in range(13))])
@pytest.mark.parametrize("times", [False, True])
def test_plot_is_an_image(families, times):
    image = Image.open(io.BytesIO(plot_png(report(families, times), "a title")))
    image.load()
    assert image.format == "PNG" and min(image.size) > 200
    assert image.convert("L").getextrema() == (0, 255)


def test_report_read_back_from_json_gives_the_same_table():
    assert markdown_table(json.loads(json.dumps(report()))) == markdown_table(report())
    assert plot_png(json.loads(json.dumps(report())), "a title").startswith(b"\x89PNG")


def test_pairs_of_counts_and_resolutions_have_rows_and_a_plot():
    choices = ["4@32", 16, "16@48"]
    predictions = [
        Prediction(i, "color" if i % 2 else "count", "q", "red", dict.fromkeys([*choices, "auto"], "red"))
        for i in range(4)
    ]
    scores = score(predictions, [*choices, "auto"])
    scores["vision_tokens"] = {"4@32": 4, 16: 16, "16@48": 16, "auto": 9.5}
    scores["gflops_to_first_token"] = {"4@32": 0.031, 16: 0.1, "16@48": 0.062}
    scores["milliseconds_to_first_token"] = {"4@32": 1.0, 16: 3.0, "16@48": 2.0, "auto": 2.5}
    table = cells(markdown_table(scores))
    assert [row[0] for row in table[1:5]] == ["4@32", "16", "16@48", "auto (9.5 read)"]
    assert [row[table[0].index("GFLOP to first token")] for row in table[1:5]] == ["0.031", "0.1", "0.062", ""]
    with Image.open(io.BytesIO(plot_png(scores, "pairs"))) as image:
        assert image.width > image.height
