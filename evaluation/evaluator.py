"""`tokenflex eval`: scores a checkpoint on a data set at every vision-token count."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import AutoModelForImageTextToText, HfArgumentParser

from ..checkpoints.adapters import load_processor
from ..checkpoints.fingerprint import fingerprint
from ..checkpoints.provenance import public_names
from ..choices_tokenflex import count_tokens, parse_choice, sort_choices
from ..data.arguments import SourceArguments
from ..data.examples import to_example
from ..data.loading import load_rows
from .cost import describe_machine, measure_cost
from .flops import choosing_flops, count_flops
from .intervals import mean_over_families, paired_test
from .metrics import METRICS, get_metric, multiple_choice
from .progress import predict_on_and_on
from .report import markdown_table, save_report
from .sweep import Prediction, questions_of, score


PARTIAL = "predictions.partial.jsonl"


def evaluate(
    model,
    processor,
    dataset,
    counts: Sequence[int | str] | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 16,
    latency_batch_size: int = 32,
    show_progress: bool = True,
    metric: str = "exact_match",
    partial_file: str | Path | None = None,
) -> tuple[dict, list]:
    """
    Scores a model at every count, with intervals and comparisons, and puts what a count costs beside its score.
    Processes that were launched together share the rows; each returns the whole report.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model.
        processor ([`TokenFlexProcessor`]): Its processor.
        dataset (sequence): Rows as [`to_example`] takes or returns them.
        counts (`Sequence[int | str]`, *optional*):
            Vision-token counts, `"auto"` among them if the model is calibrated. Defaults to the config's
            `vision_token_choices`, and `"auto"` if it can.
        batch_size (`int`, *optional*, defaults to 64): Questions answered at a time.
        max_new_tokens (`int`, *optional*, defaults to 16): The longest answer in tokens.
        latency_batch_size (`int`, *optional*, defaults to 32):
            Prompts per batch when costs are measured; 0 measures none.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to draw a progress bar.
        metric (`str`, *optional*, defaults to `"exact_match"`): One of `METRICS`.
        partial_file (`str` or `Path`, *optional*):
            File that keeps answers while it runs, to go on from. One of another model, other rows or arguments is
            refused.

    Returns:
        `tuple[dict, list[Prediction]]`: The report, [`score`]'s, [`compare`]'s and [`measure_cost`]'s figures,
        `gflops_to_first_token` of one image and 32 tokens of text, and the model's [`fingerprint`]; and every answer.

    Raises:
        ValueError: If a count or the metric is none, or `multiple_choice` is to score a question without options.
    """
    rate = get_metric(metric)
    can_choose = model.config.vision_token_chooser is not None
    counts = list(counts or [*model.config.vision_token_choices, *["auto"] * can_choose])
    for i, count in enumerate(counts):
        if isinstance(count, (tuple, list)) or count in ("low", "high"):
            raise ValueError(f"`counts[{i}]`={count!r}: scores are told apart by the count n*n, so give that.")
    state = _processes()
    share = range(state.process_index, len(dataset), state.num_processes)
    if rate is multiple_choice:
        _check_letters(dataset)  # by every process, or one would stop while the others wait for it
    options = (model, processor, dataset, counts, batch_size, max_new_tokens, show_progress and state.is_main_process)
    [checkpoint] = broadcast_object_list([fingerprint(model, processor) if state.is_main_process else None])
    run = {**checkpoint, "rows": len(dataset), "counts": counts, "metric": metric, "max_new_tokens": max_new_tokens}
    run = json.loads(json.dumps({**run, "processes": state.num_processes}))
    with tempfile.TemporaryDirectory() as folder:
        file = _of_process(partial_file or Path(folder, PARTIAL))
        predictions = predict_on_and_on(file, run, *options, indices=share)
    if state.num_processes > 1:
        # A row's questions stay in order, rows of all processes are put in theirs.
        predictions = sorted(gather_object(predictions), key=lambda prediction: prediction.index)
    report = {
        "checkpoint": checkpoint,
        "metric": metric,
        **score(predictions, counts, metric),
        **compare(predictions, counts, metric),
    }
    named = [count for count in counts if count != "auto"]
    report["vision_tokens"] = {count: count_tokens(count) for count in named}
    if "auto" in counts:
        read = [count_tokens(p.chosen) for p in predictions if p.chosen is not None]
        report["vision_tokens"]["auto"] = sum(read) / max(1, len(read))
    if latency_batch_size and state.is_main_process:
        rows = (dataset[i % len(dataset)] for i in range(latency_batch_size))
        images = [image for row in rows for image in to_example(row).images[:1]]
        if images:
            report |= measure_cost(model, processor, images, predictions[0].question, counts)
            report["gflops_to_first_token"] = {n: count_flops(model.config, n).total / 1e9 for n in named}
            if "auto" in counts:
                costs = choosing_flops(model.config, model.config.vision_token_chooser["choices"])
                chosen = [costs[p.chosen] for p in predictions if p.chosen is not None]
                report["gflops_to_first_token"]["auto"] = sum(chosen) / max(1, len(chosen)) / 1e9
        report["latency_batch_size"] = len(images)
    report["machine"] = {**describe_machine(model, processor), "processes": state.num_processes}
    return report, predictions


def _check_letters(dataset) -> None:
    """Refuses rows that `multiple_choice` cannot score, before any is answered."""
    for index in range(len(dataset)):
        for _, target in questions_of(index, to_example(dataset[index])):
            try:
                target.rate_reply(multiple_choice, "")
            except ValueError as error:
                raise ValueError(
                    f"Row {index} has no options, and `metric='multiple_choice'` cannot score it: {error} Any other "
                    "metric scores it, and questions with options by their letters as well."
                ) from None


def _processes() -> PartialState:
    # Of launched processes without a GPU, accelerate makes one group only if it is told that they run on CPUs.
    return PartialState(cpu="LOCAL_RANK" in os.environ and not torch.cuda.is_available())


def _of_process(path: str | Path) -> Path:
    """Each process keeps its answers in a file of its own."""
    state, path = _processes(), Path(path)
    return path if state.num_processes == 1 else path.with_suffix(f".{state.process_index}{path.suffix}")


def compare(predictions: Sequence[Prediction], counts: Sequence[int | str], metric: str = "exact_match") -> dict:
    """
    Tells how sure the scores are. Questions about one image are drawn, and change sides, together.

    Args:
        predictions (`Sequence[Prediction]`): Answers from [`predict`].
        counts (`Sequence[int | str]`): The counts to compare.
        metric (`str`, *optional*, defaults to `"exact_match"`): One of `METRICS`.

    Returns:
        `dict`: Per count `interval`, the 95 % bootstrap interval of its mean over families, and `against_largest`, the
        difference of its accuracy over questions from the largest count's with its 95 % interval and the two-sided
        p-value of a paired permutation test.
    """
    rate, images = get_metric(metric), [prediction.index for prediction in predictions]
    families = [prediction.family for prediction in predictions]
    rates = {count: [p.rate(rate, count) for p in predictions] for count in counts}
    largest = next(iter(sort_choices([count for count in counts if count != "auto"])[-1:]), None)
    return {
        "interval": {count: mean_over_families(rates[count], families, groups=images)[1:] for count in counts},
        "against_largest": {
            count: paired_test(rates[count], rates[largest], groups=images)._asdict()
            for count in counts
            if largest is not None and count != largest
        },
    }


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser(
        SourceArguments, prog="tokenflex eval", description="Score a checkpoint at every vision-token count."
    )
    parser.set_defaults(dataset_split="test")
    parser.add_argument("--model_name_or_path", required=True, help="Checkpoint folder or Hub id.")
    parser.add_argument(
        "--num_vision_tokens",
        dest="counts",
        metavar="COUNT",
        type=lambda text: text if text == "auto" else parse_choice(text),
        nargs="+",
        help="Vision-token counts, or `auto`. Default: the config's choices, and `auto` for a calibrated checkpoint.",
    )
    parser.add_argument("--metric", default="exact_match", choices=list(METRICS), help="Metric that scores answers.")
    parser.add_argument("--batch_size", type=int, default=64, help="Questions answered at a time.")
    parser.add_argument("--max_new_tokens", type=int, default=16, help="The longest answer in tokens.")
    parser.add_argument(
        "--latency_batch_size",
        type=int,
        default=32,
        help="Prompts per batch when costs are measured; 0 measures none.",
    )
    parser.add_argument("--output_dir", default="outputs/eval", help="Folder for reports.")
    args = parser.parse_args(argv)
    processor = load_processor(args.model_name_or_path)
    rows = load_rows(*parser.parse_dict(vars(args), allow_extra_keys=True), processor)
    state = _processes()
    place = "auto" if state.num_processes == 1 else state.device
    model = AutoModelForImageTextToText.from_pretrained(args.model_name_or_path, device_map=place)
    partial_file = Path(args.output_dir) / PARTIAL
    report, predictions = evaluate(
        model,
        processor,
        rows,
        args.counts,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        latency_batch_size=args.latency_batch_size,
        metric=args.metric,
        partial_file=partial_file,
    )
    report |= {"dataset": public_names(args.dataset), "dataset_split": args.dataset_split}
    if state.is_main_process:
        save_report(args.output_dir, report, predictions, " + ".join(Path(name).stem for name in args.dataset))
    state.wait_for_everyone()
    _of_process(partial_file).unlink(missing_ok=True)
    state.print(markdown_table(report))
    state.print(json.dumps({"accuracy": report["overall"], "output_dir": args.output_dir}))
    state.destroy_process_group()
