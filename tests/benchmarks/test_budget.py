import json

import budget
import pytest
from limits import projector_work, weight_bytes


# As the published checkpoints hold them.
PUBLISHED_PARAMETERS = {
    "0.5B": 494_032_768,
    "1.5B": 1_543_714_304,
    "3B": 3_085_938_688,
    "7B": 7_615_616_512,
    "14B": 14_770_033_664,
    "32B": 32_763_876_352,
    "72B": 72_706_203_648,
}


@pytest.mark.parametrize("name", budget.LANGUAGE_MODELS)
def test_shapes_make_the_published_number_of_parameters(name):
    config = budget.make_config(name)
    assert config.patch_grid == (27, 27)
    without_text = budget.tower_work(config.vision_config, 0, 1).bytes + projector_work(config, 0, 64, 1).bytes
    assert weight_bytes(config, 1) - without_text == PUBLISHED_PARAMETERS[name]


def test_fewer_tokens_are_never_slower_and_never_faster_than_their_number():
    """Bounds that any arithmetic of this kind has to keep, whatever the shapes."""
    for images in (1, 4):
        row = budget.count_first_token("0.5B", images, 32)
        for key in ("speed_up", "speed_up_small_tower", "speed_up_kept_features"):
            assert 1 == row[key][256] < row[key][144] < row[key][64] < 4
        assert row["speed_up"][64] < row["speed_up_small_tower"][64] < row["speed_up_kept_features"][64]
    decoding = budget.count_decoding("0.5B", 1, 32)
    assert decoding["cache_bytes_per_image"][256] == 4 * decoding["cache_bytes_per_image"][64]
    assert 1 < decoding["steps"][1]["speed_up"][64] < decoding["steps"][32]["speed_up"][64]
    training = budget.count_training("0.5B", 32)
    for ratios in training.values():
        assert 0.25 < ratios[64] < ratios[144] < ratios["2:3:5"] < 1
    assert training["frozen"][64] < training["trained"][64]


def test_the_last_line_is_json_and_the_plot_a_png(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(budget, "LANGUAGE_MODELS", {"0.5B": budget.LANGUAGE_MODELS["0.5B"]})
    budget.main(["--text_tokens", "8", "--bytes_per_second", "1e12", "--plot", str(tmp_path / "plot.png")])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["text_tokens"], figures["bytes_per_second"]) == (8, 1e12)
    assert figures["images_1"]["first_token"]["0.5B"]["speed_up"]["256"] == 1
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
