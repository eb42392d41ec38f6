import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model

from tokenflex import ImageFeatureCache
from tokenflex.data.synthetic import draw_scene
from tokenflex.towers.tiny import tiny_model_and_processor


IMAGES = [draw_scene(5, index).image for index in range(4)]


@pytest.fixture
def model_and_towers_images():
    """A model of its own, and the number of images in each call of its tower."""
    model, _ = tiny_model_and_processor(width=32)
    calls = []
    model.model.vision_tower.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    return model.eval(), calls


@pytest.fixture(scope="module")
def processor():
    return tiny_model_and_processor(width=32)[1]


def encode(processor, images, question="which color?", count=16):
    text = [f"{processor.image_token} {question}"] * len(images)
    return processor(images=images, text=text, num_vision_tokens=count, return_tensors="pt")


def answer(model, inputs, **kwargs):
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    output = model.generate(**inputs, **options, **kwargs)
    return output.sequences, torch.stack(output.logits)


def assert_same(got, expected):
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], atol=1e-5, rtol=0)


def test_a_second_question_on_a_kept_image_runs_no_tower(model_and_towers_images, processor):
    model, calls = model_and_towers_images
    questions = [encode(processor, IMAGES[:2], question) for question in ("which color?", "how tall?")]
    expected = [answer(model, questions[0]), answer(model, questions[1], num_vision_tokens=36)]
    calls.clear()
    cache = model.keep_image_features(max_images=4)
    assert_same(answer(model, questions[0]), expected[0])
    assert calls == [2]
    assert_same(answer(model, questions[1], num_vision_tokens=36), expected[1])
    assert calls == [2]
    assert (cache.hits, cache.misses, len(cache)) == (2, 2, 2)
    assert model.keep_image_features(None) is None
    answer(model, questions[0])
    assert calls == [2, 2]


def test_only_new_images_are_encoded_each_once(model_and_towers_images, processor):
    model, calls = model_and_towers_images
    a, b, c, _ = IMAGES
    expected = answer(model, encode(processor, [c, a, c, b]))
    calls.clear()
    cache = model.keep_image_features(max_images=2)
    answer(model, encode(processor, [a]))
    assert_same(answer(model, encode(processor, [c, a, c, b])), expected)
    assert calls == [1, 2]
    assert len(cache) == 2


def test_the_longest_unused_give_way(model_and_towers_images, processor):
    model, calls = model_and_towers_images
    model.keep_image_features(max_images=2)
    a, b, c, _ = IMAGES
    for image in (a, b, a, c, a):
        answer(model, encode(processor, [image]))
    assert calls == [1, 1, 1]
    answer(model, encode(processor, [b]))
    assert calls == [1, 1, 1, 1]


def test_kept_features_hold_no_batch_in_memory(model_and_towers_images, processor):
    model, _ = model_and_towers_images
    cache = model.keep_image_features(max_images=1)
    answer(model, encode(processor, IMAGES))
    (kept,) = cache._kept.values()
    assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


def test_other_weights_mean_other_features(model_and_towers_images, processor):
    model, calls = model_and_towers_images
    model.keep_image_features()
    inputs = encode(processor, IMAGES[:1])
    before = answer(model, inputs)
    weight = next(model.model.vision_tower.parameters())
    with torch.no_grad():
        weight.add_(1.0)
    after = answer(model, inputs)
    assert calls == [1, 1]
    assert not torch.equal(before[1], after[1])
    model.keep_image_features(None)
    assert_same(answer(model, inputs), after)


def test_other_adapters_mean_other_features(model_and_towers_images, processor):
    model, calls = model_and_towers_images
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*vision_tower.*q_proj", init_lora_weights=False))
    adapted.eval().keep_image_features()
    inputs = encode(processor, IMAGES[:1])
    with_adapter = answer(adapted, inputs)
    with adapted.disable_adapter():
        without = answer(adapted, inputs)
    assert not torch.equal(with_adapter[1], without[1])
    assert_same(answer(adapted, inputs), with_adapter)
    assert len(calls) == 3


def test_other_scales_layers_and_dtypes_mean_other_features(model_and_towers_images, processor):
    model, calls = model_and_towers_images
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*vision_tower.*q_proj", init_lora_weights=False))
    adapted.add_adapter("other", LoraConfig(target_modules=r".*vision_tower.*q_proj", init_lora_weights=False))
    adapted.eval()
    inputs = encode(processor, IMAGES[:1])
    layers = [module for module in adapted.modules() if hasattr(module, "scale_layer")]

    def set_layer(number):
        model.config.vision_feature_layer = number

    changes = [
        lambda: [layer.scale_layer(3.0) for layer in layers],
        lambda: adapted.set_adapter("other"),
        lambda: set_layer(-2),
        lambda: set_layer(-1),
    ]
    cache = adapted.keep_image_features()
    for change in changes:
        answer(adapted, inputs)
        change()
        kept = answer(adapted, inputs)
        cache.clear()
        assert_same(kept, answer(adapted, inputs))
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        answer(adapted, inputs)
    assert answer(adapted, inputs)[0].dtype == torch.long
    assert len(calls) == 2


def test_adapters_chosen_by_row_are_not_kept(model_and_towers_images, processor):
    model, _ = model_and_towers_images
    adapted = get_peft_model(model, LoraConfig(target_modules=r".*vision_tower.*q_proj", init_lora_weights=False))
    adapted.eval()
    inputs = encode(processor, IMAGES[:2])
    expected = answer(adapted, inputs, adapter_names=["__base__", "default"])
    cache = adapted.keep_image_features()
    answer(adapted, encode(processor, IMAGES[:1]))
    assert_same(answer(adapted, inputs, adapter_names=["__base__", "default"]), expected)
    assert len(cache) == 1


def test_offloaded_towers_are_not_kept(model_and_towers_images, processor):
    model, calls = model_and_towers_images
    accelerate.cpu_offload(model, torch.device("cpu"))
    cache = model.keep_image_features()
    for _ in range(2):
        answer(model, encode(processor, IMAGES[:1]))
    assert (len(calls), len(cache)) == (2, 0)


def test_a_failed_run_forgets_nothing():
    tower, cache = torch.nn.Linear(1, 1), ImageFeatureCache(max_images=4)
    images = torch.rand(3, 3, 4, 4)
    cache.encode(tower, images[:2], lambda new: new.flatten(2))

    def fail(new):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        cache.encode(tower, images, fail)
    assert (len(cache), cache.misses) == (2, 2)
    assert torch.equal(cache.encode(tower, images[:2], fail), images[:2].flatten(2))


def test_threads_share_a_cache():
    weight = torch.nn.Linear(1, 1)
    cache = ImageFeatureCache(max_images=3)
    images = torch.rand(8, 3, 4, 4)

    def ask(seed):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))[:4]
        if seed % 5 == 0:
            cache.clear()
        got = cache.encode(weight, images[order], lambda new: new.flatten(2), settings=seed % 3)
        return torch.equal(got, images[order].flatten(2))

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(ask, range(600)))
    assert len(cache) <= 3


def test_nothing_is_kept_where_gradients_or_inner_states_are_asked_for(model_and_towers_images, processor):
    model, calls = model_and_towers_images
    cache = model.keep_image_features()
    pixel_values = encode(processor, IMAGES[:1])["pixel_values"]
    features = model.get_image_features(pixel_values, 4).pooler_output
    assert features.requires_grad
    with torch.no_grad():
        outputs = model.get_image_features(pixel_values, 4, output_hidden_states=True)
        assert outputs.hidden_states is not None
        model.train()
        model.get_image_features(pixel_values, 4)
    assert len(calls) == 3
    assert len(cache) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_content_decides_in_any_dtype(dtype):
    torch.manual_seed(0)
    tower = torch.nn.Linear(1, 1)
    cache = ImageFeatureCache(max_images=8)
    runs = []

    def run(images):
        runs.append(len(images))
        return images.flatten(2)

    images = torch.rand(3, 3, 4, 4).to(dtype)
    expected = images.flatten(2)
    assert torch.equal(cache.encode(tower, images, run), expected)
    assert torch.equal(cache.encode(tower, images.flip(0).clone(), run), expected.flip(0))
    nearly = images.clone()
    nearly[1, 0, 0, 0] += 0.5
    assert torch.equal(cache.encode(tower, nearly, run), nearly.flatten(2))
    assert torch.equal(cache.encode(tower, images.transpose(2, 3), run), images.transpose(2, 3).flatten(2))
    assert runs == [3, 1, 3]


def test_a_model_that_keeps_features_can_be_copied_and_saved(model_and_towers_images, processor, tmp_path):
    model, _ = model_and_towers_images
    cache = model.keep_image_features()
    inputs = encode(processor, IMAGES[:1])
    expected = answer(model, inputs)
    assert_same(answer(copy.deepcopy(model), inputs), expected)
    assert len(cache) == 1
    restored = pickle.loads(pickle.dumps(cache))
    assert (len(restored), restored.max_images) == (0, cache.max_images)
    model.save_pretrained(tmp_path)
    assert_same(answer(type(model).from_pretrained(tmp_path).eval(), inputs), expected)


@pytest.mark.parametrize("max_images", [0, -3, 2.5, True, "many"])
def test_a_number_of_images_that_cannot_be_kept(tiny, max_images):
    with pytest.raises(ValueError, match="`max_images`="):
        tiny[0].keep_image_features(max_images)
