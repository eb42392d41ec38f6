"""`generate` for TokenFLEX, at any number of vision tokens."""

import math

import torch
from transformers.generation import GenerationConfig, LogitsProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .choosing_tokenflex import TokenFlexChoosingMixin
from .configuration_tokenflex import resolve_vision_token_grid, resolve_vision_token_grids
from .conversation_tokenflex import CachedPrompt, cut_tails, locate_images, mask_padding_of_answers
from .placeholders_tokenflex import recount_vision_tokens
from .prefill_tokenflex import TokenFlexPrefillMixin


_PER_IMAGE = ("image_sizes", "num_tiles")
_INPUTS = ("attention_mask", "pixel_values", "mm_encoder_outputs", "vision_token_grids", *_PER_IMAGE)


class TokenFlexGenerationMixin(TokenFlexChoosingMixin, TokenFlexPrefillMixin):
    """`generate` at a chosen number of vision tokens."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args,
        num_vision_tokens: int | tuple[int, int] | list | str | None = None,
        **kwargs,
    ):
        """
        [`~transformers.GenerationMixin.generate`] at a chosen number of vision tokens, whatever count the inputs were
        encoded with: the prompt really gets shorter or longer, and the result equals encoding at that count.

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                The prompts, as `input_ids`.
            generation_config (`GenerationConfig`, *optional*):
                As in transformers. An entry `num_vision_tokens` in it, a count or a grid for all images, is used when
                the argument is not given, and one in the model's own generation config when neither is.
            num_vision_tokens (`int`, `tuple[int, int]`, a list of these, or `str`, *optional*):
                A count n*n or grid (rows, columns) for all images, or a list with one per image in order of
                appearance (an image's tiles share its entry; a video's frames are images). Where the inputs carry
                `image_sizes`, an integer is matched to each image's shape. `"low"` and `"high"` are the smallest and
                largest of the config's `vision_token_choices`; `"auto"` chooses one of them for each prompt
                ([`~TokenFlexChoosingMixin.choose_vision_tokens`]). Defaults to the counts as encoded.
            kwargs:
                As in transformers. With `past_key_values` of an earlier turn, images that are in the cache stay at the
                count they have there; images in the new part of the prompt are encoded. `mm_encoder_outputs=
                {"image": model.get_image_features(...)}` in place of `pixel_values` saves running the tower again.

        Returns:
            As in transformers. Sequences begin with the caller's `input_ids`, so
            `output[:, input_ids.shape[1]:]` is the answer at every count. With `"auto"` and
            `return_dict_in_generate=True` the output's `num_vision_tokens` holds each prompt's count, 0
            for one without images.

        Raises:
            ValueError: If a count is not allowed, placeholders and images do not match, or prompts would have to be
                rewritten that cannot be: in a filled cache, or given as `inputs_embeds`.
        """
        options = _Options(kwargs, generation_config, self.generation_config)
        is_asked = num_vision_tokens is not None
        if not is_asked:
            num_vision_tokens = options.get("num_vision_tokens")
            if isinstance(num_vision_tokens, list):  # JSON has no tuples: how a saved config holds (rows, columns)
                num_vision_tokens = tuple(num_vision_tokens)
        elif not isinstance(num_vision_tokens, (list, str)) and kwargs.get("image_sizes") is None:
            resolve_vision_token_grid(num_vision_tokens, self.config.patch_grid)
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        chosen = None
        if isinstance(num_vision_tokens, str):
            num_vision_tokens, chosen = self._resolve_named_count(num_vision_tokens, input_ids, kwargs)
        num_images, _ = _count_images(kwargs)
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            if num_vision_tokens is not None and num_images:
                raise ValueError(
                    f"`num_vision_tokens`={num_vision_tokens} cannot be applied to `inputs_embeds`: pass `input_ids`, or "
                    "embed the prompt at that count."
                )
            return super().generate(input_ids, generation_config, *args, **kwargs)
        if kwargs.get("pixel_values") is not None and kwargs.get("mm_encoder_outputs"):
            raise ValueError("Give `pixel_values` or `mm_encoder_outputs`, not both.")
        if options.get("cache_implementation") == "paged":
            self._refuse_images(input_ids, "`cache_implementation`='paged'")

        attention_mask = self._infer_attention_mask(input_ids, kwargs, options)
        cached = self._read_cache(input_ids, attention_mask, kwargs, options)
        if cached is None:
            prompt, encoded, grids = self._recount_prompt(input_ids, num_vision_tokens, kwargs, options)
        else:
            prompt, encoded, grids = self._continue_prompt(
                cached, input_ids, attention_mask, num_vision_tokens, is_asked, kwargs, options
            )
        rewritten = prompt.pop("input_ids")
        output = super().generate(rewritten, generation_config, *args, **prompt)
        if chosen is not None and not isinstance(output, torch.Tensor):
            output["num_vision_tokens"] = torch.tensor(chosen, device=output.sequences.device)
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        cache = prompt.get("past_key_values") if isinstance(output, torch.Tensor) else output.past_key_values
        if cache is not None:
            mask = self._infer_attention_mask(rewritten, prompt, options)
            self._note_cache(cache, sequences, mask, encoded, grids, options)
        if rewritten is input_ids:
            return output
        answers = sequences[:, rewritten.shape[1] :]
        callers = input_ids.repeat_interleave(len(answers) // len(input_ids), dim=0).to(answers.device)
        sequences = torch.cat([callers, answers], dim=-1)
        if isinstance(output, torch.Tensor):
            return sequences
        output.sequences = sequences
        return output

    def _recount_prompt(
        self,
        input_ids: torch.LongTensor,
        num_vision_tokens: int | tuple[int, int] | list | None,
        kwargs: dict,
        options: "_Options",
    ) -> tuple[dict, list[list[tuple[int, int]]], list[list[tuple[int, int]]]]:
        """
        Rewrites prompts to the counts they are generated at.

        Returns:
            `tuple`: The arguments of `generate`, and for each row the grids of its images, as encoded and as generated
            at.
        """
        num_images, _ = _count_images(kwargs)
        encoded, _, rows = self._locate_encoded(input_ids, kwargs)
        grids = self._asked_grids(num_vision_tokens, encoded, kwargs)
        if num_images != len(grids):
            raise _mismatch(num_images, len(grids), len(grids))
        prompt = {**kwargs, "input_ids": input_ids}
        if grids != encoded:
            prompt["attention_mask"] = self._infer_attention_mask(input_ids, kwargs, options)
            prompt["vision_token_grids"] = torch.tensor(encoded)
            prompt = recount_vision_tokens(prompt, grids, self.config.image_token_id, options.get("pad_token_id"))
        self._pool_images(prompt, grids, list(range(num_images)))
        return prompt, _by_row(encoded, rows, len(input_ids)), _by_row(grids, rows, len(input_ids))

    def _recount_inputs(self, num_vision_tokens: int, input_ids: torch.LongTensor, kwargs: dict) -> dict:
        """What `forward` takes of the arguments of `generate`, at another count."""
        inputs = {name: kwargs[name] for name in _INPUTS if kwargs.get(name) is not None}
        return self._recount_prompt(input_ids, num_vision_tokens, inputs, _Options(kwargs, self.generation_config))[0]

    def _continue_prompt(
        self,
        cached: CachedPrompt,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor,
        num_vision_tokens: int | tuple[int, int] | list | None,
        is_asked: bool,
        kwargs: dict,
        options: "_Options",
    ) -> tuple[dict, list[list[tuple[int, int]]], list[list[tuple[int, int]]]]:
        """
        Puts the part of prompts that is not in the cache behind what is, as it lies there. Images in the cache keep their
        counts; the others are generated at those asked for.

        Returns:
            As `_recount_prompt`.
        """
        token_id, batch_size = self.config.image_token_id, len(input_ids)
        cached_length = cached.input_ids.shape[1]
        encoded, columns, rows = self._locate_encoded(input_ids, kwargs, cached)
        starts = cached.find_end(input_ids, attention_mask, encoded, token_id)
        is_new = columns >= torch.tensor(starts, device=columns.device)[rows]
        new = is_new.nonzero().squeeze(-1).tolist()
        in_cache = sum(cached.grids, [])
        num_images, _ = _count_images(kwargs)
        if not is_asked and not new:
            asked = encoded
        elif num_images == len(new) != len(encoded) and any(kwargs.get(n) is not None for n in _PER_IMAGE):
            # Shapes and tiles are known of the new images alone; those in the cache stay as they are.
            held, more = iter(in_cache), iter(self._asked_grids(num_vision_tokens, [encoded[i] for i in new], kwargs))
            asked = [next(more if is_one else held) for is_one in is_new.tolist()]
        else:
            asked = self._asked_grids(num_vision_tokens, encoded, kwargs)
        differing = [grid for i, grid in enumerate(asked) if not is_new[i]] != in_cache
        if is_asked and num_vision_tokens is not None and differing:
            raise ValueError(
                f"`num_vision_tokens`={num_vision_tokens}, but `past_key_values` holds {cached_length} tokens with images "
                f"at {in_cache}, which are already encoded: leave the argument out, give a list in which these keep their "
                "counts, or start with an empty cache."
            )
        if num_images not in (len(encoded), len(new)):
            raise _mismatch(num_images, len(encoded), len(new))

        ids, mask = cut_tails(input_ids, attention_mask, starts, options.get("pad_token_id") or 0)
        tail = {"input_ids": ids, "attention_mask": mask}
        tail["vision_token_grids"] = torch.tensor([encoded[i] for i in new], dtype=torch.long).reshape(-1, 2)
        tail = recount_vision_tokens(tail, [asked[i] for i in new], token_id, options.get("pad_token_id"))
        prompt = {name: value for name, value in kwargs.items() if name not in ("position_ids", "mm_token_type_ids")}
        prompt["input_ids"] = torch.cat([cached.input_ids, tail["input_ids"]], dim=-1)
        prompt["attention_mask"] = torch.cat([cached.attention_mask, tail["attention_mask"]], dim=-1)
        self._pool_images(prompt, [asked[i] for i in new], new if num_images == len(encoded) else range(len(new)))
        new_encoded = _by_row([encoded[i] for i in new], rows[is_new], batch_size)
        new_grids = _by_row([asked[i] for i in new], rows[is_new], batch_size)
        return (
            prompt,
            [old + more for old, more in zip(cached.encoded, new_encoded)],
            [old + more for old, more in zip(cached.grids, new_grids)],
        )

    def _read_cache(
        self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor, kwargs: dict, options: "_Options"
    ) -> CachedPrompt | None:
        """What the cache holds; `None` if it is empty or nobody's images are concerned."""
        cache = kwargs.get("past_key_values")
        length = int(cache.get_seq_length()) if cache is not None else 0
        if length == 0:
            return None
        cached = getattr(cache, "cached_prompt", None)
        has_images = cached is not None and any(cached.grids)
        if not has_images and not (input_ids == self.config.image_token_id).any():
            return None
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` has shape {tuple(attention_mask.shape)}, but `input_ids` {tuple(input_ids.shape)}: pass "
                "the whole conversation, not only what `past_key_values` does not hold."
            )
        if cached is not None and (length > cached.input_ids.shape[1] or len(input_ids) % len(cached.input_ids)):
            if cached.encoded != cached.grids:
                raise ValueError(
                    f"`past_key_values` holds {length} tokens, of which `generate` noted {cached.input_ids.shape[1]} in "
                    f"{len(cached.input_ids)} rows with re-counted images: crop it to these, or start with an empty cache."
                )
            cached = None
        if cached is not None:
            cached = cached.crop(length, self.config.image_token_id)
            return cached.repeat(len(input_ids) // len(cached.input_ids))
        # Filled elsewhere: the prompt must begin with what the cache holds, column by column.
        if length >= input_ids.shape[1]:
            raise ValueError(
                f"`past_key_values` holds {length} tokens, but the prompt has only {input_ids.shape[1]}: pass the whole "
                "conversation, with new tokens at its end."
            )
        grids = self._grids_in_prefix(input_ids, length, kwargs)
        return CachedPrompt(input_ids[:, :length], attention_mask[:, :length], grids, grids)

    def _grids_in_prefix(self, input_ids: torch.LongTensor, length: int, kwargs: dict) -> list[list[tuple[int, int]]]:
        """The grids of the images in the first `length` columns, guessed from their runs if nobody says them."""
        token_id = self.config.image_token_id
        try:
            encoded, _, rows = self._locate_encoded(input_ids, kwargs)
        except ValueError:
            guessed = []
            for row in (input_ids[:, :length] == token_id).long():
                edges = (
                    torch.diff(row, prepend=row.new_zeros(1), append=row.new_zeros(1)).nonzero().squeeze(-1).tolist()
                )
                runs = [end - start for start, end in zip(edges[::2], edges[1::2])]
                guessed.append([(math.isqrt(run),) * 2 if math.isqrt(run) ** 2 == run else (1, run) for run in runs])
            return guessed
        prefix = CachedPrompt(input_ids, input_ids, [], _by_row(encoded, rows, len(input_ids)))
        prefix.encoded = prefix.grids
        return prefix.crop(length, token_id).grids

    def _locate_encoded(
        self, input_ids: torch.LongTensor, kwargs: dict, cached: CachedPrompt | None = None
    ) -> tuple[list[tuple[int, int]], torch.LongTensor, torch.LongTensor]:
        """
        The grids that all images of the prompts were encoded at, those in the cache included, and the first column and
        the row of each.
        """
        token_id = self.config.image_token_id
        num_images, image_outputs = _count_images(kwargs)
        given = kwargs.get("vision_token_grids")
        if given is not None:
            given = self.model.resolve_grids(len(given) if cached else num_images, vision_token_grids=given)
        candidates = [given, getattr(image_outputs, "vision_token_grids", None)]
        if cached is not None:
            new = next((grids for grids in candidates if grids is not None), [])
            tokens_per_row = (input_ids == token_id).sum(-1).tolist()
            candidates += [_extend(grids, new, tokens_per_row) for grids in (cached.encoded, cached.grids)]
        for grids in candidates:
            if grids is not None and (located := _try_to_locate(input_ids, grids, token_id)):
                return grids, *located
        grids = given or []
        if given is None and num_images:
            grids = self.model.resolve_grids(num_images, input_ids=input_ids)
        return grids, *locate_images(input_ids, grids, token_id)

    def _asked_grids(
        self, num_vision_tokens: int | tuple[int, int] | list | None, encoded: list[tuple[int, int]], kwargs: dict
    ) -> list[tuple[int, int]]:
        if num_vision_tokens is None or not (encoded or isinstance(num_vision_tokens, list)):
            return encoded
        sizes = {name: torch.as_tensor(kwargs[name]).tolist() for name in _PER_IMAGE if kwargs.get(name) is not None}
        return resolve_vision_token_grids(num_vision_tokens, len(encoded), self.config.patch_grid, **sizes)

    def _pool_images(self, prompt: dict, grids: list[tuple[int, int]], selected: list[int]) -> None:
        """Leaves of the prompt's images, or of their kept features, the selected ones at their grids."""
        num_images, image_outputs = _count_images(prompt)
        for name in ("image_sizes", "num_tiles", "vision_token_grids", "mm_encoder_outputs"):
            prompt.pop(name, None)
        pixel_values = prompt.pop("pixel_values", None)
        if not grids:
            return
        prompt["vision_token_grids"] = torch.tensor(grids)
        images = pixel_values if image_outputs is None else image_outputs.last_hidden_state
        images = images if len(selected) == num_images else images[list(selected)]
        if image_outputs is None:
            prompt["pixel_values"] = images
        else:
            prompt["mm_encoder_outputs"] = {"image": self.model.pool_image_features(images, grids)}

    def _note_cache(
        self,
        cache,
        sequences: torch.LongTensor,
        attention_mask: torch.LongTensor,
        encoded: list[list[tuple[int, int]]],
        grids: list[list[tuple[int, int]]],
        options: "_Options",
    ) -> None:
        """Writes down in the cache what it holds, for the next turn."""
        cache.cached_prompt = None
        length, prompt_length = int(cache.get_seq_length()), attention_mask.shape[-1]
        if not prompt_length <= length <= sequences.shape[1]:
            return
        copies = len(sequences) // len(grids)
        if (options.get("num_beams") or 1) > 1:
            # Beams leave answers in the cache that are not those of the sequences: only the prompt is known.
            cache.cached_prompt = CachedPrompt(sequences[::copies, :prompt_length], attention_mask, encoded, grids)
            return
        ends = options.end_token_ids
        pad_token_id = options.get("pad_token_id")
        pad_token_id = ends[0] if pad_token_id is None and ends else pad_token_id
        answers_mask = mask_padding_of_answers(sequences[:, prompt_length:], pad_token_id, ends)
        mask = torch.cat([attention_mask.repeat_interleave(copies, dim=0).to(sequences.device), answers_mask], dim=-1)
        cache.cached_prompt = CachedPrompt(sequences[:, :length], mask[:, :length], encoded, grids)
        if copies > 1:
            cache.cached_prompt.encoded = [row for row in encoded for _ in range(copies)]
            cache.cached_prompt.grids = [row for row in grids for _ in range(copies)]

    def _infer_attention_mask(
        self, input_ids: torch.LongTensor, kwargs: dict, options: "_Options"
    ) -> torch.LongTensor:
        """The mask as transformers infers it where none is given."""
        if kwargs.get("attention_mask") is not None:
            return kwargs["attention_mask"]
        pad_token_id = options.get("pad_token_id")
        if pad_token_id is None or pad_token_id in options.end_token_ids:
            return torch.ones_like(input_ids)
        return (input_ids != pad_token_id).long()

    def _refuse_images(self, input_ids: torch.LongTensor, where: str) -> None:
        num_tokens = int((input_ids == self.config.image_token_id).sum())
        if num_tokens:
            raise ValueError(
                f"{where} takes no images in transformers, but `input_ids` holds {num_tokens} image tokens: call "
                "`generate` with another cache."
            )

    def generate_batch(self, inputs: list[list[int]], *args, **kwargs):
        """[`~transformers.GenerationMixin.generate_batch`] for prompts without images, all that transformers 5.23 takes."""
        for input_ids in inputs:
            self._refuse_images(torch.as_tensor(input_ids), "`generate_batch`")
        return super().generate_batch(inputs, *args, **kwargs)

    def _get_candidate_generator(self, *args, model_kwargs: dict, **kwargs):
        cache = model_kwargs.get("past_key_values")
        if cache is not None and int(cache.get_seq_length()) > 0:
            raise ValueError(
                f"`past_key_values` holds {int(cache.get_seq_length())} tokens, and transformers cannot draft behind a "
                "filled cache: leave `assistant_model` and `prompt_lookup_num_tokens` out, or start with an empty cache."
            )
        return super()._get_candidate_generator(*args, model_kwargs=model_kwargs, **kwargs)

    def _get_logits_processor(self, *args, device=None, **kwargs):
        # An image token in an answer would stand for an image that is not there, as would one that prompt lookup copies.
        processors = super()._get_logits_processor(*args, device=device, **kwargs)
        processors.insert(0, _NoImageToken(self.config.image_token_id, device or "cpu"))
        return processors


class _NoImageToken(LogitsProcessor):
    def __init__(self, image_token_id: int, device: torch.device | str):
        self.column = torch.tensor(image_token_id, device=device)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        return scores.index_fill(-1, self.column, -math.inf)


class _Options:
    """What was said about generating: in arguments, else in the passed config, else in the model's own."""

    def __init__(self, kwargs: dict, *configs: GenerationConfig | None):
        self.kwargs, self.configs = kwargs, configs

    def get(self, name: str):
        said = (self.kwargs.get(name), *(getattr(config, name, None) for config in self.configs))
        return next((value for value in said if value is not None), None)

    @property
    def end_token_ids(self) -> list[int]:
        ends = self.get("eos_token_id")
        return [] if ends is None else torch.as_tensor(ends).reshape(-1).tolist()


def _mismatch(num_images: int, num_in_prompt: int, num_new: int) -> ValueError:
    behind = f", {num_new} of them behind what `past_key_values` holds" if num_new != num_in_prompt else ""
    return ValueError(
        f"Image features and image tokens do not match: {num_images} images are given, but `input_ids` holds "
        f"{num_in_prompt}{behind}."
    )


def _count_images(kwargs: dict) -> tuple[int, BaseModelOutputWithPooling | None]:
    image_outputs = (kwargs.get("mm_encoder_outputs") or {}).get("image")
    images = kwargs.get("pixel_values") if image_outputs is None else image_outputs.last_hidden_state
    return 0 if images is None else len(images), image_outputs


def _try_to_locate(input_ids: torch.LongTensor, grids: list[tuple[int, int]], image_token_id: int):
    try:
        return locate_images(input_ids, grids, image_token_id)
    except ValueError:
        return None


def _by_row(items: list, rows: torch.LongTensor, batch_size: int) -> list[list]:
    grouped = [[] for _ in range(batch_size)]
    for item, row in zip(items, rows.tolist()):
        grouped[row].append(item)
    return grouped


def _extend(
    known: list[list[tuple[int, int]]], new: list[tuple[int, int]], tokens_per_row: list[int]
) -> list[tuple[int, int]]:
    """The known grids of each row, and then new ones up to the row's number of image tokens."""
    new, grids = iter(new), []
    for row, tokens in zip(known, tokens_per_row):
        row = list(row)
        while sum(rows * columns for rows, columns in row) < tokens and (grid := next(new, None)):
            row.append(grid)
        grids += row
    return grids
