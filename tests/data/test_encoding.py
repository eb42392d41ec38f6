import os
import re
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tokenflex import TokenFlexProcessor
from tokenflex.data.arguments import DataArguments
from tokenflex.data.encoding import encode_row, split_answers
from tokenflex.data.examples import BadRowError, to_example
from tokenflex.data.rows import RowChecker
from tokenflex.evaluation.sweep import encode_questions
from tokenflex.training import TokenFlexDataCollator
from tokenflex.training.schemes import SCHEMES


IMAGE = Image.new("RGB", (8, 6))
SPACED = st.text("a \n\tb", min_size=1, max_size=6).filter(str.strip)
NUM_FUZZED = int(os.environ.get("TOKENFLEX_FUZZ_ROWS", 150))


def mostly(usual, odd):
    return st.integers(0, 15).flatmap(lambda drawn: odd if drawn == 7 else usual)


MARKED = st.sampled_from(
    ["<image>", "<image1>", "is <image 2>\n<image1>?", "a<|image_1|>", "<image>b<image>", "<image0>"]
)
ODD = st.sampled_from(
    [None, "", " ", float("nan"), True, "<|im_end|>", "<|image_pad|>", "\ud83d", b"x", [], ["a"], {}]
)
PLAIN = st.sampled_from(["a", "which?", "  b\n", "A", "007", "red", 3, 0.5])
TEXTS = mostly(st.sampled_from(["a", "which?", "  b\n", "red"]), MARKED)
CELLS = mostly(PLAIN, MARKED | ODD)
PICTURES = mostly(
    st.sampled_from([None, [], IMAGE, [IMAGE], [IMAGE, IMAGE]]),
    st.sampled_from(["missing.png", b"x", {"bytes": None, "path": None}, 3]),
)
PARTS = mostly(
    st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS}, optional={"image": st.none(), "path": st.none()}),
    st.fixed_dictionaries({"type": st.just("image")}, optional={"text": st.none(), "image": st.just(IMAGE)})
    | st.dictionaries(st.sampled_from(["type", "text", "image", "url"]), CELLS, max_size=3),
)
CONTENTS = mostly(TEXTS | st.lists(PARTS, min_size=1, max_size=3), ODD)


def turns(role, content, user, assistant):
    """Conversations, most of them of turns that take turns."""
    turn = st.fixed_dictionaries({role: st.sampled_from([user, assistant, "system", "robot"]), content: CONTENTS})
    pair = st.tuples(*(st.fixed_dictionaries({role: st.just(name), content: CONTENTS}) for name in (user, assistant)))
    pairs = st.lists(pair, min_size=1, max_size=3).map(lambda pairs: [turn for pair in pairs for turn in pair])
    return mostly(pairs, st.builds(lambda pairs, turn: [*pairs, turn], pairs, turn) | st.lists(turn, max_size=3) | ODD)


def columns(pairs, questions, answers):
    return {questions: [question for question, _ in pairs], answers: [answer for _, answer in pairs]}


CHOICES = st.sampled_from([None, [], ["red", "a"], "['red', 'a']", ["A", "B"], "red", [None], [["red"], []]])
OTHERS = st.fixed_dictionaries(
    {},
    optional={
        "image": PICTURES,
        "images": PICTURES,
        "options": mostly(st.none(), CHOICES),
        "family": CELLS,
        "id": CELLS,
    },
)
TEXT_COLUMNS = mostly(
    st.one_of(
        st.fixed_dictionaries({"question": CELLS, "answer": CELLS | st.lists(CELLS, min_size=1, max_size=3)}),
        st.fixed_dictionaries(
            {"question": PLAIN, "answer": st.sampled_from(["A", "a", 1, "red"]), "choices": CHOICES}
        ),
        st.builds(
            columns,
            st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=3),
            st.just("questions"),
            st.just("answers"),
        ),
        st.fixed_dictionaries({"messages": turns("role", "content", "user", "assistant")}),
        st.fixed_dictionaries({"conversations": turns("from", "value", "human", "gpt")}),
    ),
    st.dictionaries(st.sampled_from(["question", "questions", "answer", "answers", "messages"]), CELLS, max_size=3),
)
ROWS = mostly(st.builds(lambda texts, others: {**others, **texts}, TEXT_COLUMNS, OTHERS), ODD)
few = settings(deadline=None, max_examples=40, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def collators(narrow):
    options = [(scheme, packing) for scheme in SCHEMES for packing in (False, True)]
    return [
        TokenFlexDataCollator(narrow[1], [4, 16], [1, 1], scheme=scheme, packing=packing)
        for scheme, packing in options
    ]


def outcome(read):
    try:
        return read(), None
    except BadRowError as error:
        return None, re.sub("0x[0-9a-f]+", "", str(error))  # PIL's errors name the bytes' address


@given(row=ROWS, max_length=st.sampled_from([None, None, 30, 60]))
@settings(few, max_examples=NUM_FUZZED, derandomize="TOKENFLEX_FUZZ_ROWS" not in os.environ)
def test_what_the_check_lets_pass_is_collated_and_the_rest_refused_alike(narrow, collators, row, max_length):
    args = DataArguments(["rows"], max_length=max_length, on_long_row="truncate")
    check = RowChecker("rows", args, processor=narrow[1], num_vision_tokens=16)
    _, refused = outcome(lambda: check(0, lambda: row))
    for collator in collators:
        collator.max_length = max_length
    batch, reason = outcome(lambda: collators[0].collate([row, {"question": "b?", "answer": "c"}]))
    assert refused == (reason and f"rows, row 0: {reason}.")
    for collator in collators if batch is not None else ():
        arranged, _ = collator.arrange(dict(batch), collator.draw(0, samples=range(2)))
        labeled = arranged["labels"] != -100
        assert torch.equal(arranged["labels"][labeled], arranged["input_ids"][labeled]) and labeled.any()


REFUSED = {
    "nobody answers the last user": [
        {"messages": [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]},
        {
            "images": [IMAGE],
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "<image> c"},
            ],
        },
        {"conversations": [{"from": f, "value": v} for f, v in (("human", "a"), ("gpt", "b"), ("human", "c"))]},
    ],
    "an assistant's message is empty": [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}
    ],
    "a user's message is empty": [
        {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "b"}]}
    ],
    "an assistant's message has an image": [
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "b"}]},
            ]
        }
    ],
    "its question is None": [{"image": IMAGE}, {"image": IMAGE, "answer": "b"}],
    "its answer is": [
        {"question": "a", "answer": ""},
        {"question": "a", "answer": None},
        {"question": "a", "answer": float("nan")},
    ],
    "not a dict of columns": [["a", "b"], None],
    "a text part of a message has 'image'": [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a", "image": IMAGE}]},
                {"role": "assistant", "content": "b"},
            ]
        }
    ],
    "an image part of a message has the text 'a'": [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": "a", "image": IMAGE}]},
                {"role": "assistant", "content": "b"},
            ]
        }
    ],
}


@pytest.mark.parametrize("reason, row", [(reason, row) for reason, rows in REFUSED.items() for row in rows])
def test_rows_that_cannot_be_trained_on_are_named(narrow, collators, reason, row):
    check = RowChecker("some rows", DataArguments(["rows"]), processor=narrow[1])
    with pytest.raises(BadRowError, match=f"^some rows, row 7: .*{reason}"):
        check(7, lambda: row)
    with pytest.raises(BadRowError, match=reason):
        collators[0].collate([row])


@given(question=SPACED, answer=SPACED, as_parts=st.booleans(), system=st.booleans())
@few
def test_training_evaluation_and_chat_template_build_one_prompt(narrow, question, answer, as_parts, system):
    model, processor = narrow
    content = [{"type": "text", "text": question, "image": None}] if as_parts else question
    asked = [{"role": "system", "content": " brief "}] * system + [{"role": "user", "content": content}]
    row = {"messages": [*asked, {"role": "assistant", "content": answer}]}
    expected = processor.apply_chat_template(asked, add_generation_prompt=True)
    (prompt, _), (said, is_answer) = split_answers(to_example(row).dialogs[0], processor)
    assert prompt == expected and is_answer and said.startswith(answer)
    encoded = encode_row(row, processor)
    prompt_ids = [token for token, label in zip(encoded.input_ids, encoded.labels) if label == -100]
    (((target,), inputs),) = encode_questions(model, processor, [row], show_progress=False)
    assert inputs["input_ids"][0].tolist() == prompt_ids
    assert (target.question, target.answer) == (question, answer)
    if not system:
        assert encode_row({"question": question, "answer": answer}, processor).input_ids == encoded.input_ids


# Qwen3's writes earlier turns without what it puts before the last answer.
REWRITING = (
    "{%- for message in messages -%}{{ message.role }}: {{ 'thought, ' if loop.last }}{{ message.content }};"
    "{%- endfor -%}{{ 'assistant: ' if add_generation_prompt }}"
)
RAISING = "{{ raise_exception('no such roles') }}"


@pytest.mark.parametrize(
    "template, reason",
    [(RAISING, "the chat template refuses it \\(no such roles\\)"), (REWRITING, "give each answer a row of its own")],
)
def test_what_the_chat_template_does_not_take_is_found_by_the_check(narrow, monkeypatch, template, reason):
    monkeypatch.setattr(narrow[1], "chat_template", template)
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    check = RowChecker("rows", DataArguments(["rows"]), processor=narrow[1])
    with pytest.raises(BadRowError, match=f"rows, row 0: .*{reason}"):
        check(0, lambda: {"messages": turns})


def sentencepiece_processor(processor, prepend_scheme):
    """A processor whose tokenizer puts a space before what it tokenizes."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(
        ["which color is it? red and blue", "user\nassistant\n how many? seven"] * 50, trainer
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[2])
    return TokenFlexProcessor(processor.image_processor, tokenizer, 36, 8)


@pytest.mark.parametrize("prepend_scheme", ["first", "always", "never"])
def test_every_turn_is_tokenized_as_the_prompt_that_asks_for_it(narrow, prepend_scheme):
    processor = sentencepiece_processor(narrow[1], prepend_scheme)
    words = ["which color is it?", "red", "how many?", "seven", "blue?", "which?"]
    dialog = [{"role": role, "content": word} for role, word in zip(("user", "assistant") * 3, words)]
    encoded = encode_row({"messages": dialog}, processor)
    starts = [
        place for place, (before, label) in enumerate(pairwise([-100, *encoded.labels])) if before == -100 != label
    ]
    prompts = [processor.apply_chat_template(dialog[:turn], add_generation_prompt=True) for turn in (1, 3, 5)]
    asked = processor(text=prompts)["input_ids"]
    assert [encoded.input_ids[:start] for start in starts] == asked


def test_an_answer_keeps_its_first_token_apart_from_the_prompt(narrow, monkeypatch):
    processor = narrow[1]
    monkeypatch.setattr(processor, "chat_template", "{{ messages | map(attribute='content.0.text') | join }}")
    merging = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"ab": 0, "a": 1, "b": 2}, "a")))
    monkeypatch.setattr(processor, "tokenizer", merging)
    encoded = encode_row({"question": "a", "answer": "b"}, processor)
    assert (encoded.input_ids, encoded.labels) == ([1, 2], [-100, 2])
