"""
Accuracy and floating-point operations of ways to choose a count and resolution for each question: the head of
`tokenflex calibrate` beside cascades, agreement, every uniform choice and an oracle.

    python benchmarks/choosing.py --model_name_or_path outputs/demo/checkpoint

Everything that is fitted, and every threshold, comes from the calibration set; accuracy and cost are those of the test
set. The cost is that of all first tokens, as a share of the largest choice's: a cascade that moves up has read at the
cheaper choices too, with one pass of the tower at each resolution, and the head has read a question's text. The last
line printed is one JSON object.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForImageTextToText, AutoProcessor

import tokenflex  # noqa: F401  (makes the Auto classes know the model)
from tokenflex.choices_tokenflex import sort_choices
from tokenflex.data.arguments import DataArguments
from tokenflex.data.loading import load_rows
from tokenflex.evaluation.answers import mask_answers
from tokenflex.evaluation.calibrate import Observations, fit_head, foresee
from tokenflex.evaluation.flops import Flops, choosing_flops, count_flops
from tokenflex.evaluation.intervals import paired_test
from tokenflex.evaluation.metrics import exact_match
from tokenflex.evaluation.sweep import encode_questions
from tokenflex.generation_tokenflex import smallest_sufficient


GRID = np.linspace(0, 1, 501)


@dataclass(kw_only=True)
class Answers(Observations):
    """
    Args:
        confidence (`torch.Tensor` of shape `(num_questions, num_choices)`):
            The smallest probability of an answer's tokens.
        texts (`list[list[str]]`): Each question's answer at each choice.
        flops (`list[Flops]`): The operations of one answer's first token at each choice.
        sides (`list[tuple[int, int]]`): The resolution of each choice.
        reading (`int`): The operations that choosing by the text takes.
    """

    confidence: torch.Tensor
    texts: list[list[str]]
    flops: list[Flops]
    sides: list[tuple[int, int]]
    reading: int

    def price(self, *places: int) -> float:
        """What reading at some choices costs, one behind the other, as a share of the most expensive one."""
        seen = {self.sides[place]: self.flops[place].vision for place in places}
        spent = sum(seen.values()) + sum(self.flops[place].language for place in places)
        return spent / max(flops.total for flops in self.flops)

    @property
    def prices(self) -> np.ndarray:
        """What each choice costs alone."""
        return np.array([self.price(place) for place in range(len(self.choices))])


@torch.no_grad()
def observe(model, processor, rows) -> Answers:
    model.eval()
    choices, config = sort_choices(model.config.vision_token_choices), model.config
    choices = sorted(choices, key=lambda choice: count_flops(config, choice).total)
    hidden_states, right, images, confidence, texts, lengths = [], [], [], [], [], []
    for targets, inputs in encode_questions(model, processor, rows):
        lengths += (inputs["attention_mask"].bool() & (inputs["input_ids"] != config.image_token_id)).sum(-1).tolist()
        hidden_states.append(model.read_questions(**inputs))
        columns = []
        for count in choices:
            options = {
                "max_new_tokens": 16,
                "do_sample": False,
                "output_logits": True,
                "return_dict_in_generate": True,
            }
            output = model.generate(**inputs, num_vision_tokens=count, **options)
            answers = output.sequences[:, inputs["input_ids"].shape[1] :]
            said = torch.stack(output.logits, dim=1).softmax(-1).gather(-1, answers[..., None])[..., 0]
            kept = mask_answers(answers, model.generation_config.eos_token_id)
            columns.append(said.where(kept, 1.0).amin(1))
            for target, text in zip(targets, processor.tokenizer.batch_decode(answers, skip_special_tokens=True)):
                target.predictions[count] = text.strip()
        confidence.append(torch.stack(columns, dim=1))
        right += [[target.rate(exact_match, count) for count in choices] for target in targets]
        images += [target.index for target in targets]
        texts += [[target.predictions[count] for count in choices] for target in targets]
    text_tokens = round(sum(lengths) / len(lengths))
    flops = [count_flops(config, choice, text_tokens) for choice in choices]
    return Answers(
        choices,
        torch.cat(hidden_states),
        torch.tensor(right),
        torch.tensor(images),
        text_tokens,
        confidence=torch.cat(confidence),
        texts=texts,
        flops=flops,
        sides=[config.resolutions_for([choice])[0] for choice in choices],
        reading=choosing_flops(config, choices[:1], text_tokens)[choices[0]] - flops[0].total,
    )


@dataclass
class Choice:
    """The place among the choices that each question ends at, and what it has cost until there."""

    places: np.ndarray
    cost: np.ndarray

    def right(self, answers: Answers) -> np.ndarray:
        return answers.right.numpy()[np.arange(len(self.places)), self.places]


def cascade(answers: Answers, sure: np.ndarray) -> Choice:
    """Stops at the first choice at which it is sure; `sure` of shape `(num_questions, num_choices)`."""
    sure = sure.copy()
    sure[:, -1] = True
    places = sure.argmax(1)
    until = np.array([answers.price(*range(place + 1)) for place in range(len(answers.choices))])
    return Choice(places, until[places])


def agreement(answers: Answers) -> Choice:
    """Asks at the two cheapest choices; where the answers differ, at the most expensive."""
    same, last = np.array([texts[0] == texts[1] for texts in answers.texts]), len(answers.choices) - 1
    return Choice(np.where(same, 1, last), np.where(same, answers.price(0, 1), answers.price(0, 1, last)))


def by_head(answers: Answers, chances: torch.Tensor, tolerance: float) -> Choice:
    chosen = smallest_sufficient(chances, answers.choices, tolerance)
    places = np.array([answers.choices.index(choice) for choice in chosen])
    return Choice(places, answers.prices[places] + answers.reading / max(flops.total for flops in answers.flops))


def operating_point(curve: Callable[[float], Choice], answers: Answers, accuracy_loss: float) -> float:
    """The cheapest setting that keeps the largest choice's accuracy on these answers."""
    needed = float(answers.right[:, -1].mean()) - accuracy_loss
    tried = [(float(value), curve(float(value))) for value in GRID]
    kept = [(choice.cost.mean(), value) for value, choice in tried if choice.right(answers).mean() >= needed]
    if not kept:
        raise SystemExit(
            f"No setting keeps the largest choice's accuracy to {accuracy_loss}: allow more with --accuracy_loss."
        )
    return min(kept)[1]


def logit(confidence: torch.Tensor) -> torch.Tensor:
    return confidence.clamp(1e-6, 1 - 1e-6).logit()


def calibrated_confidence(fitted_on: Answers, answers: Answers) -> np.ndarray:
    """The chance that an answer is right, by logistic regression on its confidence, for each count by itself."""
    columns = []
    for place in range(len(answers.choices)):
        weight, bias = fit_head(logit(fitted_on.confidence[:, [place]]), fitted_on.right[:, [place]], 0.0)
        columns.append((logit(answers.confidence[:, [place]]) @ weight.T + bias).sigmoid())
    return torch.cat(columns, dim=1).numpy()


def methods(calibration: Answers, test: Answers) -> dict[str, tuple[Callable, Callable]]:
    """For each method, a setting's choices on the calibration set and on the test set."""
    held_out, penalty = foresee(calibration)
    weight, bias = fit_head(calibration.hidden_states, calibration.right, penalty)
    chances = (test.hidden_states @ weight.T + bias).sigmoid()
    ours, theirs = (calibrated_confidence(calibration, answers) for answers in (calibration, test))
    return {
        "cascade, smallest token probability": (
            lambda t: cascade(calibration, calibration.confidence.numpy() >= t),
            lambda t: cascade(test, test.confidence.numpy() >= t),
        ),
        "cascade, calibrated probability": (
            lambda t: cascade(calibration, ours >= t),
            lambda t: cascade(test, theirs >= t),
        ),
        "head on the question (`auto`)": (
            lambda t: by_head(calibration, held_out, t),
            lambda t: by_head(test, chances, t),
        ),
    }


def compare(calibration: Answers, test: Answers, accuracy_loss: float) -> dict:
    largest = test.right[:, -1].numpy()

    def row(choice: Choice) -> dict:
        difference = paired_test(choice.right(test), largest, groups=test.images.numpy())
        return {
            "accuracy": float(choice.right(test).mean()),
            "flops": float(choice.cost.mean()),
            "against_largest": [difference.difference, difference.low, difference.high],
        }

    rows, curves, numbers = {}, {}, np.arange(len(test.right))
    for place, choice in enumerate(test.choices):
        rows[f"always {choice}"] = row(Choice(np.full(len(numbers), place), np.full(len(numbers), test.price(place))))
    rows["agreement of the two cheapest"] = row(agreement(test))
    for name, (on_calibration, on_test) in methods(calibration, test).items():
        setting = operating_point(on_calibration, calibration, accuracy_loss)
        rows[name] = {**row(on_test(setting)), "setting": setting}
        points = {(float(c.cost.mean()), float(c.right(test).mean())) for c in map(on_test, map(float, GRID))}
        curves[name] = sorted(points)
    known = np.where(test.right.numpy().any(1), test.right.numpy().argmax(1), 0)
    rows["oracle"] = row(Choice(known, test.prices[known]))
    return {"rows": rows, "curves": curves}


def table(rows: dict) -> str:
    lines = [
        "| chosen by | questions right, % | FLOPs | against the largest choice, points |",
        "|---|---:|---:|---:|",
    ]
    largest = [name for name in rows if name.startswith("always")][-1]
    for name, row in rows.items():
        difference, low, high = (100 * value for value in row["against_largest"])
        against = "" if name == largest else f"{difference:+.1f} ({low:+.1f} to {high:+.1f})"
        lines.append(f"| {name} | {100 * row['accuracy']:.1f} | {row['flops']:.0%} | {against} |")
    return "\n".join(lines)


def plot(report: dict, path: Path) -> None:
    figure = Figure(figsize=(8.5, 5), dpi=110, layout="constrained")
    axes = figure.subplots()
    for name, points in report["curves"].items():
        line = axes.plot(*zip(*((100 * cost, 100 * accuracy) for cost, accuracy in points)), linewidth=1.4, label=name)
        row = report["rows"][name]
        axes.plot(100 * row["flops"], 100 * row["accuracy"], marker="*", markersize=14, color=line[0].get_color())
    uniform = [
        (100 * row["flops"], 100 * row["accuracy"])
        for name, row in report["rows"].items()
        if name.startswith("always")
    ]
    axes.plot(*zip(*uniform), color="black", marker="s", linestyle="--", label="the same choice for all")
    for name, marker in (("agreement of the two cheapest", "D"), ("oracle", "P")):
        row = report["rows"][name]
        axes.plot(100 * row["flops"], 100 * row["accuracy"], marker=marker, markersize=9, linestyle="", label=name)
    axes.set(xlabel="FLOPs to the first token, % of the largest choice", ylabel="questions right, %")
    axes.set_title("Choosing count and resolution (stars: settings found on the calibration set)")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--calibration", default="synthetic:1500@77", help="Default: %(default)s.")
    parser.add_argument("--test", default="synthetic:1000@4242", help="Default: %(default)s.")
    parser.add_argument("--accuracy_loss", type=float, default=0.002, help="Default: %(default)s.")
    parser.add_argument("--output_dir", default="outputs/choosing", help="Default: %(default)s.")
    args = parser.parse_args(argv)
    model = AutoModelForImageTextToText.from_pretrained(args.model_name_or_path)
    processor = AutoProcessor.from_pretrained(args.model_name_or_path)
    rows = [load_rows(DataArguments([name])) for name in (args.calibration, args.test)]
    calibration, test = (observe(model, processor, part) for part in rows)
    report = compare(calibration, test, args.accuracy_loss)
    folder = Path(args.output_dir)
    plot(report, folder / "choosing.png")
    (folder / "choosing.json").write_text(json.dumps(report, indent=2) + "\n")
    print(table(report["rows"]))
    print(
        json.dumps({name: [round(row["accuracy"], 4), round(row["flops"], 3)] for name, row in report["rows"].items()})
    )


if __name__ == "__main__":
    main()
