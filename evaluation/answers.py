"""Generated answers: where they end, and what of them counts when they are compared."""

import re
import unicodedata

import torch


def mask_answers(answers: torch.LongTensor, eos_token_id: int | list[int] | None) -> torch.BoolTensor:
    """
    True for the tokens of answers, each up to its first end token, which is part of it; False for what stands behind.

    Args:
        answers (`torch.LongTensor` of shape `(batch_size, answer_length)`): Generated tokens, without the prompts.
        eos_token_id (`int` or `list[int]`, *optional*): The ids that end an answer, as in the generation config.

    Returns:
        `torch.BoolTensor` of shape `(batch_size, answer_length)`.

    Example:

    ```python
    >>> import torch
    >>> from tokenflex.evaluation.answers import mask_answers

    >>> mask_answers(torch.tensor([[5, 2, 2], [5, 6, 7]]), eos_token_id=2).sum(-1)
    tensor([2, 3])
    ```
    """
    if eos_token_id is None:
        return torch.ones_like(answers, dtype=torch.bool)
    is_end = torch.isin(answers, torch.tensor(eos_token_id, device=answers.device))
    return is_end.cumsum(-1) - is_end.long() == 0


def normalize(answer: str) -> str:
    """
    An answer without what [`exact_match`] ignores: case, surrounding space, a final period of any script, and how a
    letter is put together in Unicode (NFC).

    Args:
        answer (`str`): The answer.

    Example:

    ```python
    >>> from tokenflex.evaluation.answers import normalize

    >>> normalize(" Cafe\u0301. ") == normalize("Caf\u00e9")
    True
    ```
    """
    answer = re.sub(r"\s*[.。．।۔]?\s*\Z", "", answer.strip())
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", answer).casefold())
