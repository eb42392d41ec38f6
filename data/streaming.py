"""Rows read one after the other, for data sets that are too large to be checked or held first."""

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial

import datasets
import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers.utils import logging

from .arguments import DataArguments, check_weights
from .cells import BadRowError
from .examples import Example
from .rows import RowChecker, keep_encoded


logger = logging.get_logger(__name__)


class StreamedRows(IterableDataset):
    """
    Rows of one or several sources, each checked as it comes. An epoch is a pure function of seed, epoch and the number
    of data loader workers, which divide the rows of each source among them.

    Without weights the sources come one after the other. With weights every row's source is drawn; a source that ends
    begins anew, until each has ended once.

    Args:
        sources (`Sequence[tuple[datasets.IterableDataset | Sequence[dict], RowChecker]]`):
            Rows and what checks them. Every worker reads the whole of a `datasets.IterableDataset` to find its rows.
        args ([`DataArguments`]): The sources' weights, if they have any, and from how many rows the next one is drawn.
        seed (`int`, *optional*, defaults to 0): The seed of the order and of the mixture.
        endless (`bool`, *optional*, defaults to `False`):
            Let the next epoch follow the last, as training needs it: a `Trainer` finds its place in a stream
            again by the number of rows it has read.

    Example:

    ```python
    >>> from tokenflex.data.arguments import DataArguments
    >>> from tokenflex.data.rows import RowChecker
    >>> from tokenflex.data.streaming import StreamedRows
    >>> from tokenflex.data.synthetic import SyntheticVQA

    >>> args = DataArguments(["synthetic:3"])
    >>> rows = StreamedRows([(SyntheticVQA(num_images=3, seed=0), RowChecker("synthetic:3", args))], args)
    >>> len(list(rows))
    3
    ```
    """

    def __init__(
        self,
        sources: Sequence[tuple[datasets.IterableDataset | Sequence[dict], RowChecker]],
        args: DataArguments,
        seed: int = 0,
        endless: bool = False,
    ):
        self.sources = [
            (keep_encoded(rows) if isinstance(rows, datasets.IterableDataset) else rows, check)
            for rows, check in sources
        ]
        self.args = args
        self.seed = seed
        self.endless = endless
        self._epoch = torch.tensor(0).share_memory_()  # persistent workers are to see what the Trainer sets

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which has an order of its own."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Example]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        skipped = 0
        for epoch in itertools.count(int(self._epoch)):
            seed = (self.seed, epoch, worker)
            passes = [partial(self._pass, place, worker, num_workers, seed) for place in range(len(self.sources))]
            usable = False
            examples = self._one_by_one(passes) if self.args.dataset_weights is None else self._mixed(passes, seed)
            for example in examples:
                if example is None:
                    skipped += 1
                else:
                    yield replace(example, skipped=skipped)
                    skipped, usable = 0, True
            if not self.endless:
                return
            if not usable:
                raise BadRowError(
                    f"No rows are usable for worker {worker} of {num_workers}: use fewer `dataloader_num_workers`."
                )

    def _pass(
        self, place: int, worker: int, num_workers: int, seed: tuple[int, ...], number: int
    ) -> Iterator[Example | None]:
        """One time through this worker's rows of a source, with `None` for each row that is to be skipped."""
        rows, check = self.sources[place]
        usable = False
        reads = _reads(rows, check.source, worker, num_workers)
        for index, read in _shuffled(reads, self.args.shuffle_buffer, np.random.default_rng((*seed, place, number))):
            example = check(index, read)
            usable = usable or example is not None
            yield example
        if not usable:
            if num_workers == 1:
                raise BadRowError(f"{check.source} has no usable rows.")
            logger.warning(f"{check.source} has no usable rows for worker {worker} of {num_workers}.")

    @staticmethod
    def _one_by_one(passes: Sequence[Callable]) -> Iterator[Example | None]:
        for begin in passes:
            yield from begin(0)

    def _mixed(self, passes: Sequence[Callable], seed: tuple[int, ...]) -> Iterator[Example | None]:
        """Draws each row's source. What a source yields up to and with its next usable row counts as one row."""
        draws = np.random.default_rng(seed)
        weights = np.array(check_weights(self.args.dataset_weights, len(passes)), dtype=float)
        running = [begin(0) for begin in passes]
        numbers = [0] * len(passes)
        unended = set(range(len(passes)))
        while True:
            place = int(draws.choice(len(passes), p=weights / weights.sum()))
            if (yield from _up_to_usable(running[place])):
                continue
            unended.discard(place)
            if not unended:
                return
            numbers[place] += 1
            running[place] = passes[place](numbers[place])
            if not (yield from _up_to_usable(running[place])):
                weights[place] = 0


def _up_to_usable(examples: Iterator[Example | None]) -> Generator[Example | None, None, bool]:
    """Yields up to and with the next usable row, and returns whether there is one."""
    for example in examples:
        yield example
        if example is not None:
            return True
    return False


def _reads(rows, source: str, worker: int, num_workers: int) -> Iterator[tuple[int, Callable[[], dict]]]:
    """The number of each of a worker's rows and what reads it."""
    if not isinstance(rows, datasets.IterableDataset):
        for index in range(worker, len(rows), num_workers):
            yield index, partial(rows.__getitem__, index)
        return
    index = 0
    try:
        # Unlike `iter(rows)`, batches are not divided among workers by files, of which there may be too few.
        for batch in rows.iter(batch_size=32):
            for values in zip(*batch.values()):
                if index % num_workers == worker:
                    yield index, partial(dict, zip(batch, values))
                index += 1
    except Exception as error:  # each file format's reader raises its own
        raise ValueError(f"{source} cannot be read from row {index} on: {error.__cause__ or error!r}") from error


def _shuffled(rows: Iterator, buffer_size: int, rng: np.random.Generator) -> Iterator:
    buffer = []
    for row in rows:
        if len(buffer) < buffer_size:
            buffer.append(row)
        elif not buffer_size:
            yield row
        else:
            place = rng.integers(buffer_size)
            yield buffer[place]
            buffer[place] = row
    for place in rng.permutation(len(buffer)):
        yield buffer[place]
