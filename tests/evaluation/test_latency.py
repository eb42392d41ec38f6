import pytest

from tokenflex.evaluation.latency import time_to_first_token
from tokenflex.training.synthetic import SyntheticVQA
from tokenflex.training.tiny import tiny_model_and_processor


@pytest.fixture(scope="module")
def narrow():
    model, processor = tiny_model_and_processor(width=32)
    return model.eval(), processor


def test_every_count_is_timed_as_often_and_in_turn_at_its_own_length(narrow):
    model, processor = narrow
    ran = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: ran.append((kwargs["input_ids"] == model.config.image_token_id).sum(-1).tolist()),
        with_kwargs=True,
    )
    images = [row["image"] for row in SyntheticVQA(3, 0)]
    times = time_to_first_token(model, processor, images, "which color?", [4, 36, 16], repeats=2)
    handle.remove()
    assert list(times) == [4, 36, 16] and all(value > 0 for value in times.values())
    assert ran == [[4] * 3, [36] * 3, [16] * 3] * 3
