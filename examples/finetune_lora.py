"""
LoRA fine-tuning through the plain Trainer, with the vision-token count drawn anew for each step, and one merged
checkpoint.

    python examples/finetune_lora.py --model_name_or_path outputs/demo/checkpoint --dataset train.parquet \
        --output_dir outputs/lora

`train.parquet` (or a JSONL file) holds rows of `image`, `question` and `answer`. Needs `pip install
"tokenflex[lora]"`.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.choices_tokenflex import parse_choice
from tokenflex.data.arguments import DataArguments
from tokenflex.data.loading import load_rows
from tokenflex.training import TokenFlexDataCollator
from tokenflex.training.lora import add_adapters, lora_config, merge_adapters


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train LoRA adapters at drawn vision-token counts and merge them.")
    parser.add_argument("--model_name_or_path", required=True, help="Checkpoint folder or Hub id.")
    parser.add_argument("--dataset", required=True, help="Parquet, JSON, JSONL or CSV file of rows.")
    parser.add_argument("--output_dir", required=True, help="Gets `adapter` and the merged checkpoint, `final`.")
    parser.add_argument(
        "--vision_token_choices",
        type=parse_choice,
        nargs="+",
        help="Counts to draw from. Default: the model config's.",
    )
    parser.add_argument(
        "--vision_token_weights", type=float, nargs="+", help="One weight per count. Default: the config's."
    )
    parser.add_argument("--rank", type=int, default=16, help="The adapters' rank. Default: %(default)s.")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="Peak rate. Default: %(default)s.")
    parser.add_argument("--batch_size", type=int, default=8, help="Rows per step. Default: %(default)s.")
    parser.add_argument("--max_steps", type=int, default=-1, help="Default: one pass over the rows.")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    output_dir = Path(args.output_dir)
    processor = AutoProcessor.from_pretrained(args.model_name_or_path)
    model = AutoModelForImageTextToText.from_pretrained(args.model_name_or_path)
    model = add_adapters(model, lora_config(model, rank=args.rank))

    collator = TokenFlexDataCollator(processor, args.vision_token_choices, args.vision_token_weights)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(output_dir / "run"),
            learning_rate=args.learning_rate,
            per_device_train_batch_size=args.batch_size,
            num_train_epochs=1,
            max_steps=args.max_steps,
            logging_steps=1,
            remove_unused_columns=False,  # the collator reads the columns
            report_to="none",
        ),
        data_collator=collator,
        callbacks=[collator.callback],  # draws each step's count
        train_dataset=load_rows(DataArguments([args.dataset]), processor),
    )
    trainer.train()
    trainer.save_model(str(output_dir / "adapter"))
    merged = merge_adapters(args.model_name_or_path, output_dir / "adapter")
    save_checkpoint(output_dir / "final", merged, processor)
    print(f"Saved {output_dir / 'final'}")


if __name__ == "__main__":
    main()
