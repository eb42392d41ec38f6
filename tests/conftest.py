import copy
import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from a second thread, and lose much to it where another process wants the core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
from sources import LIKE_TINY, save_source  # noqa: E402

from tokenflex.towers.adopt import adopt_model  # noqa: E402
from tokenflex.towers.tiny import tiny_model_and_processor  # noqa: E402


@pytest.fixture(scope="session")
def pristine():
    """To be copied, not used: the tokenizer takes a second to train."""
    model, processor = tiny_model_and_processor()
    return model.eval(), processor


@pytest.fixture(scope="session")
def pristine_adopted(tmp_path_factory):
    """A vision-language model of transformers that was adopted; to be copied, not used."""
    folder = save_source(LIKE_TINY, tmp_path_factory.mktemp("source"))
    counts = {"vision_token_choices": [4, 16, 36], "vision_token_weights": [0.2, 0.3, 0.5]}
    return adopt_model(folder, num_vision_tokens=36, **counts)[:2]


@pytest.fixture(scope="module", params=["built", "adopted"])
def both(request):
    """The tiny model, and one that was adopted."""
    names = {"built": "pristine", "adopted": "pristine_adopted"}
    return copy.deepcopy(request.getfixturevalue(names[request.param]))


@pytest.fixture(scope="module")
def tiny(pristine):
    return copy.deepcopy(pristine)


@pytest.fixture(scope="module")
def narrow():
    """The tiny model at a quarter of its width, where what it answers does not matter."""
    model, processor = tiny_model_and_processor(width=32)
    return model.eval(), processor
