import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenflex.checkpoints.files import replace_directory, save_checkpoint, write_file
from tokenflex.towers.tiny import tiny_model_and_processor


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill(folder, **files):
    for name, text in files.items():
        (folder / name).write_text(text)


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, Interrupted])
def test_failed_replacement_leaves_what_was_there(tmp_path, error):
    target = tmp_path / "checkpoint"
    with replace_directory(target) as folder:
        fill(folder, config="old", weights="old")
    with pytest.raises(error), replace_directory(target) as folder:
        fill(folder, config="new")
        raise error
    assert contents(tmp_path) == {"checkpoint/config": b"old", "checkpoint/weights": b"old"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_failed_first_write_leaves_nothing(tmp_path):
    with pytest.raises(ValueError), replace_directory(tmp_path / "a" / "checkpoint") as folder:
        fill(folder, config="new")
        raise ValueError
    assert list((tmp_path / "a").iterdir()) == []


def test_replacement_takes_the_whole_place(tmp_path):
    for files in ({"config": "1", "left_over": "1"}, {"config": "2"}, {"config": "3", "more": "3"}):
        with replace_directory(tmp_path / "checkpoint") as folder:
            fill(folder, **files)
        assert contents(tmp_path) == {f"checkpoint/{name}": text.encode() for name, text in files.items()}


def test_target_is_untouched_until_the_block_ends(tmp_path):
    target = tmp_path / "checkpoint"
    with replace_directory(target) as folder:
        fill(folder, config="old")
    with replace_directory(target) as folder:
        fill(folder, config="new")
        assert contents(target) == {"config": b"old"}
    assert contents(target) == {"config": b"new"}


def test_a_file_in_the_way_is_replaced_without_rests(tmp_path):
    (tmp_path / "checkpoint").write_text("a file")
    with replace_directory(tmp_path / "checkpoint") as folder:
        fill(folder, config="new")
    assert contents(tmp_path) == {"checkpoint/config": b"new"}


def test_a_link_in_the_way_leaves_no_rests_and_its_target_alone(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    fill(tmp_path / "elsewhere", config="kept")
    (tmp_path / "checkpoint").symlink_to(tmp_path / "elsewhere")
    with replace_directory(tmp_path / "checkpoint") as folder:
        fill(folder, config="new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "elsewhere"]
    assert contents(tmp_path / "checkpoint") == {"config": b"new"}


@given(st.one_of(st.text(st.characters(exclude_categories=["Cs"])), st.binary()))
@settings(deadline=None, max_examples=30)
def test_written_file_holds_the_content(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("files")
    write_file(folder / "deep" / "er" / "file", content)
    write_file(folder / "deep" / "er" / "file", content)
    assert contents(folder) == {"deep/er/file": content if isinstance(content, bytes) else content.encode()}


@pytest.mark.parametrize("content", [3, None, "lone surrogate \udc80"])
def test_failed_write_leaves_what_was_there(tmp_path, content):
    write_file(tmp_path / "file", "old")
    with pytest.raises((TypeError, UnicodeEncodeError)):
        write_file(tmp_path / "file", content)
    assert contents(tmp_path) == {"file": b"old"}


def test_failed_exchange_leaves_no_temporary_file(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_file(tmp_path / "folder", "content")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_failed_checkpoint_leaves_the_former_one(tmp_path):
    model, processor = tiny_model_and_processor(width=32)
    save_checkpoint(tmp_path / "checkpoint", model, processor)
    before = contents(tmp_path)
    with pytest.raises(AttributeError):
        save_checkpoint(tmp_path / "checkpoint", model, None)
    assert contents(tmp_path) == before
