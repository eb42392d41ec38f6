import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import AutoConfig, Qwen2Config
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from tokenflex import TokenFlexConfig, TokenFlexModel
from tokenflex.placeholders_tokenflex import TokenFlexImageOutput


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = Qwen2Config(vocab_size=32, **{**SIZES, "hidden_size": 24}, num_key_value_heads=2)
TOWERS = [
    ("siglip_vision_model", {}),
    ("clip_vision_model", {}),
    ("vit", {}),
    ("dinov2", {}),
    ("dinov2_with_registers", {"num_register_tokens": 2}),
    ("dinov3_vit", {"num_register_tokens": 2}),
    ("internvl_vision", {}),
]
WITH_ARGUMENT = ("siglip_vision_model", "clip_vision_model", "vit")
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CHOICES = [4, 16, (1, 3), "4@32", "4@16", "1@8", "2x4@16x32", "2x1@24x16"]


def make_model(kind="siglip_vision_model", image_size=32, **options):
    torch.manual_seed(0)
    tower = {"image_size": image_size, "patch_size": 8, **SIZES, **options.pop("tower", {})}
    tower = AutoConfig.for_model(kind, **{name: size for name, size in tower.items() if size is not None})
    counts = {"num_vision_tokens": 4, "vision_token_choices": [4], "vision_token_weights": [1.0]}
    config = TokenFlexConfig(vision_config=tower, text_config=TEXT, image_token_id=5, **{**counts, **options})
    return TokenFlexModel(config).eval()


@pytest.fixture(scope="module", params=TOWERS, ids=[kind for kind, _ in TOWERS])
def model(request):
    kind, options = request.param
    return make_model(kind, tower=options)


@pytest.fixture(scope="module")
def siglip():
    return make_model()


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (8, 8), (24, 24), (16, 32)])
def test_a_tower_sees_the_shrunk_image_by_its_own_interpolation(model, size):
    kind = model.config.vision_config.model_type
    shrunk = functional.interpolate(IMAGES, size, mode="bicubic", antialias=True)
    options = {"interpolate_pos_encoding": True} if kind in WITH_ARGUMENT else {}
    expected = model.vision_tower(shrunk, **options).last_hidden_state[:, model.config.num_prefix_tokens :]
    output = model.get_image_features(IMAGES, 1, image_size=size)
    assert torch.equal(output.last_hidden_state, expected)
    assert expected.shape[1] == math.prod(side // 8 for side in size)
    assert output.image_resolutions == [size] * 4


@torch.no_grad()
def test_without_a_resolution_the_tower_runs_as_ever(model):
    calls = []
    hook = model.vision_tower.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    expected = model.vision_tower(IMAGES).last_hidden_state[:, model.config.num_prefix_tokens :]
    for asked in ({"num_vision_tokens": 4}, {"num_vision_tokens": "4@32"}, {"num_vision_tokens": 4, "image_size": 32}):
        assert torch.equal(model.get_image_features(IMAGES, **asked).last_hidden_state, expected)
    hook.remove()
    assert not any("interpolate_pos_encoding" in kwargs for kwargs in calls)


@torch.no_grad()
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_images_of_mixed_choices_get_what_each_gets_alone(model, data):
    choices = data.draw(st.lists(st.sampled_from(CHOICES), min_size=4, max_size=4))
    indices = data.draw(st.none() | st.permutations(range(4)))
    sizes = []
    hook = model.vision_tower.register_forward_hook(lambda _, args, output: sizes.append(tuple(args[0].shape[2:])))
    order = None if indices is None else torch.tensor(indices)
    mixed = model.get_image_features(IMAGES, choices, image_indices=order)
    hook.remove()
    assert len(sizes) == len(set(sizes)), "one call of the tower for each resolution"
    for i, choice in enumerate(choices):
        image = IMAGES[[i if indices is None else indices[i]]]
        alone = model.get_image_features(image, choice)
        torch.testing.assert_close(mixed.pooler_output[i], alone.pooler_output[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mixed.last_hidden_state[i], alone.last_hidden_state[0], atol=1e-5, rtol=1e-5)
        assert mixed.image_resolutions[i] == alone.image_resolutions[0]
        assert mixed.vision_token_grids[i] == alone.vision_token_grids[0]


@pytest.fixture(scope="module")
def naflex():
    """Whose own resolution is 32 by 32 pixels, from images of 64 by 64."""
    return make_model("siglip2_vision_model", image_size=None, tower={"num_patches": 16})


WIDE = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SHAPES = [(4, (32, 32)), ((2, 3), (24, 32)), ((1, 4), (16, 64)), ((1, 8), (8, 64)), ((6, 1), (64, 8)), (25, (40, 40))]


@torch.no_grad()
@pytest.mark.parametrize(("choice", "size"), [*SHAPES, ("4@16x24", (16, 24)), ("9@64", (64, 64))])
def test_a_naflex_tower_sees_an_image_in_the_shape_of_its_grid(naflex, choice, size):
    shrunk = functional.interpolate(WIDE, size, mode="bicubic", antialias=True)
    patches = torch.stack([torch.from_numpy(convert_image_to_patches(image.numpy(), 8)) for image in shrunk])
    shapes = torch.tensor([[side // 8 for side in size]] * 4)
    expected = naflex.vision_tower(patches, torch.ones(patches.shape[:2]), shapes).last_hidden_state
    output = naflex.get_image_features(WIDE, choice)
    assert output.image_resolutions == [size] * 4
    torch.testing.assert_close(output.last_hidden_state, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@settings(deadline=None, max_examples=15)
@given(st.lists(st.sampled_from([choice for choice, _ in SHAPES] + ["4@16x24"]), min_size=4, max_size=4))
def test_images_of_mixed_shapes_get_what_each_gets_alone(naflex, choices):
    mixed = naflex.get_image_features(WIDE, choices)
    for i, choice in enumerate(choices):
        alone = naflex.get_image_features(WIDE[[i]], choice)
        torch.testing.assert_close(mixed.pooler_output[i], alone.pooler_output[0], atol=1e-5, rtol=1e-5)
        assert mixed.image_resolutions[i] == alone.image_resolutions[0]


@given(st.integers(1, 8), st.integers(1, 8), st.sampled_from([1, 2]))
def test_a_naflex_resolution_has_the_grids_shape_within_the_towers_patches(naflex, rows, columns, factor):
    config = copy.deepcopy(naflex.config)
    config.downsample_factor = factor
    rows, columns = min(rows, 8 // factor), min(columns, 8 // factor)
    patch_rows, patch_columns = config.patch_grid_at(config.resolution_for((rows, columns)))
    assert patch_rows >= rows and patch_columns >= columns
    assert patch_rows * patch_columns <= max(16 // factor**2, rows * columns)
    if rows == columns:
        assert patch_rows == patch_columns == max(4 // factor, rows)
    # One patch more along either side would be too many, or too wide for the shape.
    assert (patch_rows + 1) * columns > patch_columns * rows or patch_columns == 8 // factor
    assert (patch_columns + 1) * rows > patch_rows * columns or patch_rows == 8 // factor


def test_what_a_naflex_tower_cannot_see_is_refused(naflex):
    with pytest.raises(ValueError, match="`vision_config.num_patches`=50: give a square, such as 49"):
        make_model("siglip2_vision_model", image_size=None, tower={"num_patches": 50})
    with pytest.raises(ValueError, match="`num_vision_tokens`='4@128': .*seen at 64 pixels.* Nearest: 64"):
        naflex.get_image_features(WIDE, "4@128")
    with pytest.raises(ValueError, match="`num_vision_tokens`=81.* Nearest: 64"):
        naflex.get_image_features(WIDE, 81)
    with pytest.raises(ValueError, match=r"`num_vision_tokens`=16: .* from 1 to 2 "):
        naflex.get_image_features(WIDE, "16@16x32")


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{"downsample_factor": 2}, {"projector_pools_last": True, "projector_norm_eps": 1e-6}]
)
def test_blocks_of_patches_and_late_pooling_mix_as_well(options):
    model = make_model(num_vision_tokens=1, **{"vision_token_choices": [1], **options})
    choices = [1, 4, "1@16", "1@32"]
    mixed = model.get_image_features(IMAGES, choices).pooler_output
    for i, choice in enumerate(choices):
        alone = model.get_image_features(IMAGES[i : i + 1], choice).pooler_output[0]
        torch.testing.assert_close(mixed[i], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_count_alone_is_seen_at_the_resolution_that_the_choices_name():
    model = make_model(vision_token_choices=["1@8", "4@16", "4@24", 16], vision_token_weights=[1, 1, 1, 1])
    for choice, meant in ((1, "1@8"), (4, "4@24"), (16, "16@32"), (9, "9@32"), ((2, 2), "4@24"), ((1, 4), "1x4@32")):
        assert torch.equal(
            model.get_image_features(IMAGES, choice).pooler_output,
            model.get_image_features(IMAGES, meant).pooler_output,
        ), choice
    grids = torch.tensor([[2, 2], [1, 1], [2, 2], [4, 4]])
    by_grid = model.get_image_features(IMAGES, vision_token_grids=grids)
    assert by_grid.image_resolutions == [(24, 24), (8, 8), (24, 24), (32, 32)]
    asked = torch.tensor([[16, 16], [0, 0], [32, 32], [0, 0]])
    asked = model.get_image_features(IMAGES, vision_token_grids=grids, image_resolutions=asked)
    assert asked.image_resolutions == [(16, 16), (8, 8), (32, 32), (32, 32)]


@torch.no_grad()
def test_kept_features_serve_the_resolutions_they_hold(siglip):
    kept = [siglip.get_image_features(IMAGES, 1, image_size=size) for size in (32, 16)]
    grids, sizes = [(2, 2), (2, 2), (4, 4), (1, 1)], [(16, 16), (32, 32), (32, 32), (16, 16)]
    expected = siglip.get_image_features(IMAGES, ["4@16", 4, 16, "1@16"])
    pooled = siglip.pool_kept_features(kept, grids, sizes).pooler_output
    again = siglip.pool_kept_features([expected], grids, sizes).pooler_output
    for got, same, wanted in zip(pooled, again, expected.pooler_output):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(same, wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(
        ValueError, match="holds image 2 as seen at 16 pixels, but at 16 vision tokens it is seen at 32"
    ):
        siglip.pool_kept_features(kept[1:], grids, [(16, 16)] * 2 + [(32, 32)] * 2)
    unsaid = TokenFlexImageOutput(last_hidden_state=kept[0].last_hidden_state)
    torch.testing.assert_close(
        siglip.pool_kept_features([unsaid], [(2, 2)] * 4, [(32, 32)] * 4).pooler_output,
        siglip.get_image_features(IMAGES, 4).pooler_output,
    )


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"image_size": 12},
            "`image_size`=12: an image is seen at 32 pixels.*multiples of the patch .8.. Nearest: 16",
        ),
        ({"image_size": 40}, "`image_size`=40: .* Nearest: 32"),
        ({"image_size": (8, 40)}, "`image_size`=8x40: .* Nearest: 8x32"),
        ({"num_vision_tokens": "16@16"}, "`num_vision_tokens`=16: .* from 1 to 2 .* Nearest: 4"),
        ({"num_vision_tokens": "4@16", "image_size": 32}, "'4@16' and `image_size`=32 disagree"),
        ({"image_resolutions": torch.tensor([[16, 16]])}, r"`image_resolutions` has shape \(1, 2\) for 4 images"),
        ({"image_resolutions": torch.tensor([[20, 20]] * 4)}, "`image_resolutions`=20: .* Nearest: 16"),
    ],
)
def test_what_no_tower_can_see_is_refused(siglip, asked, message):
    with pytest.raises(ValueError, match=message):
        siglip.get_image_features(IMAGES, **{"num_vision_tokens": 4, **asked})


@pytest.mark.parametrize(
    ("kind", "image_size", "options"),
    [("vit", (32, 16), {}), ("idefics3_vision", 32, {}), ("ijepa", 32, {"num_prefix_tokens": 0})],
)
def test_a_tower_without_interpolation_is_refused_by_name(kind, image_size, options):
    model = make_model(kind, image_size, **options)
    pixel_values = IMAGES if image_size == 32 else IMAGES[..., :16]
    with pytest.raises(
        ValueError, match=f"`num_vision_tokens`='1@16': a vision tower of type '{kind}' .* Square towers that do: c"
    ):
        model.get_image_features(pixel_values, "1@16")
    with pytest.raises(ValueError, match=f"a vision tower of type '{kind}'"):
        make_model(kind, image_size, **options, vision_token_choices=["1@16"])
    with torch.no_grad():
        assert model.get_image_features(pixel_values, 1).pooler_output.shape == (4, 1, 24)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"num_vision_tokens": "4@16", "image_resolutions": torch.tensor([[24, 24]] * 4)},
            "do not name the resolutions",
        ),
        ({"num_vision_tokens": 9, "image_resolutions": torch.tensor([[16, 16]] * 4)}, "at 16 pixels`=.3, 3."),
        (
            {"num_vision_tokens": None, "vision_token_grids": torch.tensor([[4, 4]] * 4), "image_size": 16},
            "at 16 pixels",
        ),
    ],
)
def test_arguments_that_do_not_fit_each_other_are_refused(siglip, asked, message):
    with pytest.raises(ValueError, match=message):
        siglip.get_image_features(IMAGES, **asked)
