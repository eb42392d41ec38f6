"""
Gains of smaller vision-token counts at each size of the language model, by arithmetic: nothing is run or timed.

    python benchmarks/budget.py --plot docs/performance_budget.png

The language models have Qwen2.5's shapes, the tower SigLIP-so400m-patch14-384's (729 patches), weights are bfloat16.
Read the tables as bounds: "by FLOPs" is what holds where matrix products decide, as in large batches; "by bytes" where
reading weights and cache decides, as in decoding; the limit is the longer of both for each part, one part after the
other, at the rates given (by default an H200's by its vendor, dense bfloat16). The last line printed is one JSON
object.
"""

import argparse
import json
from pathlib import Path

from budget_plot import plot_png
from limits import (
    Rates,
    Work,
    cache_bytes,
    decode_work,
    limit_seconds,
    prefill_work,
    projector_work,
    tower_work,
    training_work,
    weight_bytes,
)
from training_runs import COUNTS, WEIGHTS, print_table
from transformers import Qwen2Config, SiglipVisionConfig

from tokenflex import TokenFlexConfig
from tokenflex.checkpoints.files import write_file


# Hidden size, MLP size, layers, heads, key-value heads, vocabulary, tied embeddings: the published configurations.
LANGUAGE_MODELS = {
    "0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "3B": (2048, 11008, 36, 16, 2, 151936, True),
    "7B": (3584, 18944, 28, 28, 4, 152064, False),
    "14B": (5120, 13824, 48, 40, 8, 152064, False),
    "32B": (5120, 27648, 64, 40, 8, 152064, False),
    "72B": (8192, 29568, 80, 64, 8, 152064, False),
}
# Hidden size, MLP size, layers, heads, image size, patch size.
SO400M, BASE = (1152, 4304, 27, 16, 384, 14), (768, 3072, 12, 12, 384, 16)
ALL_COUNTS = [*COUNTS, 729]  # the last is every patch
BYTES = 2  # bfloat16
BATCHES, IMAGES = (1, 32), (1, 4)
TEXT_LENGTHS, ANSWER_LENGTHS = (32, 256, 1024, 4096), (1, 16, 128, 1024)
H200 = Rates(flops_per_second=989e12, bytes_per_second=4.8e12)


def make_config(language_model: str, tower: tuple = SO400M) -> TokenFlexConfig:
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text_keys = (*keys, "num_key_value_heads", "vocab_size", "tie_word_embeddings")
    return TokenFlexConfig(
        vision_config=SiglipVisionConfig(**dict(zip((*keys, "image_size", "patch_size"), tower))),
        text_config=Qwen2Config(**dict(zip(text_keys, LANGUAGE_MODELS[language_model]))),
    )


def first_token(config: TokenFlexConfig, count: int, images: int, text_tokens: int, batch_size: int = 1) -> list[Work]:
    """Tower, projector and prefill."""
    return [
        tower_work(config.vision_config, batch_size * images, BYTES),
        projector_work(config, batch_size * images, count, BYTES),
        prefill_work(config.text_config, batch_size, images * count + text_tokens, BYTES),
    ]


def total_flops(works: list[Work]) -> float:
    return sum(work.flops for work in works)


def total_limit(works: list[Work], rates: Rates) -> float:
    return sum(limit_seconds(work, rates) for work in works)


def over_256(values: dict[int, float]) -> dict[int, float]:
    """Factors by which each count's value is smaller than that of 256."""
    return {count: values[256] / value for count, value in values.items()}


def count_first_token(name: str, images: int, text_tokens: int) -> dict:
    """FLOPs to the first token, and what smaller counts save, also with a smaller tower and with kept features."""
    config, small = make_config(name), make_config(name, BASE)
    works = {count: first_token(config, count, images, text_tokens) for count in ALL_COUNTS}
    with_base = {count: first_token(small, count, images, text_tokens) for count in COUNTS}
    return {
        "tower_flops": works[256][0].flops,
        "projector_flops": {count: work[1].flops for count, work in works.items()},
        "prefill_flops": {count: work[2].flops for count, work in works.items()},
        "tower_share": {count: work[0].flops / total_flops(work) for count, work in works.items()},
        "speed_up": over_256({count: total_flops(work) for count, work in works.items()}),
        "speed_up_small_tower": over_256({count: total_flops(work) for count, work in with_base.items()}),
        "speed_up_kept_features": over_256({count: total_flops(work[1:]) for count, work in works.items()}),
    }


def count_limits(name: str, images: int, text_tokens: int, rates: Rates) -> dict:
    """The least milliseconds to the first token for each batch size and count."""
    config = make_config(name)
    limits = {}
    for batch_size in BATCHES:
        milliseconds = {
            count: 1000 * total_limit(first_token(config, count, images, text_tokens, batch_size), rates)
            for count in ALL_COUNTS
        }
        limits[batch_size] = {"milliseconds": milliseconds, "speed_up": over_256(milliseconds)}
    return limits


def count_decoding(name: str, images: int, text_tokens: int) -> dict:
    """Bytes of the first step of decoding for each batch size and count, the cache, and prompts that share 10 GiB."""
    config = make_config(name)
    text = config.text_config
    cache = {count: cache_bytes(text, 1, count, BYTES) for count in ALL_COUNTS}
    prompt = {count: cache_bytes(text, 1, images * count + text_tokens, BYTES) for count in ALL_COUNTS}
    steps = {}
    for batch_size in BATCHES:
        step_bytes = {
            count: decode_work(text, batch_size, images * count + text_tokens, BYTES).bytes for count in ALL_COUNTS
        }
        steps[batch_size] = {"bytes": step_bytes, "speed_up": over_256(step_bytes)}
    return {
        "weight_bytes": weight_bytes(config, BYTES),
        "cache_bytes_per_image": cache,
        "prompts_in_10_gib": {count: 10 * 2**30 // size for count, size in prompt.items()},
        "steps": steps,
    }


def count_training(name: str, text_tokens: int) -> dict:
    """A training step's FLOPs for one image, as parts of those at 256, and of a step with counts drawn 2:3:5."""
    config = make_config(name)
    ratios = {}
    for is_frozen in (True, False):
        flops = {
            count: training_work(config, 1, 1, count, text_tokens, BYTES, is_tower_frozen=is_frozen).flops
            for count in COUNTS
        }
        drawn = sum(weight * flops[count] for count, weight in zip(COUNTS, WEIGHTS))
        ratios["frozen" if is_frozen else "trained"] = {
            **{count: value / flops[256] for count, value in flops.items()},
            "2:3:5": drawn / flops[256],
        }
    return ratios


def count_lengths(name: str, text_tokens: int, rates: Rates) -> dict:
    """Gains of 64 in place of 256 tokens behind longer prompts, by FLOPs, and with longer answers, by the limit."""
    config = make_config(name)
    prompts = {}
    for length in TEXT_LENGTHS:
        prompts[length] = over_256({count: total_flops(first_token(config, count, 1, length)) for count in COUNTS})[64]
    answers = {}
    for batch_size in BATCHES:
        first = {c: total_limit(first_token(config, c, 1, text_tokens, batch_size), rates) for c in COUNTS}
        answers[batch_size] = {}
        for length in ANSWER_LENGTHS:
            # The cache grows by a token a step, and the bytes with it: the middle step stands for all.
            steps = {
                count: limit_seconds(
                    decode_work(config.text_config, batch_size, count + text_tokens + length // 2, BYTES), rates
                )
                for count in COUNTS
            }
            answers[batch_size][length] = over_256({c: first[c] + (length - 1) * steps[c] for c in COUNTS})[64]
    return {"speed_up_by_text_tokens": prompts, "speed_up_by_answer_tokens": answers}


def tera(flops: float) -> str:
    return f"{flops / 1e12:.2f}"


def print_first_token(figures: dict[str, dict], title: str) -> None:
    print(f"\n{title}: FLOPs to the first token, in units of 10^12")
    print_table(
        ["language model", "tower", "projector at 256", *(f"prefill at {count}" for count in ALL_COUNTS),
         *(f"tower's share at {count}" for count in COUNTS)],
        [
            (name, tera(row["tower_flops"]), tera(row["projector_flops"][256]),
             *(tera(row["prefill_flops"][count]) for count in ALL_COUNTS),
             *(f"{row['tower_share'][count]:.0%}" for count in COUNTS))
            for name, row in figures.items()
        ],
    )  # fmt: skip
    print(f"\n{title}: times faster to the first token than at 256, by FLOPs")
    kinds = {"speed_up": "", "speed_up_small_tower": ", SigLIP-base", "speed_up_kept_features": ", features kept"}
    print_table(
        ["language model", *(f"{count}{kind}" for kind in kinds.values() for count in (64, 144))],
        [(name, *(f"{row[key][count]:.2f}" for key in kinds for count in (64, 144))) for name, row in figures.items()],
    )


def print_limits(figures: dict[str, dict], title: str) -> None:
    print(f"\n{title}: limit of the time to the first token, ms")
    print_table(
        ["language model", *(f"batch {batch}, {count}" for batch in BATCHES for count in ALL_COUNTS),
         *(f"256 / 64, batch {batch}" for batch in BATCHES)],
        [
            (name, *(f"{row[batch]['milliseconds'][count]:.2f}" for batch in BATCHES for count in ALL_COUNTS),
             *(f"{row[batch]['speed_up'][64]:.2f}" for batch in BATCHES))
            for name, row in figures.items()
        ],
    )  # fmt: skip


def print_decoding(figures: dict[str, dict], title: str) -> None:
    print(f"\n{title}: decoding, times faster than at 256 by bytes, and the cache")
    speed_ups = [(batch, count) for batch in BATCHES for count in (64, 144)]
    print_table(
        ["language model", "weights, GB", "GB per step, batch 1, 256", "batch 32, 64", "batch 32, 256",
         *(f"{count}, batch {batch}" for batch, count in speed_ups),
         *(f"MiB per image, {count}" for count in ALL_COUNTS), "prompts in 10 GiB, 64", "144", "256"],
        [
            (name, f"{row['weight_bytes'] / 1e9:.2f}", f"{row['steps'][1]['bytes'][256] / 1e9:.2f}",
             *(f"{row['steps'][32]['bytes'][count] / 1e9:.2f}" for count in (64, 256)),
             *(f"{row['steps'][batch]['speed_up'][count]:.3f}" for batch, count in speed_ups),
             *(f"{row['cache_bytes_per_image'][count] / 2**20:.1f}" for count in ALL_COUNTS),
             *(row["prompts_in_10_gib"][count] for count in COUNTS))
            for name, row in figures.items()
        ],
    )  # fmt: skip


def print_training(figures: dict[str, dict]) -> None:
    print("\n1 image per sample: FLOPs of a training step, as parts of those at 256")
    columns = [(tower, count) for tower in ("frozen", "trained") for count in (64, 144, "2:3:5")]
    print_table(
        ["language model", *(f"{count}, tower {tower}" for tower, count in columns)],
        [(name, *(f"{row[tower][count]:.2f}" for tower, count in columns)) for name, row in figures.items()],
    )


def print_lengths(figures: dict[str, dict]) -> None:
    print("\n1 image: times faster at 64 than at 256; to the first token by FLOPs, whole answers by the limit")
    print_table(
        ["language model", *(f"text of {length}" for length in TEXT_LENGTHS),
         *(f"answer of {length}, batch {batch}" for batch in BATCHES for length in ANSWER_LENGTHS)],
        [
            (name, *(f"{row['speed_up_by_text_tokens'][length]:.2f}" for length in TEXT_LENGTHS),
             *(f"{row['speed_up_by_answer_tokens'][batch][length]:.2f}"
               for batch in BATCHES for length in ANSWER_LENGTHS))
            for name, row in figures.items()
        ],
    )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text_tokens", type=int, default=32, help="Of the prompt. Default: %(default)s.")
    parser.add_argument(
        "--flops_per_second", type=float, default=H200.flops_per_second, help="For limits. Default: %(default).3g."
    )
    parser.add_argument(
        "--bytes_per_second", type=float, default=H200.bytes_per_second, help="For limits. Default: %(default).3g."
    )
    parser.add_argument("--plot", type=Path, help="PNG file to write.")
    args = parser.parse_args(argv)
    rates = Rates(args.flops_per_second, args.bytes_per_second)

    figures = {}
    for images in IMAGES:
        title = f"{images} image{'s' if images > 1 else ''}, {args.text_tokens} text tokens"
        figures[f"images_{images}"] = part = {
            "first_token": {name: count_first_token(name, images, args.text_tokens) for name in LANGUAGE_MODELS},
            "limits": {name: count_limits(name, images, args.text_tokens, rates) for name in LANGUAGE_MODELS},
            "decoding": {name: count_decoding(name, images, args.text_tokens) for name in LANGUAGE_MODELS},
        }
        print_first_token(part["first_token"], title)
        print_limits(part["limits"], title)
        print_decoding(part["decoding"], title)
    figures["training"] = {name: count_training(name, args.text_tokens) for name in LANGUAGE_MODELS}
    figures["lengths"] = {name: count_lengths(name, args.text_tokens, rates) for name in LANGUAGE_MODELS}
    print_training(figures["training"])
    print_lengths(figures["lengths"])
    if args.plot:
        write_file(args.plot, plot_png(figures))
    print(f"\n{json.dumps({**figures, **vars(rates), 'text_tokens': args.text_tokens})}")


if __name__ == "__main__":
    main()
