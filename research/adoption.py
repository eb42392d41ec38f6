"""
Adoption in small: a LLaVA of transformers that was trained at one count, made token-flexible and tuned.

For each seed a tiny model is trained on all 64 patches alone and saved as transformers' LLaVA; `tokenflex adopt` takes
it; `tokenflex label` lets it answer questions; `tokenflex train --config adopt/tune.yaml` tunes it, once on its own
answers and once on the labels. Beside it stands a model that was trained with drawn counts for as many steps.
"""

import json
import math
import time
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import transformers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from ..checkpoints.files import write_file
from ..data.synthetic import SyntheticVQA
from ..evaluation.label import label
from ..evaluation.metrics import get_metric
from ..evaluation.sweep import predict
from ..modeling_tokenflex import TokenFlexForConditionalGeneration
from ..processing_tokenflex import TokenFlexProcessor
from ..towers import adopt
from .baselines import become_llava
from .stages import TEST_SEED, load, train_base, train_stage, write_score


COUNTS = (4, 16, 36, 64)
TRAIN_STEPS = 1200  # of a model at drawn counts or at one, behind the small recipes' tower and base
TUNE_SEED, TUNE_IMAGES, BATCH_SIZE = 24_000, 4_800, 16
CHOICES = ["--vision_token_choices", *map(str, COUNTS)]
DRAWN = [*CHOICES, "--vision_token_weights", *["1"] * len(COUNTS)]
FIXED = ["--vision_token_choices", "64", "--vision_token_weights", "1"]
TUNING = (
    "--bf16 false --gradient_checkpointing false --learning_rate 1e-3 --projector_learning_rate 1e-3 "
    f"--per_device_train_batch_size {BATCH_SIZE} --gradient_accumulation_steps 1 --num_train_epochs 2 "
    "--dataloader_num_workers 0 --check_rows lazily"
).split()


def save_llava(model: TokenFlexForConditionalGeneration, processor: TokenFlexProcessor, folder: Path) -> None:
    """
    Saves a model as transformers' LLaVA, with its processor.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): A model that [`become_llava`] has changed.
        processor ([`TokenFlexProcessor`]): Its processor.
        folder (`Path`): The folder.
    """
    config = LlavaConfig(
        vision_config=model.config.vision_config,
        text_config=model.config.text_config,
        image_token_id=model.config.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=model.config.tie_word_embeddings,
    )
    llava, connector = LlavaForConditionalGeneration(config), model.model.multi_modal_projector.connector
    llava.model.vision_tower.load_state_dict(model.model.vision_tower.state_dict())
    llava.model.language_model.load_state_dict(model.model.language_model.state_dict())
    llava.model.multi_modal_projector.linear_1.load_state_dict(connector.up.state_dict())
    llava.model.multi_modal_projector.linear_2.load_state_dict(connector.down.state_dict())
    llava.lm_head.load_state_dict(model.lm_head.state_dict())
    llava.generation_config = model.generation_config
    llava.save_pretrained(folder)
    LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy="full",
        image_token=processor.image_token,
        chat_template=processor.chat_template,
    ).save_pretrained(folder)


def run_seed(seed: int, folder: Path, scale: float = 1.0, test_images: int = 1000) -> dict:
    """
    One seed of the experiment, from nothing to its scores. What a former call has finished is used again.

    Args:
        seed (`int`): The seed of weights, data and draws.
        folder (`Path`): Folder for everything.
        scale (`float`, *optional*, defaults to 1.0): Scales the steps of the models' training.
        test_images (`int`, *optional*, defaults to 1000): The number of images to test on.

    Returns:
        `dict`: For each model `right`, for each count a 1 or 0 for every question; `families` and `images` of the
        questions; `minutes` of labeling and tuning.
    """
    folder = folder / str(seed)
    result = folder / f"result-{scale}-{test_images}.json"
    if result.is_file():
        return json.loads(result.read_text())
    adopted, labeled = folder / "adopted", folder / "labeled"
    base = train_base(folder, seed, scale, become_llava)
    steps = ["--max_steps", str(math.ceil(scale * TRAIN_STEPS))]
    drawn = train_stage(folder / "drawn", "small/stage2.yaml", base, seed, *DRAWN, *steps)
    fixed = train_stage(folder / "fixed", "small/stage2.yaml", base, seed, *FIXED, *steps)
    if not (adopted / "config.json").is_file():
        save_llava(*load(fixed), folder / "llava")
        adopt.main(["--model", str(folder / "llava"), "--output_dir", str(adopted), *CHOICES])
    clock = folder / "minutes.json"
    minutes, start = json.loads(clock.read_text()) if clock.is_file() else {}, time.perf_counter()
    images = SyntheticVQA(TUNE_IMAGES, TUNE_SEED + seed)
    if not (labeled / "rows.jsonl").is_file():
        label(*load(adopted), images, labeled, batch_size=128, max_new_tokens=16)
        minutes["labeling"] = (time.perf_counter() - start) / 60
    rows = {"own answers": str(labeled / "rows.jsonl"), "labels": f"synthetic:{len(images)}@{TUNE_SEED + seed}"}
    models = {"drawn": drawn, "adopted": adopted}
    for kind, dataset in rows.items():
        start = time.perf_counter()
        name = f"tuned on {kind}"
        models[name] = train_stage(
            folder / name.replace(" ", "_"), "adopt/tune.yaml", adopted, seed, "--dataset", dataset, *TUNING
        )
        minutes.setdefault(name, (time.perf_counter() - start) / 60)
        write_file(clock, json.dumps(minutes))
    test, rate = SyntheticVQA(test_images, TEST_SEED), get_metric("exact_match")
    right = {}
    for name, checkpoint in models.items():
        answers = predict(*load(checkpoint), test, COUNTS, batch_size=128, show_progress=False)
        right[name] = {str(n): [int(answer.rate(rate, n)) for answer in answers] for n in COUNTS}
    questions = {"families": [answer.family for answer in answers], "images": [answer.index for answer in answers]}
    write_file(result, json.dumps({"seed": seed, "right": right, "minutes": minutes, **questions}))
    return json.loads(result.read_text())


def table(results: Sequence[Mapping]) -> str:
    """
    The table of all models and the differences that matter, in Markdown.

    Args:
        results (`Sequence[Mapping]`): What [`run_seed`] returned, for each seed.
    """

    def cell(name: str, count: int, minus: str | None = None) -> str:
        scores = [result["right"][name][str(count)] for result in results]
        other = None if minus is None else [result["right"][minus][str(count)] for result in results]
        return write_score(scores, other, results[0])

    head = "| | " + " | ".join(f"@{count}" for count in COUNTS) + " |"
    lines = [head, "|---|" + "---:|" * len(COUNTS)]
    for name in results[0]["right"]:
        lines.append(f"| {name} | " + " | ".join(cell(name, count) for count in COUNTS) + " |")
    differences = [
        ("tuned on own answers", "drawn"),
        ("tuned on own answers", "adopted"),
        ("tuned on labels", "adopted"),
        ("tuned on own answers", "tuned on labels"),
    ]
    lines += ["", head, "|---|" + "---:|" * len(COUNTS)]
    for first, second in differences:
        lines.append(f"| {first} - {second} | " + " | ".join(cell(first, n, second) for n in COUNTS) + " |")
    minutes = {name: max(result["minutes"][name] for result in results) for name in results[0]["minutes"]}
    lines += ["", "Minutes at most: " + ", ".join(f"{name} {value:.1f}" for name, value in minutes.items())]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m tokenflex.research.adoption", description=__doc__.strip().split("\n")[0])
    parser.add_argument("--output_dir", default="outputs/adoption", help="Folder. Default: %(default)s.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="Default: 0 1 2.")
    parser.add_argument("--scale", type=float, default=1.0, help="Scales the steps of training. Default: 1.")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    results = [run_seed(seed, Path(args.output_dir), args.scale) for seed in args.seeds]
    print(f"{len(results)} seeds, {torch.get_num_threads()} threads\n\n{table(results)}")  # noqa: T201


if __name__ == "__main__":
    main()
