"""`tokenflex eval`: scores a checkpoint on a data set at every vision-token count."""

import json
import platform
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser

from ..files import write_file
from ..training.data import to_example
from ..training.datasets import SourceArguments, load_rows
from .latency import time_to_first_token
from .report import markdown_table, plot_png
from .sweep import predict, score


def evaluate(
    model,
    processor,
    dataset,
    counts: list[int] | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 16,
    latency_batch_size: int = 32,
    show_progress: bool = True,
) -> tuple[dict, list]:
    """
    Scores a model at every count and measures the time to first token beside it.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model.
        processor ([`TokenFlexProcessor`]): Its processor.
        dataset (sequence): Rows as [`to_example`] takes or returns them.
        counts (`list[int]`, *optional*): Vision-token counts. Defaults to the config's `vision_token_choices`.
        batch_size (`int`, *optional*, defaults to 64): Questions answered at a time.
        max_new_tokens (`int`, *optional*, defaults to 16): The longest answer in tokens.
        latency_batch_size (`int`, *optional*, defaults to 32): Prompts per batch when timing; 0 measures no time.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to draw a progress bar.

    Returns:
        `tuple[dict, list[Prediction]]`: The report and every answer.
    """
    counts = list(counts or model.config.vision_token_choices)
    predictions = predict(model, processor, dataset, counts, batch_size, max_new_tokens, show_progress)
    report = score(predictions, counts)
    if latency_batch_size:
        rows = (dataset[i % len(dataset)] for i in range(latency_batch_size))
        images = [image for row in rows for image in to_example(row).images[:1]]
        times = time_to_first_token(model, processor, images, predictions[0].question, counts) if images else None
        report["milliseconds_to_first_token"] = times
        report["latency_batch_size"] = len(images)
    report["machine"] = {
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return report, predictions


def save_report(folder: str | Path, report: dict, predictions: list, title: str) -> None:
    """Writes `results.json`, `results.md`, `results.png` and `predictions.jsonl`."""
    folder = Path(folder)
    write_file(folder / "results.json", json.dumps(report, indent=2) + "\n")
    write_file(folder / "results.md", markdown_table(report))
    write_file(folder / "results.png", plot_png(report, title))
    lines = [json.dumps(asdict(prediction), ensure_ascii=False) for prediction in predictions]
    write_file(folder / "predictions.jsonl", "\n".join(lines) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser(
        SourceArguments, prog="tokenflex eval", description="Score a checkpoint at every vision-token count."
    )
    parser.set_defaults(dataset_split="test")
    parser.add_argument("--model_name_or_path", required=True, help="Checkpoint folder or Hub id.")
    parser.add_argument(
        "--counts", type=int, nargs="+", help="Vision-token counts; the config's choices if not given."
    )
    parser.add_argument("--batch_size", type=int, default=64, help="Questions answered at a time.")
    parser.add_argument("--max_new_tokens", type=int, default=16, help="The longest answer in tokens.")
    parser.add_argument("--output_dir", default="outputs/eval", help="Where reports go.")
    args = parser.parse_args(argv)
    processor = AutoProcessor.from_pretrained(args.model_name_or_path)
    special_tokens = processor.tokenizer.all_special_tokens
    rows = load_rows(args.dataset, args.dataset_split, args.image_folder, args.on_bad_row, special_tokens)
    model = AutoModelForImageTextToText.from_pretrained(args.model_name_or_path, device_map="auto")
    report, predictions = evaluate(
        model, processor, rows, args.counts, batch_size=args.batch_size, max_new_tokens=args.max_new_tokens
    )
    save_report(args.output_dir, report, predictions, " + ".join(Path(name).stem for name in args.dataset))
    print(markdown_table(report))  # noqa: T201
    print(json.dumps({"accuracy": report["overall"], "output_dir": args.output_dir}))  # noqa: T201
