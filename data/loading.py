"""Data sets from files, folders and the Hub, alone or mixed."""

from .arguments import DataArguments, SourceArguments
from .rows import MixedRows, RowChecker, Rows
from .sources import open_rows
from .streaming import StreamedRows


def load_rows(
    args: SourceArguments,
    processor=None,
    num_vision_tokens: int | None = None,
    seed: int = 0,
    endless: bool = False,
) -> Rows | MixedRows | StreamedRows:
    """
    Loads and checks one data set or a mixture.

    Args:
        args ([`DataArguments`] or [`SourceArguments`]): Which rows, and how.
        processor ([`TokenFlexProcessor`], *optional*):
            The model's processor, with which a row is checked to be one that can be trained on. Needed with
            `max_length`.
        num_vision_tokens (`int`, *optional*): The largest count, at which rows are measured. Defaults to the
            processor's.
        seed (`int`, *optional*, defaults to 0): The seed of synthetic images and of the order of streamed rows.
        endless (`bool`, *optional*, defaults to `False`): Let streamed rows begin anew when they end.

    Returns:
        [`Rows`], [`MixedRows`] of several data sets, or [`StreamedRows`]

    Raises:
        ValueError: If a file is missing, unreadable or of an unknown kind, or arguments do not fit each other.
        BadRowError: If a row cannot be used; the message names data set, row and reason.

    Example:

    ```python
    >>> from tokenflex.data.arguments import DataArguments
    >>> from tokenflex.data.loading import load_rows

    >>> len(load_rows(DataArguments(["synthetic:3", "synthetic:1"], dataset_weights=[0.5, 0.5])))
    6
    ```
    """
    args = DataArguments(**vars(args))  # sources alone leave the rest at its defaults
    opened = [open_rows(name, args.dataset_split, args.streaming, seed) for name in args.dataset]
    sources = [
        (rows, RowChecker(name, args, args.image_folder or folder, processor, num_vision_tokens))
        for name, (rows, folder) in zip(args.dataset, opened)
    ]
    if args.streaming:
        return StreamedRows(sources, args, seed, endless)
    parts = [Rows(rows, check) for rows, check in sources]
    return parts[0] if len(parts) == 1 and args.dataset_weights is None else MixedRows(parts, args.dataset_weights)
