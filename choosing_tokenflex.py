"""The number of vision tokens that a question needs, chosen by the model itself."""

from collections.abc import Sequence

import torch

from .configuration_tokenflex import resolve_named_count


def smallest_sufficient(chances: torch.Tensor, choices: Sequence[int], tolerance: float) -> list[int]:
    """
    For each question the smallest count whose chance of a right answer falls short of the best count's by no more than
    a tolerance. A question that no count helps with gets the smallest.

    Args:
        chances (`torch.Tensor` of shape `(num_questions, num_choices)`): From 0 to 1.
        choices (`Sequence[int]`): The counts, rising.
        tolerance (`float`): From 0 to 1.

    Returns:
        `list[int]`: A count for each question.

    Example:

    ```python
    >>> import torch
    >>> from tokenflex.choosing_tokenflex import smallest_sufficient

    >>> smallest_sufficient(torch.tensor([[0.90, 0.95, 0.93], [0.2, 0.6, 0.9]]), [64, 144, 256], tolerance=0.1)
    [64, 256]
    ```
    """
    sufficient = chances >= chances.max(-1, keepdim=True).values - tolerance
    return [choices[place] for place in sufficient.int().argmax(-1).tolist()]


class TokenFlexChoosingMixin:
    """
    Reads every question once at the smallest count and foresees at which counts it will be answered rightly, by a linear
    head on the hidden state of the prompt's last token. `tokenflex calibrate` fits the head to the model's own right and
    wrong answers, and keeps it in the config as `vision_token_chooser`.
    """

    @torch.no_grad()
    def read_questions(self, input_ids: torch.LongTensor, **kwargs) -> torch.Tensor:
        """
        The hidden state of each prompt's last token at the smallest of `vision_token_choices`.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The prompts, at any count.
            kwargs: What the processor returns beside them; `mm_encoder_outputs` may stand for `pixel_values`.

        Returns:
            `torch.Tensor` of shape `(batch_size, hidden_size)`, in float32.
        """
        prompt = self._recount_inputs(min(self.config.vision_token_choices), input_ids, kwargs)
        hidden_states = self.model(**prompt, use_cache=False, return_dict=True).last_hidden_state
        mask = prompt.get("attention_mask")
        if mask is None:
            return hidden_states[:, -1].float()
        last = mask.shape[1] - 1 - mask.flip(-1).long().argmax(-1)
        return hidden_states[torch.arange(len(last), device=last.device), last].float()

    def choose_vision_tokens(self, input_ids: torch.LongTensor, tolerance: float | None = None, **kwargs) -> list[int]:
        """
        The count that each prompt's images need, as `generate(num_vision_tokens="auto")` chooses it. A prompt's choice does
        not depend on the others in the batch.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The prompts, at any count.
            tolerance (`float`, *optional*):
                By how much a chosen count's chance of a right answer may fall short of the best count's, from 0 to 1.
                Defaults to what `tokenflex calibrate` found.
            kwargs: As for [`~TokenFlexChoosingMixin.read_questions`].

        Returns:
            `list[int]`: One of `vision_token_choices` for each prompt.

        Raises:
            ValueError: If the model has not been calibrated.
        """
        chooser = self.config.vision_token_chooser
        if chooser is None:
            raise ValueError(
                "`num_vision_tokens`='auto': this checkpoint has not learned to choose. Run `tokenflex calibrate` on it, or "
                f"ask for 'low' ({min(self.config.vision_token_choices)}), 'high' "
                f"({max(self.config.vision_token_choices)}) or any count."
            )
        hidden_states = self.read_questions(input_ids, **kwargs)
        weight = torch.tensor(chooser["weight"], device=hidden_states.device)
        bias = torch.tensor(chooser["bias"], device=hidden_states.device)
        chances = (hidden_states @ weight.T + bias).sigmoid()
        return smallest_sufficient(
            chances, chooser["choices"], chooser["tolerance"] if tolerance is None else tolerance
        )

    def _resolve_named_count(self, name: str, input_ids: torch.LongTensor | None, kwargs: dict):
        """
        A named count's number; for `"auto"` a list with one per image, and the number for each prompt, 0 without images.

        Returns:
            `tuple[int | list[int] | None, list[int] | None]`
        """
        count = resolve_named_count(name, self.config.vision_token_choices)
        if count != "auto":
            return count, None
        cache = kwargs.get("past_key_values")
        if input_ids is None or (cache is not None and int(cache.get_seq_length()) > 0):
            raise ValueError(
                "`num_vision_tokens`='auto' reads the whole prompt, so that it takes `input_ids` and no filled "
                "`past_key_values`: name a count."
            )
        if kwargs.get("pixel_values") is None and not kwargs.get("mm_encoder_outputs"):
            return None, None
        if not kwargs.get("mm_encoder_outputs"):
            pixel_values = kwargs.pop("pixel_values")
            kwargs["mm_encoder_outputs"] = {"image": self.get_image_features(pixel_values, 1, return_dict=True)}
        chosen = self.choose_vision_tokens(input_ids, **kwargs)
        _, _, rows = self._locate_encoded(input_ids, kwargs)
        rows = rows.tolist()
        return [chosen[row] for row in rows], [count if row in rows else 0 for row, count in enumerate(chosen)]
