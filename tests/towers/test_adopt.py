import json
import subprocess
import sys

import pytest
import torch
import transformers
from helpers import IMAGES, assert_same_weights
from safetensors.torch import load_file, save_file
from sources import SOURCES, save_source, text
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import is_timm_available, is_torchvision_available

from tokenflex import TokenFlexForConditionalGeneration
from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.cli import main
from tokenflex.data.encoding import encode_row
from tokenflex.data.placing import tokenize_prompts
from tokenflex.towers.adopt import adopt_model
from tokenflex.towers.families import FAMILIES, REFUSED
from tokenflex.towers.identity import comparable, encode_adopted, encode_original, original_logits
from tokenflex.towers.pretrained import load_images_processor


def is_timms(source):
    return source["config"]["vision_config"].get("model_type") == "timm_wrapper"


has_timm = is_timm_available() and is_torchvision_available()
NAMES = [
    pytest.param(
        name, marks=pytest.mark.skipif(is_timms(source) and not has_timm, reason="needs timm and torchvision")
    )
    for name, source in SOURCES.items()
]
CHOSEN = [1, 4, (2, 3)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Each source saved once, adopted, saved and loaded again: its folder, the adopted one, model and processor."""
    kept = {}

    def get(name, dtype=torch.float32):
        if (name, dtype) not in kept:
            folder = tmp_path_factory.mktemp(name)
            source = save_source(SOURCES[name], folder / "source", dtype)
            model, processor, _ = adopt_model(source)
            save_checkpoint(folder / "adopted", model, processor)
            loaded = AutoModelForImageTextToText.from_pretrained(folder / "adopted")
            kept[name, dtype] = (source, folder / "adopted", loaded, AutoProcessor.from_pretrained(folder / "adopted"))
        return kept[name, dtype]

    return get


def original(folder):
    source = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
    return source, load_images_processor(folder, source.config), FAMILIES[source.config.model_type]


def native_grid(processor, model):
    side = int(model.config.num_vision_tokens**0.5)
    return side, side


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_at_its_own_count_the_adopted_model_is_the_original(saved, name, dtype):
    folder, _, model, processor = saved(name, dtype)
    source, source_processor, family = original(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype} == {model.dtype}
    native = native_grid(processor, model)
    for images in ([], IMAGES[:1], IMAGES[2:5]):
        own = encode_adopted(processor, images, native)
        theirs = encode_original(source_processor, processor, images, family)
        for got, expected in comparable(own, theirs, processor.image_token_id, family).values():
            assert torch.equal(got, expected)
        logits, expected = model(**own).logits, original_logits(source, own, theirs, family)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2 * max(1, expected.abs().max().item())
        torch.testing.assert_close(logits, expected, atol=tolerance, rtol=0)
        if family.has_base_view and images:
            continue  # the original would generate with its tiles
        if family.pools_last and dtype == torch.bfloat16:
            continue  # averages are rounded otherwise than by torch's own pooling, and near ties then go otherwise
        asked = {"max_new_tokens": 6, "do_sample": False}
        no_images = {"suppress_tokens": [processor.image_token_id]}
        answers, expected = model.generate(**own, **asked), source.generate(**theirs, **asked, **no_images)
        assert torch.equal(answers, expected)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_batches_with_padding_are_what_each_row_is_alone(saved, name):
    _, _, model, processor = saved(name)
    texts = [processor.image_token + "what?", processor.image_token * 2 + "which color is it?", "hello"]
    batch = processor(images=IMAGES[:3], text=texts, padding=True, num_vision_tokens=4, return_tensors="pt")
    logits = model(**batch).logits[:, -1]
    for row, images in enumerate(([IMAGES[0]], IMAGES[1:3], None)):
        alone = processor(images=images, text=texts[row], num_vision_tokens=4, return_tensors="pt")
        torch.testing.assert_close(model(**alone).logits[0, -1], logits[row], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_count_at_generate_is_a_count_at_encoding(saved, name):
    _, _, model, processor = saved(name)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which color?"}]}],
        add_generation_prompt=True,
    )
    asked = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    encoded = processor(images=IMAGES[0], text=text, return_tensors="pt")
    for count in CHOSEN:
        at_encoding = processor(images=IMAGES[0], text=text, num_vision_tokens=count, return_tensors="pt")
        tokens = count if isinstance(count, int) else count[0] * count[1]
        assert int((at_encoding["input_ids"] == processor.image_token_id).sum()) == tokens
        expected = model.generate(**at_encoding, **asked)
        got = model.generate(**encoded, num_vision_tokens=count, **asked)
        own, wanted = (
            out.sequences[:, inputs["input_ids"].shape[1] :]
            for out, inputs in ((got, encoded), (expected, at_encoding))
        )
        assert torch.equal(own, wanted)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_tower_and_language_model_keep_every_byte(saved, name):
    folder, _, model, _ = saved(name, torch.bfloat16)
    source, _, family = original(folder)
    tower = source.model.get_submodule(family.vision_tower).state_dict()
    tower = {key: weight for key, weight in tower.items() if not key.startswith(("head.", "vision_model.head."))}
    assert_same_weights(model.model.vision_tower.state_dict(), tower)
    language_model = source.model.get_submodule(family.language_model)
    assert_same_weights(model.model.language_model.state_dict(), language_model.state_dict())
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)
    head, embeddings = model.lm_head.weight, model.get_input_embeddings().weight
    is_tied = source.lm_head.weight is source.get_input_embeddings().weight
    assert (head is embeddings) == is_tied == model.config.tie_word_embeddings
    projector = source.model.get_submodule(family.projector)
    connector = model.model.multi_modal_projector.connector
    for key, part in family.linear.items():
        weight = projector.get_submodule(part).weight
        own = torch.cat([connector.up.weight, connector.gate.weight]) if key == "gate_up" else None
        assert torch.equal(connector.get_submodule(key).weight if own is None else own, weight)


REMOTE = """
import json, sys

sys.modules["tokenflex"] = None  # as if it were not there
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
text = processor.image_token + "which color?"
inputs = processor(images=Image.open(sys.argv[2]), text=text, return_tensors="pt")
print(json.dumps([model.generate(**inputs, num_vision_tokens=n, max_new_tokens=4).tolist() for n in (1, 4)]))
"""


def test_it_runs_as_remote_code(saved, tmp_path):
    _, folder, model, processor = saved("aya_vision")
    IMAGES[0].save(tmp_path / "image.png")
    command = [sys.executable, "-c", REMOTE, str(folder), str(tmp_path / "image.png")]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    inputs = processor(images=IMAGES[0], text=processor.image_token + "which color?", return_tensors="pt")
    expected = [model.generate(**inputs, num_vision_tokens=n, max_new_tokens=4).tolist() for n in (1, 4)]
    assert json.loads(said.stdout.splitlines()[-1]) == expected


def test_the_command_says_what_it_found(tmp_path, capsys):
    folder = save_source(SOURCES["llava"], tmp_path / "source")
    main(["adopt", "--model", folder, "--output_dir", str(tmp_path / "out"), "--vision_token_choices", "4", "49",
          "--vision_token_weights", "1", "1"])  # fmt: skip
    said = capsys.readouterr().out
    assert "at 49 vision tokens it is the original model: prompts and pixels are equal, logits within" in said
    model = TokenFlexForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert (model.config.num_vision_tokens, model.config.vision_token_choices) == (49, [4, 49])
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert [stage["stage"] for stage in provenance["stages"]] == ["pooling before connector"]
    assert str(tmp_path) not in "".join(file.read_text() for file in (tmp_path / "out").glob("*.json"))


@pytest.mark.parametrize(
    ("given", "choices", "weights"),
    [
        ({}, [9, 25, 49], [1, 1, 8]),
        ({"vision_token_choices": [49, 4, 9, 16]}, [49, 4, 9, 16], [12, 1, 1, 1]),
        ({"vision_token_choices": [49]}, [49], [1]),
        ({"vision_token_choices": [4, 16]}, [4, 16], [1, 1]),
        ({"vision_token_choices": [4, 49], "vision_token_weights": [1, 0]}, [4, 49], [1, 0]),
    ],
)
def test_the_own_count_weighs_most_unless_weights_are_given(tmp_path, given, choices, weights):
    model, _, _ = adopt_model(save_source(SOURCES["llava"], tmp_path / "source"), **given)
    assert (model.config.vision_token_choices, model.config.vision_token_weights) == (choices, weights)


def test_shards_stay_as_large_as_they_were(tmp_path):
    folder = save_source(SOURCES["llava"], tmp_path / "source")
    source = AutoModelForImageTextToText.from_pretrained(folder)
    (tmp_path / "source" / "model.safetensors").unlink()
    source.save_pretrained(folder, max_shard_size="100KB")
    main(["adopt", "--model", folder, "--output_dir", str(tmp_path / "out")])
    number = len(list((tmp_path / "source").glob("*.safetensors")))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == pytest.approx(number, abs=1) and number > 2


def change_config(folder, **changes):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    text = {name.removeprefix("text."): changes.pop(name) for name in list(changes) if name.startswith("text.")}
    config["text_config"] |= text
    file.write_text(json.dumps(config | changes))


def drop_processor(folder):
    for file in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).unlink(missing_ok=True)


def drop_weights(folder):
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "projector" not in name}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_processor, "comes without a processor"),
        (drop_weights, "lacks 4 weights of a LlavaForConditionalGeneration, such as 'model.multi_modal_projector"),
        (lambda f: change_config(f, **{"text.vocab_size": 380}), "weights that do not fit its config.*resize_token"),
        (lambda f: change_config(f, image_token_id=5), "`image_token_id`=5, but its tokenizer gives '<image>' the id"),
        (lambda f: change_config(f, **{"text.vocab_size": 3}), "embeddings of 3 tokens.*resize_token_embeddings"),
        (lambda f: change_config(f, vision_feature_select_strategy="full"), "keeps the first of its tower's.*has 1"),
        (lambda f: change_config(f, quantization_config={"quant_method": "bitsandbytes"}), "is quantized: give the"),
    ],
)
def test_what_cannot_be_adopted_is_named_and_nothing_is_written(tmp_path, change, message):
    folder = save_source(SOURCES["llava"], tmp_path / "source")
    change(tmp_path / "source")
    with pytest.raises(SystemExit, match=message):
        main(["adopt", "--model", folder, "--output_dir", str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# As published: LLaVA-1.5's writes no end token, LLaVA-OneVision's other white space before an answer than in a prompt.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ '\n' + part['text'] }}{% endif %}{% endfor %}"
    "{{ '</s>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("template", [LLAVA_TEMPLATE, ONEVISION_TEMPLATE], ids=["llava", "onevision"])
def test_answers_are_learned_with_their_end_behind_the_prompt_of_generation(tmp_path, template):
    folder = save_source(SOURCES["llava"], tmp_path / "source")
    source = AutoProcessor.from_pretrained(folder)
    source.chat_template = template
    source.save_pretrained(folder)
    _, processor, _ = adopt_model(folder)
    row = encode_row({"image": IMAGES[0], "question": "which color?", "answer": "red"}, processor)
    content = [{"type": "image"}, {"type": "text", "text": "which color?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    [asked] = tokenize_prompts([prompt], processor)["input_ids"]
    learned = [token for token in row.labels if token != -100]
    assert row.input_ids == asked + learned
    assert processor.decode(learned).strip() == "red</s>"


def test_a_source_without_a_chat_template_is_adopted(tmp_path):
    folder = save_source(SOURCES["llava"], tmp_path / "source")
    (tmp_path / "source/chat_template.jinja").unlink()
    _, processor, identity = adopt_model(folder)
    assert identity.difference < 1e-5
    assert processor.image_token in processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])


def test_logits_that_are_no_numbers_are_no_identity(tmp_path):
    folder = save_source(SOURCES["llava"], tmp_path / "source")
    weights = load_file(tmp_path / "source/model.safetensors")
    name = next(name for name in weights if name.endswith(".norm.weight") and "language_model" in name)
    save_file(weights | {name: weights[name] * torch.nan}, tmp_path / "source/model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="logits differ from the original's by nan"):
        adopt_model(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_vision_tokens": 0}, "`num_vision_tokens`=0"),
        ({"num_vision_tokens": 64}, "`num_vision_tokens`=64.*from 1 to 7.*Nearest: 49"),
        ({"vision_token_choices": [4, 50], "vision_token_weights": [1, 1]}, r"`vision_token_choices\[1\]`=50"),
        ({"vision_token_weights": [1]}, "give both"),
    ],
)
def test_counts_beyond_the_grid_are_named(tmp_path, options, message):
    folder = save_source(SOURCES["llava"], tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        adopt_model(folder, **options)


def test_a_model_that_would_not_be_the_same_is_refused(tmp_path):
    # LLaVA's own head does not cap its logits as Gemma 2's does.
    folder = save_source(
        SOURCES["llava"], tmp_path / "source", text_config=text("gemma2", final_logit_softcapping=0.5)
    )
    with pytest.raises(ValueError, match="at 49 vision tokens the adopted model's logits differ.*by"):
        adopt_model(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.Gemma3Config(), "'gemma3', which .*both directions.*Families that can be adopted: aya_vision"),
        (transformers.PaliGemmaConfig(), "'paligemma', which .*both directions"),
        (transformers.Qwen2_5_VLConfig(), "'qwen2_5_vl', which takes images at their own resolution"),
        (transformers.Mistral3Config(), "'mistral3', which takes images at their own resolution"),
        (transformers.LlavaConfig(vision_config=transformers.PixtralVisionConfig()), "'pixtral', which takes images"),
        (transformers.Blip2Config(), "'blip-2', which is not known"),
        (transformers.Qwen2Config(), "'qwen2', which is not known"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_other_families_are_refused_by_name(tmp_path, config, message):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        adopt_model(tmp_path)


def test_no_family_is_both_taken_and_refused():
    assert not set(REFUSED) & set(FAMILIES)
