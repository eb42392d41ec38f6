"""`tokenflex init`: a new tiny checkpoint for a data set of one's own."""

from transformers import AutoModelForImageTextToText, HfArgumentParser

from ..checkpoints.files import save_checkpoint
from ..checkpoints.provenance import add_stage, public_names
from ..data.arguments import SourceArguments
from ..data.loading import load_rows
from .tiny import tiny_model_and_processor


def init_checkpoint(dataset, vision_tower: str | None = None, seed: int = 0):
    """
    A tiny model with random weights and a tokenizer trained on a data set's questions and answers.

    Args:
        dataset (`Sequence[Example]`): The data.
        vision_tower (`str`, *optional*):
            A TokenFLEX checkpoint of the same sizes whose trained vision tower is taken over.
        seed (`int`, *optional*, defaults to 0): The seed of the weights.

    Returns:
        `tuple[TokenFlexForConditionalGeneration, TokenFlexProcessor]`

    Raises:
        ValueError: If the other checkpoint's tower has another configuration.
    """
    texts = (
        part["text"]
        for example in (dataset[index] for index in range(len(dataset)))
        for dialog in example.dialogs
        for message in dialog
        for part in message["content"]
        if "text" in part
    )
    model, processor = tiny_model_and_processor(seed, texts=texts)
    if vision_tower is not None:
        other = AutoModelForImageTextToText.from_pretrained(vision_tower).model.vision_tower
        own = model.model.vision_tower
        wanted, given = own.config.to_diff_dict(), other.config.to_diff_dict()
        differing = [name for name in wanted if name != "transformers_version" and wanted[name] != given.get(name)]
        if differing:
            raise ValueError(
                f"`vision_tower`={vision_tower!r} differs from the tiny tower in {', '.join(differing)}: use a "
                "checkpoint that `tokenflex quickstart` or `tokenflex init` made."
            )
        own.load_state_dict(other.state_dict())
    return model, processor


def main(argv: list[str] | None = None) -> None:
    parser = HfArgumentParser(
        SourceArguments,
        prog="tokenflex init",
        description="Make a new tiny checkpoint whose tokenizer is trained on a data set's questions and answers.",
    )
    parser.add_argument("--vision_tower", help="A checkpoint whose trained vision tower is taken over.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the new weights.")
    parser.add_argument("--output_dir", required=True, help="Folder for the checkpoint.")
    args = parser.parse_args(argv)
    rows = load_rows(*parser.parse_dict(vars(args), allow_extra_keys=True))
    model, processor = init_checkpoint(rows, args.vision_tower, args.seed)
    towers = public_names(args.vision_tower)
    provenance = {"base_models": towers, "stages": []}
    provenance = add_stage(provenance, "new weights", vocabulary=public_names(args.dataset), seed=args.seed)
    save_checkpoint(args.output_dir, model, processor, provenance=provenance)
    print(f"Saved {args.output_dir}")  # noqa: T201
