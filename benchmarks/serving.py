"""
Both servers under load: vLLM and `tokenflex serve` without an engine, side by side on one machine.

    pip install vllm  # or the environment that `make test-vllm` builds
    python benchmarks/serving.py --output_dir outputs/serving

A checkpoint of random weights is written with SmolLM2-135M's shapes behind a tower of SigLIP-base's width and four
layers. Clients ask one after the other, each without a pause, for 64 tokens on an image that no cache has seen, at one
count or at mixed ones. Both servers are up all the time and take turns, cell by cell, so that a machine's other work
meets both. Answers are compared between the servers. The last line printed is one JSON object.
"""

import argparse
import asyncio
import base64
import io
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import torch
from limits import decode_work, limit_seconds, measure_rates, prefill_work, projector_work, tower_work
from PIL import Image
from recount import smollm2_config
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from tokenflex import TokenFlexConfig, TokenFlexForConditionalGeneration, TokenFlexProcessor
from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.towers.tiny import train_tokenizer


NEW_TOKENS = 64
TOKEN_END = "]"
QUESTION = "What is to be seen here, where does it stand, and which of its colors is the brightest one of all?"
PORTS = {"vllm": 18401, "tokenflex": 18402}


def write_checkpoint(path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = train_tokenizer([QUESTION] * 20)
    layout = json.loads(tokenizer.backend_tokenizer.to_str())
    named = {f"Ġ[{index}{TOKEN_END}": index for index in range(len(tokenizer), 49152)}  # to count them by
    layout["model"]["vocab"] |= named
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(layout)), **tokenizer.special_tokens_map, padding_side="left"
    )
    config = TokenFlexConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=4,
            num_attention_heads=12,
            image_size=256,
            patch_size=16,
        ),
        text_config=smollm2_config(),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    )
    model = TokenFlexForConditionalGeneration(config)
    # No id ends an answer.
    suppressed = [config.image_token_id]
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, suppress_tokens=suppressed)
    processor = TokenFlexProcessor(
        SiglipImageProcessorPil(size={"height": 256, "width": 256}, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer,
        patch_size=16,
    )
    save_checkpoint(path, model, processor)


def start(engine: str, path: Path, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "tokenflex", "serve", "--model_name_or_path", str(path), "--dtype", "float32"]
    command += ["--port", str(PORTS[engine])]
    if engine == "vllm":
        command += ["--engine", "vllm", "--", "--max-model-len", "1024", "--max-num-seqs", "32", "--enforce-eager"]
        command += ["--generation-config", "vllm"]
    else:
        command += ["--device", "cpu"]
    # By itself vLLM's CPU build keeps a core for its front end, which is half of two.
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    running = subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, env={**os.environ, **threads})
    with httpx.Client(base_url=f"http://localhost:{PORTS[engine]}") as client:
        while running.poll() is None:
            try:
                if client.get("/health").status_code == 200:
                    return running
            except httpx.HTTPError:
                time.sleep(1)
    raise RuntimeError(f"{engine} did not start:\n{log.read_text()[-3000:]}")


def draw_image(seed: int) -> str:
    """A photo-like image, smooth and with noise, as a `data:` URL."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((320, 240), Image.BICUBIC)
    noisy = np.asarray(coarse, dtype=np.int16) + draw.integers(-8, 9, (240, 320, 3))
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


async def ask(client: httpx.AsyncClient, seed: int, count: int, events: list) -> str:
    """The answer; each piece is noted with its time, its tokens and, if it is the first, the seconds until it."""
    part = {"type": "image_url", "image_url": {"url": draw_image(seed)}}
    message = {"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}
    body = {"messages": [message], "max_tokens": NEW_TOKENS, "temperature": 0, "stream": True}
    started, said = time.perf_counter(), ""
    async with client.stream("POST", "/v1/chat/completions", json={**body, "num_vision_tokens": count}) as reply:
        if reply.status_code != 200:
            raise RuntimeError(f"status {reply.status_code}: {(await reply.aread()).decode()[:500]}")
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise RuntimeError(str(event))
                piece = event["choices"][0]["delta"].get("content") or ""
                if piece:
                    now = time.perf_counter()
                    events.append((now, piece.count(TOKEN_END), None if said else now - started))
                    said += piece
    return said


async def load(engine: str, clients: int, counts: list[int], seconds: float, seed: int, answers: dict) -> dict:
    """Clients that ask without a pause; what comes in the first third of the time warms up and does not count."""
    seeds, draw, events, ended = itertools.count(seed), random.Random(seed), [], 0
    async with httpx.AsyncClient(base_url=f"http://localhost:{PORTS[engine]}", timeout=600) as client:

        async def run():
            nonlocal ended
            while True:
                image, count = next(seeds), draw.choice(counts)
                said = await ask(client, image, count, events)
                answers.setdefault((image, count), {})[engine] = said
                ended += 1

        running = [asyncio.create_task(run()) for _ in range(clients)]
        done, _ = await asyncio.wait(running, timeout=1.5 * seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        end = time.perf_counter()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    within = [event for event in events if end - seconds <= event[0] <= end]
    firsts = [waited for _, tokens, waited in within if waited is not None]
    tokens = sum(tokens for _, tokens, _ in within)
    return {
        "ended": ended,
        "tokens_per_second": round(tokens / seconds, 2),
        "requests_per_second": round(tokens / seconds / NEW_TOKENS, 3),
        "first_token_ms": round(1000 * statistics.median(firsts)) if firsts else None,
    }


def predict(config, clients: int, count: int, rates) -> float:
    """Seconds of a request at the machine's limits, where its decoding shares every reading of weights with others."""
    text, length = config.text_config, count + 40
    prompt = tower_work(config.vision_config, 1, 4) + projector_work(config, 1, count, 4)
    prompt += prefill_work(text, 1, length, 4)
    step = decode_work(text, clients, length + NEW_TOKENS // 2, 4)
    return limit_seconds(prompt, rates) + NEW_TOKENS * limit_seconds(step, rates) / clients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=16, help="Of a cell. Default: %(default)s.")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="Default: %(default)s.")
    parser.add_argument("--counts", type=int, nargs="+", default=[64, 144, 256], help="Default: %(default)s.")
    parser.add_argument(
        "--mixed_seconds", type=float, default=120, help="Of 32 clients at all counts; 0 for none. Default: 120."
    )
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / "checkpoint"
    write_checkpoint(path)
    config, rates = AutoConfig.from_pretrained(path), measure_rates("cpu", torch.float32)
    servers = [start(engine, path, args.output_dir / f"{engine}.log") for engine in PORTS]
    answers, rows = {}, []
    # So many clients wait for each other: the time has to hold several answers of each.
    cells = [
        (clients, [count], args.seconds * max(1, clients / 8)) for clients in args.clients for count in args.counts
    ]
    cells += [(32, args.counts, args.mixed_seconds)] if args.mixed_seconds else []
    try:
        for number, (clients, counts, seconds) in enumerate(cells):
            row = {"clients": clients, "counts": counts}
            for engine in PORTS:
                row[engine] = asyncio.run(load(engine, clients, counts, seconds, 100_000 * number, answers))
            if len(counts) == 1:
                row["predicted"] = round(1 / predict(config, clients, *counts, rates), 3)
            speeds = [row[engine]["tokens_per_second"] for engine in PORTS]
            row["vllm_over_tokenflex"] = round(speeds[0] / speeds[1], 2) if all(speeds) else None
            rows.append(row)
            print(json.dumps(row), flush=True)
    finally:
        for server in servers:
            server.terminate()
    both = [said for said in answers.values() if len(said) == 2]
    summary = {
        "rows": rows,
        "answers_compared": len(both),
        "answers_equal": sum(said["vllm"] == said["tokenflex"] for said in both),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    (args.output_dir / "results.json").write_text(json.dumps(summary, indent=2))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
