"""Answers and scores of one model at every vision-token count."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm

from ..choices_tokenflex import resolve_named_count
from ..data.examples import Example, to_example
from ..data.placing import place_images, tokenize_prompts
from ..inference.decoding import GREEDY
from ..placeholders_tokenflex import TokenFlexImageOutput, asked_grids
from .answers import normalize
from .choices import find_choice
from .metrics import get_metric, multiple_choice
from .options import rate_option


@dataclass
class Prediction:
    """
    Args:
        index (`int`): The row in the data set.
        family (`str`): The kind of question, `"all"` where the data names none.
        question (`str`): The question's text.
        answer (`str`): The expected answer; of several the commonest.
        predictions (`dict[int | str, str]`): The model's answer at each count.
        chosen (`int` or `str`, *optional*): The count that `"auto"` chose, if that is among the counts.
        references (`list[str]`, *optional*): All expected answers, where there are several.
        options (`list[str]`, *optional*): The options, where there are some; answers are then letters.
        cut (`list[int | str]`, *optional*): The counts at which the answer did not end within the tokens it was given.
    """

    index: int
    family: str
    question: str
    answer: str
    predictions: dict[int | str, str]
    chosen: int | str | None = None
    references: list[str] | None = None
    options: list[str] | None = None
    cut: list[int | str] = field(default_factory=list)

    def rate(self, rate: Callable[..., float], count: int | str) -> float:
        """
        Scores the answer at a count, that to a question with options as [`rate_option`] does.

        Args:
            rate (`Callable`): A metric, as [`get_metric`] returns it.
            count (`int` or `str`): A count.
        """
        return self.rate_reply(rate, self.predictions[count])

    def rate_reply(self, rate: Callable[..., float], reply: str) -> float:
        """
        Scores any reply to the question.

        Args:
            rate (`Callable`): A metric, as [`get_metric`] returns it.
            reply (`str`): The reply.
        """
        expected = self.references or self.answer
        return rate_option(reply, expected, self.options) if self.options else rate(reply, expected)

    def is_parsed(self, count: int | str) -> bool:
        """
        Tells if the answer at a count chooses an option, right or wrong.

        Args:
            count (`int` or `str`): A count.
        """
        return find_choice(self.predictions[count], self.options) is not None


def _batches(dataset, batch_size: int) -> Iterator[list[tuple[int, Example]]]:
    """Rows in order, together holding at most `batch_size` questions, or one row if that alone holds more."""
    batch, size = [], 0
    for index in range(len(dataset)):
        example = to_example(dataset[index])
        if batch and size + len(example.dialogs) > batch_size:
            yield batch
            batch, size = [], 0
        batch.append((index, example))
        size += len(example.dialogs)
    if batch:
        yield batch


def questions_of(index: int, example: Example) -> Iterator[tuple[list[dict], Prediction]]:
    """
    The last question of every dialog of a row.

    Args:
        index (`int`): The row in the data set.
        example ([`Example`]): The row.

    Yields:
        `tuple[list[dict], Prediction]`: The messages up to the question, and the question, with no answers yet.
    """
    for number, dialog in enumerate(example.dialogs):
        last = max(i for i, message in enumerate(dialog) if message["role"] == "assistant")
        family = example.families[number] if example.families else "all"
        references = example.references[number] if example.references else None
        options = (example.options[number] or None) if example.options else None
        asked, expected = _text(dialog[last - 1]), _text(dialog[last])
        yield dialog[:last], Prediction(index, family, asked, expected, {}, references=references, options=options)


def _text(message: dict) -> str:
    return " ".join(part["text"] for part in message["content"] if "text" in part)


@torch.no_grad()
def encode_questions(
    model,
    processor,
    dataset,
    batch_size: int = 64,
    show_progress: bool = True,
    choices: Sequence[int | str] | None = None,
) -> Iterator[tuple[list[Prediction], dict]]:
    """
    The last question of every dialog, in batches ready for `generate` at any count. The vision tower runs once per
    image and resolution.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model.
        processor ([`TokenFlexProcessor`]): Its processor.
        dataset (sequence): Rows as [`to_example`] takes or returns them.
        batch_size (`int`, *optional*, defaults to 64): Questions at a time.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to draw a progress bar.
        choices (`Sequence[int | str]`, *optional*): The counts, also with resolutions, that will be asked for; with
            `"auto"` also those that it chooses among. Default to the config's.

    Yields:
        `tuple[list[Prediction], dict]`: Questions to answer, with no answers yet, and the inputs.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size`={batch_size}: at least one question at a time.")
    choices, chooser = list(choices or model.config.vision_token_choices), model.config.vision_token_chooser
    if "auto" in choices and chooser is not None:
        choices += chooser["choices"]
    choices = [
        resolve_named_count(choice, model.config.vision_token_choices) for choice in choices if choice != "auto"
    ]
    progress = tqdm(total=len(dataset), unit="image", desc="Evaluating", disable=not show_progress)
    for batch in _batches(dataset, batch_size):
        images = [image for _, example in batch for image in example.images]
        prompts, used, targets, first_image = [], [], [], 0
        for index, example in batch:
            for prompt, target in questions_of(index, example):
                prompts.append(processor.apply_chat_template(prompt, add_generation_prompt=True))
                used += range(first_image, first_image + len(example.images))
                targets.append(target)
            first_image += len(example.images)
        inputs = tokenize_prompts(prompts, processor, padding=True, padding_side="left", return_tensors="pt")
        inputs = dict(inputs.to(model.device))
        if images:
            processed = processor(images=images, return_tensors="pt")
            # Every question has its image's tiles.
            tiles = processed.get("num_tiles", torch.ones(len(images), dtype=torch.long))
            of_image = torch.arange(int(tiles.sum())).split(tiles.tolist())
            rows = torch.cat([of_image[image] for image in used])
            asked = {}
            if "image_shapes" in processed:
                asked["image_shapes"] = processed["image_shapes"][rows]
            if "num_tiles" in processed:
                asked["num_tiles"] = tiles[used]
            seen = {}  # by each resolution, the appearances of images
            for choice in choices:
                grids, of_images = asked_grids(asked, choice, len(rows), model.config)
                for i, (grid, size) in enumerate(zip(grids, of_images)):
                    seen.setdefault(size or model.config.resolution_for(grid), {})[i] = int(rows[i])
            pixel_values, kept = processed["pixel_values"].to(model.device), []
            for size, appearances in seen.items():
                needed = list(dict.fromkeys(appearances.values()))
                features = model.get_image_features(pixel_values[needed], num_vision_tokens=1, image_size=size)
                places = {i: needed.index(row) for i, row in appearances.items()}
                if len(places) == len(rows):
                    states = features.last_hidden_state[[places[i] for i in range(len(rows))]]
                else:
                    states = [features.last_hidden_state[places[i]] if i in places else None for i in range(len(rows))]
                sizes = [size if i in places else None for i in range(len(rows))]
                kept.append(TokenFlexImageOutput(states, image_resolutions=sizes))
            inputs = place_images(inputs, {"mm_encoder_outputs": {"image": kept}, **asked}, processor)
        yield targets, inputs
        progress.update(len(batch))
    progress.close()


@torch.no_grad()
def predict(
    model,
    processor,
    dataset,
    counts: Sequence[int],
    batch_size: int = 64,
    max_new_tokens: int = 16,
    show_progress: bool = True,
) -> list[Prediction]:
    """
    Answers the last question of every dialog at every count. The vision tower runs once per image and resolution,
    whatever the number of counts and questions.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model.
        processor ([`TokenFlexProcessor`]): Its processor.
        dataset (sequence): Rows as [`to_example`] takes or returns them.
        counts (`Sequence[int | str]`): The vision-token counts, also with resolutions; `"auto"` is one of them that
            chooses itself.
        batch_size (`int`, *optional*, defaults to 64): Questions answered at a time.
        max_new_tokens (`int`, *optional*, defaults to 16): The longest answer in tokens.
        show_progress (`bool`, *optional*, defaults to `True`): Whether to draw a progress bar.

    Returns:
        `list[Prediction]`: One per dialog, in order.
    """
    was_training = model.training
    model.eval()
    results = []
    for targets, inputs in encode_questions(model, processor, dataset, batch_size, show_progress, counts):
        answer_questions(model, processor, targets, inputs, counts, max_new_tokens)
        results += targets
    model.train(was_training)
    return results


def answer_questions(
    model, processor, targets: Sequence[Prediction], inputs: dict, counts: Sequence[int], max_new_tokens: int = 16
) -> None:
    """
    Fills in a batch's answers at every count; `inputs` and `targets` come from [`encode_questions`].

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model.
        processor ([`TokenFlexProcessor`]): Its processor.
        targets (`Sequence[Prediction]`): Questions to answer; changed in place.
        inputs (`dict`): The questions as the model takes them.
        counts (`Sequence[int | str]`): The vision-token counts.
        max_new_tokens (`int`, *optional*, defaults to 16): The longest answer in tokens.
    """
    for count in counts:
        options = {**GREEDY, "max_new_tokens": max_new_tokens, "return_dict_in_generate": True}
        output = model.generate(**inputs, num_vision_tokens=count, **options)
        answers = output.sequences[:, inputs["input_ids"].shape[1] :]
        ends = model.generation_config.eos_token_id
        ends = torch.tensor([] if ends is None else ends, device=answers.device)
        has_ended = torch.isin(answers, ends).any(-1).tolist()
        texts = processor.tokenizer.batch_decode(answers, skip_special_tokens=True)
        for target, text, ended in zip(targets, texts, has_ended):
            target.predictions[count] = text.strip()
            target.cut += [] if ended else [count]
        if output.get("num_vision_tokens") is not None:
            chosen = output["num_vision_tokens"]
            for target, choice in zip(targets, chosen.tolist() if isinstance(chosen, torch.Tensor) else chosen):
                target.chosen = choice or None


def score(predictions: Sequence[Prediction], counts: Sequence[int | str], metric: str = "exact_match") -> dict:
    """
    Accuracy per count and family.

    Args:
        predictions (`Sequence[Prediction]`): Answers from [`predict`].
        counts (`Sequence[int | str]`): The counts to score.
        metric (`str`, *optional*, defaults to `"exact_match"`): One of `METRICS`.

    Returns:
        `dict`: Per family `questions`, their number, and `majority`, the accuracy of always giving the commonest
        answer; per count `accuracy` of each family, its `mean` over families and `overall` over questions, and for
        `"multiple_choice"` `unparsed`, the number of replies that choose no option, which are wrong. Accuracies go
        from 0 to 1.

    Raises:
        ValueError: If there is no such metric, or nothing to score.
    """
    rate = get_metric(metric)
    if not predictions:
        raise ValueError("`predictions` is empty: there is nothing to score.")
    families = defaultdict(list)
    for prediction in sorted(predictions, key=lambda prediction: prediction.family):
        families[prediction.family].append(prediction)
    report = {
        "questions": {family: len(members) for family, members in families.items()},
        "majority": {family: _rate_of_commonest(members, rate) for family, members in families.items()},
        "accuracy": {},
        "mean": {},
        "overall": {},
    }
    for count in counts:
        right = {family: [p.rate(rate, count) for p in members] for family, members in families.items()}
        accuracy = {family: sum(hits) / len(hits) for family, hits in right.items()}
        report["accuracy"][count] = accuracy
        report["mean"][count] = sum(accuracy.values()) / len(accuracy)
        report["overall"][count] = sum(map(sum, right.values())) / len(predictions)
    if rate is multiple_choice:
        report["unparsed"] = {count: sum(not p.is_parsed(count) for p in predictions) for count in counts}
    return report


def _rate_of_commonest(predictions: Sequence[Prediction], rate: Callable[..., float]) -> float:
    """The score of always giving the commonest answer."""
    ((form, _),) = Counter(normalize(p.answer) for p in predictions).most_common(1)
    commonest = next(p.answer for p in predictions if normalize(p.answer) == form)
    return sum(p.rate_reply(rate, commonest) for p in predictions) / len(predictions)
