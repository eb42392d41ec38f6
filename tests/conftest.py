import copy
import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from a second thread, and lose much to it where another process wants the core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

from tokenflex.towers.tiny import tiny_model_and_processor  # noqa: E402


@pytest.fixture(scope="session")
def pristine():
    """To be copied, not used: the tokenizer takes a second to train."""
    model, processor = tiny_model_and_processor()
    return model.eval(), processor


@pytest.fixture(scope="module")
def tiny(pristine):
    return copy.deepcopy(pristine)


@pytest.fixture(scope="module")
def narrow():
    """The tiny model at a quarter of its width, where what it answers does not matter."""
    model, processor = tiny_model_and_processor(width=32)
    return model.eval(), processor
