"""
A visual question answering set that the project draws itself: four kinds of scene, ten families of question.

Five families can be answered from a coarse view (`COARSE_FAMILIES`), five need detail (`DETAIL_FAMILIES`). Image i of
a seed is a pure function of (seed, i), so nothing is stored and nothing is downloaded.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw


IMAGE_SIZE = 64
LABEL_SIZE = 16  # dense labels say what each 4 x 4 pixels hold

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
    "cyan": (60, 200, 220),
    "brown": (120, 75, 40),
}
PAPERS = {"white": (250, 250, 250), "gray": (170, 170, 170), "pink": (250, 205, 215), "black": (20, 20, 20)}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")
# 3 x 5 pixels per digit, rows from the top, drawn twice as large.
DIGITS = (
    "111101101101111", "010110010010111", "111001111100111", "111001111001111", "101101111001001",
    "111100111001111", "111100111101111", "111001001010010", "111101111101111", "111101111001111",
)  # fmt: skip

COARSE_FAMILIES = ("paper_color", "shape_color", "shape_kind", "shape_place", "tallest_bar")
DETAIL_FAMILIES = ("bar_value", "cell_color", "digit_color", "digit_value", "dot_count")
FAMILIES = COARSE_FAMILIES + DETAIL_FAMILIES
SCENES = {"poster": 0.35, "chart": 0.15, "mosaic": 0.2, "dots": 0.3}  # of questions, with their shares
TOWER_SCENES = {"page": 0.5, "poster": 0.2, "chart": 0.1, "mosaic": 0.1, "dots": 0.1}  # of the tower's training
GRID = 5  # rows and columns of cells: not a count's side, so that cells and pooling windows do not line up

# Dense labels of an object: how many values each has, 0 meaning nothing is there.
LABEL_KINDS = {"color": 1 + len(COLORS), "kind": 9, "value": 21, "row": 1 + GRID, "column": 1 + GRID}
_COLOR_NAMES = tuple(COLORS)


@dataclass
class Scene:
    """
    Args:
        image (`PIL.Image.Image`): 64 x 64 pixels.
        questions (`list[tuple[str, str, str]]`): (family, question, answer).
        labels (`numpy.ndarray` of shape `(16, 16, 5)`): Dense labels in the order of `LABEL_KINDS`.
    """

    image: Image.Image
    questions: list[tuple[str, str, str]]
    labels: np.ndarray


class _Canvas:
    def __init__(self, rng: np.random.Generator, paper: str):
        self.rng = rng
        self.image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), self.shade(PAPERS[paper]))
        self.ids = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE), 0)
        self.pen, self.id_pen = ImageDraw.Draw(self.image), ImageDraw.Draw(self.ids)
        self.objects = [(0, 0, 0, 0, 0)]

    def shade(self, color: tuple[int, int, int]) -> tuple[int, int, int]:
        return tuple(int(c) for c in np.clip(np.array(color) + self.rng.integers(-14, 15, 3), 0, 255))

    def draw(self, method: str, where, color: int, labels: tuple[int, int, int, int]):
        self.objects.append((color + 1, *labels))
        getattr(self.pen, method)(where, fill=self.shade(COLORS[_COLOR_NAMES[color]]))
        getattr(self.id_pen, method)(where, fill=len(self.objects) - 1)

    def digit(self, digit: int, x: int, y: int, color: int, row: int, column: int):
        self.objects.append((color + 1, 5, 1 + digit, row, column))
        fill = self.shade(COLORS[_COLOR_NAMES[color]])
        for i, bit in enumerate(DIGITS[digit]):
            if bit == "1":
                left, top = x + 2 * (i % 3), y + 2 * (i // 3)
                self.pen.rectangle((left, top, left + 1, top + 1), fill=fill)
        self.id_pen.rectangle((x, y, x + 5, y + 9), fill=len(self.objects) - 1)

    def labels(self) -> np.ndarray:
        block = IMAGE_SIZE // LABEL_SIZE
        ids = np.asarray(self.ids).reshape(LABEL_SIZE, block, LABEL_SIZE, block).max((1, 3))
        return np.array(self.objects, dtype=np.int64)[ids]


def _poster(canvas: _Canvas, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """One big shape in a quadrant, two small digits in each of the others; questions about one of the two."""
    colors = [int(color) for color in rng.permutation(len(COLORS))]
    place, kind = int(rng.integers(4)), int(rng.integers(len(SHAPES)))
    digits = [int(digit) for digit in rng.permutation(10)]
    questions = []
    for quadrant in range(4):
        row, column = divmod(quadrant, 2)
        if quadrant == place:
            color = colors.pop()
            size = int(rng.integers(20, 29))
            x = 32 * column + int(rng.integers(1, 31 - size))
            y = 32 * row + int(rng.integers(1, 31 - size))
            _draw_shape(canvas, kind, x, y, size, color, (kind + 1, 0, row + 1, column + 1))
            questions += [
                ("shape_color", "which color is the big shape?", _COLOR_NAMES[color]),
                ("shape_kind", "what is the big shape?", SHAPES[kind]),
                ("shape_place", "where is the big shape?", PLACES[place]),
            ]
        else:
            pair = [(digits.pop(), colors.pop()) for _ in range(2)]
            for half, (digit, color) in enumerate(pair):
                x, y = 32 * column + 16 * half + int(rng.integers(1, 10)), 32 * row + int(rng.integers(1, 22))
                canvas.digit(digit, x, y, color, row + 1, column + 1)
            digit, color = pair[int(rng.integers(2))]
            questions += [
                ("digit_value", f"which digit is {_COLOR_NAMES[color]}?", str(digit)),
                ("digit_color", f"which color is the digit {digit}?", _COLOR_NAMES[color]),
            ]
    return questions


def _page(canvas: _Canvas, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Nine small digits; no questions, but much to read for a tower that learns to see."""
    for cell in range(9):
        row, column = divmod(cell, 3)
        x, y = 21 * column + int(rng.integers(1, 15)), 21 * row + int(rng.integers(1, 11))
        canvas.digit(int(rng.integers(10)), x, y, int(rng.integers(len(COLORS))), 1 + row // 2, 1 + column // 2)
    return []


def _draw_shape(canvas: _Canvas, kind: int, x: int, y: int, size: int, color: int, labels: tuple[int, ...]):
    right, bottom, third = x + size, y + size, size // 3
    if SHAPES[kind] == "circle":
        canvas.draw("ellipse", (x, y, right, bottom), color, labels)
    elif SHAPES[kind] == "square":
        canvas.draw("rectangle", (x, y, right, bottom), color, labels)
    elif SHAPES[kind] == "triangle":
        canvas.draw("polygon", [(x, bottom), (right, bottom), (x + size // 2, y)], color, labels)
    else:
        a, b = x + third, right - third
        c, d = y + third, bottom - third
        outline = [
            (a, y),
            (b, y),
            (b, c),
            (right, c),
            (right, d),
            (b, d),
            (b, bottom),
            (a, bottom),
            (a, d),
            (x, d),
            (x, c),
            (a, c),
        ]
        canvas.draw("polygon", outline, color, labels)


def _chart(canvas: _Canvas, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Four bars of one to nine units, six pixels each."""
    colors = rng.permutation(len(COLORS))[:4]
    tallest = int(rng.integers(4))
    values = rng.integers(1, 8, 4)
    values[tallest] = rng.integers(values.max() + 2, 10)
    questions = [("tallest_bar", "which bar is the tallest?", _COLOR_NAMES[colors[tallest]])]
    for i, (color, value) in enumerate(zip(colors, values)):
        left = 4 + 15 * i
        canvas.draw(
            "rectangle", (left, 60 - 6 * int(value), left + 10, 59), int(color), (6, 11 + int(value), 0, i + 1)
        )
        questions.append(("bar_value", f"how tall is the {_COLOR_NAMES[color]} bar?", str(value)))
    return questions


def _mosaic(canvas: _Canvas, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Five by five cells of eleven pixels, each of its own color."""
    colors = rng.integers(0, len(COLORS), (GRID, GRID))
    questions = []
    for row in range(GRID):
        for column in range(GRID):
            x, y, color = 2 + 12 * column, 2 + 12 * row, int(colors[row, column])
            canvas.draw("rectangle", (x, y, x + 10, y + 10), color, (7, 0, row + 1, column + 1))
            question = f"which color is the cell in row {row + 1}, column {column + 1}?"
            questions.append(("cell_color", question, _COLOR_NAMES[color]))
    return questions


def _dots(canvas: _Canvas, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Up to six dots of each of two colors, in random cells of a 5 x 5 grid."""
    colors = rng.permutation(len(COLORS))[:2]
    counts = rng.integers(1, 7, 2)
    radius = 3
    cells = rng.permutation(GRID * GRID)
    questions = [
        ("dot_count", f"how many {_COLOR_NAMES[color]} dots are there?", str(count))
        for color, count in zip(colors, counts)
    ]
    for i, cell in enumerate(cells[: counts.sum()]):
        x = IMAGE_SIZE * (int(cell) % GRID) // GRID + int(rng.integers(4, 9))
        y = IMAGE_SIZE * (int(cell) // GRID) // GRID + int(rng.integers(4, 9))
        color = int(colors[0] if i < counts[0] else colors[1])
        canvas.draw("ellipse", (x - radius, y - radius, x + radius, y + radius), color, (8, 0, 0, 0))
    return questions


_DRAW = {"page": _page, "poster": _poster, "chart": _chart, "mosaic": _mosaic, "dots": _dots}


def draw_scene(seed: int, index: int, scenes: dict[str, float] = SCENES) -> Scene:
    """
    Draws one image with its questions, a pure function of its arguments.

    Args:
        seed (`int`): The generator's seed.
        index (`int`): The image's number.
        scenes (`dict[str, float]`, *optional*, defaults to `SCENES`): Kinds of scene and their probabilities.

    Example:

    ```python
    >>> from tokenflex.data.synthetic import draw_scene

    >>> draw_scene(seed=0, index=0).image.size
    (64, 64)
    ```
    """
    rng = np.random.default_rng((seed, index))
    paper = tuple(PAPERS)[int(rng.integers(len(PAPERS)))]
    canvas = _Canvas(rng, paper)
    scene = rng.choice(list(scenes), p=list(scenes.values()))
    questions = _DRAW[scene](canvas, rng)
    questions.append(("paper_color", "which color is the paper?", paper))
    return Scene(canvas.image, questions, canvas.labels())


class SyntheticVQA:
    """
    Rows of `image`, `questions`, `answers` and `families`, drawn when they are asked for.

    Args:
        num_images (`int`): The number of images.
        seed (`int`): The generator's seed; other seeds give other images.
        questions_per_image (`int`, *optional*, defaults to 6):
            At most so many questions are kept of an image, chosen at random.

    Example:

    ```python
    >>> from tokenflex.data.synthetic import SyntheticVQA

    >>> sorted(SyntheticVQA(num_images=10, seed=0)[3])
    ['answers', 'families', 'image', 'questions']
    ```
    """

    def __init__(self, num_images: int, seed: int, questions_per_image: int = 6):
        self.num_images = num_images
        self.seed = seed
        self.questions_per_image = questions_per_image

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.num_images:
            raise IndexError(f"index {index} is outside the {self.num_images} images of this set")
        scene = draw_scene(self.seed, index)
        order = np.random.default_rng((self.seed, index, 1)).permutation(len(scene.questions))
        families, questions, answers = zip(*(scene.questions[i] for i in order[: self.questions_per_image]))
        return {
            "image": scene.image,
            "questions": list(questions),
            "answers": list(answers),
            "families": list(families),
        }
