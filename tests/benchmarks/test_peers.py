import json

import peers
import pytest
import torch
from peer_models import BUILDERS, SIZES, build_pair, draw_photos
from peer_stages import STAGES, Moments, Training, alternate, choose_rounds
from transformers import SiglipImageProcessorPil


COUNTS = [64, 256]
ALL_STAGES = [stage for stages in STAGES.values() for stage in stages]


@pytest.fixture(scope="module")
def photos():
    return draw_photos(2, seed=3)


@pytest.fixture(scope="module", params=BUILDERS)
def peer(request):
    return request.param


@pytest.fixture(scope="module")
def pairs(peer):
    return {count: build_pair(SIZES["tiny"], peer, count, "cpu", torch.float32, seed=0) for count in COUNTS}


def pixels_of(inputs, size):
    """Pixel values as images, of Qwen3-VL put together from its patches."""
    pixels = inputs["pixel_values"]
    if "image_grid_thw" in inputs:
        side = int(inputs["image_grid_thw"][0, 1])
        merged = pixels.view(-1, side // 2, side // 2, 2, 2, 3, 2, size, size)[:, :, :, :, :, :, 0]
        return merged.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(-1, 3, side * size, side * size)
    return pixels.flatten(0, -4)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("batch_size", [1, 2], ids=["two images in a prompt", "two prompts"])
def test_a_pair_reads_prompts_of_one_length_with_the_images_tokens_in_them(pairs, photos, peer, count, batch_size):
    own, other = (contender.encode(photos, batch_size)["input_ids"] for contender in pairs[count])
    tokens = [(ids == pairs[count][0].image_token_id).sum().item() for ids in (own, other)]
    newlines = 2 if peer == "llava_onevision" else 0
    assert tokens == [2 * count, 2 * count + newlines]
    assert own.shape == other.shape
    assert (own != other).sum() == newlines  # a newline's token stands where the others have the mark at the end


@pytest.mark.parametrize("count", COUNTS)
def test_a_pair_has_the_same_patches_resolution_and_shapes(pairs, photos, peer, count):
    own, other = pairs[count]
    patches = []
    for contender in (own, other):
        handle = contender.tower.register_forward_hook(
            lambda *call: patches.append(call[-1].last_hidden_state.numel())
        )
        with torch.no_grad():
            contender.model(**contender.encode(photos, 2))
        handle.remove()
    assert patches[0] == patches[1] == 2 * peers.grid_side(peer, count) ** 2 * SIZES["tiny"].tower[0]
    patch_size = SIZES["tiny"].patch_size
    assert pixels_of(own.encode(photos, 2), patch_size).shape == pixels_of(other.encode(photos, 2), patch_size).shape
    sizes = [
        {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
        for parts in (
            {"tower": c.tower, "language_model": c.model.model.language_model, "head": c.model.lm_head}
            for c in (own, other)
        )
    ]
    if peer == "qwen3_vl":
        config = other.config
        ours, theirs = own.config.text_config.to_dict(), config.text_config.to_dict()
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
        ):
            assert ours[name] == theirs[name]
        assert own.config.vision_config.num_hidden_layers == config.vision_config.depth
        assert sizes[0]["head"] == sizes[1]["head"]
    else:
        assert sizes[0] == sizes[1]


def test_pixel_values_are_those_of_the_stock_siglip_processor(pairs, photos, peer):
    own, other = pairs[64]
    size = own.processor.image_processor.size
    stock = SiglipImageProcessorPil(size=dict(size), image_mean=[0.5] * 3, image_std=[0.5] * 3)
    expected = stock(photos, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(own.encode(photos, 2)["pixel_values"], expected, rtol=0, atol=0)
    if peer != "llava_onevision":  # which pads images to squares
        pixels = pixels_of(other.encode(photos, 2), SIZES["tiny"].patch_size)
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


def test_a_forward_pass_is_divided_without_gaps(pairs, photos):
    for contender in pairs[64]:
        inputs = contender.encode(photos[:1], 1)
        with torch.no_grad(), Moments(contender) as moments:
            contender.model(**inputs)
        order = ["forward", "tower", "encoded", "projected", "forwarded"]
        assert sorted(moments.at, key=moments.at.get) == order
        assert not contender.model._forward_hooks and not contender.model._forward_pre_hooks


def test_training_leaves_the_tower_as_it_is_and_moves_the_rest(pairs, photos):
    for contender in pairs[64]:
        before = {name: parameter.clone() for name, parameter in contender.model.named_parameters()}
        Training(contender, contender.encode(photos[:1], 1)).step()
        moved = {name for name, p in contender.model.named_parameters() if not torch.equal(p, before[name])}
        projector = {id(parameter) for parameter in contender.projector.parameters()}
        tower = {id(parameter) for parameter in contender.tower.parameters()} - projector
        ids = {name: id(parameter) for name, parameter in contender.model.named_parameters()}
        assert not any(ids[name] in tower for name in moved)
        assert any(ids[name] in projector for name in moved)
        assert any(".language_model." in name for name in moved)


def test_turns_alternate_and_warming_up_is_not_counted():
    calls = []
    functions = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    records = alternate(functions, rounds=3)
    assert "".join(calls) == "ba" + "ab" + "ba" + "ab"
    assert records == {"a": [3, 6, 7], "b": [4, 5, 8]}


def test_rounds_fall_with_the_batch():
    rounds = [choose_rounds("forward", number, 10)[0] for number in (1, 8, 32, 128)]
    assert rounds == sorted(rounds, reverse=True) and rounds[0] == 10 and rounds[-1] >= 2
    assert choose_rounds("decode", 128, 10) == (0, 0)
    assert choose_rounds("forward", 128, 1)[0] == 1


def test_one_run_measures_every_stage_of_every_peer(tmp_path, capsys):
    peers.main(
        f"--output_dir {tmp_path} --size tiny --rounds 1 --batch_sizes 2 --images 1 --num_vision_tokens 64 "
        "--extras scaling mixed second_question".split()
    )
    results = json.loads((tmp_path / "results.json").read_text())
    measured = {(cell["peer"], cell["stage"]) for cell in results["cells"]}
    assert measured == {(peer, stage) for peer in BUILDERS for stage in ALL_STAGES}
    for cell in results["cells"]:
        assert cell["ratio"]["median"] == pytest.approx(
            cell["peer_figure"]["median"] / cell["tokenflex"]["median"], rel=1e-2
        )
        assert ("limit" in cell) == (cell["stage"] != "processing")
        assert cell["stage"] == "processing" or cell["limit"]["least"] > 0
    for pair in results["pairs"]:
        assert pair["tokenflex"]["sequence_length"] == pair[pair["peer"]]["sequence_length"]
    alone = results["alone"]
    assert alone["second_question"]["tower_calls"] == {"first": 1, "second": 0}
    assert {row["count"] for row in alone["scaling"]} == {64, 144, 256}
    assert all(row["predicted"] > 1 for row in alone["scaling"] if row["count"] == 64)
    headline = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert headline == results["headline"]
    assert set(headline["ratios"]) == set(ALL_STAGES)
    table = (tmp_path / "results.md").read_text()
    assert table.count("\n## ") == 3 + len(ALL_STAGES)
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "results.md", "results.png"}


def test_a_count_that_is_no_square_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        peers.main(["--output_dir", str(tmp_path), "--num_vision_tokens", "100", "60"])
    assert "[60]" in capsys.readouterr().err
