"""
The cost of re-counting beside the prefill it shortens.

    python benchmarks/recount.py

The language model has SmolLM2-135M's shapes, about the smallest in use, since the ratio only falls with larger ones;
weights are random, and the vision tower does not count into the prefill. Both are timed alternately in one process,
and the ratio of their medians is what to read: times differ between machines. The last line printed is one JSON
object.
"""

import argparse
import json
import platform
import statistics
import time

import torch
import transformers
from transformers import LlamaConfig, SiglipVisionConfig

from tokenflex import TokenFlexConfig, TokenFlexForConditionalGeneration, at_count


IMAGE_TOKEN, PAD_TOKEN = 49150, 0


def smollm2_config() -> LlamaConfig:
    """SmolLM2-135M's shapes."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )


def build_model() -> TokenFlexForConditionalGeneration:
    config = TokenFlexConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=768, num_hidden_layers=1, num_attention_heads=12, image_size=384, patch_size=16
        ),
        text_config=smollm2_config(),
        image_token_id=IMAGE_TOKEN,
    )
    return TokenFlexForConditionalGeneration(config).eval()


def encode(batch_size: int, images: int, count: int, text_length: int) -> dict[str, torch.Tensor]:
    """Rows of `images` images and different lengths of text, padded on the left."""
    side = int(count**0.5)
    length = images * count + text_length
    input_ids = torch.full((batch_size, length), PAD_TOKEN)
    attention_mask = torch.zeros_like(input_ids)
    for row in range(batch_size):
        text = torch.randint(1, IMAGE_TOKEN, (text_length - row % text_length // 2,))
        ids = torch.cat([text[:3], torch.full((images * count,), IMAGE_TOKEN), text[3:]])
        input_ids[row, length - len(ids) :] = ids
        attention_mask[row, length - len(ids) :] = 1
    grids = torch.full((batch_size * images, 2), side)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "vision_token_grids": grids}


def measure(model, batch_size: int, images: int, repeats: int, recounts: int) -> dict:
    """Milliseconds of re-counting 64 tokens per image to 256, and of prefilling the result."""
    encoded = encode(batch_size, images, 64, 32)
    grids = [(16, 16)] * (batch_size * images)
    prompt = encode(batch_size, images, 256, 32)
    embeds = model.get_input_embeddings()(prompt["input_ids"])

    def recount():
        for _ in range(recounts):
            at_count(encoded, grids, model.config, PAD_TOKEN)

    def prefill():
        model(inputs_embeds=embeds, attention_mask=prompt["attention_mask"], logits_to_keep=1)

    times = {recount: [], prefill: []}
    for repeat in range(repeats + 1):
        for function, taken in times.items():
            start = time.perf_counter()
            function()
            if repeat:  # the first round warms up
                taken.append(1000 * (time.perf_counter() - start))
    recount_ms = statistics.median(times[recount]) / recounts
    prefill_ms = statistics.median(times[prefill])
    return {
        "batch_size": batch_size,
        "images": images,
        "recount_ms": round(recount_ms, 4),
        "prefill_ms": round(prefill_ms, 2),
        "percent": round(100 * recount_ms / prefill_ms, 3),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="Timed rounds. Default: %(default)s.")
    parser.add_argument("--recounts", type=int, default=20, help="Re-counts per round. Default: %(default)s.")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = build_model()
    rows = [measure(model, batch, images, args.repeats, args.recounts) for batch, images in [(1, 1), (1, 4), (8, 1)]]
    print("| batch | images per row | re-count, ms | prefill at 256 tokens per image, ms | re-count / prefill |")
    print("|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['batch_size']} | {row['images']} | {row['recount_ms']:.3f} | {row['prefill_ms']:.1f} "
            f"| {row['percent']:.2f} % |"
        )
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"recount_percent_of_prefill": rows, **machine, **versions, "seed": 0}))


if __name__ == "__main__":
    main()
