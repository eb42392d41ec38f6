#!/usr/bin/env bash
# Runs transformers' own common tests of models and processors on the classes here: tests/upstream/run.sh -k save_load
# They come with its source distribution, of the installed version, but for those of generation and of exporters.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=.venv/bin/python
version=$($python -c 'import importlib.metadata as metadata; print(metadata.version("transformers"))')
folder=.matrix/upstream-$version
if [ ! -e "$folder/.unpacked" ]; then
    rm -rf "$folder"
    $python -m pip download -q --no-deps --no-binary transformers -d "$folder" "transformers==$version"
    $python -m pip install -q --no-deps -t "$folder" parameterized
    tar -xzf "$folder/transformers-$version.tar.gz" -C "$folder" --strip-components=1 "transformers-$version/tests"
    mv "$folder/tests" "$folder/transformers_tests"
    touch "$folder/.unpacked"
fi
PYTHONPATH=$folder${PYTHONPATH:+:$PYTHONPATH} $python -m pytest -W ignore::pytest.PytestUnknownMarkWarning tests/upstream/common.py "$@"
