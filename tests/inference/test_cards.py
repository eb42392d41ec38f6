import numpy as np
import pytest
from PIL import Image

from tokenflex.inference.cards import draw_grid, render_answers, render_card
from tokenflex.inference.comparison import Answer, answer_at, ask


@pytest.mark.parametrize("size", [(64, 64), (640, 480), (300, 2000)])
@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (3, 6), (6, 6)])
def test_drawn_grid_has_its_rows_and_columns(size, grid):
    color = (200, 30, 90)
    drawn = np.asarray(draw_grid(Image.new("RGB", size, color), grid))
    paper = (drawn == color).all(-1)

    def runs(line):
        return int((np.diff(line.astype(int), prepend=0) == 1).sum())

    assert (runs(paper.any(1)), runs(paper.any(0))) == grid


def test_strip_narrower_than_a_line_is_drawn():
    assert draw_grid(Image.new("RGB", (3, 3000)), (6, 6)).size == (1, 360)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK"])
def test_images_of_every_mode_are_answered_and_drawn(tiny, mode):
    image = Image.new(mode, (40, 30))
    answer = answer_at(*tiny, ask(*tiny, image, "which color is the paper?"), 4, max_new_tokens=1)
    assert 'data-tokens="4"' in render_card(image, answer, ["your choice"])


def test_what_the_model_says_is_text_not_markup():
    shown = render_card(Image.new("L", (4, 4)), Answer("<script>alert(1)</script>", (1, 1), 9, 1.0), ["your choice"])
    assert "<script" not in shown and "&lt;script&gt;" in shown
    assert "<b>" not in render_answers("<b>", [], 1.0)
