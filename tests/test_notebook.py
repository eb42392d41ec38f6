from pathlib import Path

import pytest

from tokenflex.checkpoints.files import save_checkpoint


nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = Path(__file__).parents[1] / "examples/tokenflex_tour.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_nothing_that_was_run_is_kept(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}


def test_links_lead_somewhere(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = [part.split(")")[0] for part in text.split("](")[1:]]
    assert links and all((NOTEBOOK.parent / link).is_file() for link in links)


def test_every_cell_runs(notebook, tiny, tmp_path):
    model, processor = tiny
    save_checkpoint(tmp_path / "outputs/demo/checkpoint", model, processor)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    printed = {
        cell.id: "".join(o.get("text", "") for o in cell.outputs) for cell in notebook.cells if "outputs" in cell
    }
    for count in model.config.vision_token_choices:
        assert f"{count:>5} vision tokens:" in printed["ask-code"]
    assert "[4, 36]: 40 vision tokens, grids [[2, 2], [6, 6]]" in printed["lists-code"]
    assert printed["train-code"].count("vision tokens, loss") == 3
    table = notebook.cells[-2].outputs[-1]["data"]["text/markdown"]
    assert [line.split(" | ")[0] for line in table.splitlines()[2:6]] == ["| 4", "| 16", "| 36", "| commonest answer"]
