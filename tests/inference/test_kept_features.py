from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokenflex.data.synthetic import draw_scene
from tokenflex.inference.kept_features import KeptFeatures
from tokenflex.towers.tiny import tiny_model_and_processor


class Tower:
    """Stands for a model: an image's patches are its features. Notes how many images each run has."""

    def __init__(self):
        self.runs, self.is_broken = [], False

    def get_image_features(self, pixel_values, num_vision_tokens, image_size, return_dict):
        if self.is_broken:
            raise RuntimeError("out of memory")
        self.runs.append(len(pixel_values))
        return BaseModelOutputWithPooling(last_hidden_state=pixel_values[..., : image_size[1]].flatten(2))


def encode(kept, images, sizes=None):
    return kept.encode(images, sizes or [tuple(images.shape[2:])] * len(images)).last_hidden_state


@pytest.fixture
def images():
    return torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_kept_features_answer_as_the_image_does_at_every_count():
    model, processor = tiny_model_and_processor(width=32)
    runs = []
    model.model.vision_tower.register_forward_hook(lambda module, args, output: runs.append(len(args[0])))
    scenes = [draw_scene(5, index).image for index in range(2)]
    kept = KeptFeatures(model.eval(), max_images=4)
    for question in ("which color?", "how tall?"):
        text = [f"{processor.image_token} {question}"] * 2
        inputs = processor(images=scenes, text=text, num_vision_tokens=16, return_tensors="pt")
        features = kept.encode(inputs["pixel_values"], [(64, 64)] * 2)
        assert runs == [2]
        for count in (4, 36):
            options = {"num_vision_tokens": count, "max_new_tokens": 4, "do_sample": False}
            expected = model.generate(**inputs, **options)
            others = {name: value for name, value in inputs.items() if name != "pixel_values"}
            assert torch.equal(model.generate(**others, mm_encoder_outputs={"image": features}, **options), expected)
        del runs[1:]


def test_only_new_images_are_encoded_each_once(images):
    kept = KeptFeatures(tower := Tower(), max_images=2)
    encode(kept, images[:1])
    batch = images[[2, 0, 2, 1]]
    assert torch.equal(encode(kept, batch), batch.flatten(2))
    assert tower.runs == [1, 2]
    assert len(kept) == 2


def test_the_longest_unused_give_way(images):
    kept = KeptFeatures(tower := Tower(), max_images=2)
    for index in (0, 1, 0, 2, 0):
        encode(kept, images[[index]])
    assert tower.runs == [1, 1, 1]
    encode(kept, images[[1]])
    assert tower.runs == [1, 1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_content_decides_in_any_dtype(images, dtype):
    images = images[:3].to(dtype)
    kept = KeptFeatures(tower := Tower(), max_images=8)
    nearly = images.clone()
    nearly[1, 0, 0, 0] += 0.5
    for batch in (images, images.flip(0).clone(), nearly, images.transpose(2, 3), images[:, :, :2]):
        assert torch.equal(encode(kept, batch), batch.flatten(2))
    assert tower.runs == [3, 1, 3, 3]


def test_a_failed_run_forgets_nothing(images):
    kept = KeptFeatures(tower := Tower(), max_images=4)
    encode(kept, images[:2])
    tower.is_broken = True
    with pytest.raises(RuntimeError, match="out of memory"):
        encode(kept, images)
    encode(kept, images[:2])
    assert (tower.runs, len(kept)) == ([2], 2)


def test_threads_share_them(images):
    kept = KeptFeatures(Tower(), max_images=3)

    def ask(seed):
        order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))[:4]
        return torch.equal(encode(kept, images[order]), images[order].flatten(2))

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(ask, range(600)))
    assert len(kept) <= 3


@pytest.mark.parametrize("max_images", [0, -3, 2.5, True, "many"])
def test_a_number_of_images_that_cannot_be_kept_is_refused(max_images):
    with pytest.raises(ValueError, match="`max_images`="):
        KeptFeatures(Tower(), max_images)


def test_an_image_is_kept_at_each_resolution(images):
    kept = KeptFeatures(tower := Tower(), max_images=4)
    mixed = kept.encode(images[:3], [(4, 4), (4, 2), (4, 4)])
    assert tower.runs == [2, 1]
    assert mixed.image_resolutions == [(4, 4), (4, 2), (4, 4)]
    for image, features, (_, width) in zip(images, mixed.last_hidden_state, mixed.image_resolutions):
        assert torch.equal(features, image[..., :width].flatten(1))
    assert torch.equal(encode(kept, images[:2], [(4, 2)] * 2), images[:2, ..., :2].flatten(2))
    assert (tower.runs, len(kept)) == ([2, 1, 1], 4)
