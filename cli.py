"""The `tokenflex` command: every verb is a function elsewhere."""

import argparse
import importlib

from . import __version__


VERBS = {
    "adopt": ("towers.adopt", "make a fixed-count vision-language model token-flexible"),
    "init": ("towers.init", "make a new tiny checkpoint for a data set of one's own"),
    "build": ("towers.build", "join a pretrained vision tower and language model to a new checkpoint"),
    "train": ("training.train", "train a checkpoint with vision-token counts drawn per step"),
    "eval": ("evaluation.evaluator", "score a checkpoint on a data set at every vision-token count"),
    "label": ("evaluation.label", "answer questions about images, as data to tune a checkpoint's other counts on"),
    "calibrate": ("evaluation.calibrate", "teach a checkpoint to choose its count for each question"),
    "paper-table": ("evaluation.paper_table", "put harnesses' scores beside the paper's"),
    "reproduce": (
        "research.reproduce",
        "run the paper's experiment in small: fixed models, flexible ones, baselines",
    ),
    "push": ("hub.push", "publish a checkpoint on the Hub with a model card made from its evaluation"),
    "serve": ("inference.serve", "answer OpenAI-style requests over HTTP, with a count for each"),
    "page": ("inference.page", "open a page to try a checkpoint at several counts side by side"),
    "generate": ("inference.ask", "answer a question about an image at one or several counts"),
    "quickstart": ("training.quickstart", "train, evaluate and try the embedded tiny model, start to end"),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="tokenflex",
        description="TokenFLEX: one vision-language model, any number of vision tokens.",
        epilog="`tokenflex VERB --help` lists a verb's arguments.",
    )
    parser.add_argument("--version", action="version", version=f"tokenflex {__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error came from")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, (_, summary) in VERBS.items():
        verbs.add_parser(verb, help=summary, add_help=False)
    args, rest = parser.parse_known_args(argv)
    module = importlib.import_module(f".{VERBS[args.verb][0]}", __package__)
    try:
        module.main(rest)
    except Exception as error:
        if args.traceback:
            raise
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        raise SystemExit(f"tokenflex {args.verb}: {kind}{error} (--traceback, before the verb, shows where)") from None
