import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenflex.packing_tokenflex import packed_mask_function, packed_position_ids


@st.composite
def packed_row(draw):
    """Samples, each a prefix and continuations of random lengths, and padding at the end."""
    segments, samples = [], []
    for sample in range(draw(st.integers(1, 4))):
        lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
        for segment, length in enumerate(lengths):
            segments += [segment] * length
            samples += [sample] * length
    padding = [-1] * draw(st.integers(0, 3))
    return segments + padding, samples + padding


def wanted(segments, samples):
    """Positions, and what each position sees, written down one by one."""
    positions, seen = [], []
    for query, place in enumerate(zip(samples, segments)):
        alone = [
            key
            for key in range(query + 1)
            if samples[key] == place[0] and (segments[key] == 0 or segments[key] == place[1])
        ]
        positions.append(len(alone) - 1)
        seen.append(alone)
    return positions, seen


@given(packed_row())
def test_positions_and_sight_are_those_of_each_continuation_alone(row):
    segments, samples = row
    positions, seen = wanted(segments, samples)
    tensors = torch.tensor([segments]), torch.tensor([samples])
    mask = packed_mask_function(*tensors)
    got = packed_position_ids(*tensors)[0].tolist()
    for query in range(len(segments)):
        if samples[query] >= 0:
            assert got[query] == positions[query]
            assert [key for key in range(query + 1) if mask(0, 0, query, key)] == seen[query]


def test_positions_of_segments_count_on_from_the_prefix():
    segments = torch.tensor([[-1, 0, 0, 1, 1, 2], [0, 1, 2, 2, -1, -1]])
    assert packed_position_ids(segments).tolist() == [[0, 0, 1, 2, 3, 2], [0, 1, 1, 2, 0, 1]]
