"""Publishing from a trainer: a checkpoint's own files and its card, and nothing else of a run's folder."""

import json
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..checkpoints.files import PROVENANCE_NAME, write_file
from ..checkpoints.provenance import add_stage, read_provenance
from ..choices_tokenflex import sort_choices
from ..hub.card import slugify
from ..hub.push import push_checkpoint


logger = logging.get_logger(__name__)

ADAPTERS = (
    "these are adapters, not a model: merge them with `merge_adapters`, save with `save_checkpoint`, and publish that "
    "with `tokenflex push`; or publish the adapters alone with the model's `push_to_hub`."
)


class PublishingMixin:
    """
    For a `Trainer`: publishing as `tokenflex push` does it, with scores of the very weights that are published.

    Args:
        model: As for `transformers.Trainer`.
        args (`TrainingArguments`): As for `transformers.Trainer`.

    Raises:
        ValueError: If `hub_strategy` would publish a run's state, or the model is adapters alone.
    """

    def __init__(self, model, args, *rest, **kwargs):
        if args.push_to_hub and args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise ValueError(
                f"`hub_strategy`={args.hub_strategy.value!r} publishes optimizer states and arguments with their "
                "paths: use 'end' or 'every_save', which publish checkpoints alone."
            )
        if args.push_to_hub and hasattr(model, "peft_config"):
            raise ValueError(f"`push_to_hub`=True: {ADAPTERS}")
        super().__init__(model, args, *rest, **kwargs)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        license: str | None = None,
        language: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        finetuned_from: str | list[str] | None = None,
    ):
        """
        Saves the model and publishes it, with the card of `tokenflex push`. If there is an `eval_dataset`, the weights
        are evaluated on it first, so that the scores are theirs. Every process has to call it.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`): The commit's.
            blocking (`bool`, *optional*, defaults to `True`): Wait for the upload.
            token (`str`, *optional*): Defaults to the arguments' `hub_token`, else that of the login.
            revision (`str`, *optional*): The branch. Defaults to the arguments' `hub_revision`.
            private (`bool`, *optional*): Make a new repository private. Defaults to `hub_private_repo`.
            license (`str`, *optional*): The checkpoint's license.
            language (`str` or `list[str]`, *optional*, defaults to `"en"`): The languages of the model.
            tags (`str` or `list[str]`, *optional*): Further tags.
            dataset (`str` or `list[str]`, *optional*): Hub ids of the training data.
            finetuned_from (`str` or `list[str]`, *optional*): Hub ids of what the model was built from.

        Returns:
            `str`, `concurrent.futures.Future` or `None`: The commit's URL, or its future; `None` on other processes.

        Raises:
            ValueError: If the trainer holds adapters alone, or the Hub refuses.
            ConnectionError: If the upload broke off.
        """
        if hasattr(self.accelerator.unwrap_model(self.model), "peft_config"):
            raise ValueError(ADAPTERS)
        evaluations = self.evaluate_to_publish()
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        folder = Path(self.args.output_dir)
        write_file(folder / PROVENANCE_NAME, json.dumps(self.describe_stage(), indent=2) + "\n")
        card = {
            "license": license,
            "languages": _as_list(language) or ["en"],
            "tags": _as_list(tags),
            "datasets": _as_list(dataset),
            "base_models": _as_list(finetuned_from),
        }
        options = {"token": token, "revision": revision, "private": private, "commit_message": commit_message}
        return self.publish(folder, evaluations, blocking, **options, **card)

    def publish(self, folder: str | Path, evaluations: Sequence[Path] = (), blocking: bool = True, **options):
        """
        Publishes a checkpoint where the arguments say.

        Args:
            folder (`str` or `Path`): The checkpoint.
            evaluations (`Sequence[Path]`, *optional*): Folders from [`~PublishingMixin.evaluate_to_publish`].
            blocking (`bool`, *optional*, defaults to `True`): Wait for the upload.
            options: As for [`push_checkpoint`]; what is `None` is the arguments'.
        """
        args = self.args
        defaults = {"token": args.hub_token, "revision": args.hub_revision, "private": args.hub_private_repo}
        options = {**defaults, **{name: value for name, value in options.items() if value is not None}}
        repo_id = self.hub_model_id or args.hub_model_id or Path(args.output_dir).resolve().name
        arguments = (folder, repo_id, evaluations)
        if blocking:
            return push_checkpoint(*arguments, **options)
        return HfApi().run_as_future(push_checkpoint, *arguments, **options)

    def evaluate_to_publish(self, source: dict | None = None, model=None) -> list[Path]:
        """
        Scores the present weights on the `eval_dataset` as `tokenflex eval` does, into `<output_dir>/evaluation`.

        Args:
            source (`dict`, *optional*): Names of the data: `dataset`, a list of names, and `dataset_split`.
            model (`TokenFlexForConditionalGeneration`, *optional*):
                The model that is published, where it is not the trained one but has its adapters merged.

        Returns:
            `list[Path]`: A folder for each set; none if there is no set, or weights are shared out between processes.
        """
        from ..evaluation.evaluator import (
            evaluate,  # which reads data as training does, so that each would need the other
        )
        from ..evaluation.report import save_report

        if self.eval_dataset is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return []
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"evaluation set": self.eval_dataset}
        if model is None:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        was_training, folders = model.training, []
        for name, rows in sets.items():
            report, _ = evaluate(
                model.eval(),
                self.processing_class,
                rows,
                sort_choices(self.data_collator.vision_token_choices),
                batch_size=self.args.per_device_eval_batch_size,
                max_new_tokens=self.args.eval_max_new_tokens,
                show_progress=False,
            )
            report |= source or {"dataset": [name]}
            folder = Path(self.args.output_dir) / "evaluation" / slugify(name)
            if self.is_world_process_zero():
                save_report(folder, report, [], name)
            folders.append(folder)
        model.train(was_training)
        return folders

    def describe_stage(self, start: dict | None = None, data: list[str] | None = None, **facts) -> dict:
        """
        How the present weights came about.

        Args:
            start (`dict`, *optional*): The provenance of the checkpoint that training began with. Defaults to what is
                known of the one that the model was loaded from.
            data (`list[str]`, *optional*): Names of the training data.
            facts: Further things that they depend on.

        Returns:
            `dict`: The checkpoint's provenance, as [`add_stage`] returns it.
        """
        args, collator = self.args, self.data_collator
        if start is None:
            name = self.model.config.name_or_path
            start = read_provenance(name) if name else {"base_models": [], "stages": []}
        return add_stage(
            start,
            "training",
            data=data,
            vision_token_choices=collator.vision_token_choices,
            vision_token_weights=collator.vision_token_weights,
            scheme=collator.scheme,
            steps=self.state.best_global_step if args.load_best_model_at_end else self.state.global_step,
            batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            learning_rate=args.learning_rate,
            seed=args.seed,
            **facts,
        )

    def publish_checkpoint(self, checkpoint_folder: str | Path) -> None:
        """Publishes a checkpoint on the way, if `hub_strategy` says so; what fails is logged, and training goes on."""
        if self.args.hub_strategy != HubStrategy.EVERY_SAVE or not self.is_world_process_zero():
            return
        try:
            self.publish(checkpoint_folder, commit_message=f"Training in progress, step {self.state.global_step}")
        except (ValueError, ConnectionError) as error:  # what is trained is worth more than what is shown of it
            logger.warning(f"{checkpoint_folder} was not published, training goes on: {error}")


def _as_list(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])
