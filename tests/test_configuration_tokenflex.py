import json

import pytest
import torch
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    IJepaConfig,
    InternVLVisionConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from tokenflex import TokenFlexConfig, TokenFlexForConditionalGeneration


def test_defaults_are_the_papers():
    config = TokenFlexConfig()
    assert config.patch_grid == (27, 27)
    assert config.vision_token_choices == [64, 144, 256]
    assert config.vision_token_weights == [0.2, 0.3, 0.5]
    assert (config.vision_config.hidden_size, config.text_config.hidden_size) == (1152, 3584)


def test_towers_are_adjusted_to_what_the_model_needs():
    config = TokenFlexConfig(
        vision_config=SiglipVisionConfig(image_size=384, patch_size=16, vision_use_head=True),
        text_config=Qwen2Config(hidden_size=64, tie_word_embeddings=True),
    )
    assert not config.vision_config.vision_use_head
    assert config.tie_word_embeddings
    assert config.patch_grid == (24, 24)
    assert config.projector_hidden_size == 64


@pytest.mark.parametrize("top", [None, True, False])
@pytest.mark.parametrize("text", [True, False])
def test_the_top_level_says_if_the_head_is_tied_else_the_text_config(tmp_path, top, text):
    text_config = Qwen2Config(hidden_size=64, tie_word_embeddings=text)
    said = {} if top is None else {"tie_word_embeddings": top}
    made = TokenFlexConfig(text_config=text_config, **said)
    assert text_config.tie_word_embeddings == text, "the caller's is left alone"
    made.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written["text_config"]["tie_word_embeddings"] = text  # as another program may have written it
    written |= {"tie_word_embeddings": top}
    (tmp_path / "config.json").write_text(json.dumps(written))
    for config in (made, AutoConfig.from_pretrained(tmp_path)):
        assert (config.tie_word_embeddings, config.text_config.tie_word_embeddings) == (top if said else text,) * 2


def test_a_checkpoint_of_another_type_is_refused(tmp_path):
    Qwen2Config(hidden_size=64).save_pretrained(tmp_path)
    for load in (TokenFlexConfig.from_pretrained, TokenFlexForConditionalGeneration.from_pretrained):
        with pytest.raises(ValueError, match="The checkpoint is of type 'qwen2', not 'tokenflex'"):
            load(tmp_path)


def test_saving_keeps_everything(tmp_path):
    config = TokenFlexConfig(
        vision_token_choices=[16, 49], vision_token_weights=[1, 2], num_vision_tokens=49, projector_hidden_size=77
    )
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_dict() == {**config.to_dict(), "_name_or_path": str(tmp_path)} or (
        AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_vision_tokens": 65}, "`num_vision_tokens`=65.*Nearest: 64 or 81"),
        (
            {"vision_token_choices": [64, 1024], "vision_token_weights": [1, 1]},
            r"vision_token_choices\[1\]`=1024.*Nearest: 729",
        ),
        ({"vision_token_choices": [], "vision_token_weights": []}, "`vision_token_choices` is empty"),
        ({"vision_token_choices": [64]}, r"`vision_token_choices`=\[64\].*give both"),
        ({"vision_token_choices": [64, 144], "vision_token_weights": [1.0]}, "1 entries for 2"),
        ({"vision_token_choices": [64, 144], "vision_token_weights": [0.0, 0]}, "not all zero"),
        ({"vision_token_choices": [64, 144], "vision_token_weights": [1, -0.2]}, "not negative"),
        ({"vision_token_choices": [64, 144], "vision_token_weights": [1, float("nan")]}, "finite"),
    ],
)
def test_counts_and_weights_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenFlexConfig(**arguments)


def test_a_towers_config_is_left_as_it_was():
    vision_config = SiglipVisionConfig(image_size=384, patch_size=16)
    before = vision_config.to_dict()
    assert not TokenFlexConfig(vision_config=vision_config).vision_config.vision_use_head
    assert vision_config.to_dict() == before


def test_full_size_model_has_the_right_shapes_and_size():
    with torch.device("meta"):
        model = TokenFlexForConditionalGeneration(TokenFlexConfig())
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.model.named_children()}
    # Qwen2.5-7B's model card: 7.61 billion parameters, 6.53 billion of them outside the embeddings.
    language_model = count["language_model"] + model.lm_head.weight.numel()
    assert language_model == 7_615_616_512
    attention, mlp, norms = 4 * (1152 * 1152 + 1152), 2 * 1152 * 4304 + 4304 + 1152, 4 * 1152
    patches = 14 * 14 * 3 * 1152 + 1152 + 729 * 1152
    assert count["vision_tower"] == 27 * (attention + mlp + norms) + patches + 2 * 1152
    assert count["multi_modal_projector"] == 2 * 1152 * 3584 + 3584 * 3584
    for tokens in (64, 144, 256):
        features = model.get_image_features(torch.empty(2, 3, 384, 384, device="meta"), num_vision_tokens=tokens)
        assert features.pooler_output.shape == (2, tokens, 3584)
        assert features.last_hidden_state.shape == (2, 729, 1152)


@pytest.mark.parametrize(
    ("vision_config", "prefix_tokens"),
    [
        (SiglipVisionConfig(), 0),
        (CLIPVisionConfig(), 1),
        (Dinov2Config(image_size=224), 1),
        (Dinov2WithRegistersConfig(image_size=224, num_register_tokens=4), 5),
        (InternVLVisionConfig(), 1),
    ],
)
def test_class_tokens_and_registers_are_counted_by_rule(vision_config, prefix_tokens):
    counts = {"num_vision_tokens": 49, "vision_token_choices": [49], "vision_token_weights": [1.0]}
    assert TokenFlexConfig(vision_config=vision_config, **counts).num_prefix_tokens == prefix_tokens
    with pytest.raises(ValueError, match=f"`num_prefix_tokens`=7 .* it has {prefix_tokens}"):
        TokenFlexConfig(vision_config=vision_config, num_prefix_tokens=7, **counts)


def test_an_unknown_tower_must_say_its_prefix():
    vision_config = IJepaConfig(image_size=224, patch_size=14)
    with pytest.raises(
        ValueError, match="'ijepa': say how many class tokens and registers it has. Known towers: clip"
    ):
        TokenFlexConfig(vision_config=vision_config)
    assert TokenFlexConfig(vision_config=vision_config, num_prefix_tokens=0).num_prefix_tokens == 0
