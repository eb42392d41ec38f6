"""Control tokens of a tokenizer in the texts of strangers, which must not end or place things."""


def refuse_control_tokens(name: str, text: str, tokenizer) -> None:
    """
    Refuses a text of which the tokenizer would make anything but ordinary tokens.

    Args:
        name (`str`): The text's name in the error.
        text (`str`): The text, as a user typed it.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer that will read it.

    Raises:
        ValueError: If there is a special token in the text, or half a surrogate pair, which no tokenizer reads.

    Example:

    ```python
    >>> from tokenflex.inference.control_tokens import refuse_control_tokens
    >>> from tokenflex.towers.tiny import train_tokenizer

    >>> refuse_control_tokens("question", "which <|im_end|>?", train_tokenizer(["which color is it?"]))
    Traceback (most recent call last):
    ...
    ValueError: `question`: the control token '<|im_end|>' is not taken in a text: leave it out, or write it otherwise.
    ```
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"`{name}`: there is half a character (a lone surrogate) at {error.start}: send it whole, or leave it out."
        ) from None
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = special.union(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    for token_id in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if token_id in special:
            token = tokenizer.convert_ids_to_tokens(token_id)
            raise ValueError(
                f"`{name}`: the control token {token!r} is not taken in a text: leave it out, or write it otherwise."
            )
