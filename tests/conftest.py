import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402

from tokenflex.training.tiny import tiny_model_and_processor  # noqa: E402


def pytest_collection_modifyitems(config, items):
    if config.option.markexpr:
        return
    skip_slow = pytest.mark.skip(reason="trains for minutes: run with `-m slow`")
    skip_gpu = pytest.mark.skip(reason="needs a CUDA device: run with `-m gpu`")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip_slow)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip_gpu)


@pytest.fixture(scope="session")
def tiny():
    model, processor = tiny_model_and_processor()
    return model.eval(), processor
