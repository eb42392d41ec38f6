"""
Stage 0 of the embedded default: the tiny tower learns to see, from dense labels that the drawing gives for free.

In the paper the tower comes trained (SigLIP). A tower that starts from nothing has to see before a language model can
listen to it: without this stage the model answers near chance after minutes.
"""

import torch
from torch import nn

from ..data.synthetic import LABEL_KINDS, LABEL_SIZE, TOWER_SCENES, draw_scene


class PatchLabelModel(nn.Module):
    """
    A vision tower with one linear head that names what each quarter of a patch holds.

    Args:
        vision_tower (`PreTrainedModel`): The tower to train.
        patch_grid (`tuple[int, int]`): Its patch grid; `LABEL_SIZE` must be a multiple of both sides.
    """

    def __init__(self, vision_tower: nn.Module, patch_grid: tuple[int, int]):
        super().__init__()
        self.vision_tower = vision_tower
        self.rows, self.columns = patch_grid
        self.cells = (LABEL_SIZE // self.rows) * (LABEL_SIZE // self.columns)
        self.head = nn.Linear(vision_tower.config.hidden_size, self.cells * sum(LABEL_KINDS.values()))

    def forward(self, pixel_values: torch.Tensor, patch_labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Images.
            patch_labels (`torch.Tensor` of shape `(batch_size, 16, 16, 5)`): Dense labels, see `LABEL_KINDS`.

        Returns:
            `dict`: `loss`, the cross-entropy, a mean over cells that hold something plus one over empty cells, summed
            over kinds of label.
        """
        logits = self.head(self.vision_tower(pixel_values).last_hidden_state)
        logits = logits.view(-1, sum(LABEL_KINDS.values()))  # (batch * patches * cells, classes)
        high, wide = LABEL_SIZE // self.rows, LABEL_SIZE // self.columns
        labels = patch_labels.view(-1, self.rows, high, self.columns, wide, len(LABEL_KINDS))
        labels = labels.transpose(2, 3).reshape(-1, len(LABEL_KINDS))
        losses = []
        for kind, part in enumerate(logits.split(list(LABEL_KINDS.values()), dim=-1)):
            loss = nn.functional.cross_entropy(part, labels[:, kind], reduction="none")
            # Most cells are empty: averaged apart, or small things would hardly count.
            present = (labels[:, kind] > 0).float()
            for cells in (present, 1 - present):
                losses.append((loss * cells).sum() / cells.sum().clamp(min=1))
        return {"loss": sum(losses)}


class PatchLabelDataset:
    """Rows of `image` and `patch_labels`, drawn when they are asked for."""

    def __init__(self, num_images: int, seed: int):
        self.num_images = num_images
        self.seed = seed

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> dict:
        scene = draw_scene(self.seed, index, TOWER_SCENES)
        return {"image": scene.image, "patch_labels": scene.labels}


class PatchLabelCollator:
    """Batches of `pixel_values` and `patch_labels`."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        images = self.processor(images=[row["image"] for row in rows], return_tensors="pt")["pixel_values"]
        return {
            "pixel_values": images,
            "patch_labels": torch.stack([torch.from_numpy(row["patch_labels"]) for row in rows]),
        }
