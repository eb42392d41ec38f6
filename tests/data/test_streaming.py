import io
import itertools
import json
import logging
import pickle

import datasets
import pytest
from helpers import answers_of, read_rows, text_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from tokenflex.data.arguments import DataArguments
from tokenflex.data.encoding import encode_row, measure_row
from tokenflex.data.examples import BadRowError
from tokenflex.data.rows import RowChecker
from tokenflex.data.streaming import StreamedRows


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def source(name, size, bad=(), **options):
    rows = text_rows(*("" if i in bad else f"{name}{i}" for i in range(size)))
    return rows, RowChecker(name, DataArguments([name], **options))


def streamed(sources, weights=None, shuffle_buffer=1000, seed=0):
    args = DataArguments(
        [check.source for _, check in sources], dataset_weights=weights, shuffle_buffer=shuffle_buffer
    )
    return StreamedRows(sources, args, seed)


def named(name, numbers):
    return [f"{name}{i}" for i in numbers]


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    buffer=st.integers(0, 25),
    seed=st.integers(0, 9),
    weighted=st.booleans(),
)
@settings(deadline=None, derandomize=True)
def test_an_epoch_is_a_pure_function_and_holds_every_row(sizes, buffer, seed, weighted):
    def stream():
        sources = [source(name, size) for name, size in zip("abc", sizes)]
        return streamed(sources, list(range(1, 1 + len(sizes))) if weighted else None, buffer, seed)

    rows = stream()
    epochs = []
    for epoch in range(3):
        rows.set_epoch(epoch)
        epochs.append(answers_of(rows))
        assert answers_of(rows) == epochs[-1], "two iterations of an epoch give the same rows"
        expected = [name for place, size in zip("abc", sizes) for name in named(place, range(size))]
        assert set(epochs[-1]) == set(expected)
        if not weighted:
            assert len(epochs[-1]) == len(expected)
        if not buffer and not weighted:
            assert epochs[-1] == expected
    again = pickle.loads(pickle.dumps(stream()))
    again.set_epoch(2)
    assert answers_of(again) == epochs[2]


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = []
    for seed, epoch in itertools.product(range(3), range(3)):
        rows = streamed([source("a", 50)], shuffle_buffer=20, seed=seed)
        rows.set_epoch(epoch)
        orders.append(tuple(answers_of(rows)))
    assert len(set(orders)) == len(orders)


def test_a_row_leaves_the_buffer_no_sooner_than_it_came():
    order = answers_of(streamed([source("a", 200)], shuffle_buffer=10))
    assert all(int(name[1:]) <= place + 10 for place, name in enumerate(order))
    assert order != named("a", range(200))


def test_a_positions_source_does_not_depend_on_what_the_sources_hold():
    first = streamed([source("a", 400), source("b", 400)], [1, 3], shuffle_buffer=0)
    other = streamed([source("a", 7, bad=[2, 5], on_bad_row="skip"), source("b", 400)], [1, 3], shuffle_buffer=5)
    drawn, short = ([name[0] for name in answers_of(rows)] for rows in (first, other))
    assert drawn[: len(short)] == short[: len(drawn)]
    assert abs(drawn.count("a") / len(drawn) - 0.25) < 0.05


def test_a_source_that_ends_begins_anew_in_another_order():
    rows = answers_of(streamed([source("a", 5), source("b", 200)], [1, 1], shuffle_buffer=5))
    small = [name for name in rows if name[0] == "a"]
    passes = [small[i : i + 5] for i in range(0, len(small) - 4, 5)]
    assert all(sorted(names) == named("a", range(5)) for names in passes)
    assert len(set(map(tuple, passes))) > 1


@given(bad=st.sets(st.integers(0, 11), max_size=11), buffer=st.integers(0, 15))
@settings(deadline=None, derandomize=True)
def test_rows_that_are_passed_over_are_counted(bad, buffer):
    examples = list(streamed([source("a", 12, bad, on_bad_row="skip"), source("b", 1)], shuffle_buffer=buffer))
    assert sorted(answers_of(examples)) == sorted([*named("a", set(range(12)) - bad), "b0"])
    assert sum(example.skipped for example in examples) == len(bad)
    if not buffer:
        places = [int(name[1:]) for name in answers_of(examples[:-1])]
        assert [example.skipped for example in examples[:-1]] == [
            place - before - 1 for before, place in zip([-1, *places], places)
        ]


def test_a_bad_row_is_named(caplog):
    with pytest.raises(BadRowError, match="a, row 3: its answer is ''"):
        list(streamed([source("a", 4, bad=[3])]))
    skipping = streamed([source("a", 4, bad=[3], on_bad_row="skip")])
    with caplog.at_level(logging.WARNING):
        assert len(list(skipping)) == 3
    assert "Skipped a, row 3: its answer is ''" in caplog.text


def test_long_rows_are_skipped(narrow):
    rows = text_rows("1", "3 3 3", "2")
    limit = measure_row(encode_row(rows[0], narrow[1]), narrow[1])[0]
    check = RowChecker("a", DataArguments(["a"], max_length=limit, on_long_row="skip"), processor=narrow[1])
    assert answers_of(streamed([(rows, check)], shuffle_buffer=0)) == ["1", "2"]


@pytest.mark.parametrize("weights", [None, [1, 2]])
def test_no_usable_row_is_an_error(weights):
    rows = streamed([source("a", 3), source("b", 2, bad=[0, 1], on_bad_row="skip")], weights)
    with pytest.raises(BadRowError, match="b has no usable rows"):
        list(rows)


def test_negative_buffer_is_refused():
    with pytest.raises(ValueError, match="`shuffle_buffer`=-1"):
        streamed([source("a", 3)], shuffle_buffer=-1)


def png(color):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, "PNG")
    return buffer.getvalue()


def write_source(folder, kind, size):
    rows = text_rows(*named("r", range(size)))
    if kind == "parquet":
        images = [{"bytes": png((i, 0, 0)), "path": None} for i in range(size)]
        images[1]["bytes"] = b"broken"
        table = datasets.Dataset.from_list([{**row, "image": image} for row, image in zip(rows, images)])
        table = table.cast_column("image", datasets.Image())
        table.to_parquet(folder / "a.parquet")
        return str(folder / "a.parquet")
    rows[1]["answer"] = ""
    if kind == "csv":
        lines = ["question,answer", *(f"{row['question']},{row['answer']}" for row in rows)]
        (folder / "a.csv").write_text("\n".join(lines) + "\n")
        return str(folder / "a.csv")
    if kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
        return str(folder / "saved")
    if kind == "folder":
        (folder / "hub").mkdir()
        for part in range(2):
            table = datasets.Dataset.from_list(rows[part * size // 2 : (part + 1) * size // 2])
            table.to_parquet(folder / "hub" / f"train-0000{part}-of-00002.parquet")
        return str(folder / "hub")
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "a.jsonl")


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "saved", "folder"])
def test_every_source_gives_every_row_once_among_workers(tmp_path, kind, num_workers):
    name = write_source(tmp_path, kind, 10)
    kept = named("r", [0, *range(2, 10)])
    rows = read_rows(name, on_bad_row="skip", streaming=True, shuffle_buffer=0)
    loader = DataLoader(rows, batch_size=None, num_workers=num_workers)
    for _ in range(2):
        examples = list(loader)
        assert sorted(answers_of(examples)) == kept
        assert sum(example.skipped for example in examples) == 1
    with pytest.raises(BadRowError, match=f"{name}, row 1: "):
        list(read_rows(name, streaming=True))


def test_persistent_workers_see_the_epoch():
    rows = streamed([source("a", 20)], shuffle_buffer=20)
    loader = DataLoader(rows, batch_size=None, num_workers=1, persistent_workers=True)
    orders = []
    for epoch in (0, 1, 0):
        rows.set_epoch(epoch)
        orders.append(answers_of(loader))
    assert orders[0] == orders[2] != orders[1]


def test_workers_without_rows_of_a_source_go_without():
    sources = [source("a", 1), source("b", 20), source("c", 2, bad=[0], on_bad_row="skip")]
    for weights in (None, [1, 1, 1]):
        loader = DataLoader(streamed(sources, weights), batch_size=None, num_workers=2)
        assert set(answers_of(loader)) == {*named("a", range(1)), *named("b", range(20)), "c1"}


def test_mixtures_stream_by_name(tmp_path):
    names = [write_source(tmp_path, "parquet", 6), "synthetic:4"]
    rows = read_rows(*names, on_bad_row="skip", dataset_weights=[1, 1], streaming=True, seed=3)
    sizes = {example.images[0].size for example in rows}
    assert sizes == {(4, 4), (64, 64)}
