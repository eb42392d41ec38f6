import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from tokenflex.data.synthetic import COLORS, IMAGE_SIZE, LABEL_KINDS, LABEL_SIZE, PAPERS
from tokenflex.towers.tiny import tiny_model_and_processor
from tokenflex.training.patch_labels import PatchLabelCollator, PatchLabelDataset, PatchLabelModel


BLOCK = IMAGE_SIZE // LABEL_SIZE
DIGIT = 5  # the kind that digits are labeled as


@pytest.fixture(scope="module")
def tiny_tower():
    model, processor = tiny_model_and_processor(width=32)
    return model.model.vision_tower.eval(), model.config.patch_grid, processor


@given(st.integers(0, 1000), st.integers(0, 2000))
@example(469, 336)  # two digits whose boxes meet in one block
@settings(deadline=None, max_examples=50)
def test_color_labels_say_what_the_pixels_show(seed, index):
    row = PatchLabelDataset(2001, seed)[index]
    known = np.array([*COLORS.values(), *PAPERS.values()])
    distance = np.abs(np.asarray(row["image"], dtype=int)[:, :, None] - known).max(-1)
    shown = np.where(distance.argmin(-1) < len(COLORS), distance.argmin(-1) + 1, 0)
    assert (distance.min(-1) <= 14).all()
    blocks = (
        shown.reshape(LABEL_SIZE, BLOCK, LABEL_SIZE, BLOCK).transpose(0, 2, 1, 3).reshape(LABEL_SIZE, LABEL_SIZE, -1)
    )
    labels, kinds = row["patch_labels"][..., 0], row["patch_labels"][..., 1]
    for line, column in np.ndindex(labels.shape):
        label, block = labels[line, column], blocks[line, column]
        if label == 0:
            assert not block.any()
        elif kinds[line, column] == DIGIT:  # labeled in all of its box, of which strokes fill a part
            assert label in blocks[max(0, line - 1) : line + 2, max(0, column - 1) : column + 2]
        elif block.any():
            assert label in block


@given(st.integers(0, 1000), st.integers(0, 2000))
@settings(deadline=None, max_examples=50)
def test_labels_lie_within_their_kinds(seed, index):
    labels = PatchLabelDataset(2001, seed)[index]["patch_labels"]
    assert labels.shape == (LABEL_SIZE, LABEL_SIZE, len(LABEL_KINDS))
    assert (labels >= 0).all() and (labels.reshape(-1, len(LABEL_KINDS)).max(0) < list(LABEL_KINDS.values())).all()
    assert ((labels[..., 0] == 0) == (labels[..., 1] == 0)).all()


def test_loss_equals_cross_entropy_of_each_cell_with_the_label_it_covers(tiny_tower):
    tower, (rows, columns), processor = tiny_tower
    torch.manual_seed(0)
    model = PatchLabelModel(tower, (rows, columns))
    dataset = PatchLabelDataset(2, seed=5)
    batch = PatchLabelCollator(processor)([dataset[0], dataset[1]])
    with torch.no_grad():
        loss = model(**batch)["loss"]
        patches = model.head(tower(batch["pixel_values"]).last_hidden_state)
    high, wide = LABEL_SIZE // rows, LABEL_SIZE // columns
    losses = {(kind, present): [] for kind in LABEL_KINDS for present in (False, True)}
    for i in range(2):
        for y in range(LABEL_SIZE):
            for x in range(LABEL_SIZE):
                patch, cell = (y // high) * columns + x // wide, (y % high) * wide + x % wide
                scores = patches[i, patch].view(high * wide, -1)[cell].split(list(LABEL_KINDS.values()))
                for k, kind in enumerate(LABEL_KINDS):
                    label = batch["patch_labels"][i, y, x, k]
                    losses[kind, bool(label)].append(nn.functional.cross_entropy(scores[k], label))
    expected = sum(torch.stack(values).mean() for values in losses.values() if values)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_collated_row_is_the_row(tiny_tower):
    _, _, processor = tiny_tower
    dataset = PatchLabelDataset(3, seed=1)
    batch = PatchLabelCollator(processor)([dataset[i] for i in range(3)])
    for i in range(3):
        alone = PatchLabelCollator(processor)([dataset[i]])
        assert torch.equal(batch["pixel_values"][i], alone["pixel_values"][0])
        assert torch.equal(batch["patch_labels"][i], torch.from_numpy(dataset[i]["patch_labels"]))


def test_loss_reaches_tower_and_head(tiny_tower):
    tower, grid, processor = tiny_tower
    model = PatchLabelModel(tower, grid)
    model(**PatchLabelCollator(processor)([PatchLabelDataset(1, seed=2)[0]]))["loss"].backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.head.parameters())
    assert sum(parameter.grad.abs().sum() for parameter in tower.parameters() if parameter.grad is not None) > 0
    tower.zero_grad()
