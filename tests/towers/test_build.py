import json
import logging
import math

import numpy as np
import pytest
import torch
import transformers
from helpers import write_gguf
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GgufConfig,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

import tokenflex.towers.build
from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.checkpoints.provenance import read_provenance, untrained_tokens
from tokenflex.cli import main
from tokenflex.towers.build import build_from_towers, default_vision_tokens, largest_shard
from tokenflex.vision_tokenflex import cut_patches


TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**TINY, "image_size": 28, "patch_size": 4}
TEXT = {**TINY, "vocab_size": 300, "num_key_value_heads": 2, "max_position_embeddings": 256}
SQUARE = {"image_size": [28, 28], "patch_size": [4, 4]}
ROWS = 300  # of the language models' embeddings; the tokenizers have 283 tokens
PAD = "<|endoftext|>"  # the Qwen2 tokenizer adds it where it is missing


def composite(config_class, text_type="qwen2", **vision):
    text = {"model_type": text_type, **TEXT}
    return getattr(transformers, config_class)(vision_config={**VISION, **vision}, text_config=text, image_token_id=5)


# Model class, configuration, where the tower is in it, its class tokens and registers.
TOWERS = {
    "siglip": ("SiglipVisionModel", {}, "", 0),
    "siglip-whole": ("SiglipModel", composite("SiglipConfig"), "vision_model", 0),
    "clip": ("CLIPVisionModel", {}, "", 1),
    "clip-whole": ("CLIPModel", composite("CLIPConfig"), "vision_model", 1),
    "clip-projected": ("CLIPVisionModelWithProjection", {}, "vision_model", 1),
    "dinov2": ("Dinov2Model", {}, "", 1),
    "dinov2-classifier": ("Dinov2ForImageClassification", {}, "dinov2", 1),
    "dinov2-registers": ("Dinov2WithRegistersModel", {"num_register_tokens": 3}, "", 4),
    "internvit": ("InternVLVisionModel", SQUARE, "", 1),
    "internvl": ("InternVLForConditionalGeneration", composite("InternVLConfig", **SQUARE), "model.vision_tower", 1),
    "llava": (
        "LlavaForConditionalGeneration",
        composite("LlavaConfig", model_type="clip_vision_model"),
        "model.vision_tower",
        1,
    ),
}
LANGUAGE_MODELS = {
    "qwen2": {},
    "qwen2-tied": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},  # as SmolLM
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 0.5},
    "gemma3_text": {"head_dim": 16},
}
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
LIST_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}"
)
TEMPLATES = {"trimmed": LLAMA_TEMPLATE, "lists": LIST_TEMPLATE}
CHAT = [
    {"role": "system", "content": "  be brief "},
    {"role": "user", "content": "which color?\n"},
    {"role": "assistant", "content": "red"},
    {"role": "user", "content": "and <|image_pad| what 日本?"},
]


def make_tokenizer(special=(), template=LLAMA_TEMPLATE, adds_bos=True, **tokens):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=283,
        special_tokens=[PAD, "<s>", "</s>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["which color is the shape? the paper is red, the ring is blue"] * 4, trainer)
    if adds_bos:
        tokenizer.post_processor = transformers.tokenization_utils_tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": PAD, **tokens}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)
    tokenizer.chat_template = template
    return tokenizer


def randomized(model):
    """Whatever transformers leaves at zero or one (class tokens, norms, positions) gets values of its own."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """Saves a tower or language model once, by name and dtype, and returns its folder."""
    folders = {}

    def save_tower(name, dtype):
        class_name, config, _, _ = TOWERS[name]
        model_class = getattr(transformers, class_name)
        if isinstance(config, dict):
            config = model_class.config_class(**{**VISION, **config})
        return model_class(config)

    def save_language_model(name, dtype):
        config = AutoConfig.for_model(name.removesuffix("-tied"), **{**TEXT, **LANGUAGE_MODELS[name]})
        return AutoModelForCausalLM.from_config(config)

    def get(name, dtype=torch.float32):
        if (name, dtype) not in folders:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(len(folders))
            model = (save_tower if name in TOWERS else save_language_model)(name, dtype)
            randomized(model).to(dtype).save_pretrained(folder)
            if name in LANGUAGE_MODELS:
                make_tokenizer().save_pretrained(folder)
            folders[name, dtype] = str(folder)
        return folders[name, dtype]

    return get


def source_tower(folder, name):
    """The source's own tower, as transformers loads it."""
    class_name, _, path, _ = TOWERS[name]
    model = getattr(transformers, class_name).from_pretrained(folder, dtype="auto")
    return model.get_submodule(path).eval()


def round_trip(model, processor, folder):
    save_checkpoint(folder, model, processor)
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def images(count=1, size=(28, 28)):
    pixels = np.random.default_rng(0).integers(0, 256, (count, *size, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in pixels]


def assert_equal_parts(part, source, unused=()):
    own, wanted = part.state_dict(), source.state_dict()
    assert {key for key in wanted if key not in own and not key.startswith(unused)} == set()
    assert set(own) <= set(wanted)
    for key, tensor in own.items():
        assert tensor.dtype == wanted[key].dtype and torch.equal(tensor, wanted[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TOWERS)
def test_towers_keep_their_weights_and_features(save, tmp_path, name, dtype):
    tower_folder, text_folder = save(name, dtype), save("qwen2", dtype)
    model, processor = round_trip(*build_from_towers(tower_folder, text_folder), tmp_path / "built")
    tower, language_model = source_tower(tower_folder, name), AutoModelForCausalLM.from_pretrained(text_folder)
    assert_equal_parts(model.model.vision_tower, tower, unused=("head.", "embeddings.mask_token", "pooler."))
    assert_equal_parts(model.model.language_model, language_model.model)
    assert_equal_parts(model.lm_head, language_model.lm_head)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.config.patch_grid == (7, 7) and model.config.dtype == dtype

    pixel_values = processor(images=images(2), return_tensors="pt")["pixel_values"]
    assert pixel_values.dtype == torch.float32
    with torch.no_grad():
        hidden_states = tower(pixel_values.to(dtype)).last_hidden_state
        prefix = TOWERS[name][3]
        assert hidden_states.shape[1] == prefix + 49
        features = model.get_image_features(pixel_values, num_vision_tokens=9)
    assert torch.equal(features.last_hidden_state, hidden_states[:, prefix:])
    assert features.pooler_output.shape == (2, 9, 32) and features.pooler_output.dtype == dtype

    prompt = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which?"}]}],
        add_generation_prompt=True,
    )
    options = {"text": prompt, "images": images(), "return_tensors": "pt"}
    many, few = processor(**options), processor(**options, num_vision_tokens=9)
    assert many["input_ids"].shape[1] - few["input_ids"].shape[1] == 49 - 9
    asked = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    answers = [
        model.generate(**inputs, **asked, num_vision_tokens=count)[:, inputs["input_ids"].shape[1] :]
        for inputs, count in ((many, 9), (few, 9), (many, 49), (few, 49))
    ]
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[2], answers[3])
    assert answers[0].shape == (1, 3)


def test_a_naflex_tower_sees_images_in_their_shapes(save, tmp_path):
    config = transformers.Siglip2VisionConfig(**TINY, patch_size=4, num_patches=49)
    tower = randomized(transformers.Siglip2VisionModel(config)).eval()
    tower.save_pretrained(tmp_path / "tower")
    model, processor = round_trip(*build_from_towers(tmp_path / "tower", save("qwen2")), tmp_path / "built")
    assert processor.match_aspect_ratio and model.config.image_size == (56, 56) == tuple(processor.image_size)
    assert model.config.vision_token_choices == [9, 25, 49]
    assert_equal_parts(model.model.vision_tower, tower, unused=("head.",))

    # Smooth, so that bringing them to a square first changes nothing to speak of.
    shapes = [(28, 28), (60, 30), (20, 60), (90, 120)]
    photos = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (3, 3, 3), dtype=np.uint8)) for i in range(4)]
    photos = [photo.resize(shape[::-1], Image.BICUBIC) for photo, shape in zip(photos, shapes)]
    inputs = processor(images=photos, num_vision_tokens=9, return_tensors="pt")
    with torch.no_grad():
        output = model.get_image_features(**inputs)
        for i, photo in enumerate(photos):
            size = output.image_resolutions[i]
            grid = torch.tensor([[side // 4 for side in size]])
            direct = photo.resize(size[::-1], Image.BICUBIC)
            direct = torch.from_numpy(np.asarray(direct)).permute(2, 0, 1)[None] / 127.5 - 1
            patches, _ = cut_patches(direct, (4, 4))
            expected = tower(patches, torch.ones(patches.shape[:2]), grid).last_hidden_state[0]
            agreement = torch.nn.functional.cosine_similarity(output.last_hidden_state[i], expected, dim=-1)
            assert agreement.min() > 0.99, (i, agreement)
    assert output.image_resolutions[0] == (28, 28) and output.image_resolutions[1][0] > output.image_resolutions[1][1]

    text = [f"{processor.image_token}which color?"] * 4
    asked = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    options = {"images": photos, "text": text, "padding": True, "padding_side": "left", "return_tensors": "pt"}
    many, few = processor(**options, num_vision_tokens=49), processor(**options, num_vision_tokens=9)
    answers = model.generate(**few, **asked)[:, -3:]
    assert torch.equal(model.generate(**many, **asked, num_vision_tokens=9)[:, -3:], answers)
    for i, photo in enumerate(photos):
        alone = processor(images=photo, text=text[i], num_vision_tokens=9, return_tensors="pt")
        assert torch.equal(model.generate(**alone, **asked)[0, -3:], answers[i])


@pytest.mark.parametrize("vocab_size", [ROWS, 283], ids=["padded vocabulary", "exact vocabulary"])
def test_a_head_that_only_the_config_ties_stays_as_it_is(save, tmp_path, vocab_size):
    source = AutoModelForCausalLM.from_pretrained(save("qwen2-tied"))
    source.resize_token_embeddings(vocab_size)
    source.lm_head.weight = torch.nn.Parameter(torch.randn_like(source.lm_head.weight))
    assert source.config.tie_word_embeddings
    source.save_pretrained(tmp_path / "source")
    make_tokenizer().save_pretrained(tmp_path / "source")
    model, _ = round_trip(*build_from_towers(save("siglip"), tmp_path / "source"), tmp_path / "built")
    assert torch.equal(model.lm_head.weight[:vocab_size], source.lm_head.weight)
    assert torch.equal(model.get_input_embeddings().weight[:vocab_size], source.get_input_embeddings().weight)
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize("vocab_size", [ROWS, 283], ids=["padded vocabulary", "exact vocabulary"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models_keep_their_weights_and_logits(save, tmp_path, name, vocab_size):
    folder = save(name)
    source = AutoModelForCausalLM.from_pretrained(folder)
    if vocab_size != ROWS:
        source.resize_token_embeddings(vocab_size)
        source.save_pretrained(folder := str(tmp_path / "exact"))
        make_tokenizer().save_pretrained(folder)
    model, processor = round_trip(*build_from_towers(save("siglip"), folder), tmp_path / "built")
    rows = max(vocab_size, 284)
    embeddings, wanted = model.get_input_embeddings().weight, source.get_input_embeddings().weight
    head, wanted_head = model.lm_head.weight, source.get_output_embeddings().weight
    assert len(embeddings) == len(head) == model.config.text_config.vocab_size == rows
    assert torch.equal(embeddings[:vocab_size], wanted) and torch.equal(head[:vocab_size], wanted_head)
    assert embeddings.isfinite().all() and (rows == vocab_size or (embeddings[-1].abs() > 0).all())
    tied = source.get_output_embeddings().weight is source.get_input_embeddings().weight
    assert (head is embeddings) == model.config.tie_word_embeddings == tied
    own, wanted = model.model.language_model.state_dict(), source.base_model.state_dict()
    assert set(own) == set(wanted)
    assert all(torch.equal(own[key], wanted[key]) for key in own if key != "embed_tokens.weight")

    input_ids = torch.randint(0, 283, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=input_ids).logits
        torch.testing.assert_close(
            logits[..., :vocab_size],
            source(input_ids=input_ids).logits,
            rtol=0,
            atol=0 if rows == vocab_size else 1e-6,
        )
    assert (
        model.config.image_token_id
        == 283
        == processor.image_token_id
        == processor.tokenizer("<|image_pad|>")["input_ids"][-1]
    )


@pytest.mark.parametrize("template", TEMPLATES)
def test_text_chats_stay_as_they_were(save, tmp_path, template):
    AutoModelForCausalLM.from_pretrained(save("llama")).save_pretrained(tmp_path / "llama")
    # As in published models, either the template or nobody writes the token that begins a text.
    tokenizer = make_tokenizer(template=TEMPLATES[template], adds_bos=template == "trimmed")
    tokenizer.save_pretrained(tmp_path / "llama")
    own = AutoTokenizer.from_pretrained(tmp_path / "llama")
    for processor in (
        (built := build_from_towers(save("siglip"), tmp_path / "llama"))[1],
        round_trip(*built, tmp_path / "built")[1],
    ):
        for generate in (False, True):
            wanted = own.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=generate)
            assert processor.apply_chat_template(CHAT, add_generation_prompt=generate) == wanted
            parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in CHAT]
            assert processor.apply_chat_template(parts, add_generation_prompt=generate) == wanted
        ids = own.apply_chat_template(CHAT, return_dict=True)["input_ids"]
        encoded = processor.apply_chat_template(CHAT, tokenize=True, return_dict=True)["input_ids"]
        assert encoded == [ids] and ids.count(1) == (template == "trimmed")
        for text in ("which color?", " naïve 日本\n", "</s><s>"):
            assert processor.tokenizer(text)["input_ids"] == own(text)["input_ids"]
        with_image = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which?"}]}]
        rendered = processor.apply_chat_template(with_image)
        text_only = own.apply_chat_template([{"role": "user", "content": "which?"}], tokenize=False)
        assert rendered.replace(processor.image_placeholder, "") == text_only != rendered


def test_without_a_template_chats_are_chatml(save, tmp_path):
    source = AutoModelForCausalLM.from_pretrained(save("llama"))
    source.resize_token_embeddings(283)
    source.save_pretrained(tmp_path / "llama")
    make_tokenizer(template=None).save_pretrained(tmp_path / "llama")
    model, processor = round_trip(*build_from_towers(save("siglip"), tmp_path / "llama"), tmp_path / "built")
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == [2, end]
    assert model.config.text_config.vocab_size == len(processor.tokenizer) == 286
    prompt = processor.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=True)
    assert prompt == "<s><|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    encoded = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert encoded.count(end) == 1 and encoded.count(processor.tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    assert processor.decode(encoded, skip_special_tokens=True) == "user\na\nassistant\n"


@pytest.mark.parametrize(
    ("own", "wanted"),
    [
        ({"do_sample": True, "temperature": 0.6, "top_k": 20, "eos_token_id": [2, 9], "pad_token_id": 7}, None),
        ({"do_sample": False, "repetition_penalty": 1.1, "suppress_tokens": [8]}, None),
        (None, {}),
        ({"temperature": 0.6, "top_p": 0.9}, {}),  # sampling options of greedy decoding, which cannot be saved
    ],
)
def test_generation_settings_are_the_language_models(save, tmp_path, own, wanted):
    AutoModelForCausalLM.from_pretrained(save("llama")).save_pretrained(tmp_path / "llama")
    make_tokenizer().save_pretrained(tmp_path / "llama")
    settings = tmp_path / "llama" / "generation_config.json"
    settings.unlink() if own is None else settings.write_text(json.dumps(own))
    model, processor = build_from_towers(save("siglip"), tmp_path / "llama")
    model.generation_config.num_vision_tokens = 4
    model, _ = round_trip(model, processor, tmp_path / "built")
    expected = {
        "eos_token_id": [2],
        **(own if wanted is None else wanted),
        "pad_token_id": 0,
        "num_vision_tokens": 4,  # kept: the settings are not taken for ones derived from the model's config
    }
    expected["suppress_tokens"] = [*expected.get("suppress_tokens", []), 283]
    config = model.generation_config.to_dict()
    assert {key: config[key] for key in expected} == expected
    assert all(config[key] is None for key in ("temperature", "top_k", "top_p") if key not in expected)


@pytest.mark.parametrize(
    ("tower_dtype", "text_dtype"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)],
    ids=str,
)
def test_towers_of_different_dtypes_are_not_rounded(save, tmp_path, tower_dtype, text_dtype):
    folders = save("clip", tower_dtype), save("llama", text_dtype)
    model, processor = build_from_towers(*folders)
    inputs = processor(images=images(), text="<|image_pad|>which?", return_tensors="pt")
    assert model(**inputs).logits.dtype == text_dtype
    reloaded, _ = round_trip(model, processor, tmp_path / "built")
    with safe_open(tmp_path / "built/model.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
    assert all(
        dtype == (tower_dtype if key.startswith("model.vision_tower.") else text_dtype)
        for key, dtype in stored.items()
    )
    widest = torch.promote_types(tower_dtype, text_dtype)
    tensors = reloaded.state_dict()
    assert {tensor.dtype for tensor in tensors.values()} == {widest}
    assert all(torch.equal(tensors[key], tensor.to(widest)) for key, tensor in model.state_dict().items())
    assert reloaded(**inputs).logits.isfinite().all()

    cast, _ = build_from_towers(*folders, dtype="bfloat16")
    assert {parameter.dtype for parameter in cast.parameters()} == {torch.bfloat16}
    wanted = AutoModel.from_pretrained(folders[0]).to(torch.bfloat16).state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in cast.model.vision_tower.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_projector_is_new_and_depends_on_the_seed_alone(save, dtype):
    folders = save("dinov2", dtype), save("qwen2", dtype)
    state = torch.get_rng_state()
    projectors = [
        torch.cat([weight.flatten() for weight in model.model.multi_modal_projector.parameters()]).float()
        for model in (build_from_towers(*folders, seed=seed)[0] for seed in (1, 1, 2))
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(projectors[0], projectors[1]) and not torch.equal(projectors[0], projectors[2])
    # 3072 draws: their mean and standard deviation are within four standard errors of 0 and 0.02.
    for values in projectors:
        assert len(values) == 3 * 32 * 32 and values.isfinite().all()
        assert abs(values.mean()) < 4 * 0.02 / math.sqrt(len(values))
        assert abs(values.std() / 0.02 - 1) < 4 / math.sqrt(2 * len(values))


def test_no_weight_is_copied(save, monkeypatch):
    loaded = []
    for name in ("load_vision_tower", "load_language_model"):
        load = getattr(tokenflex.towers.build, name)
        monkeypatch.setattr(
            tokenflex.towers.build, name, lambda *args, load=load: loaded.append(load(*args)) or loaded[-1]
        )
    model, _ = build_from_towers(save("siglip"), save("qwen2"))
    tower, causal_lm = loaded
    assert model.model.vision_tower is tower
    assert model.model.language_model is causal_lm.model and model.lm_head is causal_lm.lm_head
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("grid", "choices", "weights"),
    [
        ((27, 27), [64, 144, 256], [0.2, 0.3, 0.5]),
        ((16, 16), [64, 144, 256], [0.2, 0.3, 0.5]),
        ((14, 14), [49, 100, 196], [0.2, 0.3, 0.5]),
        ((12, 30), [36, 81, 144], [0.2, 0.3, 0.5]),
        ((7, 7), [9, 25, 49], [0.2, 0.3, 0.5]),
        ((2, 2), [1, 4], [0.5, 0.5]),
        ((1, 1), [1], [1.0]),
    ],
)
def test_counts_follow_the_patch_grid(grid, choices, weights):
    assert default_vision_tokens(grid) == (choices, pytest.approx(weights))


def test_counts_can_be_chosen(save):
    tower, language_model = save("siglip"), save("qwen2")
    model, processor = build_from_towers(tower, language_model)
    assert (model.config.vision_token_choices, processor.num_vision_tokens) == ([9, 25, 49], 49)
    model, processor = build_from_towers(
        tower, language_model, vision_token_choices=[4, 16], vision_token_weights=[1, 3], vision_feature_layer=-2
    )
    assert (model.config.vision_token_choices, model.config.vision_token_weights) == ([4, 16], [1, 3])
    assert model.config.num_vision_tokens == processor.num_vision_tokens == 16
    assert model.config.vision_feature_layer == -2
    model, processor = build_from_towers(tower, language_model, num_vision_tokens=1)
    assert model.config.num_vision_tokens == processor.num_vision_tokens == 1
    assert model.config.vision_token_choices == [9, 25, 49]


def weight_files(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_command_builds_and_keeps_the_sharding(save, tmp_path, capsys):
    source = AutoModelForCausalLM.from_pretrained(save("llama"))
    source.save_pretrained(tmp_path / "llama", max_shard_size="40KB")
    make_tokenizer().save_pretrained(tmp_path / "llama")
    assert len(weight_files(tmp_path / "llama")) > 1
    largest = largest_shard(tmp_path / "llama")
    assert largest == max(file.stat().st_size for file in (tmp_path / "llama").glob("*.safetensors"))
    arguments = ["build", "--vision_tower", save("internvl"), "--language_model", str(tmp_path / "llama")]
    main([*arguments, "--output_dir", str(tmp_path / "built"), "--seed", "3", "--num_vision_tokens", "16"])
    out = capsys.readouterr().out
    assert "internvl_vision (7 x 7 patches)" in out and "[9, 25, 49] vision tokens, 16 by default" in out
    assert len(weight_files(tmp_path / "built")) > 1
    for file in (tmp_path / "built").glob("*.safetensors"):
        header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert file.stat().st_size - header <= largest
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "built")
    wanted, _ = build_from_towers(save("internvl"), tmp_path / "llama", seed=3, num_vision_tokens=16)
    tensors = wanted.state_dict()
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in model.state_dict().items())
    assert str(tmp_path) not in (tmp_path / "built/config.json").read_text()

    main([*arguments, "--output_dir", str(tmp_path / "built"), "--max_shard_size", "1GB", "--dtype", "bfloat16"])
    assert weight_files(tmp_path / "built") == ["model.safetensors"]
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "built").dtype == torch.bfloat16
    assert largest_shard(tmp_path / "built") is None
    with pytest.raises(SystemExit, match="tokenflex build: `vision_tower`='nowhere'"):
        main(["build", "--vision_tower", "nowhere", *arguments[3:], "--output_dir", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_command_builds_from_a_gguf_file(save, tmp_path, caplog, dtype):
    (tmp_path / "source").mkdir()
    tokenizer = make_tokenizer(adds_bos=False)
    file = write_gguf(tmp_path / "source" / "llama.gguf", tokenizer)
    arguments = ["build", "--vision_tower", save("siglip"), "--output_dir", str(tmp_path / "built")]
    main([*arguments, "--language_model", file, *(["--dtype", dtype] if dtype else [])])
    assert "bits on average, are dequantized to" in caplog.text and "chat template" not in caplog.text
    loaded = {"gguf_file": "llama.gguf", "quantization_config": GgufConfig(dequantize=True), "dtype": dtype or "auto"}
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "source", **loaded)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "built")
    processor = AutoProcessor.from_pretrained(tmp_path / "built")
    text = processor.apply_chat_template(CHAT[:2])
    inputs = processor(text=text, return_tensors="pt")
    assert inputs["input_ids"].tolist() == [tokenizer(text)["input_ids"]]
    with torch.no_grad():
        wanted = source(input_ids=inputs["input_ids"]).logits
        assert torch.equal(model(**inputs).logits[..., : source.config.vocab_size], wanted)
    assert model.dtype == source.dtype == getattr(torch, dtype or "float32")
    assert read_provenance(tmp_path / "built")["base_models"][1] == "llama.gguf"
    assert not any(str(tmp_path) in path.read_text() for path in (tmp_path / "built").glob("*.json"))

    (tmp_path / "part.gguf").write_bytes((tmp_path / "source" / "llama.gguf").read_bytes()[:-4000])
    arguments[4] = str(tmp_path / "other")
    with pytest.raises(SystemExit, match="tokenflex build: `language_model`=.*part.gguf is no GGUF file"):
        main([*arguments, "--language_model", str(tmp_path / "part.gguf")])
    assert not (tmp_path / "other").exists()


def test_tokens_that_have_to_be_trained_are_named(save, tmp_path, caplog, monkeypatch):
    tokenizer = make_tokenizer(template=None, adds_bos=False)
    file = write_gguf(tmp_path / "base.gguf", tokenizer)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    logging.Logger.warning_once.cache_clear()  # what other tests have warned about counts as not said
    arguments = ["build", "--vision_tower", save("siglip"), "--language_model", file]
    main([*arguments, "--output_dir", str(tmp_path / "built")])
    config = AutoConfig.from_pretrained(tmp_path / "built")
    assert config.text_config.vocab_size == len(tokenizer) + 3  # those of chats, and the image token
    assert "without a chat template: chats are written with <|im_start|> and <|im_end|>, which" in caplog.text
    assert "multivariate normal distribution" not in caplog.text
    assert untrained_tokens(read_provenance(tmp_path / "built")) == ["<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_vision_tokens": 50}, "`num_vision_tokens`=50.*Nearest: 49"),
        ({"vision_token_choices": [4], "vision_token_weights": [1.0, 2.0]}, "2 entries for 1"),
        ({"vision_token_choices": [4]}, r"`vision_token_choices`=\[4\].*give both"),
        ({"vision_token_weights": [4.0]}, "`vision_token_choices`=None.*give both"),
        ({"vision_token_choices": [], "vision_token_weights": []}, "`vision_token_choices` is empty"),
        ({"num_prefix_tokens": 1}, "`num_prefix_tokens`=1 .*'siglip_vision_model': it has 0"),
        ({"vision_feature_layer": -4}, "`vision_feature_layer`=-4: the tower has 2 layers.*-3 "),
        ({"vision_feature_layer": 3}, "`vision_feature_layer`=3: the tower has 2 layers"),
    ],
)
def test_arguments_are_checked(save, monkeypatch, arguments, message):
    monkeypatch.setattr(tokenflex.towers.build, "load_language_model", None)  # before weights are read
    with pytest.raises(ValueError, match=message):
        build_from_towers(save("siglip"), save("qwen2"), **arguments)


def test_unknown_towers_are_taken_when_their_prefix_is_given(save, tmp_path):
    vit = randomized(transformers.ViTMSNModel(transformers.ViTMSNConfig(**VISION))).eval()
    vit.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no preprocessor_config.json.*'vit_msn'"):
        build_from_towers(tmp_path, save("qwen2"), num_prefix_tokens=1)
    SiglipImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="returned 50 features per image, but `num_prefix_tokens`=2"):
        build_from_towers(tmp_path, save("qwen2"), num_prefix_tokens=2)
    model, processor = build_from_towers(tmp_path, save("qwen2"), num_prefix_tokens=1)
    pixel_values = processor(images=images(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = vit(pixel_values).last_hidden_state[:, 1:]
        assert torch.equal(model.get_image_features(pixel_values).last_hidden_state, wanted)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {}),  # scales its logits as well
        ("phi", {}),  # a head with a bias
        ("gpt2", {}),  # embeddings under another name
    ],
)
def test_language_models_that_would_change_are_refused(save, tmp_path, model_type, options):
    options = {**TEXT, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **options}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options)).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"type '{model_type}', whose logits are not one linear layer"):
        build_from_towers(save("siglip"), tmp_path)


def test_swapped_towers_are_told_apart(save):
    with pytest.raises(ValueError, match="`vision_tower`=.*Give a vision tower"):
        build_from_towers(save("qwen2"), save("siglip"))
    with pytest.raises(ValueError, match="`language_model`=.*no causal language model"):
        build_from_towers(save("siglip"), save("siglip"))
