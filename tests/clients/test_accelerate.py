"""Accelerate by itself; its part in `from_pretrained` and in the Trainer is tested elsewhere."""

import copy

import accelerate
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.data.synthetic import SyntheticVQA, draw_scene
from tokenflex.training import TokenFlexDataCollator


IMAGES = [draw_scene(5, index).image for index in range(3)]
TEXTS = ["<|image_pad|> which color?", "one <|image_pad|> and one <|image_pad|>: how tall is the red bar?"]
PARTS = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("accelerate") / "checkpoint"
    save_checkpoint(path, *tiny, max_shard_size="1500KB")
    return path


def assert_alike(dispatched, model, processor):
    inputs = processor(images=IMAGES, text=TEXTS, num_vision_tokens=16, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits
        torch.testing.assert_close(dispatched(**inputs).logits, expected, atol=1e-5, rtol=0)
    for count in (4, [36, (2, 5), 9]):
        options = {"num_vision_tokens": count, "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(dispatched.generate(**inputs, **options), model.generate(**inputs, **options))


def empty_model(checkpoint):
    with accelerate.init_empty_weights():
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(checkpoint))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("on_disk", [(), PARTS[:2]], ids=["nothing on disk", "tower and projector on disk"])
def test_a_sharded_checkpoint_loads_into_an_empty_model(tiny, checkpoint, tmp_path, on_disk):
    assert len(list(checkpoint.glob("*.safetensors"))) > 1
    device_map = {part: "disk" if part in on_disk else "cpu" for part in PARTS}
    model = accelerate.load_checkpoint_and_dispatch(
        empty_model(checkpoint), checkpoint, device_map=device_map, offload_folder=tmp_path
    )
    assert (model.model.vision_tower.embeddings.patch_embedding.weight.device.type == "meta") == bool(on_disk)
    model.generation_config = tiny[0].generation_config
    assert_alike(model, *tiny)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_model_answers_alike(tiny, tmp_path, where):
    model = copy.deepcopy(tiny[0])
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert_alike(model, *tiny)


def test_a_device_map_keeps_layers_whole(checkpoint):
    model = empty_model(checkpoint)
    sizes = accelerate.utils.compute_module_sizes(model)
    whole = [name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules]
    layer = max(sizes[name] for name in whole)
    device_map = accelerate.infer_auto_device_map(
        model, {0: 2 * layer, 1: sizes[""]}, no_split_module_classes=model._no_split_modules
    )
    assert set(device_map.values()) == {0, 1}
    for name in whole:
        assert any(f"{name}.".startswith(f"{place}.") for place in device_map), name


@pytest.fixture
def accelerator():
    state = accelerate.state.AcceleratorState
    state._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True)
    state._reset_state(reset_partial_state=True)  # a Trainer in the same process chooses for itself


def step(model, batches, optimizer, accelerator=None):
    losses = []
    for batch in batches:
        loss = model(**batch).loss
        losses.append(loss.item())
        accelerator.backward(loss) if accelerator else loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_a_loop_of_ones_own_trains_alike(tiny, accelerator):
    model, processor = tiny
    plain, prepared = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    rows = SyntheticVQA(num_images=6, seed=0)

    def loader():
        # Every loader counts its own batches, so that both draw the same counts.
        collator = TokenFlexDataCollator(processor, [4, 16], [0.5, 0.5], seed=1)
        return torch.utils.data.DataLoader(rows, batch_size=2, collate_fn=collator)

    expected = step(plain, loader(), torch.optim.SGD(plain.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    prepared, optimizer, batches = accelerator.prepare(prepared, optimizer, loader())
    assert step(prepared, batches, optimizer, accelerator) == expected
    assert len(set(expected)) == 3
    for (name, weight), other in zip(plain.named_parameters(), accelerator.unwrap_model(prepared).parameters()):
        torch.testing.assert_close(other, weight, msg=name)
