"""
Trains tiny models as one of several processes, or alone, and writes the outcome, for test_distributed.py to compare:

    accelerate launch --config_file training/accelerate/ddp.yaml --num_processes 2 --mixed_precision no \
        tests/training/distributed_worker.py FOLDER
"""

import copy
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from transformers import CLIPVisionConfig

from tokenflex import TokenFlexForConditionalGeneration
from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.data.synthetic import SyntheticVQA
from tokenflex.evaluation.sweep import predict
from tokenflex.towers.tiny import tiny_model_and_processor
from tokenflex.training.arguments import TokenFlexTrainingArguments
from tokenflex.training.lora import add_adapters, lora_config
from tokenflex.training.train import freeze_parts, main
from tokenflex.training.trainer import TokenFlexTrainer


GLOBAL_BATCH = 4
TEXT_ROWS = [{"question": f"is {i} even?", "answer": "no" if i % 2 else "yes"} for i in range(48)]


def shard_on_cpu():
    """Accelerate shares weights out between accelerators only; torch does so between CPUs as well."""
    set_up = PartialState.__init__

    def patched(self, *args, **kwargs):
        set_up(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = patched


class Runs:
    """Every method trains some models; what they train on is the same however many processes there are."""

    def __init__(self, folder: Path):
        self.folder = folder
        state = PartialState(cpu=True, timeout=timedelta(seconds=60))
        self.world_size, self.rank = state.num_processes, state.process_index
        self.model, self.processor = tiny_model_and_processor(width=32)
        self.rows = [*SyntheticVQA(32, 3, questions_per_image=2), *TEXT_ROWS]

    def train(self, name, model=None, resume=None, frozen=(), trainer_options=None, **options):
        model = copy.deepcopy(model or self.model)
        if frozen is not None:
            freeze_parts(model, list(frozen))
        counts = []

        def record(module, args, kwargs):
            if module.training:
                grids = kwargs.get("vision_token_grids")
                counts.append(None if grids is None else grids.prod(-1).tolist())

        model.model.register_forward_pre_hook(record, with_kwargs=True)
        args = TokenFlexTrainingArguments(
            str(self.folder / name),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            adam_epsilon=1e-4,  # weights whose gradient is nothing but rounding stay where they are
            seed=5,
            **{
                "save_strategy": "no",
                "learning_rate": 1e-3,
                "per_device_train_batch_size": GLOBAL_BATCH // self.world_size,
                **options,
            },
        )
        trainer = TokenFlexTrainer(
            model, args, processing_class=self.processor, train_dataset=self.rows, **(trainer_options or {})
        )
        trainer.train(resume_from_checkpoint=resume)
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        result = {
            "distributed_type": trainer.accelerator.distributed_type.value,
            "counts": counts,
            "log": trainer.state.log_history,
        }
        (self.folder / f"{name}.{self.rank}.json").write_text(json.dumps(result))
        if self.rank == 0:
            weights = {key: value.clone() for key, value in weights.items() if key != "lm_head.weight"}
            save_file(weights, self.folder / f"{name}.safetensors")

    def schemes(self):
        for scheme in ("batch", "sample", "nested"):
            self.train(scheme, max_steps=20 if scheme == "batch" else 12, scheme=scheme)

    def workers(self):
        for workers in (1, 2):
            self.train(f"workers-{workers}", max_steps=4, dataloader_num_workers=workers)

    def accumulation(self):
        """Eight samples in each step, one at a time or all at once."""
        share = 8 // self.world_size
        splits = {"whole": (share, 1), "split": (1, share)}
        single = {"vision_token_choices": [16], "vision_token_weights": [1.0]}
        for scheme, trainer_options in (("sample", None), ("batch", single)):
            for name, (batch_size, micro_steps) in splits.items():
                self.train(
                    f"{scheme}-{name}",
                    max_steps=3,
                    scheme=scheme,
                    per_device_train_batch_size=batch_size,
                    gradient_accumulation_steps=micro_steps,
                    trainer_options=trainer_options,
                )

    def resume(self):
        options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
        self.train("uninterrupted", **options)
        for step in (1, 2, 3):
            checkpoint = self.folder / "uninterrupted" / f"checkpoint-{step}"
            self.train(f"resumed-{step}", resume=str(checkpoint), **options)

    def freeze(self):
        self.train("tower-frozen", max_steps=3, frozen=["vision_tower"], gradient_checkpointing=True)
        self.train("alignment", max_steps=3, frozen=["vision_tower", "language_model"])
        self.train("checkpointing", max_steps=3, gradient_checkpointing=True)
        self.train("clip", self.clip(), max_steps=3, gradient_checkpointing=True)

    def clip(self):
        config = copy.deepcopy(self.model.config)
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        sizes = {name: getattr(config.vision_config, name) for name in (*sizes, "image_size", "patch_size")}
        values = config.to_dict() | {"vision_config": CLIPVisionConfig(**sizes), "num_prefix_tokens": 1}
        torch.manual_seed(0)
        return TokenFlexForConditionalGeneration(type(config)(**values))

    def adapters(self):
        torch.manual_seed(0)
        model = add_adapters(copy.deepcopy(self.model), lora_config(self.model, rank=4))
        try:
            options = {"scheme": "distill", "distillation_from_base": True, "max_steps": 3}
            self.train("from-base", model, frozen=None, **options)
        except ValueError as error:
            (self.folder / "from-base.error").write_text(str(error))

    def resolutions(self):
        pairs = {"vision_token_choices": ["4@32", 16, "36@48"], "vision_token_weights": [1.0, 1.0, 1.0]}
        self.train("pairs", max_steps=6, trainer_options=pairs)
        try:
            self.train("pairs-nested", max_steps=3, scheme="nested", trainer_options=pairs)
        except ValueError as error:
            (self.folder / "pairs-nested.error").write_text(str(error))

    def features(self):
        options = {"max_steps": 3, "frozen": ["vision_tower"], "gradient_checkpointing": True}
        try:
            for name in ("features-new", "features-kept"):
                self.train(name, cache_features=str(self.folder / "features"), **options)
        except ValueError as error:
            (self.folder / "features.error").write_text(str(error))

    def evaluate(self):
        rows = [SyntheticVQA(5, 4, questions_per_image=1)[i] for i in range(5)]
        for i, given in enumerate(predict(self.model, self.processor, rows, [16], max_new_tokens=4)):
            if i % 2:
                rows[i]["answers"] = [given.predictions[16]]  # so that the scores are neither 0 nor 1
        options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
        options |= {"save_strategy": "steps", "max_steps": 2, "learning_rate": 0.0, "eval_max_new_tokens": 4}
        self.train("evaluated", trainer_options={"eval_dataset": rows}, **options)

    def command(self):
        if self.rank == 0:
            save_checkpoint(self.folder / "start", self.model, self.processor)
        PartialState().wait_for_everyone()
        main([
            "--model_name_or_path", str(self.folder / "start"),
            "--dataset", "synthetic:16",
            "--output_dir", str(self.folder / "command"),
            "--max_steps", "2",
            "--per_device_train_batch_size", str(GLOBAL_BATCH // self.world_size),
            "--learning_rate", "1e-3",
            "--adam_epsilon", "1e-4",
            "--use_cpu", "true",
            "--report_to", "none",
            "--disable_tqdm", "true",
            "--save_steps", "1",
        ])  # fmt: skip


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()
    runs = Runs(Path(sys.argv[1]))
    for name in sys.argv[2:]:
        getattr(runs, name)()
    PartialState().destroy_process_group()
