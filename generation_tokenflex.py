"""Generation for TokenFLEX: placeholders of images, re-counting them, and `generate` at any number of vision tokens."""

from collections.abc import Mapping, Sequence

import torch
from transformers.generation import GenerationConfig, GenerationMixin, SuppressTokensLogitsProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_tokenflex import resolve_vision_token_grid, resolve_vision_token_grids


# What the new positions of a re-counted or re-padded row hold, per tensor that runs along the sequence.
SEQUENCE_FILL_VALUES = {
    "attention_mask": 0,
    "labels": -100,
    "mm_token_type_ids": 0,
    "token_type_ids": 0,
    "segment_ids": -1,
}


def infer_vision_token_grids(
    input_ids: torch.LongTensor, num_images: int, image_token_id: int, patch_grid: tuple[int, int]
) -> list[tuple[int, int]]:
    """
    Reads a uniform square count off the placeholders of hand-built inputs.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The prompts.
        num_images (`int`): How many images the placeholders stand for.
        image_token_id (`int`): The placeholder's id.
        patch_grid (`tuple[int, int]`): Rows and columns of the vision tower's patch grid.

    Returns:
        `list[tuple[int, int]]`: One (rows, columns) per image.

    Raises:
        ValueError: If the placeholders cannot be that many images with one square count.
    """
    row_counts = (input_ids == image_token_id).sum(-1).tolist()
    count, remainder = divmod(sum(row_counts), num_images)
    if remainder or count == 0 or any(row_count % count for row_count in row_counts):
        raise ValueError(
            f"Image features and image tokens do not match: the rows hold {row_counts} image tokens for {num_images} "
            "images, which is no uniform count per image. Pass `vision_token_grids` as the processor returns it."
        )
    return [resolve_vision_token_grid(count, patch_grid, "image tokens per image in `input_ids`")] * num_images


def first_placeholders(
    input_ids: torch.LongTensor, vision_token_counts: torch.LongTensor, image_token_id: int
) -> torch.LongTensor:
    """
    Finds where each image's run of placeholders begins.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The prompts.
        vision_token_counts (`torch.LongTensor` of shape `(num_images,)`): The length of each image's run.
        image_token_id (`int`): The placeholder's id.

    Returns:
        `torch.LongTensor` of shape `(num_images,)`: Positions in the flattened `input_ids`.

    Raises:
        ValueError: If the placeholders are not such runs, each unbroken and within one row.
    """
    length = input_ids.shape[-1]
    placeholders = (input_ids == image_token_id).flatten().nonzero().squeeze(-1)
    ends = vision_token_counts.cumsum(0)
    if int(vision_token_counts.sum()) == len(placeholders):
        first, last = placeholders[ends - vision_token_counts], placeholders[ends - 1]
        if ((last - first + 1 == vision_token_counts) & (first // length == last // length)).all():
            return first
    images = (
        f"its {len(vision_token_counts)} images were encoded as {vision_token_counts.tolist()} tokens in unbroken runs"
    )
    raise ValueError(
        f"Image features and image tokens do not match: `input_ids` holds {len(placeholders)} image tokens, but "
        f"{images if len(vision_token_counts) else 'there are no images: pass `pixel_values`'}."
    )


def recount_vision_tokens(
    inputs: Mapping[str, torch.Tensor],
    vision_token_grids: Sequence[tuple[int, int]],
    image_token_id: int,
    pad_token_id: int | None = None,
) -> dict[str, torch.Tensor]:
    """
    Rewrites encoded inputs to other vision-token counts, as if they had been encoded so in the first place: every
    image's run of placeholders gets its new length in each tensor that runs along the sequence, and rows are padded
    again on the side they were padded on.

    Args:
        inputs (`Mapping[str, torch.Tensor]`):
            A processor's or collator's output: `input_ids` of shape `(batch_size, sequence_length)`,
            `vision_token_grids` of shape `(num_images, 2)` with the grids as encoded, optionally `attention_mask`,
            `labels`, `mm_token_type_ids`, `token_type_ids` and `segment_ids`. Other entries are passed through, except
            `position_ids`, which is dropped.
        vision_token_grids (sequence of `tuple[int, int]`):
            The new (rows, columns) per image.
        image_token_id (`int`):
            The placeholder's id.
        pad_token_id (`int`, *optional*):
            The id that pads `input_ids`; 0 when there is none, since the mask hides it.

    Returns:
        `dict[str, torch.Tensor]`: New tensors; the caller's are left as they were.

    Raises:
        ValueError: If the runs of placeholders do not match the encoded grids.

    Example:

    ```python
    >>> import torch
    >>> from tokenflex import recount_vision_tokens

    >>> inputs = {"input_ids": torch.tensor([[5, 9, 9, 9, 9, 6]]), "vision_token_grids": torch.tensor([[2, 2]])}
    >>> recount_vision_tokens(inputs, [(1, 1)], image_token_id=9)["input_ids"]
    tensor([[5, 9, 6]])
    ```
    """
    input_ids = inputs["input_ids"]
    batch_size, length = input_ids.shape
    device = input_ids.device
    attention_mask = inputs.get("attention_mask")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` of shape {tuple(attention_mask.shape)} cannot be re-counted: give one of the shape of "
            f"`input_ids`, {tuple(input_ids.shape)}."
        )
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
    first = first_placeholders(input_ids, inputs["vision_token_grids"].to(device).prod(-1), image_token_id)
    new_counts = torch.tensor(vision_token_grids, dtype=torch.long, device=device).reshape(-1, 2).prod(-1)
    if len(first) != len(new_counts):
        raise ValueError(f"{len(new_counts)} new counts are asked for, but the inputs hold {len(first)} images.")

    # Every position is copied once, the first placeholder of an image as often as its new count, padding never.
    copies = ((mask.cumsum(-1) > 0) & (mask.flip(-1).cumsum(-1).flip(-1) > 0)).long().flatten()
    copies[(input_ids == image_token_id).flatten()] = 0
    copies[first] = new_counts
    row_lengths = copies.view(batch_size, length).sum(-1)
    new_length = int(row_lengths.max())
    pad_right = bool((mask[:, -1] == 0).any()) and bool((mask[:, 0] == 1).all())
    source = torch.repeat_interleave(torch.arange(batch_size * length, device=device), copies)
    row = source // length
    row_starts = row_lengths.cumsum(0) - row_lengths
    offset = torch.zeros_like(row_lengths) if pad_right else new_length - row_lengths
    target = row * new_length + offset[row] + torch.arange(len(source), device=device) - row_starts[row]

    def rewrite(tensor: torch.Tensor, fill: int) -> torch.Tensor:
        flat = tensor.new_full((batch_size * new_length,), fill)
        flat[target] = tensor.reshape(-1)[source]
        return flat.view(batch_size, new_length)

    recounted = {key: value for key, value in inputs.items() if key != "position_ids"}
    recounted["input_ids"] = rewrite(input_ids, 0 if pad_token_id is None else pad_token_id)
    if attention_mask is None and new_length * batch_size != len(source):
        recounted["attention_mask"] = mask
    for key, fill in SEQUENCE_FILL_VALUES.items():
        if recounted.get(key) is not None:
            recounted[key] = rewrite(recounted[key], fill)
    recounted["vision_token_grids"] = torch.tensor(vision_token_grids, dtype=torch.long, device=device).reshape(-1, 2)
    return recounted


def count_tokens(vision_token_grids: Sequence[tuple[int, int]], device: torch.device) -> torch.LongTensor:
    """The number of vision tokens of each grid, as a tensor of shape `(num_images,)`."""
    return torch.tensor(vision_token_grids, dtype=torch.long, device=device).reshape(-1, 2).prod(-1)


class TokenFlexGenerationMixin(GenerationMixin):
    """`generate` at a chosen number of vision tokens."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args,
        num_vision_tokens: int | tuple[int, int] | list | None = None,
        **kwargs,
    ):
        """
        [`~transformers.GenerationMixin.generate`] at a chosen number of vision tokens, whatever count the inputs were
        encoded with: the prompt really gets shorter or longer, and the result equals encoding at that count.

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The prompts, as `input_ids`.
            generation_config (`GenerationConfig`, *optional*):
                As in transformers. An entry `num_vision_tokens` in it is used when the argument is not given, and one
                in the model's own generation config when neither is.
            num_vision_tokens (`int`, `tuple[int, int]` or a list of these, *optional*):
                A count n*n or grid (rows, columns) for all images, or a list with one per image in order of
                appearance (an image's tiles share its entry; a video's frames are images). Where the inputs carry
                `image_sizes`, an integer is matched to each image's shape. Defaults to the counts as encoded.
            kwargs:
                As in transformers. With `past_key_values` of an earlier turn, images that are in the cache stay at the
                count they have there; images in the new part of the prompt are encoded. `mm_encoder_outputs=
                {"image": model.get_image_features(...)}` in place of `pixel_values` saves running the tower again.

        Returns:
            As in transformers. Sequences begin with the caller's `input_ids`, so
            `output[:, input_ids.shape[1]:]` is the answer at every count.

        Raises:
            ValueError: If a count is not allowed, placeholders and images do not match, or prompts would have to be
                rewritten that cannot be: in a filled cache, or given as `inputs_embeds`.
        """
        for config in (generation_config, self.generation_config):
            if num_vision_tokens is None:
                num_vision_tokens = getattr(config, "num_vision_tokens", None)
        if num_vision_tokens is not None and not isinstance(num_vision_tokens, list) and "image_sizes" not in kwargs:
            resolve_vision_token_grid(num_vision_tokens, self.config.patch_grid)
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            has_images = kwargs.get("pixel_values") is not None or kwargs.get("mm_encoder_outputs")
            if num_vision_tokens is not None and has_images:
                raise ValueError(
                    f"`num_vision_tokens`={num_vision_tokens} cannot be applied to `inputs_embeds`: pass `input_ids`, or "
                    "embed the prompt at that count."
                )
            return super().generate(input_ids, generation_config, *args, **kwargs)

        prompt, encoded, grids = self._prepare_prompt(input_ids, num_vision_tokens, generation_config, kwargs)
        rewritten = prompt.pop("input_ids")
        output = super().generate(rewritten, generation_config, *args, **prompt)
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        copies = len(sequences) // len(input_ids)
        cache = prompt.get("past_key_values") if isinstance(output, torch.Tensor) else output.past_key_values
        if cache is not None:
            cache.vision_token_grids = [list(zip(*row)) for row in zip(encoded, grids) for _ in range(copies)]
        if grids == encoded:
            return output
        answers = sequences[:, rewritten.shape[1] :]
        sequences = torch.cat([input_ids.repeat_interleave(copies, dim=0).to(answers.device), answers], dim=-1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output

    def _prepare_prompt(
        self,
        input_ids: torch.LongTensor,
        num_vision_tokens: int | tuple[int, int] | list | None,
        generation_config: GenerationConfig | None,
        kwargs: dict,
    ) -> tuple[dict, list[list[tuple[int, int]]], list[list[tuple[int, int]]]]:
        """
        Rewrites prompts to the counts they are generated at, and keeps the images that are not in the cache yet.

        Returns:
            `tuple`: The arguments of `generate`, and for each row of `input_ids` the grids of its images, as encoded
            and as generated at.
        """
        cache = kwargs.get("past_key_values")
        cached_length = int(cache.get_seq_length()) if cache is not None else 0
        earlier = getattr(cache, "vision_token_grids", None) if cached_length else None
        if earlier is not None and len(earlier) != len(input_ids):
            earlier = None
        # A cache that was filled elsewhere says nothing about its images: that part of the prompt is left as it is.
        hidden_length = cached_length if earlier is None else 0
        visible_ids = input_ids[:, hidden_length:]

        encoded = self._encoded_grids(visible_ids, kwargs, earlier)
        first = first_placeholders(visible_ids, count_tokens(encoded, input_ids.device), self.config.image_token_id)
        rows = (first // max(1, visible_ids.shape[1])).tolist()
        fixed = [grid for row, pairs in enumerate(earlier or []) for grid in _pad(pairs, rows.count(row))]
        grids = encoded
        if num_vision_tokens is not None and encoded:
            options = {name: kwargs[name].tolist() for name in ("image_sizes", "num_tiles") if name in kwargs}
            grids = resolve_vision_token_grids(num_vision_tokens, len(encoded), self.config.patch_grid, **options)
            if hidden_length and grids != encoded:
                raise ValueError(
                    f"`num_vision_tokens`={num_vision_tokens} would rewrite a prompt of which {cached_length} tokens are "
                    "already in `past_key_values`: start with an empty cache."
                )
            if any(grid not in (None, wanted) for grid, wanted in zip(fixed, grids)):
                raise ValueError(
                    f"`num_vision_tokens`={num_vision_tokens}, but `past_key_values` holds {cached_length} tokens with "
                    f"images at {[grid for grid in fixed if grid]}: leave the argument out, or start with an empty cache."
                )
        if earlier is not None:
            grids = [grid or wanted for grid, wanted in zip(fixed, grids)]

        prompt = {**kwargs, "input_ids": input_ids}
        if grids != encoded:
            pad_token_id = self._pad_token_id(generation_config)
            if prompt.get("attention_mask") is None and pad_token_id is not None:
                prompt["attention_mask"] = (input_ids != pad_token_id).long()
            prompt["vision_token_grids"] = torch.tensor(encoded)
            prompt = recount_vision_tokens(prompt, grids, self.config.image_token_id, pad_token_id)
        self._keep_uncached_images(prompt, grids, hidden_length, cached_length)
        by_row = [[i for i, other in enumerate(rows) if other == row] for row in range(len(input_ids))]
        return (
            prompt,
            [[encoded[i] for i in images] for images in by_row],
            [[grids[i] for i in images] for images in by_row],
        )

    def _encoded_grids(
        self, input_ids: torch.LongTensor, kwargs: dict, earlier: list[list[tuple]] | None
    ) -> list[tuple[int, int]]:
        """The grids that the prompts' images were encoded at, those of earlier turns included."""
        num_images, image_outputs = _count_images(kwargs)
        given = kwargs.get("vision_token_grids")
        if given is not None and (earlier is None or len(given) == num_images > 0):
            given = self.model.resolve_grids(num_images, vision_token_grids=given)
        elif given is not None:
            given = self.model.resolve_grids(len(given), vision_token_grids=given)
        candidates = [given, getattr(image_outputs, "vision_token_grids", None)]
        if earlier is not None:
            new = next((grids for grids in candidates if grids is not None), [])
            tokens_per_row = (input_ids == self.config.image_token_id).sum(-1).tolist()
            candidates += [_extend(earlier, version, new, tokens_per_row) for version in (0, 1)]
        for grids in candidates:
            if grids is not None and self._fits(input_ids, grids):
                return grids
        if given is not None or num_images == 0:
            return given or []
        return self.model.resolve_grids(num_images, input_ids=input_ids)

    def _fits(self, input_ids: torch.LongTensor, grids: list[tuple[int, int]]) -> bool:
        try:
            first_placeholders(input_ids, count_tokens(grids, input_ids.device), self.config.image_token_id)
        except ValueError:
            return False
        return True

    def _keep_uncached_images(
        self, prompt: dict, grids: list[tuple[int, int]], hidden_length: int, cached_length: int
    ) -> None:
        """Drops the images whose tokens are in the cache, and pools kept features to the grids."""
        input_ids = prompt["input_ids"]
        if cached_length >= input_ids.shape[1]:
            raise ValueError(
                f"`past_key_values` holds {cached_length} tokens, but the prompt has only {input_ids.shape[1]} at its "
                "counts: pass the whole conversation, with new tokens at its end."
            )
        counts = count_tokens(grids, input_ids.device)
        first = first_placeholders(input_ids[:, hidden_length:], counts, self.config.image_token_id)
        start = first % (input_ids.shape[1] - hidden_length) + hidden_length
        if ((start < cached_length) & (start + counts > cached_length)).any():
            raise ValueError(
                f"`past_key_values` ends after {cached_length} tokens, inside an image: crop it before or behind one."
            )
        new = (start >= cached_length).nonzero().squeeze(-1)
        num_images, image_outputs = _count_images(prompt)
        if num_images not in (len(grids), len(new)):
            raise ValueError(
                f"Image features and image tokens do not match: {num_images} images are given, but `input_ids` holds "
                f"{len(grids)}, {len(new)} of them behind the {cached_length} tokens in `past_key_values`."
            )
        for name in ("image_sizes", "num_tiles", "vision_token_grids"):
            prompt.pop(name, None)
        pixel_values = prompt.pop("pixel_values", None)
        prompt.pop("mm_encoder_outputs", None)
        if len(new) == 0:
            return
        selected = new if num_images == len(grids) else torch.arange(len(new), device=new.device)
        new_grids = [grids[i] for i in new.tolist()]
        prompt["vision_token_grids"] = torch.tensor(new_grids)
        if pixel_values is not None:
            prompt["pixel_values"] = pixel_values if len(selected) == num_images else pixel_values[selected]
            return
        features = image_outputs.last_hidden_state
        features = features if len(selected) == num_images else features[selected.to(features.device)]
        prompt["mm_encoder_outputs"] = {"image": self.model.pool_image_features(features, new_grids)}

    def _pad_token_id(self, generation_config: GenerationConfig | None) -> int | None:
        for config in (generation_config, self.generation_config):
            if getattr(config, "pad_token_id", None) is not None:
                return config.pad_token_id
        return None

    def _get_logits_processor(self, *args, device=None, **kwargs):
        # An image token in an answer would stand for an image that is not there, as would one that prompt lookup copies.
        processors = super()._get_logits_processor(*args, device=device, **kwargs)
        processors.insert(0, SuppressTokensLogitsProcessor([self.config.image_token_id], device=device or "cpu"))
        return processors


def _count_images(kwargs: dict) -> tuple[int, BaseModelOutputWithPooling | None]:
    image_outputs = (kwargs.get("mm_encoder_outputs") or {}).get("image")
    images = kwargs.get("pixel_values") if image_outputs is None else image_outputs.last_hidden_state
    return 0 if images is None else len(images), image_outputs


def _pad(pairs: list[tuple], length: int) -> list[tuple[int, int] | None]:
    return [pairs[i][1] if i < len(pairs) else None for i in range(length)]


def _extend(
    earlier: list[list[tuple]], version: int, new: list[tuple[int, int]], tokens_per_row: list[int]
) -> list[tuple[int, int]]:
    """Each row's grids of earlier turns (as encoded: version 0, as generated at: 1), then new ones up to its tokens."""
    new, grids = iter(new), []
    for pairs, tokens in zip(earlier, tokens_per_row):
        row = [pair[version] for pair in pairs]
        while sum(rows * columns for rows, columns in row) < tokens and (grid := next(new, None)):
            row.append(grid)
        grids += row
    return grids


__all__ = ["TokenFlexGenerationMixin", "recount_vision_tokens"]
