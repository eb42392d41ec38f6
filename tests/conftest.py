import copy
import os


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models gain nothing from a second thread, and lose much to it where another process wants the core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from sources import LIKE_TINY, save_source  # noqa: E402
from transformers import Siglip2VisionConfig, SiglipImageProcessorPil  # noqa: E402

from tokenflex import TokenFlexConfig, TokenFlexForConditionalGeneration, TokenFlexProcessor  # noqa: E402
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


@pytest.fixture(scope="session")
def pristine_naflex(pristine):
    """The tiny model behind a tower that sees images in their own shapes; to be copied, not used."""
    config, processor = copy.deepcopy(pristine[0].config), copy.deepcopy(pristine[1])
    own = {name: getattr(config.vision_config, name) for name in ("hidden_size", "intermediate_size", "patch_size")}
    tower = Siglip2VisionConfig(**own, num_hidden_layers=3, num_attention_heads=4, num_patches=64)
    config = TokenFlexConfig(**{**config.to_dict(), "vision_config": tower})
    torch.manual_seed(0)
    model = TokenFlexForConditionalGeneration(config)
    model.generation_config = copy.deepcopy(pristine[0].generation_config)
    side = config.image_size[0]
    image_processor = SiglipImageProcessorPil(size={"height": side, "width": side})
    options = {
        "patch_size": processor.patch_size,
        "match_aspect_ratio": True,
        "max_num_patches": 64,
        "chat_template": processor.chat_template,
    }
    processor = TokenFlexProcessor(image_processor, processor.tokenizer, config.num_vision_tokens, **options)
    return model.eval(), processor


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
