"""The runs that the training benchmark times: models by shape, seeded rows, trainers that take turns step by step."""

import copy
import math
import platform
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import Qwen2Config, SiglipImageProcessorPil, SiglipVisionConfig

from tokenflex import TokenFlexConfig, TokenFlexForConditionalGeneration, TokenFlexProcessor
from tokenflex.data.synthetic import SyntheticVQA, draw_scene
from tokenflex.towers.tiny import tiny_model_and_processor
from tokenflex.training.arguments import TokenFlexTrainingArguments
from tokenflex.training.trainer import TokenFlexTrainer


COUNTS, WEIGHTS = [64, 144, 256], [0.2, 0.3, 0.5]  # the paper's
# (width, MLP width, layers, heads, key-value heads); the tower sees a grid of 16 x 16 patches if not said otherwise.
SMALL_TOWER, SIGLIP_BASE = (128, 512, 4, 4), (768, 3072, 12, 12)
SMOLLM2_135M = (576, 1536, 30, 9, 3)
# Takes 13 % of a 256-token step's FLOPs before SmolLM2-135M, as SigLIP-so400m does before the paper's Qwen2.5-7B.
PROPORTIONAL_TOWER = (384, 1536, 10, 6)
SHAPES = {
    "language-heavy": {"tower": PROPORTIONAL_TOWER, "language_model": SMOLLM2_135M},
    "tower-heavy": {"tower": SIGLIP_BASE, "language_model": (256, 1024, 8, 4, 2)},
    "packing": {"tower": SMALL_TOWER, "language_model": (384, 1024, 8, 6, 2)},
    "ViT-S/14 + SmolLM2-135M": {
        "tower": (384, 1536, 12, 6),
        "language_model": SMOLLM2_135M,
        "image_size": 224,
        "patch_size": 14,
        "vocab_size": 49152,
    },
    "so400m + Qwen2.5-1.5B": {
        "tower": (1152, 4304, 27, 16),
        "language_model": (1536, 8960, 28, 12, 2),
        "image_size": 384,
        "patch_size": 14,
        "vocab_size": 151936,
    },
    "dry run": {"tower": (32, 64, 1, 2), "language_model": (32, 64, 2, 2, 1)},
}


def build(name: str, seed: int) -> tuple[TokenFlexForConditionalGeneration, TokenFlexProcessor]:
    """A model of `SHAPES` with random weights and the tiny model's tokenizer, or the tiny model itself."""
    if name == "tiny":
        return tiny_model_and_processor(seed)
    shapes = SHAPES[name]
    image_size, patch_size = shapes.get("image_size", 128), shapes.get("patch_size", 8)
    tokenizer = tiny_model_and_processor()[1].tokenizer
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = TokenFlexConfig(
        vision_config=SiglipVisionConfig(
            **dict(zip(keys, shapes["tower"])), image_size=image_size, patch_size=patch_size
        ),
        text_config=Qwen2Config(
            **dict(zip(keys, shapes["language_model"])),
            vocab_size=shapes.get("vocab_size", len(tokenizer)),
            tie_word_embeddings=True,
        ),
        image_token_id=tokenizer.image_token_id,
        num_vision_tokens=max(COUNTS),
        vision_token_choices=COUNTS,
        vision_token_weights=WEIGHTS,
    )
    torch.manual_seed(seed)
    size = {"height": image_size, "width": image_size}
    image_processor = SiglipImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = TokenFlexForConditionalGeneration(config)
    return model, TokenFlexProcessor(image_processor, tokenizer, config.num_vision_tokens, patch_size)


class QuestionRows:
    """
    Rows of noise images with questions of about ten tokens each and answers of one word or several sentences, drawn
    when they are asked for, by seed and index.

    Args:
        image_size (`int`): Sides of the images in pixels.
        num_rows (`int`): Number of rows.
        seed (`int`): The rows' seed.
        mixed (`bool`, *optional*, defaults to `False`):
            A mixture as instruction data is: 25 % text alone with answers of 1 to 40 sentences, 40 % one image and a
            word, 25 % one image and 5 to 40 sentences, 10 % two images and a word. By default every row has one image,
            four questions (about 50 tokens with the chat's own) and a word for an answer.
        num_images (`int`, *optional*, defaults to 1): The images of every row, unless it is a mixture.
    """

    def __init__(self, image_size: int, num_rows: int, seed: int, mixed: bool = False, num_images: int = 1):
        self.image_size, self.num_rows, self.seed, self.mixed = image_size, num_rows, seed, mixed
        self.num_images = num_images
        scenes = (draw_scene(seed, index) for index in range(200))
        self.pairs = [(question, answer) for scene in scenes for _, question, answer in scene.questions[:1]]

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.num_rows:
            raise IndexError(index)
        random = np.random.default_rng((self.seed, index))
        num_images, num_questions, num_sentences = self.num_images, 4, 0
        if self.mixed:
            kind = random.choice(4, p=[0.25, 0.4, 0.25, 0.1])
            num_images, num_questions = (0, 1, 1, 2)[kind], random.integers(1, 5)
            num_sentences = random.integers(*((1, 41), (0, 1), (5, 41), (0, 1))[kind])
        asked = [self.pairs[i] for i in random.integers(len(self.pairs), size=num_questions)]
        told = [self.pairs[i] for i in random.integers(len(self.pairs), size=num_sentences)]
        size = (self.image_size, self.image_size, 3)
        return {
            "images": [Image.fromarray(random.integers(256, size=size, dtype=np.uint8)) for _ in range(num_images)],
            "question": " ".join(question for question, _ in asked),
            "answer": " ".join(f"{question} {answer}." for question, answer in told) or asked[-1][1],
        }


def make_rows(model, num_rows: int, seed: int, mixed: bool = False) -> Sequence[dict]:
    """[`QuestionRows`] of the tower's size; for the tiny model its own recipe's, with six questions to an image."""
    if model.config.vision_token_choices != COUNTS:
        return SyntheticVQA(num_rows, seed)
    return QuestionRows(model.config.vision_config.image_size, num_rows, seed, mixed)


class Run:
    """
    A [`TokenFlexTrainer`] that is taken through its loop one step at a time: next batch from its data loader and
    collator, the callback's draw and arrangement, forward, backward, clipped gradients, optimizer.

    Args:
        model ([`TokenFlexForConditionalGeneration`]): The model.
        processor ([`TokenFlexProcessor`]): Its processor.
        rows (`Sequence[dict]`): Rows in the order they are trained on.
        choices (`dict[int, float]`, *optional*): Weight of each count. Defaults to the model config's.
        **kwargs: Of [`TokenFlexTrainingArguments`].
    """

    def __init__(self, model, processor, rows: Sequence[dict], choices: dict[int, float] | None = None, **kwargs):
        args = TokenFlexTrainingArguments(
            tempfile.gettempdir(),
            **{"learning_rate": 1e-4, "train_sampling_strategy": "sequential", **kwargs},
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
        )
        self.trainer = trainer = TokenFlexTrainer(
            model,
            args,
            processing_class=processor,
            train_dataset=rows,
            vision_token_choices=choices and list(choices),
            vision_token_weights=choices and list(choices.values()),
        )
        self.model = trainer.accelerator.prepare(model)
        self.optimizer = None
        self.records = []
        self._batches = None
        self._positions = 0
        trainer.callback_handler.on_train_begin(args, trainer.state, trainer.control)
        self.model.register_forward_pre_hook(self._count_positions, with_kwargs=True)  # after the callback's hook

    def _count_positions(self, model, args, kwargs):
        self._positions = kwargs["input_ids"].numel()

    def step(self, number: int) -> None:
        """Trains one step and records it; those with negative numbers only warm up."""
        trainer, model, callback = self.trainer, self.model, self.trainer.vision_tokens
        is_cuda = trainer.args.device.type == "cuda"
        self.optimizer = self.optimizer or trainer.create_optimizer()
        self._batches = self._batches or iter(trainer.get_train_dataloader())
        before = {name: int(total) for name, total in callback.totals.items()}
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        (batch,), num_items = trainer.get_batch_samples(self._batches, 1, trainer.args.device)
        trainer.state.global_step = number
        trainer.callback_handler.on_step_begin(trainer.args, trainer.state, trainer.control)
        loss = trainer.training_step(model, batch, num_items)
        trainer._clip_grad_norm(model)
        self.optimizer.step()
        model.zero_grad()
        if is_cuda:
            torch.cuda.synchronize()
        if number >= 0:
            self.records.append({
                "seconds": time.perf_counter() - start,
                "loss": float(loss),
                "count": callback.num_vision_tokens,
                "positions": self._positions,
                **{name: int(total) - before[name] for name, total in callback.totals.items()},
                **({"gpu_bytes": torch.cuda.max_memory_allocated()} if is_cuda else {}),
            })  # fmt: skip

    def __getitem__(self, name: str) -> list:
        """One figure of every recorded step."""
        return [record[name] for record in self.records]


def sharing_runs(model, processor, rows, variants: dict[str, dict], **kwargs) -> dict[str, Run]:
    """One run for each variant's arguments; they share weights, gradients and optimizer, and so the memory of one."""
    runs = {}
    for name, variant in variants.items():
        parameters = {id(parameter): parameter for parameter in model.parameters()}
        runs[name] = Run(copy.deepcopy(model, parameters), processor, rows, **kwargs, **variant)
    optimizer = next(iter(runs.values())).trainer.create_optimizer()
    for run in runs.values():
        run.optimizer = optimizer
    return runs


def take_turns(runs: dict[str, Run], steps: int, warmup: int) -> None:
    """A step of each, then the next step of each: what slows the machine down slows all of them."""
    for number in range(-warmup, steps):
        for run in runs.values():
            run.step(number)


def summarize(values: Sequence[float], digits: int = 4) -> dict:
    """Median and quartiles, rounded to significant digits."""
    first, median, third = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    summary = {"median": median, "first_quartile": first, "third_quartile": third}
    return {**{name: float(f"{value:.{digits}g}") for name, value in summary.items()}, "steps": len(values)}


def show(summary: dict, form: str = ".3f") -> str:
    return f"{summary['median']:{form}} ({summary['first_quartile']:{form}}–{summary['third_quartile']:{form}})"


def print_table(header: Sequence[str], rows: Sequence[Sequence]) -> None:
    print(f"\n| {' | '.join(header)} |\n|---|{'---:|' * (len(header) - 1)}")
    for row in rows:
        print(f"| {' | '.join(str(cell) for cell in row)} |")


def measure_apart(function: Callable[..., dict], *args) -> dict:
    """Calls a function in a process of its own, since a process's peak memory never falls again."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_memory_mib() -> int:
    """The most that this process was resident in memory."""
    if sys.platform == "linux":  # where `ru_maxrss` of a spawned process begins with its parent's peak
        status = Path("/proc/self/status").read_text()
        return round(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def step_flops(model: TokenFlexForConditionalGeneration, counts: Sequence[int], text_tokens: float) -> float:
    """
    Floating-point operations of training on one sample of one image and `text_tokens`, at each of `counts` behind one
    pass of the tower: 6 per weight and token, twice forward and four times backward, and for attention in every layer
    12 * width * length^2 in the tower and half of that, causal, in the language model. Embeddings are looked up; the
    head is a weight.
    """
    config = model.config
    vision, text, num_patches = config.vision_config, config.text_config, math.prod(config.patch_grid)
    tower = sum(parameter.numel() for parameter in model.model.vision_tower.parameters() if parameter.ndim > 1)
    tower -= num_patches * vision.hidden_size  # position embeddings are added
    projector = sum(parameter.numel() for parameter in model.model.multi_modal_projector.parameters())
    layers = sum(parameter.numel() for parameter in model.model.language_model.layers.parameters())
    head = text.vocab_size * text.hidden_size
    flops = 6 * tower * num_patches + 12 * vision.num_hidden_layers * vision.hidden_size * num_patches**2
    for count in counts:
        length = count + text_tokens
        flops += 6 * projector * count + 6 * (layers + head) * length
        flops += 6 * text.num_hidden_layers * text.hidden_size * length**2
    return flops


def describe_machine() -> dict:
    if torch.cuda.is_available():
        machine = {"gpu": torch.cuda.get_device_name()}
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        machine = {"processor": names[0] if names else platform.processor()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {**machine, "threads": torch.get_num_threads(), **versions}
