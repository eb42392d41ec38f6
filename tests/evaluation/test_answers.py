import pytest
import torch

from tokenflex.evaluation.answers import mask_answers


ANSWERS = torch.tensor([[5, 2, 0, 0], [5, 6, 7, 8], [2, 2, 2, 2], [5, 0, 3, 0]])


@pytest.mark.parametrize(
    ("ends", "lengths"), [(2, [2, 4, 1, 4]), ([2], [2, 4, 1, 4]), ([3, 2], [2, 4, 1, 3]), (None, [4, 4, 4, 4])]
)
def test_an_answer_goes_up_to_its_first_end(ends, lengths):
    mask = mask_answers(ANSWERS, ends)
    assert mask.sum(-1).tolist() == lengths
    assert all(row[:length].all() for row, length in zip(mask, lengths))
