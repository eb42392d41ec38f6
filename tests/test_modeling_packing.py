import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen2Config
from transformers.masking_utils import create_masks_for_generate

from tokenflex.modeling_tokenflex import create_packed_masks, packed_mask_function, packed_position_ids


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
            assert [key for key in range(query + 1) if mask(0, 0, torch.tensor(query), key)] == seen[query]


@given(packed_row(), st.sampled_from(["sdpa", "eager"]), st.integers(1, 8))
def test_masks_are_those_of_the_function_mapped_over_every_position(row, implementation, window):
    segments, samples = (torch.tensor([ids]) for ids in row)
    config = Qwen2Config(
        num_hidden_layers=2,
        layer_types=["full_attention", "sliding_attention"],
        use_sliding_window=True,
        sliding_window=window,
        attn_implementation=implementation,
    )
    inputs = {"inputs_embeds": torch.zeros(*segments.shape, 1), "attention_mask": segments >= 0}
    inputs_and_cache = (config, *inputs.values(), None)
    mapped = create_masks_for_generate(*inputs_and_cache, and_mask_function=packed_mask_function(segments, samples))
    masks = create_packed_masks(config, **inputs, segment_ids=segments, sample_ids=samples)
    for name in ("full_attention", "sliding_attention"):
        torch.testing.assert_close(masks[name], mapped[name], rtol=0, atol=0)


def test_positions_of_segments_count_on_from_the_prefix():
    segments = torch.tensor([[-1, 0, 0, 1, 1, 2], [0, 1, 2, 2, -1, -1]])
    assert packed_position_ids(segments).tolist() == [[0, 0, 1, 2, 3, 2], [0, 1, 1, 2, 0, 1]]
