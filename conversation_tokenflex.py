"""Conversations that go on in a kept cache: which part of a prompt is in it, and at which vision-token counts."""

from dataclasses import dataclass

import torch

from .placeholders_tokenflex import count_tokens, first_placeholders


@dataclass
class CachedPrompt:
    """
    What a cache holds, as `generate` notes it there.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, cached_length)`):
            The cached tokens, with each image at the count it was generated at.
        attention_mask (`torch.LongTensor` of shape `(batch_size, cached_length)`):
            0 for padding, also behind answers that ended early.
        encoded (`list[list[tuple[int, int]]]`):
            For each row, the grids that the caller encoded its images at.
        grids (`list[list[tuple[int, int]]]`):
            For each row, the grids that its images were generated at.
    """

    input_ids: torch.LongTensor
    attention_mask: torch.LongTensor
    encoded: list[list[tuple[int, int]]]
    grids: list[list[tuple[int, int]]]

    def crop(self, length: int, image_token_id: int) -> "CachedPrompt":
        """The same for a cache that was cropped to `length` tokens."""
        if length == self.input_ids.shape[1]:
            return self
        first, rows = locate_images(self.input_ids, sum(self.grids, []), image_token_id)
        ends = first + count_tokens(sum(self.grids, []), first.device)
        if ((first < length) & (ends > length)).any():
            raise ValueError(
                f"`past_key_values` ends after {length} tokens, inside an image: crop it before or behind one."
            )
        numbers = [int(((rows == row) & (ends <= length)).sum()) for row in range(len(self.input_ids))]
        return CachedPrompt(
            self.input_ids[:, :length],
            self.attention_mask[:, :length],
            [grids[:number] for grids, number in zip(self.encoded, numbers)],
            [grids[:number] for grids, number in zip(self.grids, numbers)],
        )

    def repeat(self, copies: int) -> "CachedPrompt":
        """The same for a cache whose rows were repeated."""
        return CachedPrompt(
            self.input_ids.repeat_interleave(copies, dim=0),
            self.attention_mask.repeat_interleave(copies, dim=0),
            [grids for grids in self.encoded for _ in range(copies)],
            [grids for grids in self.grids for _ in range(copies)],
        )

    def find_end(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor,
        encoded: list[tuple[int, int]],
        image_token_id: int,
    ) -> list[int]:
        """
        Finds where in each row of a longer prompt the cached part ends, whatever the padding and the counts of either.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): The longer prompt.
            attention_mask (`torch.LongTensor` of shape `(batch_size, sequence_length)`): Its mask.
            encoded (`list[tuple[int, int]]`): The grids of all its images.
            image_token_id (`int`): The placeholder's id.

        Returns:
            `list[int]`: The column of each row's first token that is not in the cache.

        Raises:
            ValueError: If a row does not begin with what the cache holds, or has nothing behind it.
        """
        cached_tokens, _ = _without_counts(self.input_ids, self.attention_mask, sum(self.grids, []), image_token_id)
        tokens, columns = _without_counts(input_ids, attention_mask, encoded, image_token_id)
        ends = []
        for row, (known, said, where) in enumerate(zip(cached_tokens, tokens, columns)):
            shared = min(len(known), len(said))
            different = (known[:shared] != said[:shared]).nonzero()
            if len(different):
                place = int(different[0])
                raise ValueError(
                    f"`input_ids` does not go on from `past_key_values`: row {row} has token {int(said[place])} where the "
                    f"cache holds {int(known[place])}, {place} tokens (an image counted as one) from its start."
                )
            if len(said) <= len(known):
                raise ValueError(
                    f"`past_key_values` holds {len(known)} tokens of row {row} (an image counted as one), but the prompt "
                    f"has only {len(said)}: pass the whole conversation, with new tokens at its end."
                )
            ends.append(int(where[len(known)]))
        return ends


def locate_images(
    input_ids: torch.LongTensor, grids: list[tuple[int, int]], image_token_id: int
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """The first column and the row of each image, two tensors of shape `(num_images,)`."""
    first = first_placeholders(input_ids, count_tokens(grids, input_ids.device), image_token_id)
    length = max(1, input_ids.shape[1])
    return first % length, first // length


def cut_tails(
    input_ids: torch.LongTensor, attention_mask: torch.LongTensor, starts: list[int], pad_token_id: int
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Each row from its own column on, padded on the left."""
    length = input_ids.shape[1] - min(starts)
    ids = input_ids.new_full((len(input_ids), length), pad_token_id)
    mask = attention_mask.new_zeros(len(input_ids), length)
    for row, start in enumerate(starts):
        ids[row, length - (input_ids.shape[1] - start) :] = input_ids[row, start:]
        mask[row, length - (input_ids.shape[1] - start) :] = attention_mask[row, start:]
    return ids, mask


def mask_padding_of_answers(answers: torch.LongTensor, pad_token_id: int | None, ends: list[int]) -> torch.LongTensor:
    """
    1 for the tokens of answers, 0 for what stands behind those that ended before others did.

    Args:
        answers (`torch.LongTensor` of shape `(batch_size, answer_length)`): Generated tokens.
        pad_token_id (`int`, *optional*): What generation pads with.
        ends (`list[int]`): The ids that end an answer; where the padding is one of them, the first one belongs to the
            answer.
    """
    if pad_token_id is None:
        return torch.ones_like(answers)
    is_other = answers != pad_token_id
    kept = is_other.long().flip(-1).cummax(-1).values.flip(-1)
    if pad_token_id in ends:
        kept[:, 1:] |= kept[:, :-1].clone()
        kept[:, :1] = 1
    return kept


def _without_counts(
    input_ids: torch.LongTensor, attention_mask: torch.LongTensor, grids: list[tuple[int, int]], image_token_id: int
) -> tuple[list[torch.LongTensor], list[torch.LongTensor]]:
    """Each row's tokens with one placeholder per image and no padding, and their columns."""
    kept = (attention_mask == 1) & (input_ids != image_token_id)
    columns, rows = locate_images(input_ids, grids, image_token_id)
    kept[rows, columns] = True
    return [ids[row] for ids, row in zip(input_ids, kept)], [row.nonzero().squeeze(-1) for row in kept]
