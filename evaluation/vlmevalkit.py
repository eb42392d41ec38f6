"""
Runs VLMEvalKit with TokenFLEX at one or several vision-token counts, which become models of their own, `tokenflex-64`
and so on. What stands behind `--` goes to VLMEvalKit's run.py:

    python -m tokenflex.evaluation.vlmevalkit --pretrained outputs/tokenflex-7b --num_vision_tokens 64 144 256 \\
        -- --data MMStar OCRBench --work-dir outputs/vlmevalkit

With a configuration file of VLMEvalKit the models are named there, as class `TokenFlexVLM`:

    python -m tokenflex.evaluation.vlmevalkit -- --config benchmarks.json
"""

import functools
import json
import os
import runpy
import sys
from argparse import ArgumentParser
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from ..checkpoints.files import write_file
from ..checkpoints.fingerprint import fingerprint_checkpoint, name_differences
from ..inference.counts import parse_num_vision_tokens
from .harness import HarnessModel


CLAIM = "tokenflex.json"
PLACES = ("class", "pretrained", "device")  # on which no answer depends


class VisionLanguageModel(HarnessModel):
    """
    TokenFLEX as VLMEvalKit's models are asked; `TokenFlexVLM` is this class with `vlmeval.vlm.base.BaseModel` as its
    base. Prompts are the data sets' own.

    Args:
        pretrained (`str`):
            A checkpoint folder or Hub id.
        num_vision_tokens (`int`, `str` or `list[int]`, *optional*):
            The vision-token count of every image, or the grid, as `[rows, columns]` or `"8x12"`. Defaults to the
            checkpoint's.
        max_new_tokens (`int`, *optional*, defaults to 1024):
            The longest answer in tokens.
        options:
            `device`, `dtype` and `attn_implementation`; others are refused by name.
    """

    INTERLEAVE = True

    def __init__(
        self,
        pretrained: str,
        num_vision_tokens: int | str | list[int] | None = None,
        max_new_tokens: int = 1024,
        **options,
    ):
        super().__init__(pretrained, num_vision_tokens, **options)
        self.max_new_tokens = max_new_tokens

    def generate_inner(self, message: list[dict], dataset: str | None = None) -> str:
        """
        Answers one question.

        Args:
            message (`list[dict]`):
                Its parts in order, as `{"type": "text" or "image", "value": text or path}`.
            dataset (`str`, *optional*):
                Not used: the prompt does not depend on it.

        Returns:
            `str`: The answer.
        """
        return self.chat_inner([{"role": "user", "content": message}], dataset)

    def chat_inner(self, messages: list[dict], dataset: str | None = None) -> str:
        """Answers the last message of a conversation, whose contents are as in `generate_inner`."""
        conversation = [
            {
                "role": message["role"],
                "content": [{"type": part["type"], part["type"]: part["value"]} for part in message["content"]],
            }
            for message in messages
        ]
        return self.answer([conversation], max_new_tokens=self.max_new_tokens)[0].text


@functools.cache
def _model_class() -> type:
    from vlmeval.vlm.base import BaseModel

    class TokenFlexVLM(VisionLanguageModel, BaseModel):
        __doc__ = VisionLanguageModel.__doc__

    return TokenFlexVLM


def __getattr__(name: str):
    # VLMEvalKit asks for a subclass of its own class, and need not be installed.
    if name == "TokenFlexVLM":
        return _model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def model_name(num_vision_tokens: int | tuple[int, int] | None) -> str:
    """
    Name of the model at a count, in VLMEvalKit's arguments and files.

    Example:

    ```python
    >>> from tokenflex.evaluation.vlmevalkit import model_name

    >>> [model_name(count) for count in (64, (8, 12), "auto", None)]
    ['tokenflex-64', 'tokenflex-8x12', 'tokenflex-auto', 'tokenflex']
    ```
    """
    if num_vision_tokens is None:
        return "tokenflex"
    sides = num_vision_tokens if isinstance(num_vision_tokens, tuple) else (num_vision_tokens,)
    return "tokenflex-" + "x".join(map(str, sides))


def register(pretrained: str, counts: list, **options) -> list[str]:
    """
    Adds a checkpoint to VLMEvalKit's models, once per count.

    Args:
        pretrained (`str`): A checkpoint folder or Hub id.
        counts (`list`): Vision-token counts or grids; `None` is the checkpoint's own.
        options: More arguments of `TokenFlexVLM`.

    Returns:
        `list[str]`: The models' names.
    """
    from vlmeval.config import supported_VLM

    names = [model_name(count) for count in counts]
    for name, count in zip(names, counts):
        supported_VLM[name] = functools.partial(_model_class(), pretrained, num_vision_tokens=count, **options)
    return names


def claim(work_dir: str | Path, models: Mapping[str, dict]) -> None:
    """
    Notes of which checkpoint the answers are that VLMEvalKit keeps under a model's name, and goes on from.

    Args:
        work_dir (`str` or `Path`): VLMEvalKit's `--work-dir`.
        models (`Mapping[str, dict]`): Arguments of `TokenFlexVLM` by the models' names.

    Raises:
        ValueError: If it holds answers of another checkpoint, or of other arguments.
    """
    fingerprints = {path: fingerprint_checkpoint(path) for path in {model["pretrained"] for model in models.values()}}
    for name, model in models.items():
        decisive = {key: value for key, value in model.items() if key not in PLACES and value is not None}
        ours = {**fingerprints[model["pretrained"]], **json.loads(json.dumps(decisive))}
        file = Path(work_dir, name, CLAIM)
        theirs = json.loads(file.read_text()) if file.is_file() else ours
        if differing := name_differences(theirs, ours):
            raise ValueError(
                f"{file.parent} holds answers of another model, which differs in {differing}: name another --work-dir "
                "behind `--`, or delete it."
            )
        write_file(file, json.dumps(ours, indent=2) + "\n")


def find_run_py() -> Path:
    """VLMEvalKit's run.py, which lies beside its package in a clone, and inside it in some builds."""
    spec = find_spec("vlmeval")
    if spec is None:
        raise ValueError("VLMEvalKit is not installed: clone open-compass/VLMEvalKit and `pip install -e` the clone.")
    package = Path(spec.submodule_search_locations[0])
    for path in (package / "run.py", package.parent / "run.py"):
        if path.is_file():
            return path
    raise ValueError(
        f"No run.py in {package} nor beside it: install VLMEvalKit from its clone with `pip install -e`, or name the "
        "file with --run_py."
    )


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    ours, theirs = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = ArgumentParser(
        prog="python -m tokenflex.evaluation.vlmevalkit", description=__doc__.split("\n\n")[0].replace("\n", " ")
    )
    parser.add_argument("--pretrained", help="Checkpoint folder or Hub id.")
    parser.add_argument(
        "--num_vision_tokens",
        nargs="+",
        default=[None],
        help="Counts such as 64, grids such as 8x12, or low, high, auto. Default: the checkpoint's.",
    )
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="Longest answer. Default: %(default)s.")
    parser.add_argument("--attn_implementation", help="As in transformers.")
    parser.add_argument("--run_py", help="VLMEvalKit's run.py. Default: the installed one.")
    args = parser.parse_args(ours)
    has_config = any(argument.split("=")[0] == "--config" for argument in theirs)
    if has_config == (args.pretrained is not None):
        parser.error("name the models either by --pretrained or, behind `--`, by VLMEvalKit's --config")
    if any(argument.split("=")[0] == "--model" for argument in theirs):
        parser.error("leave out VLMEvalKit's --model: it is filled in with the counts' names")
    try:
        counts = [parse_num_vision_tokens(count) for count in args.num_vision_tokens]
        run_py = args.run_py or find_run_py()
    except ValueError as error:
        parser.error(str(error))

    import vlmeval.vlm

    vlmeval.vlm.TokenFlexVLM = _model_class()
    theirs_parser = ArgumentParser(add_help=False, allow_abbrev=False)
    theirs_parser.add_argument("--work-dir", default="./outputs")
    theirs_parser.add_argument("--config")
    known, _ = theirs_parser.parse_known_args(theirs)
    if args.pretrained is not None:
        options = {"max_new_tokens": args.max_new_tokens, "attn_implementation": args.attn_implementation}
        names = register(args.pretrained, counts, **options)
        models = {
            name: {"pretrained": args.pretrained, "num_vision_tokens": count, **options}
            for name, count in zip(names, counts)
        }
        theirs = [*theirs, "--model", *names]
    else:
        listed = json.loads(Path(known.config).read_text())["model"]
        models = {name: model for name, model in listed.items() if model.get("class") == "TokenFlexVLM"}
    claim(os.environ.get("MMEVAL_ROOT", known.work_dir), models)
    sys.argv = [str(run_py), *theirs]
    runpy.run_path(str(run_py), run_name="__main__")


if __name__ == "__main__":
    main()
