import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


ROOT = Path(__file__).parent
ROOMS = ("checkpoints", "data", "towers", "training", "evaluation", "hub", "inference", "research")


class BuildPackage(build_py):
    """The repository root is the package, so that this very file would be taken for one of its modules."""

    def find_package_modules(self, package, package_dir):
        return [found for found in super().find_package_modules(package, package_dir) if found[1] != "setup"]


setup(
    name="tokenflex",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "__init__.py").read_text())[1],
    description="TokenFLEX vision-language models for transformers: any number of vision tokens, chosen at inference",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    package_dir={"tokenflex": "."},
    packages=["tokenflex", *(f"tokenflex.{room}" for room in ROOMS)],
    package_data={"tokenflex.hub": ["card.md"], "tokenflex.training": ["recipes/*/*.yaml", "accelerate/*.yaml"]},
    cmdclass={"build_py": BuildPackage},
    install_requires=[
        "accelerate>=1.15",
        "datasets>=5.2",
        "huggingface_hub>=1.31",
        "matplotlib>=3.9",
        "numpy>=2.0",
        "pillow>=11.0",
        "pyyaml>=6.0",
        "tokenizers>=0.22",
        "torch>=2.9",
        "tqdm>=4.67",
        "transformers>=5.18",
    ],
    extras_require={
        "docs": ["mkdocs-material>=9.7", "mkdocstrings[python]>=1.0"],
        "gguf": ["gguf>=0.19"],
        "liger": ["liger-kernel>=0.8"],
        "lora": ["peft>=0.21"],
        "metrics": ["evaluate>=0.4.6"],
        "qlora": ["bitsandbytes>=0.49", "peft>=0.21"],
        "onnx": ["onnx>=1.21", "onnxruntime>=1.24", "onnxscript>=0.7"],
        "page": ["gradio>=6.31"],
        "quantization": ["torchao>=0.18"],
        "serve": ["fastapi>=0.115", "jinja2>=3.1", "uvicorn>=0.30"],
        "video": ["av>=14.0"],
        "test": [
            "av>=14.0",
            "evaluate>=0.4.6",
            "fastapi>=0.115",
            "gguf>=0.19",
            "gradio>=6.31",
            "hypothesis>=6.100",
            "ipykernel>=7.4",
            "nbclient>=0.11",
            "num2words>=0.5.14",
            "onnx>=1.21",
            "onnxruntime>=1.24",
            "onnxscript>=0.7",
            "openai>=1.98",
            "peft>=0.21",
            "playwright>=1.65",
            "pytest>=8.0",
            "pytest-xdist>=3.8",
            "rapidfuzz>=3.14",
            "ruff>=0.14",
            "scikit-learn>=1.9",
            "scipy>=1.17",
            "setuptools>=77",
            "tensorboard>=2.19",
            "torchao>=0.18",
            "trl>=1.16",
            "uvicorn>=0.30",
        ],
    },
    entry_points={
        "console_scripts": ["tokenflex=tokenflex.cli:main"],
        "lmms_eval.models": ["tokenflex=tokenflex.evaluation.lmms_eval_plugin:manifests"],
        "vllm.general_plugins": ["tokenflex=tokenflex.inference.vllm_plugin:register"],
    },
)
