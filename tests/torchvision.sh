#!/usr/bin/env bash
# Runs tests where torchvision and timm are installed: tests/torchvision.sh tests/towers/test_adopt.py -k fast_vlm
# The rest comes from .venv. A torchvision that was built for another torch has no compiled operators; images need none,
# so that their names alone are defined where it cannot be imported otherwise.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=.matrix/torchvision
if [[ ! $folder/.built -nt .venv/.testable || ! $folder/.built -nt tests/torchvision.sh ]]; then
    rm -rf "$folder"
    .venv/bin/python -m venv --without-pip "$folder"
    own=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    shared=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    .venv/bin/python -m pip --python "$folder/bin/python" install -q --no-deps torchvision==0.28.0 timm==1.0.31
    echo "import site; site.addsitedir('$shared'); import define_operators" > "$own/shared.pth"
    cat > "$own/define_operators.py" <<'PYTHON'
import sys

try:
    import torchvision
except RuntimeError:
    import torch

    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        del sys.modules[name]
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision
PYTHON
    touch "$folder/.built"
fi
"$folder/bin/python" -m pytest "${@:-tests/towers/test_adopt.py}"
