"""Answers at several counts as cards of HTML, each with the image under the grid of its vision tokens."""

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image, ImageDraw

from ..processing_tokenflex import read_image
from .comparison import Answer


SHOWN_SIDE = 360
# Gradio's own file for semi-bold letters holds next to none, so that other fonts would mix in.
STYLE = """<style>
@font-face { font-family: "Source Sans Pro"; font-weight: 600;
  src: url("static/fonts/SourceSansPro/SourceSansPro-Bold.woff2"); }
.flex-head h1 { margin: 0 0 4px; font-size: 28px; font-weight: 600; }
.flex-head p, .flex-note { margin: 0; color: var(--body-text-color-subdued); }
.flex-question { margin: 0 0 12px; font-size: 20px; font-weight: 600; }
.flex-cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px;
  margin-bottom: 12px; }
.flex-card { border: 1px solid var(--border-color-primary); border-radius: 10px; overflow: hidden; }
.flex-card.chosen { border-color: var(--color-accent); box-shadow: 0 0 0 1px var(--color-accent); }
.flex-card header { padding: 10px 14px; }
.flex-card header b { display: block; font-size: 18px; font-weight: 600; }
.flex-card header span { font-size: 13px; color: var(--body-text-color-subdued); }
.flex-card.chosen header span { color: var(--color-accent); font-weight: 600; }
.flex-card img { display: block; width: 100%; max-height: 320px; object-fit: contain; background: #8883; }
.flex-card .answer { margin: 0; padding: 12px 14px; font-size: 22px; font-weight: 600; overflow-wrap: anywhere; }
.flex-card dl { margin: 0; padding: 0 14px 12px; display: grid; grid-template-columns: 1fr auto; row-gap: 3px;
  font-size: 14px; }
.flex-card dt { color: var(--body-text-color-subdued); }
.flex-card dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
#examples thead { display: none; }
#examples tbody { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); }
#examples tr { display: flex; align-items: center; background: none; border: 0; }
#examples td { text-align: left; border: 0; padding: 6px 10px; }
</style>"""
HEAD = (
    '<div class="flex-head"><h1>TokenFLEX</h1><p>One vision-language model, any number of vision tokens. Ask at a '
    "count, and see it between the smallest and the largest that the model was trained at.</p></div>"
)
EMPTY = '<p class="flex-note">The answers will stand here, side by side.</p>'


def draw_grid(image: Image.Image, grid: tuple[int, int]) -> Image.Image:
    """
    The image, at most 360 pixels wide and high, with the lines between vision tokens. (Where a grid does not divide
    the patch grid, neighboring tokens share the patches under a line.)

    Args:
        image (`PIL.Image.Image`): The image.
        grid (`tuple[int, int]`): (rows, columns).

    Returns:
        `PIL.Image.Image`, in mode RGB.

    Example:

    ```python
    >>> from PIL import Image
    >>> from tokenflex.inference.cards import draw_grid

    >>> draw_grid(Image.new("RGB", (4000, 1000)), grid=(4, 4)).size
    (360, 90)
    ```
    """
    shown = read_image(image).copy()
    if max(shown.size) > SHOWN_SIDE:
        shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    else:
        factor = SHOWN_SIDE // max(shown.size)
        shown = shown.resize((factor * shown.width, factor * shown.height), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(shown, "RGBA")
    for fill, width in (((0, 0, 0, 100), 4), ((255, 255, 255, 255), 2)):  # white with black edges shows on any image
        for row in range(1, grid[0]):
            y = row * shown.height // grid[0]
            pen.line((0, y, shown.width, y), fill, width)
        for column in range(1, grid[1]):
            x = column * shown.width // grid[1]
            pen.line((x, 0, x, shown.height), fill, width)
    return shown


def render_card(image: Image.Image, answer: Answer, roles: Sequence[str]) -> str:
    """One count's answer as HTML; whatever the model said is shown as text."""
    rows, columns = answer.grid
    count = rows * columns
    encoded = io.BytesIO()
    draw_grid(image, answer.grid).save(encoded, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}"
    figures = {
        "grid": f"{rows} × {columns}",
        "prompt tokens": answer.prompt_tokens,
        "first token": f"{answer.milliseconds_to_first_token:.1f} ms",
    }
    if answer.resolution is not None:
        figures["image"] = "{} × {} pixels".format(*answer.resolution)
    is_chosen = any(role.startswith(("your", "auto")) for role in roles)
    return (
        f'<article class="flex-card{" chosen" * is_chosen}" data-tokens="{count}">'
        f"<header><b>{count} vision token{'s' * (count > 1)}</b><span>{', '.join(roles)}</span></header>"
        f'<img src="{source}" alt="the image in {rows} rows and {columns} columns">'
        f'<p class="answer">{html.escape(answer.text) or "(nothing)"}</p><dl>'
        + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in figures.items())
        + "</dl></article>"
    )


def render_answers(question: str, cards: Sequence[str], tower_milliseconds: float) -> str:
    """The cards so far, under the question, as HTML."""
    return (
        f'<h2 class="flex-question">{html.escape(question.strip())}</h2><div class="flex-cards">{"".join(cards)}</div>'
        f'<p class="flex-note">The vision tower ran once for each size of the image: {tower_milliseconds:.1f} ms in '
        "all. First token: from its features on, the median of three.</p>"
    )
