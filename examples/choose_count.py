"""
Scores a checkpoint at several vision-token counts and names the cheapest that is as good as the best, within a
tolerance.

    python examples/choose_count.py --model_name_or_path outputs/demo/checkpoint --dataset validation.parquet \
        --tolerance 0.01

A calibrated checkpoint (`tokenflex calibrate`) is also scored at `auto`. Choose on other rows than you report on.
"""

import argparse

from transformers import AutoModelForImageTextToText, AutoProcessor

from tokenflex.choices_tokenflex import parse_choice
from tokenflex.data.arguments import DataArguments
from tokenflex.data.loading import load_rows
from tokenflex.evaluation import evaluate
from tokenflex.evaluation.report import markdown_table


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Find the cheapest vision-token count that is good enough.")
    parser.add_argument("--model_name_or_path", required=True, help="Checkpoint folder or Hub id.")
    parser.add_argument("--dataset", required=True, help="Parquet, JSON, JSONL or CSV file of rows.")
    parser.add_argument(
        "--num_vision_tokens",
        nargs="+",
        type=parse_choice,
        help="Counts to try, `auto` among them. Default: the model config's, and `auto` if it is calibrated.",
    )
    parser.add_argument("--metric", default="exact_match", help="See docs/evaluation.md. Default: %(default)s.")
    parser.add_argument("--tolerance", type=float, default=0.01, help="Score that may be lost. Default: %(default)s.")
    parser.add_argument("--batch_size", type=int, default=64, help="Questions at a time. Default: %(default)s.")
    return parser.parse_args()


def cheapest(report: dict, tolerance: float) -> int | str:
    """The count that costs the fewest FLOPs, of those whose mean score is within `tolerance` of the best."""
    needed = max(report["mean"].values()) - tolerance
    good = [count for count, mean in report["mean"].items() if mean >= needed]
    return min(good, key=report.get("gflops_to_first_token", report["vision_tokens"]).get)


def main() -> None:
    args = parse_args()
    processor = AutoProcessor.from_pretrained(args.model_name_or_path)
    model = AutoModelForImageTextToText.from_pretrained(args.model_name_or_path, device_map="auto")
    rows = load_rows(DataArguments([args.dataset]), processor)
    report, _ = evaluate(model, processor, rows, args.num_vision_tokens, args.batch_size, metric=args.metric)
    print(markdown_table(report))
    count = cheapest(report, args.tolerance)
    best = max(report["mean"], key=report["mean"].get)
    print(
        f"Use num_vision_tokens={count!r}: {report['mean'][count]:.1%} at {report['vision_tokens'][count]:.1f} tokens "
        f"read per image; the best, {best}, has {report['mean'][best]:.1%} at {report['vision_tokens'][best]:.1f}."
    )


if __name__ == "__main__":
    main()
