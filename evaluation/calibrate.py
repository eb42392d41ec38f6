"""`tokenflex calibrate`: teaches a checkpoint to choose its number of vision tokens for each question."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser

from ..checkpoints.adapters import refuse_adapters
from ..checkpoints.files import save_checkpoint, update_checkpoint, write_file
from ..checkpoints.provenance import add_stage, public_names, read_provenance
from ..choices_tokenflex import count_tokens, sort_choices
from ..data.arguments import SourceArguments
from ..data.loading import load_rows
from ..generation_tokenflex import TokenFlexChooser, smallest_sufficient
from .flops import choosing_flops, count_flops
from .metrics import exact_match
from .sweep import answer_questions, encode_questions


ACCURACY_LOSS = 0.005
NUM_FOLDS = 5
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
TOLERANCES = np.linspace(0, 1, 201)


@dataclass
class Observations:
    """
    A model's results at every count, question by question.

    Args:
        choices (`list[int | str]`): The counts, also with resolutions, the cheapest first.
        hidden_states (`torch.Tensor` of shape `(num_questions, hidden_size)`): See `read_questions`.
        right (`torch.Tensor` of shape `(num_questions, num_choices)`): 1 for a right answer, else 0.
        images (`torch.Tensor` of shape `(num_questions,)`): The row of the data set that each question is about.
        text_tokens (`int`, *optional*, defaults to 32): The mean length of the prompts without their images.
    """

    choices: list[int | str]
    hidden_states: torch.Tensor
    right: torch.Tensor
    images: torch.Tensor
    text_tokens: int = 32


@torch.no_grad()
def observe(
    model, processor, dataset, batch_size: int = 64, max_new_tokens: int = 16, show_progress: bool = True
) -> Observations:
    """Reads and answers every question of a data set at every choice; arguments as for [`predict`]."""
    model.eval()
    choices = list(model.config.vision_token_choices)
    hidden_states, right, images, lengths = [], [], [], []
    for targets, inputs in encode_questions(model, processor, dataset, batch_size, show_progress):
        lengths += (
            (inputs["attention_mask"].bool() & (inputs["input_ids"] != processor.image_token_id)).sum(-1).tolist()
        )
        hidden_states.append(model.read_questions(**inputs).cpu())
        answer_questions(model, processor, targets, inputs, choices, max_new_tokens)
        right += [[t.rate(exact_match, count) for count in choices] for t in targets]
        images += [target.index for target in targets]
    text_tokens = round(sum(lengths) / max(1, len(lengths)))
    order = sorted(range(len(choices)), key=lambda i: count_flops(model.config, choices[i], text_tokens).total)
    choices, right = [choices[i] for i in order], torch.tensor(right)[:, order]
    return Observations(choices, torch.cat(hidden_states), right, torch.tensor(images), text_tokens)


def fit_head(hidden_states: torch.Tensor, right: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Logistic regression of right answers at each count on standardized hidden states.

    Args:
        hidden_states (`torch.Tensor` of shape `(num_questions, hidden_size)`): The features.
        right (`torch.Tensor` of shape `(num_questions, num_choices)`): 1 for a right answer, else 0.
        penalty (`float`): The weight of the squared norm.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Weight of shape `(num_choices, hidden_size)` and bias of shape
        `(num_choices,)`, for hidden states as they come.
    """
    mean, scale = hidden_states.mean(0), hidden_states.std(0).clamp_min(1e-6)
    features = ((hidden_states - mean) / scale).double()
    weight = torch.zeros(right.shape[1], features.shape[1], dtype=torch.double, requires_grad=True)
    bias = torch.zeros(right.shape[1], dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = functional.binary_cross_entropy_with_logits(features @ weight.T + bias, right.double())
        loss = loss + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight = weight.detach().float() / scale
    return weight, bias.detach().float() - weight @ mean


def foresee(observations: Observations) -> tuple[torch.Tensor, float]:
    """
    Each question's chances by heads that were fitted without its image, at the penalty that foresees best.

    Args:
        observations ([`Observations`]): Results from [`observe`].

    Returns:
        `tuple[torch.Tensor, float]`: Chances of shape `(num_questions, num_choices)`, and the penalty.
    """
    folds = observations.images % NUM_FOLDS
    results = []
    for penalty in PENALTIES:
        chances = torch.empty_like(observations.right)
        for fold in range(NUM_FOLDS):
            held_out = folds == fold
            weight, bias = fit_head(observations.hidden_states[~held_out], observations.right[~held_out], penalty)
            chances[held_out] = (observations.hidden_states[held_out] @ weight.T + bias).sigmoid()
        loss = functional.binary_cross_entropy(chances.clamp(1e-6, 1 - 1e-6), observations.right)
        results.append((float(loss), penalty, chances))
    _, penalty, chances = min(results, key=lambda result: result[0])
    return chances, penalty


@dataclass
class OperatingPoint:
    """
    Args:
        tolerance (`float`): See `choose_vision_tokens`.
        accuracy (`float`): The share of right answers at the chosen counts.
        vision_tokens (`float`): The mean of the chosen counts.
        flops (`float`): The mean of floating-point operations to the first token, choosing and vision tower included,
            as a share of the most expensive choice's.
    """

    tolerance: float
    accuracy: float
    vision_tokens: float
    flops: float


def trace(
    chances: torch.Tensor,
    observations: Observations,
    costs: Sequence[float],
    tolerances: Sequence[float] = TOLERANCES,
) -> list[OperatingPoint]:
    """
    Lists the [`OperatingPoint`] that each tolerance leads to.

    Args:
        chances (`torch.Tensor` of shape `(num_questions, num_choices)`): Chances from [`foresee`].
        observations ([`Observations`]): Results from [`observe`].
        costs (`Sequence[float]`): Of choosing and answering at each choice, as shares of the most expensive answer.
        tolerances (`Sequence[float]`, *optional*): Defaults to 201 values from 0 to 1.
    """
    points = []
    for tolerance in tolerances:
        chosen = smallest_sufficient(chances, observations.choices, float(tolerance))
        columns = torch.tensor([observations.choices.index(count) for count in chosen])
        accuracy = observations.right.gather(1, columns[:, None]).mean()
        tokens = sum(map(count_tokens, chosen)) / len(chosen)
        flops = float(torch.tensor(costs, dtype=torch.float)[columns].mean())
        points.append(OperatingPoint(float(tolerance), float(accuracy), tokens, flops))
    return points


def calibrate(
    model, observations: Observations, accuracy_loss: float | None = ACCURACY_LOSS, mean_tokens: float | None = None
) -> dict:
    """
    Fits the head and finds the tolerance, and gives both to the model.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model that was observed.
        observations ([`Observations`]): Results on data that it is not going to be tested on.
        accuracy_loss (`float`, *optional*, defaults to 0.005):
            Accuracy, from 0 to 1, that may be lost against the largest choice; the fewest floating-point operations
            that keep it are taken.
        mean_tokens (`float`, *optional*):
            In its place, how many vision tokens may be read per image on average; the best accuracy within it is
            taken.

    Returns:
        `dict`: `point` (the [`OperatingPoint`] that was found, foreseen on held-out folds), `uniform` accuracies by
        count, `oracle` (accuracy and tokens if the smallest right count were always known), `curve` and `penalty`.

    Raises:
        ValueError: If no tolerance reaches the target.
    """
    chances, penalty = foresee(observations)
    asked = (model.config, observations.choices, observations.text_tokens)
    most = max(count_flops(model.config, choice, observations.text_tokens).total for choice in observations.choices)
    curve = trace(chances, observations, [flops / most for flops in choosing_flops(*asked).values()])
    uniform = dict(zip(observations.choices, observations.right.mean(0).tolist()))
    if mean_tokens is not None:
        within = [point for point in curve if point.vision_tokens <= mean_tokens]
        target = f"`mean_tokens`={mean_tokens}: the least that is read is {curve[-1].vision_tokens:.1f}"
        point = max(within, key=lambda point: (point.accuracy, -point.vision_tokens), default=None)
    else:
        needed = uniform[sort_choices(observations.choices)[-1]] - accuracy_loss
        within = [point for point in curve if point.accuracy >= needed]
        target = (
            f"`accuracy_loss`={accuracy_loss}: choosing reaches {max(p.accuracy for p in curve):.4f}, not {needed:.4f}"
        )
        point = min(within, key=lambda point: (point.flops, -point.accuracy), default=None)
    if point is None:
        raise ValueError(f"{target}. Allow more, or calibrate on more data.")
    weight, bias = fit_head(observations.hidden_states, observations.right, penalty)
    chooser = TokenFlexChooser(*weight.shape).to(device=model.device, dtype=model.dtype)
    chooser.weight.copy_(weight)
    chooser.bias.copy_(bias)
    model.model.vision_token_chooser = chooser
    choices = list(observations.choices)
    model.config.vision_token_chooser = {"choices": choices, "tolerance": point.tolerance, "reads": "text"}
    known = [
        count_tokens(next((choice for choice, hit in zip(observations.choices, row) if hit), observations.choices[0]))
        for row in observations.right.tolist()
    ]
    return {
        "point": asdict(point),
        "uniform": uniform,
        "oracle": {"accuracy": float(observations.right.amax(1).mean()), "vision_tokens": sum(known) / len(known)},
        "penalty": penalty,
        "questions": len(observations.right),
        "curve": [asdict(point) for point in curve],
    }


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser(
        SourceArguments,
        prog="tokenflex calibrate",
        description="Teach a checkpoint to choose its vision tokens for each question (`--num_vision_tokens auto`).",
    )
    parser.add_argument("--model_name_or_path", required=True, help="Checkpoint folder or Hub id.")
    parser.add_argument(
        "--output_dir",
        help="Folder for the calibrated checkpoint. Default: the checkpoint is changed in place.",
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--accuracy_loss",
        type=float,
        default=ACCURACY_LOSS,
        help="Accuracy that may be lost against the largest count, from 0 to 1.",
    )
    target.add_argument("--mean_tokens", type=float, help="Vision tokens that may be read per image on average.")
    parser.add_argument("--batch_size", type=int, default=64, help="Questions answered at a time.")
    parser.add_argument("--max_new_tokens", type=int, default=16, help="The longest answer in tokens.")
    args = parser.parse_args(argv)
    report = calibrate_checkpoint(args, *parser.parse_dict(vars(args), allow_extra_keys=True))
    print(json.dumps({name: value for name, value in report.items() if name != "curve"}))  # noqa: T201


def calibrate_checkpoint(args: argparse.Namespace, sources: SourceArguments) -> dict:
    path = Path(args.model_name_or_path)
    if args.output_dir is None and not path.is_dir():
        raise ValueError(f"`output_dir` is needed: {args.model_name_or_path} is no folder that could be changed.")
    refuse_adapters(args.model_name_or_path)
    processor = AutoProcessor.from_pretrained(args.model_name_or_path)
    rows = load_rows(sources, processor)
    model = AutoModelForImageTextToText.from_pretrained(args.model_name_or_path, device_map="auto")
    observations = observe(model, processor, rows, args.batch_size, args.max_new_tokens)
    report = calibrate(model, observations, args.accuracy_loss, args.mean_tokens)
    known = read_provenance(args.model_name_or_path)
    provenance = add_stage(known, "calibration", data=public_names(args.dataset))
    if args.output_dir is not None:
        save_checkpoint(args.output_dir, model, processor, provenance=provenance)
    else:
        update_checkpoint(path, model, processor, provenance)
    write_file(Path(args.output_dir or path) / "calibration.json", json.dumps(report, indent=2) + "\n")
    return report
