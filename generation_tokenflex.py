"""`generate` for TokenFLEX at any number of vision tokens, and the choice of that number by the model itself."""

import functools
import math
import weakref
from collections.abc import Sequence

import torch
import transformers
from torch import nn
from transformers.generation import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList

from .choices_tokenflex import NAMED_COUNTS, resolve_named_count, resolve_vision_tokens, sort_choices, split_choice
from .placeholders_tokenflex import (
    TokenFlexImageOutput,
    asked_grids,
    at_count,
    count_images,
    encoded_grids,
    first_placeholders,
    kept_features,
    seen_resolutions,
)


# The positions of image tokens in caches that `generate` filled: a conversation that goes on in one is encoded alike.
_IMAGE_POSITIONS = weakref.WeakKeyDictionary()
KEEPS_IMAGES_OF_CHUNKS = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)
PER_IMAGE = ("pixel_values", "vision_token_grids", "image_resolutions", "image_shapes", "num_tiles")


def smallest_sufficient(chances: torch.Tensor, choices: Sequence[int | str], tolerance: float) -> list[int | str]:
    """
    Finds for each question the cheapest choice whose chance of a right answer falls short of the best one's by no more
    than a tolerance. A question that no choice helps with gets the cheapest.

    Args:
        chances (`torch.Tensor` of shape `(num_questions, num_choices)`): From 0 to 1.
        choices (`Sequence[int | str]`): The counts, also with resolutions, the cheapest first.
        tolerance (`float`): From 0 to 1.

    Returns:
        `list[int | str]`: A choice for each question.

    Example:

    ```python
    >>> import torch
    >>> from tokenflex.generation_tokenflex import smallest_sufficient

    >>> smallest_sufficient(torch.tensor([[0.90, 0.95, 0.93], [0.2, 0.6, 0.9]]), [64, 144, 256], tolerance=0.1)
    [64, 256]
    ```
    """
    sufficient = chances >= chances.max(-1, keepdim=True).values - tolerance
    return [choices[place] for place in sufficient.int().argmax(-1).tolist()]


class TokenFlexChooser(nn.Module):
    """
    The linear head that foresees, from the hidden state of a text's last token, the chance of a right answer at each
    choice. Buffers, so that it is saved with the weights and never trained with them.

    Args:
        num_choices (`int`): The number of counts to choose from.
        hidden_size (`int`): The language model's hidden size.
    """

    def __init__(self, num_choices: int, hidden_size: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(num_choices, hidden_size))
        self.register_buffer("bias", torch.zeros(num_choices))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Chances from 0 to 1, of shape `(num_questions, num_choices)`; states are `(num_questions, hidden_size)`."""
        return nn.functional.linear(hidden_states.float(), self.weight.float(), self.bias.float()).sigmoid()


class TokenFlexGenerationMixin(GenerationMixin):
    """
    `generate` at a chosen number of vision tokens. To choose it, the model reads a prompt's text once, without its
    images, and foresees at which counts it will be answered rightly, by [`TokenFlexChooser`]; `tokenflex calibrate`
    fits that head to the model's own right and wrong answers.
    """

    @torch.no_grad()
    def read_questions(
        self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor | None = None, **kwargs
    ) -> torch.Tensor:
        """
        Computes the hidden state of each prompt's last token behind its text alone, without its images.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The prompts, at any count.
            attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                0 for padding, which is known by the generation config's `pad_token_id` where no mask is given.
            kwargs: The processor's other outputs, which are not looked at.

        Returns:
            `torch.Tensor` of shape `(batch_size, hidden_size)`, in float32.

        Raises:
            ValueError: If a prompt has no text, or the mask another shape.
        """
        if attention_mask is None:
            attention_mask = _mask_padding(input_ids, _padding({}, (self.generation_config,)))
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` has shape {tuple(attention_mask.shape)}: `num_vision_tokens`='auto' takes one of "
                f"the shape of `input_ids`, {tuple(input_ids.shape)}."
            )
        is_text = attention_mask.bool() & (input_ids != self.config.image_token_id)
        if not is_text.any(-1).all():
            raise ValueError(
                "`num_vision_tokens`='auto' reads each prompt's text, but row "
                f"{is_text.any(-1).tolist().index(False)} of `input_ids` has none: name a count."
            )
        texts = [row[kept] for row, kept in zip(input_ids, is_text)]
        texts = nn.utils.rnn.pad_sequence(texts, batch_first=True)  # no token sees what is behind it
        hidden_states = self.model(input_ids=texts, use_cache=False).last_hidden_state
        return hidden_states[torch.arange(len(texts), device=texts.device), is_text.sum(-1) - 1].float()

    def choose_vision_tokens(
        self, input_ids: torch.LongTensor, tolerance: float | None = None, **kwargs
    ) -> list[int | str]:
        """
        Chooses the count, and with it the resolution, that each prompt's images need, as
        `generate(num_vision_tokens="auto")` does: by the prompt's text, before any image is seen. A prompt's choice
        does not depend on the others in the batch.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The prompts, at any count.
            tolerance (`float`, *optional*):
                By how much a chosen count's chance of a right answer may fall short of the best count's, from 0 to 1.
                Defaults to the value that `tokenflex calibrate` found.
            kwargs: As for [`~TokenFlexGenerationMixin.read_questions`].

        Returns:
            `list[int | str]`: One of `vision_token_choices` for each prompt.

        Raises:
            ValueError: If the model has not been calibrated, or a prompt has no text.
        """
        chooser = self.config.vision_token_chooser
        if chooser is None:
            choices = sort_choices(self.config.vision_token_choices)
            raise ValueError(
                "`num_vision_tokens`='auto': this checkpoint has not learned to choose. Run `tokenflex calibrate` on "
                f"it, or ask for 'low' ({choices[0]}), 'high' ({choices[-1]}) or any count."
            )
        if chooser.get("reads") != "text":
            raise ValueError(
                "`num_vision_tokens`='auto': this checkpoint learned to choose by its images, as earlier versions "
                "did: run `tokenflex calibrate` on it again."
            )
        chances = self.model.vision_token_chooser(self.read_questions(input_ids, **kwargs))
        tolerance = chooser["tolerance"] if tolerance is None else tolerance
        return smallest_sufficient(chances, chooser["choices"], tolerance)

    def _choose_counts(self, prompt: dict, pad_token_id: int | None) -> tuple[list | None, list | None]:
        """The choice of each image, and of each prompt, 0 for one without images; `None` where there are none."""
        if not count_images(prompt):
            return None, None
        input_ids, mask = prompt["input_ids"], prompt.get("attention_mask")
        mask = _mask_padding(input_ids, pad_token_id) if mask is None else mask
        chosen = self.choose_vision_tokens(input_ids, attention_mask=mask)
        first = first_placeholders(input_ids, encoded_grids(prompt, self.config), self.config.image_token_id)
        rows = (first // input_ids.shape[1]).tolist()
        return [chosen[row] for row in rows], [n if row in rows else 0 for row, n in enumerate(chosen)]

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        *args,
        num_vision_tokens: int | tuple[int, int] | list | str | None = None,
        image_size: int | tuple[int, int] | None = None,
        **kwargs,
    ):
        """
        [`~transformers.GenerationMixin.generate`] at a chosen number of vision tokens, and resolution of the vision
        tower, whatever the inputs were encoded with: the prompt really gets shorter or longer, and the result equals
        encoding so.

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The prompts, as `input_ids`.
            generation_config (`GenerationConfig`, *optional*):
                As in transformers. An entry `num_vision_tokens` in it, a count or a grid for all images, is used when
                the argument is not given, and one in the model's own generation config when neither is.
            logits_processor (`LogitsProcessorList`, *optional*):
                As in transformers. Like a custom stopping criterion and `prefix_allowed_tokens_fn` it sees the prompt
                as it is generated at, not the caller's.
            num_vision_tokens (`int`, `tuple[int, int]`, a list of these, or `str`, *optional*):
                A count n*n or grid (rows, columns) for all images, or a list with one per image in order of appearance
                (an image's tiles share its entry). With `image_shapes`, an integer is matched to each image's shape.
                `"64@224"` is a count at a resolution: the tower sees the image shrunk to 224 by 224 pixels.
                `"low"` and `"high"` are the smallest and largest of the config's `vision_token_choices`; `"auto"`
                chooses one of them for each prompt ([`~TokenFlexGenerationMixin.choose_vision_tokens`]). Defaults to
                the counts as encoded.
            image_size (`int` or `tuple[int, int]`, *optional*):
                The resolution in pixels, square or (height, width), that the tower sees all images at. Defaults to the
                one that `vision_token_choices` names for the count, else the tower's own.
            kwargs:
                As in transformers. `mm_encoder_outputs={"image": model.get_image_features(...)}` in place of
                `pixel_values` saves running the tower again; a list of such outputs serves several resolutions. With
                filled `past_key_values` the whole conversation is given, encoded at the counts that the cache holds;
                images in the cache may be given or left out.

        Returns:
            As in transformers. Sequences begin with the caller's `input_ids`, so `output[:, input_ids.shape[1]:]` is
            the answer at every count. With `"auto"` and `return_dict_in_generate=True` the output's
            `num_vision_tokens` holds each prompt's count, 0 for one without images, as a tensor, or as a list where
            it chose among resolutions.

        Raises:
            ValueError: If a count or resolution is not allowed, placeholders and images do not match, or prompts would
                have to be rewritten that cannot be: behind a filled cache, or given as `inputs_embeds`.
        """
        configs = (generation_config, self.generation_config)
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        processors = LogitsProcessorList([NoImageToken(self.config.image_token_id), *(logits_processor or [])])
        kept = kept_features(kwargs)
        is_final = len(kept) == 1 and kept[0].pooler_output is not None and kwargs.get("vision_token_grids") is None
        if num_vision_tokens is None and image_size is None and is_final:  # as transformers hands it to an assistant
            return self._decode(input_ids, generation_config, processors, *args, **kwargs)
        is_said = num_vision_tokens is not None
        if not is_said:
            num_vision_tokens = _said("num_vision_tokens", {}, *configs)
            if isinstance(num_vision_tokens, list):  # JSON has no tuples: a saved config holds (rows, columns) so
                num_vision_tokens = tuple(num_vision_tokens)
            if image_size is not None and num_vision_tokens not in (None, *NAMED_COUNTS):
                num_vision_tokens, _ = split_choice(num_vision_tokens)
        num_vision_tokens = resolve_named_count(num_vision_tokens, self.config.vision_token_choices)
        if num_vision_tokens == "auto" and image_size is not None:
            raise ValueError(
                f"`image_size`={image_size!r} with `num_vision_tokens`='auto', which chooses it: leave it out."
            )
        is_one = is_said and num_vision_tokens != "auto" and not isinstance(num_vision_tokens, list)
        if is_one and kwargs.get("image_shapes") is None:  # without images it is not used
            resolve_vision_tokens(num_vision_tokens, 1, self.config, image_size=image_size)
        cache = kwargs.get("past_key_values", kwargs.get("cache"))  # as transformers calls it from 5.24 on
        cached = 0 if cache is None else int(cache.get_seq_length())
        self._refuse_unsupported(input_ids, num_vision_tokens, image_size, cached, kwargs, configs)
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            return self._decode(input_ids, generation_config, processors, *args, **kwargs)

        prompt, chosen = {**kwargs, "input_ids": input_ids}, None
        if num_vision_tokens == "auto":
            num_vision_tokens, chosen = self._choose_counts(prompt, _padding(kwargs, configs))
        if cached:
            self._keep_new_images(prompt, num_vision_tokens, image_size, cache, cached)
        else:
            prompt = at_count(prompt, num_vision_tokens, self.config, _padding(kwargs, configs), image_size)
        self._encode_images(prompt, cached)
        rewritten = prompt.pop("input_ids")
        output = self._decode(rewritten, generation_config, processors, *args, **prompt)

        is_tensor = isinstance(output, torch.Tensor)
        if chosen is not None and not is_tensor:
            has_pairs = any(isinstance(choice, str) for choice in chosen)
            chosen = chosen if has_pairs else torch.tensor(chosen, device=output.sequences.device)
            output["num_vision_tokens"] = chosen
        cache = cache if is_tensor else output.past_key_values
        if cache is not None:
            _IMAGE_POSITIONS[cache] = rewritten == self.config.image_token_id
        sequences = output if is_tensor else output.sequences
        answers = sequences[:, rewritten.shape[1] :]
        callers = input_ids.repeat_interleave(len(answers) // len(input_ids), dim=0).to(answers.device)
        sequences = torch.cat([callers, answers], dim=-1)
        if not is_tensor:
            output.sequences = sequences
        return sequences if is_tensor else output

    def _decode(self, *args, **kwargs):
        """transformers' `generate`, with a cache for layers that training checkpoints, which before 5.24 drop it."""
        layers = [module for module in self.modules() if getattr(module, "gradient_checkpointing", False)]
        try:
            for layer in layers:
                layer.gradient_checkpointing = False
            return super().generate(*args, **kwargs)
        finally:
            for layer in layers:
                layer.gradient_checkpointing = True

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args, **kwargs):
        # transformers leaves the images out of an assistant's prompt, which `forward` refuses unless it is told.
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return inputs if kwargs.get("mm_encoder_outputs") is None else {"mm_encoder_outputs": {}, **inputs}

    def _encode_images(self, prompt: dict, cached: int) -> None:
        """Puts features in the place of images, a row's together, which transformers 5.18 would mix up in beams."""
        kept, images = kept_features(prompt), prompt.get("pixel_values")
        prompt.pop("mm_encoder_outputs", None)
        given = {name: prompt.pop(name, None) for name in PER_IMAGE}
        asked = {name: given[name] for name in ("vision_token_grids", "image_resolutions")}
        if images is None and not kept:
            first_placeholders(prompt["input_ids"][:, cached:], [], self.config.image_token_id)
            return
        if kept:
            sizes = seen_resolutions(asked, self.config)
            features = self.model.pool_kept_features(kept, encoded_grids(asked, self.config), sizes)
        else:
            features = self.model.get_image_features(images, **asked, return_dict=True)
        tokens = (prompt["input_ids"][:, cached:] == self.config.image_token_id).sum(-1).tolist()
        features.pooler_output = [row for row in torch.cat(list(features.pooler_output)).split(tokens) if len(row)]
        prompt["mm_encoder_outputs"] = {"image": features}

    def _keep_new_images(self, prompt: dict, num_vision_tokens, image_size, cache, cached: int) -> None:
        """Leaves of a conversation's images those behind its cache, which has to hold the others alike."""
        input_ids, mask = prompt["input_ids"], prompt.get("attention_mask")
        batch_size, length = input_ids.shape
        is_image, noted = input_ids == self.config.image_token_id, _IMAGE_POSITIONS.get(cache)
        if not is_image.any() and (noted is None or not noted.any()):
            return
        if cached >= length or (mask is not None and mask.shape != input_ids.shape):
            raise ValueError(
                f"`past_key_values` holds {cached} tokens, but `input_ids` has shape {tuple(input_ids.shape)} and "
                f"`attention_mask` {None if mask is None else tuple(mask.shape)}: pass the whole conversation, with "
                "new tokens at its end."
            )
        if noted is not None and batch_size % len(noted) == 0:
            noted = noted.repeat_interleave(batch_size // len(noted), dim=0)[:, :cached].to(is_image.device)
            if not torch.equal(noted, is_image[:, : noted.shape[1]]):
                raise ValueError(
                    f"`past_key_values` holds {cached} tokens with images in runs of {_run_lengths(noted)}, but "
                    f"`input_ids` has them in runs of {_run_lengths(is_image[:, :cached])}: encode the conversation "
                    "at the counts that the cache holds, or start with an empty cache."
                )
        grids = encoded_grids(prompt, self.config)
        if num_vision_tokens is not None or (image_size is not None and grids):
            num_vision_tokens = grids if num_vision_tokens is None else num_vision_tokens
            runs = sum(_run_lengths(is_image), [])
            asked, sizes = asked_grids(prompt, num_vision_tokens, len(grids or runs), self.config, image_size)
            if asked != grids if grids else [rows * columns for rows, columns in asked] != runs:
                raise ValueError(
                    f"`num_vision_tokens`={num_vision_tokens}, but `past_key_values` holds {cached} tokens, behind "
                    f"which a prompt with images in runs of {_run_lengths(is_image)} is not re-counted: leave the "
                    "argument out, or encode the whole conversation at the counts asked for and start with an empty "
                    "cache."
                )
            if grids:
                prompt["image_resolutions"] = torch.tensor([size or (0, 0) for size in sizes])
        are_all_new = sum(rows * columns for rows, columns in grids) == int(is_image[:, cached:].sum())
        start = cached if are_all_new else 0
        first = first_placeholders(input_ids[:, start:], grids, self.config.image_token_id)
        columns = first % (length - start) + start
        is_new = columns >= cached
        ends = columns + torch.tensor([rows * columns for rows, columns in grids], device=columns.device)
        if (~is_new & (ends > cached)).any():
            raise ValueError(
                f"`past_key_values` ends after {cached} tokens, inside an image: crop it to before the image, or "
                "behind it."
            )
        new, outputs = is_new.nonzero().flatten().tolist(), []
        for kept in kept_features(prompt):
            features, sizes = kept.last_hidden_state, kept.get("image_resolutions")
            features = features[new] if isinstance(features, torch.Tensor) else [features[i] for i in new]
            outputs.append(TokenFlexImageOutput(features, image_resolutions=sizes and [sizes[i] for i in new]))
        prompt["mm_encoder_outputs"] = {"image": outputs} if new and outputs else None
        for name in ("pixel_values", "vision_token_grids", "image_resolutions"):
            images = prompt.pop(name, None)
            if images is not None and new:
                prompt[name] = images[new]

    def _refuse_unsupported(
        self, input_ids, num_vision_tokens, image_size, cached: int, kwargs: dict, configs: tuple
    ) -> None:
        """Names what transformers' `generate` cannot do with images, or behind a filled cache."""
        if kwargs.get("pixel_values") is not None and kwargs.get("mm_encoder_outputs"):
            raise ValueError("Give `pixel_values` or `mm_encoder_outputs`, not both.")
        if num_vision_tokens == "auto" and (cached or input_ids is None):
            raise ValueError(
                "`num_vision_tokens`='auto' reads the whole prompt, so that it takes `input_ids` and no filled "
                "`past_key_values`: name a count."
            )
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            asked = {"num_vision_tokens": num_vision_tokens, "image_size": image_size}
            asked = ", ".join(f"`{name}`={value}" for name, value in asked.items() if value is not None)
            if asked and count_images(kwargs):
                raise ValueError(
                    f"{asked} cannot be applied to `inputs_embeds`: pass `input_ids`, or embed the prompt at that "
                    "count."
                )
        elif _said("cache_implementation", kwargs, *configs) == "paged":
            self._refuse_images(input_ids, "`cache_implementation`='paged'", "call `generate` with another cache")
        if kwargs.get("negative_prompt_ids") is not None:
            self._refuse_images(kwargs["negative_prompt_ids"], "`negative_prompt_ids`", "give a prompt of text alone")
        if count_images(kwargs) and _said("prefill_chunk_size", kwargs, *configs) and not KEEPS_IMAGES_OF_CHUNKS:
            raise ValueError(
                f"`prefill_chunk_size`: transformers {transformers.__version__} drops images in it: leave it out, or "
                "install 5.23 or later."
            )
        drafts = kwargs.get("assistant_model") is not None or _said("prompt_lookup_num_tokens", kwargs, *configs)
        if cached and drafts:
            raise ValueError(
                f"`past_key_values` holds {cached} tokens, and transformers cannot draft behind a filled cache: leave "
                "`assistant_model` and `prompt_lookup_num_tokens` out, or start with an empty cache."
            )

    def _refuse_images(self, input_ids: torch.LongTensor, where: str, remedy: str) -> None:
        if num_tokens := int((input_ids == self.config.image_token_id).sum()):
            raise ValueError(
                f"{where} takes no images in transformers, but the prompt holds {num_tokens} image tokens: {remedy}."
            )

    def generate_batch(self, inputs: list[list[int]], *args, **kwargs):
        """[`~transformers.GenerationMixin.generate_batch`], for prompts without images; others are refused."""
        for input_ids in inputs:
            self._refuse_images(torch.as_tensor(input_ids), "`generate_batch`", "call `generate`")
        return super().generate_batch(inputs, *args, **kwargs)


class NoImageToken(LogitsProcessor):
    """Keeps the image token out of answers, as `suppress_tokens` does by looking through the vocabulary every step."""

    def __init__(self, image_token_id: int):
        self.image_token_id = image_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = scores.clone()
        scores[:, self.image_token_id] = -math.inf
        return scores


def _said(name: str, kwargs: dict, *configs: GenerationConfig | None):
    """Looks an option up in the arguments, else in the passed config, else in the model's own."""
    said = (kwargs.get(name), *(getattr(config, name, None) for config in configs))
    return next((value for value in said if value is not None), None)


def _padding(kwargs: dict, configs: tuple) -> int | None:
    """The id by which padding is known; as in transformers, one that also ends answers says nothing."""
    pad_token_id, ends = (_said(name, kwargs, *configs) for name in ("pad_token_id", "eos_token_id"))
    ends = [] if ends is None else torch.as_tensor(ends).reshape(-1).tolist()
    return None if pad_token_id in ends else pad_token_id


def _mask_padding(input_ids: torch.LongTensor, pad_token_id: int | None) -> torch.LongTensor:
    return torch.ones_like(input_ids) if pad_token_id is None else (input_ids != pad_token_id).long()


def _run_lengths(is_image: torch.BoolTensor) -> list[list[int]]:
    """The lengths of each row's unbroken runs of image tokens."""
    edges = nn.functional.pad(is_image.long(), (1, 1)).diff()
    starts, ends = (edges == 1).nonzero(), (edges == -1).nonzero()
    return [(ends - starts)[starts[:, 0] == row, 1].tolist() for row in range(len(is_image))]
