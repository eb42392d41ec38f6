import os
import subprocess
import sys

import pytest

import tokenflex


def run(script):
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.splitlines()


@pytest.mark.parametrize(
    "first",
    [
        "from tokenflex import TokenFlexConfig",
        "import tokenflex; from transformers import AutoModel",
        "from transformers import AutoModel, AutoProcessor; import tokenflex",
        "from tokenflex.modeling_tokenflex import TokenFlexModel",
    ],
)
def test_auto_classes_know_the_model_whatever_is_imported_first(first):
    script = f"""
{first}
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor
config = AutoConfig.for_model("tokenflex")
auto_classes = (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM)
for known in (type(config), *(auto._model_mapping[type(config)] for auto in auto_classes)):
    print(known.__module__, known.__name__)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
print(PROCESSOR_MAPPING[type(config)].__name__)
"""
    assert run(script) == [
        "tokenflex.configuration_tokenflex TokenFlexConfig",
        "tokenflex.modeling_tokenflex TokenFlexModel",
        "tokenflex.modeling_tokenflex TokenFlexForConditionalGeneration",
        "tokenflex.modeling_tokenflex TokenFlexForConditionalGeneration",
        "TokenFlexProcessor",
    ]


def test_public_names_are_what_they_are_called():
    assert all(getattr(tokenflex, name).__name__ == name for name in tokenflex.__all__)


def test_threads_sleep_while_they_wait_unless_told_otherwise():
    for said, policy in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        done = subprocess.run(
            [sys.executable, "-c", "import tokenflex"],
            env={**environment, "OMP_DISPLAY_ENV": "TRUE", **said},
            stderr=subprocess.PIPE,
            text=True,
            check=True,
        )
        assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr
