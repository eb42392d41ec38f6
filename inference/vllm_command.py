"""The command that serves a checkpoint by vLLM, with this package's counts in requests."""

import json
import os
import sys
from importlib.util import find_spec
from typing import NoReturn

from transformers import AutoConfig

from ..checkpoints.adapters import load_processor
from .counts import RequestCounts


MIDDLEWARE = "tokenflex.inference.vllm_middleware.VisionTokenMiddleware"


def build_command(
    model_name_or_path: str,
    num_vision_tokens: int | tuple[int, int] | str | None = None,
    max_images: int = 32,
    host: str = "localhost",
    port: int = 8000,
    dtype: str = "auto",
    more: list[str] = (),
) -> list[str]:
    """
    The arguments of `vllm` that start an OpenAI-style server for a checkpoint.

    Args:
        model_name_or_path (`str`): Checkpoint folder or Hub id.
        num_vision_tokens (`int`, `tuple[int, int]` or `str`, *optional*):
            The count of requests that ask for none. Defaults to the checkpoint's. Memory is reserved for the largest
            trained count, or for this one if it is larger.
        max_images (`int`, *optional*, defaults to 32): Limit on the number of images in a request.
        host (`str`, *optional*, defaults to `"localhost"`): Address to listen at.
        port (`int`, *optional*, defaults to 8000): Its port.
        dtype (`str`, *optional*, defaults to `"auto"`): The dtype of weights and computation.
        more (`list[str]`, *optional*): Arguments for vLLM as they are, which count where they repeat one of these.

    Raises:
        ValueError: If the checkpoint cannot do the count, or it is `"auto"`.
    """
    counts = RequestCounts(
        load_processor(model_name_or_path), AutoConfig.from_pretrained(model_name_or_path), num_vision_tokens
    )
    if counts.default == "auto":
        raise ValueError("`num_vision_tokens`='auto': in vLLM no model chooses a count. Serve it without an engine.")
    options = {
        "--host": host,
        "--port": str(port),
        "--dtype": dtype,
        "--mm-processor-kwargs": json.dumps({"num_vision_tokens": counts.default}),
        "--limit-mm-per-prompt": json.dumps({"image": max_images}),
        "--media-io-kwargs": json.dumps({"image": {"image_mode": None}}),  # the processor reads images itself
        "--middleware": MIDDLEWARE,
    }
    flags = [word for option in options.items() for word in option]
    return ["serve", model_name_or_path, *flags, "--trust-request-mm-kwargs", *more]


def run_vllm(max_megapixels: float = 64, **options) -> NoReturn:
    """
    Becomes vLLM's server.

    Args:
        max_megapixels (`float`, *optional*, defaults to 64): Limit on each image.
        options: Of [`build_command`].

    Raises:
        ImportError: If vLLM is not installed.
    """
    if find_spec("vllm") is None:
        raise ImportError("`--engine vllm` needs vLLM: `pip install vllm` beside this package.")
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", *build_command(**options)]
    environment = {**os.environ, "VLLM_MAX_IMAGE_PIXELS": str(int(max_megapixels * 1e6))}
    os.execve(sys.executable, command, environment)
