#!/usr/bin/env bash
# Runs the tests of vLLM's engine in an environment of its own: tests/engine/run.sh tests/engine/test_engine.py -k tiny
# It has what vLLM's CPU build asks for, in the versions of requirements.txt, and takes the rest, torch too, from .venv.
# vLLM's own pins of torchvision, torchaudio and torchcodec are left out: images need none of them.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=.matrix/vllm-0.32.0
if [[ ! $folder/.built -nt .venv/.testable || ! $folder/.built -nt tests/engine/requirements.txt ]]; then
    rm -rf "$folder"
    .venv/bin/python -m venv --without-pip "$folder"
    own=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    shared=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    .venv/bin/python -m pip --python "$folder/bin/python" install -q --no-deps -r tests/engine/requirements.txt
    # It looks itself up by the name of its GPU build.
    mkdir "$own/vllm-0.32.0+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$own/vllm-0.32.0+cpu.dist-info/METADATA"
    echo "import site; site.addsitedir('$shared')" > "$own/shared.pth"
    touch "$folder/.built"
fi
"$folder/bin/python" -m pytest -n 0 "${@:-tests/engine}"
