"""Choices of vision tokens: the arithmetic of counts, grids and the resolutions that images are seen at."""

import functools
import math
import operator
from collections.abc import Sequence


NAMED_COUNTS = ("low", "high", "auto")


def split_choice(choice, image_size: int | tuple[int, int] | None = None, name: str = "num_vision_tokens"):
    """
    Splits what was asked for into a count or grid and the resolution at which the vision tower is to see the image.

    Args:
        choice (`int`, `tuple[int, int]` or `str`):
            A count, a grid (rows, columns), or a text of either with a resolution in pixels: `"64@224"`,
            `"8x12@224x336"`.
        image_size (`int` or `tuple[int, int]`, *optional*):
            A resolution, square or (height, width), for a choice that names none.
        name (`str`, *optional*, defaults to `"num_vision_tokens"`):
            The argument to name in errors.

    Returns:
        `tuple`: The count or grid, and (height, width) or `None` where no resolution is asked for.

    Raises:
        ValueError: If a text is no such choice, or `image_size` is no size or not the one that `choice` names.

    Example:

    ```python
    >>> from tokenflex.choices_tokenflex import split_choice

    >>> split_choice("64@224"), split_choice((8, 12)), split_choice(64, image_size=336)
    ((64, (224, 224)), ((8, 12), None), (64, (336, 336)))
    ```
    """
    asked = None if image_size is None else as_pair(image_size)
    if asked is not None and (len(asked) != 2 or any(type(side) is not int or side < 1 for side in asked)):
        raise ValueError(f"`image_size`={image_size!r}: give pixels, one number or (height, width).")
    if not isinstance(choice, str):
        return choice, asked
    count, _, size = (text.split("x") for text in choice.partition("@"))
    if not all(len(sides) < 3 and all(map(str.isdecimal, sides)) for sides in (count, size)):
        raise ValueError(
            f"`{name}`={choice!r}: give a number, a tuple (rows, columns), a text with a resolution such as "
            f"'64@224', or one of {', '.join(NAMED_COUNTS)}."
        )
    resolution = int(size[0]), int(size[-1])
    if asked not in (None, resolution):
        raise ValueError(f"`{name}`={choice!r} and `image_size`={image_size!r} disagree: leave one of them out.")
    return (int(count[0]), int(count[1])) if len(count) == 2 else int(count[0]), resolution


def parse_choice(text: int | str) -> int | str:
    """
    Reads a choice as a command line or a recipe writes it: `"64"` is a count, `"64@224"` stays a text.

    Args:
        text (`int` or `str`): A count, or a count with a resolution.
    """
    return int(text) if str(text).isdecimal() else text


def count_tokens(choice: int | tuple[int, int] | str) -> int:
    """
    Counts the vision tokens of a choice, whatever its resolution.

    Args:
        choice (`int`, `tuple[int, int]` or `str`): A count or grid, also with a resolution.
    """
    count, _ = split_choice(choice)
    return math.prod(count) if isinstance(count, tuple) else count


def sort_choices(choices: Sequence[int | str]) -> list[int | str]:
    """
    Sorts choices by their number of tokens, and those of one number by their resolution; the tower's own is the
    largest.

    Args:
        choices (`Sequence[int | str]`): The config's `vision_token_choices`.

    Example:

    ```python
    >>> from tokenflex.choices_tokenflex import sort_choices

    >>> sort_choices([256, 64, "144@336", "64@224"])
    ['64@224', 64, '144@336', 256]
    ```
    """
    return sorted(choices, key=lambda choice: (count_tokens(choice), math.prod(split_choice(choice)[1] or [math.inf])))


def resolve_named_count(num_vision_tokens, choices: Sequence[int | str]):
    """
    Replaces `"low"` and `"high"` by the smallest and the largest choice that was trained; all else stays as it is.

    Args:
        num_vision_tokens (`int`, `tuple[int, int]`, `str` or a list, *optional*): A count, grid, name or list.
        choices (`Sequence[int | str]`): The config's `vision_token_choices`.
    """
    if num_vision_tokens not in ("low", "high"):
        return num_vision_tokens
    return sort_choices(choices)[0 if num_vision_tokens == "low" else -1]


def follow_shape(
    shape: tuple[int, int], num_patches: int, image_size: tuple[int, int], patch_size: tuple[int, int]
) -> tuple[int, int]:
    """
    The largest resolution of a shape that has no more than some patches, as NaFlex towers see images.

    Args:
        shape (`tuple[int, int]`): (height, width) in any unit.
        num_patches (`int`): The most patches.
        image_size (`tuple[int, int]`): (height, width) in pixels that no resolution goes beyond.
        patch_size (`tuple[int, int]`): (height, width) of a patch, or of the blocks of patches that make one feature.

    Example:

    ```python
    >>> from tokenflex.choices_tokenflex import follow_shape

    >>> follow_shape((720, 1280), num_patches=256, image_size=(512, 512), patch_size=(16, 16))
    (192, 336)
    ```
    """
    height, width = shape
    patches = math.isqrt(num_patches * height // width), math.isqrt(num_patches * width // height)
    return tuple(min(max(n, 1) * patch, side) for n, patch, side in zip(patches, patch_size, image_size))


def resolve_patch_grid(
    resolution: tuple[int, int], image_size: tuple[int, int], patch_size: tuple[int, int], asked: str | None = None
) -> tuple[int, int]:
    """
    The patch grid of an image that is shrunk to a resolution.

    Args:
        resolution (`tuple[int, int]`): (height, width) in pixels.
        image_size (`tuple[int, int]`): (height, width) of the vision tower's own images.
        patch_size (`tuple[int, int]`): (height, width) of a patch, or of the blocks of patches that make one feature.
        asked (`str`, *optional*): The argument and its value, for errors. Defaults to `image_size`.

    Raises:
        ValueError: If a side is no multiple of the patch, or larger than the tower's own.
    """
    sides = list(zip(resolution, image_size, patch_size))
    if resolution != image_size and not all(0 < side <= own and side % patch == 0 for side, own, patch in sides):
        nearest = [own if side >= own else max(round(side / patch), 1) * patch for side, own, patch in sides]
        raise ValueError(
            f"{asked or f'`image_size`={format_size(resolution)}'}: an image is seen at {format_size(image_size)} "
            f"pixels, the largest size, or shrunk to multiples of the patch ({format_size(patch_size)}). Nearest: "
            f"{format_size(nearest)}."
        )
    return tuple(side // patch for side, _, patch in sides)


def resolve_vision_token_grid(
    num_vision_tokens: int | tuple[int, int], patch_grid: tuple[int, int], name: str = "num_vision_tokens"
) -> tuple[int, int]:
    """
    Maps a vision-token count to the grid that the patch grid is pooled to. Nothing is rounded: a count that the rule
    does not allow is refused.

    Args:
        num_vision_tokens (`int` or `tuple[int, int]`):
            The number of vision tokens of one image, a square `n * n` with `n` at most the shorter side of
            `patch_grid`; or the grid itself as `(rows, columns)`, each side within `patch_grid`.
        patch_grid (`tuple[int, int]`): Rows and columns of the vision tower's patch grid.
        name (`str`, *optional*, defaults to `"num_vision_tokens"`):
            The argument to name in errors.

    Returns:
        `tuple[int, int]`: The grid as (rows, columns).

    Raises:
        ValueError: If the count is not an integer, not a square, smaller than 1 or larger than the patch grid. The
            message names the nearest counts that are allowed.

    Example:

    ```python
    >>> from tokenflex import resolve_vision_token_grid

    >>> resolve_vision_token_grid(144, patch_grid=(27, 27))
    (12, 12)
    ```
    """
    max_rows, max_columns = patch_grid
    if isinstance(num_vision_tokens, tuple):
        try:
            rows, columns = (_as_integer(side) for side in num_vision_tokens)
        except (TypeError, ValueError):
            rows = columns = 0
        if not (1 <= rows <= max_rows and 1 <= columns <= max_columns):
            raise ValueError(
                f"`{name}`={num_vision_tokens!r}: a grid is (rows, columns), two integers from (1, 1) to the patch "
                f"grid ({max_rows}, {max_columns})."
            )
        return rows, columns

    max_side = min(patch_grid)
    try:
        count = _as_integer(num_vision_tokens)
    except TypeError:
        raise ValueError(
            f"`{name}`={num_vision_tokens!r} ({type(num_vision_tokens).__name__}): a vision-token count is an integer "
            f"n*n with n from 1 to {max_side}, or a tuple (rows, columns)."
        ) from None
    side = math.isqrt(max(count, 0))
    if count < 1 or side * side != count or side > max_side:
        lower = min(max(side, 1), max_side)
        nearest = sorted({lower**2, min(lower + 1, max_side) ** 2}, key=lambda allowed: abs(allowed - count))
        nearest = " or ".join(map(str, sorted(nearest if 1 < count < max_side**2 else nearest[:1])))
        raise ValueError(
            f"`{name}`={count}: a vision-token count is a square n*n with n from 1 to {max_side} (the patch grid is "
            f"{max_rows} x {max_columns}), or a tuple (rows, columns). Nearest: {nearest}."
        )
    return side, side


def match_vision_token_grid(
    num_vision_tokens: int, image_size: tuple[int, int], patch_grid: tuple[int, int], name: str = "num_vision_tokens"
) -> tuple[int, int]:
    """
    The grid of at most `num_vision_tokens` tokens that is nearest to an image's shape. Near is measured against the
    ideal grid, which has exactly that many tokens and exactly that shape: the sum of both sides' ratios to it, as
    logarithms. A square image gets the square grid.

    Args:
        num_vision_tokens (`int`):
            The most tokens to use, from 1 to the number of patches; it need not be a square.
        image_size (`tuple[int, int]`):
            (height, width) of the image in pixels.
        patch_grid (`tuple[int, int]`): Rows and columns of the vision tower's patch grid.
        name (`str`, *optional*, defaults to `"num_vision_tokens"`):
            The argument to name in errors.

    Returns:
        `tuple[int, int]`: The grid as (rows, columns).

    Raises:
        ValueError: If the count is not an integer from 1 to the number of patches.

    Example:

    ```python
    >>> from tokenflex import match_vision_token_grid

    >>> match_vision_token_grid(144, image_size=(720, 1280), patch_grid=(27, 27))
    (9, 16)
    ```
    """
    max_rows, max_columns = patch_grid
    try:
        count = _as_integer(num_vision_tokens)
    except TypeError:
        count = 0
    if not 1 <= count <= max_rows * max_columns:
        raise ValueError(
            f"`{name}`={num_vision_tokens!r}: with `match_aspect_ratio`, a vision-token count is an integer from 1 to "
            f"{max_rows * max_columns} (the patch grid is {max_rows} x {max_columns})."
        )
    return _nearest_grid(count, *image_size, max_rows, max_columns)


@functools.lru_cache(maxsize=4096)
def _nearest_grid(count: int, height: int, width: int, max_rows: int, max_columns: int) -> tuple[int, int]:
    ideal_rows, ideal_columns = math.sqrt(count * height / width), math.sqrt(count * width / height)
    # For each number of rows only the two integers around the ideal number of columns can be nearest.
    candidates = {
        (rows, max(1, min(columns, count // rows, max_columns)))
        for rows in range(1, min(max_rows, count) + 1)
        for columns in (math.floor(ideal_columns), math.ceil(ideal_columns))
    }
    return min(
        sorted(candidates),
        key=lambda grid: abs(math.log(grid[0] / ideal_rows)) + abs(math.log(grid[1] / ideal_columns)),
    )


def resolve_vision_tokens(
    num_vision_tokens: int | tuple[int, int] | str | Sequence[int | tuple[int, int] | str],
    num_images: int,
    config,
    name: str = "num_vision_tokens",
    image_size: int | tuple[int, int] | None = None,
    image_shapes: Sequence[tuple[int, int]] | None = None,
    num_tiles: Sequence[int] | None = None,
) -> tuple[list[tuple[int, int]], list[tuple[int, int] | None]]:
    """
    Maps one choice for all images, or a list with one per image, to a grid and a resolution for each image.

    Args:
        num_vision_tokens (`int`, `tuple[int, int]`, `str` or a list of these):
            A count, a `(rows, columns)` tuple or one of them with a resolution, such as `"64@224"`, holds for all
            images; a list has one entry per image.
        num_images (`int`):
            The number of images that the vision tower sees: tiles count one by one.
        config ([`TokenFlexConfig`] or [`TokenFlexProcessor`]):
            The model's or the processor's.
        name (`str`, *optional*, defaults to `"num_vision_tokens"`):
            The argument to name in errors.
        image_size (`int` or `tuple[int, int]`, *optional*):
            The resolution for all images.
        image_shapes (sequence of `tuple[int, int]`, *optional*):
            (height, width) of each image: an integer count is then matched to the image's shape
            ([`match_vision_token_grid`]) in place of a square, and with a NaFlex tower the resolution as well.
        num_tiles (sequence of `int`, *optional*):
            Number of tiles of each image. A list of counts may then have one entry per image or one per tile.

    Returns:
        `tuple[list[tuple[int, int]], list[tuple[int, int] | None]]`: One (rows, columns) per image, and its (height,
        width) in pixels, `None` where no resolution is asked for.

    Raises:
        ValueError: If an entry is not allowed (see [`resolve_vision_token_grid`], [`split_choice`] and
            [`resolve_patch_grid`]), or a list has another length than `num_images`.

    Example:

    ```python
    >>> from tokenflex import TokenFlexConfig, resolve_vision_tokens

    >>> resolve_vision_tokens([256, "64@224"], num_images=2, config=TokenFlexConfig())
    ([(16, 16), (8, 8)], [None, (224, 224)])
    ```
    """
    if not isinstance(num_vision_tokens, list):
        choices, names = [num_vision_tokens] * num_images, [name] * num_images
    else:
        choices, names = num_vision_tokens, [f"{name}[{i}]" for i in range(len(num_vision_tokens))]
        if num_tiles is not None and len(choices) == len(num_tiles):
            choices = [choice for choice, tiles in zip(choices, num_tiles) for _ in range(tiles)]
            names = [entry for entry, tiles in zip(names, num_tiles) for _ in range(tiles)]
    if len(choices) != num_images:
        in_tiles = f" cut into {num_images} tiles" if num_tiles is not None else ""
        raise ValueError(
            f"`{name}` lists {len(num_vision_tokens)} counts for {len(num_tiles or range(num_images))} "
            f"images{in_tiles}: give one count per image in order of appearance, or a single integer for all of them."
        )
    if image_shapes is not None and len(image_shapes) != num_images:
        raise ValueError(f"`image_shapes` holds {len(image_shapes)} sizes for {num_images} images: give one each.")
    grids, resolutions = [], []
    for i, (choice, entry) in enumerate(zip(choices, names)):
        count, resolution = split_choice(choice, image_size, entry)
        patch_grid, shape = config.patch_grid, None if image_shapes is None else tuple(image_shapes[i])
        if resolution is not None:
            asked = f"`{entry}`={choice!r}" if isinstance(choice, str) else None
            patch_grid = config.patch_grid_at(resolution, asked)
        if shape is None or isinstance(count, tuple):
            grid = resolve_vision_token_grid(count, patch_grid, entry)
        else:
            grid = match_vision_token_grid(count, shape, patch_grid, entry)
        if resolution is None and shape is not None and config.max_num_patches is not None:
            most = max(config.max_num_patches, math.prod(grid))
            resolution = follow_shape(shape, most, config.image_size, config.block_size)
            patch_grid = config.patch_grid_at(resolution)
            if isinstance(count, tuple):
                resolve_vision_token_grid(count, patch_grid, entry)
            grid = tuple(map(min, grid, patch_grid))
        grids.append(grid)
        resolutions.append(resolution)
    return grids, resolutions


def check_vision_token_weights(choices: Sequence[int], weights: Sequence[float]) -> None:
    """
    Checks that there is one finite, non-negative weight per count, not all of them zero.

    Raises:
        ValueError: If that does not hold; the message names both lists.
    """
    if len(choices) != len(weights):
        raise ValueError(
            f"`vision_token_weights` has {len(weights)} entries for {len(choices)} `vision_token_choices` "
            f"({list(weights)} for {list(choices)}): give one weight per choice."
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or sum(weights) <= 0:
        raise ValueError(
            f"`vision_token_weights`={list(weights)}: weights are finite, not negative and not all zero, such as "
            "[0.2, 0.3, 0.5]."
        )


def _as_integer(value) -> int:
    if isinstance(value, bool):
        raise TypeError("a bool is not a count")
    return operator.index(value)


def format_size(size: Sequence[int]) -> str:
    """Writes (height, width) in pixels as choices do: `"224"` where it is square, else `"224x336"`."""
    return "x".join(map(str, size if size[0] != size[1] else size[:1]))


def as_pair(value) -> tuple[int, int]:
    """Doubles a single value; a pair stays one."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value, value)
