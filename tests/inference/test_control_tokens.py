import pytest
from tokenizers import AddedToken

from tokenflex.inference.control_tokens import refuse_control_tokens
from tokenflex.towers.tiny import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = train_tokenizer(["which color is the paper?"])
    tokenizer.add_tokens([AddedToken("<|box|>", special=True), AddedToken("<think>", special=False)])
    return tokenizer


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|endoftext|>", "<|box|>"])
@pytest.mark.parametrize("around", ["{}", "what is {} here?", "a<{}>", "\n{}\n"])
def test_control_tokens_are_refused_wherever_they_stand(tokenizer, token, around):
    with pytest.raises(ValueError, match=r"`question`: .*'" + token.replace("|", r"\|")):
        refuse_control_tokens("question", around.format(token), tokenizer)


@pytest.mark.parametrize(
    "text", ["", "red", "<|im_end", "< |im_end|>", "<|IM_END|>", "<b>|</b>", "日本 é \0", "<think>"]
)
def test_other_texts_are_taken(tokenizer, text):
    refuse_control_tokens("question", text, tokenizer)


@pytest.mark.parametrize("text", ["\ud800", "red \udfff paper"])
def test_half_characters_are_refused(tokenizer, text):
    with pytest.raises(ValueError, match="`question`: .*half a character"):
        refuse_control_tokens("question", text, tokenizer)


def test_an_unknown_character_is_no_control_token():
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = tokenizers.models.WordLevel({"[UNK]": 0, "red": 1, "[SEP]": 2}, unk_token="[UNK]")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), unk_token="[UNK]", eos_token="[SEP]"
    )
    refuse_control_tokens("question", "blue", tokenizer)
    with pytest.raises(ValueError, match="SEP"):
        refuse_control_tokens("question", "[SEP]", tokenizer)
