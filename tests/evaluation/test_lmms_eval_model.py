import abc
import importlib
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tokenflex.checkpoints.files import save_checkpoint
from tokenflex.data.synthetic import draw_scene
from tokenflex.evaluation import lmms_eval_model, lmms_eval_plugin
from tokenflex.evaluation.lmms_eval_model import read_generation_kwargs


COUNTS = [4, 36, "2x5", None]


# The interfaces of lmms-eval 0.7.3, as small as they can be.
class lmms(abc.ABC):
    is_simple = True

    def __init__(self):
        self._rank, self._world_size = 0, 1
        self.task_dict, self.cached = {}, []
        self.cache_hook = SimpleNamespace(add_partial=lambda *entry: self.cached.append(entry))

    @classmethod
    def create_from_arg_string(cls, args, more):
        args = dict(arg.split("=", 1) for arg in args.split(","))
        args = {name: int(value) if value.isnumeric() else value for name, value in args.items()}
        return cls(**args, **{name: value for name, value in more.items() if value is not None})

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    @property
    def rank(self):
        return self._rank

    @property
    def world_size(self):
        return self._world_size


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


@dataclass
class Instance:
    request_type: str
    arguments: tuple
    idx: int = 0
    metadata: dict = field(default_factory=dict)

    @property
    def args(self):
        return self.arguments


@dataclass
class ChatMessages:
    messages: list

    def to_hf_messages(self):
        return [
            {
                "role": message["role"],
                "content": [
                    part if part["type"] == "text" else {"type": part["type"], part["type"]: part["url"]}
                    for part in message["content"]
                ],
            }
            for message in self.messages
        ]


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple = ()


@pytest.fixture
def logged(monkeypatch):
    logged = []
    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.api.instance": {
            "Instance": Instance,
            "GenerationResult": GenerationResult,
            "TokenCounts": TokenCounts,
        },
        "lmms_eval.protocol": {"ChatMessages": ChatMessages},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "lmms_eval.models.model_utils": {},
        "lmms_eval.models.model_utils.gen_metrics": {"log_metrics": lambda *args, **more: logged.append((args, more))},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    lmms_eval_model._chat_class.cache_clear()
    yield logged
    lmms_eval_model._chat_class.cache_clear()


@pytest.fixture
def chat_class(logged):
    """The class as lmms-eval's registry finds and checks it."""
    manifest = lmms_eval_plugin.manifests()
    assert manifest.model_id == "tokenflex"
    module, name = manifest.chat_class_path.rsplit(".", 1)
    found = getattr(importlib.import_module(module), name)
    assert issubclass(found, lmms) and not found.is_simple
    return found


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lmms_eval") / "checkpoint"
    save_checkpoint(folder, *tiny)
    return str(folder)


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    images = [draw_scene(7, index).image for index in range(5)]
    path = tmp_path_factory.mktemp("images") / "second.png"
    images[1].save(path)
    return [
        {"id": 0, "images": [images[0]], "question": "which color is the paper?"},
        {"id": 1, "images": [str(path)], "question": "what kind of shape is it, and where does it stand?"},
        {"id": 2, "images": [], "question": "hello"},
        {"id": 3, "images": [images[2], images[3]], "question": "which is taller?"},
        {"id": 4, "images": [images[4].convert("L")], "question": "how many dots are there?"},
    ]


def to_messages(doc):
    parts = [{"type": "image", "url": image} for image in doc["images"]]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": doc["question"]}]}]


def request(doc, doc_to_messages=to_messages, **gen_kwargs):
    gen_kwargs = {"max_new_tokens": 6, "temperature": 0, "until": ["\n\n"], **gen_kwargs}
    arguments = (doc["question"], doc_to_messages, gen_kwargs, doc["id"], "mmstar", "val")
    return Instance("generate_until", arguments)


def build(chat_class, checkpoint, docs, **options):
    model = chat_class(pretrained=checkpoint, **options)
    model.task_dict["mmstar"] = {"val": docs}
    return model


def own_answer(tiny, messages, count=None, max_new_tokens=6):
    """The answer to one conversation by the processor and `generate` alone, and the tokens it took."""
    model, processor = tiny
    count = (2, 5) if count == "2x5" else count
    content = ChatMessages(messages).to_hf_messages()
    images = [part["image"] for message in content for part in message["content"] if "image" in part] or None
    prompt = processor.apply_chat_template(content, add_generation_prompt=True)
    options = {} if count is None else {"num_vision_tokens": count}
    inputs = processor(images=images, text=prompt, return_tensors="pt", **options)
    output = model.generate(**inputs, **options, max_new_tokens=max_new_tokens, do_sample=False)
    answer = output[0, inputs["input_ids"].shape[1] :]
    text = processor.decode(answer, skip_special_tokens=True).strip()
    return GenerationResult(text, TokenCounts(inputs["input_ids"].shape[1], len(answer)))


@pytest.mark.parametrize("batch_size", [1, "3"])
@pytest.mark.parametrize("count", COUNTS)
def test_answers_equal_generate_at_each_count_and_batch_size(chat_class, checkpoint, docs, tiny, count, batch_size):
    options = {} if count is None else {"num_vision_tokens": count}
    model = build(chat_class, checkpoint, docs, batch_size=batch_size, **options)
    results = model.generate_until([request(doc) for doc in docs])
    assert results == [own_answer(tiny, to_messages(doc), count) for doc in docs]
    assert len({result.text for result in results}) > 1


def test_input_tokens_include_vision_tokens_which_are_logged(chat_class, checkpoint, docs, logged):
    inputs = {}
    for count in (4, 16):
        model = build(chat_class, checkpoint, docs, num_vision_tokens=count, batch_size=8)
        results = model.generate_until([request(doc) for doc in docs])
        inputs[count] = [result.token_counts.input_tokens for result in results]
    assert [more - less for less, more in zip(*inputs.values())] == [12, 12, 0, 24, 12]
    per_request = [more["additional_metrics"]["vision_tokens_per_request"] for _, more in logged]
    assert per_request == [4.0, 16.0]


def test_requests_of_different_generation_kwargs_come_back_in_order(chat_class, checkpoint, docs, tiny):
    model = build(chat_class, checkpoint, docs, num_vision_tokens=16, batch_size=4)
    lengths = [2, 6, 2, 1, 6]
    results = model.generate_until([request(doc, max_new_tokens=n) for doc, n in zip(docs, lengths)])
    assert results == [own_answer(tiny, to_messages(doc), 16, n) for doc, n in zip(docs, lengths)]
    assert {entry[0] for entry in model.cached} == {"generate_until"} and len(model.cached) == len(docs)


def test_until_ends_answers_and_a_blank_line_does_not(chat_class, checkpoint, docs, tiny):
    model = build(chat_class, checkpoint, docs, num_vision_tokens=4)
    whole = own_answer(tiny, to_messages(docs[0]), 4).text
    end = whole[len(whole) // 2]
    (cut,) = model.generate_until([request(docs[0], until=["\n\n", end])])
    assert cut.text == whole.split(end)[0].strip() != whole
    assert model.generate_until([request(docs[0], until=end)])[0].text == cut.text
    assert lmms_eval_model.cut("first\n\nthen ASSISTANT: more", ["ASSISTANT:"]) == "first\n\nthen"


@pytest.mark.parametrize(
    ("gen_kwargs", "options"),
    [
        ({}, {"max_new_tokens": 1024, "do_sample": False}),
        ({"temperature": 0.2, "do_sample": False}, {"max_new_tokens": 1024, "do_sample": False}),
        ({"temperature": 0, "do_sample": True, "top_p": 0.9}, {"max_new_tokens": 1024, "do_sample": False}),
        ({"temperature": 0.2, "top_p": None}, {"max_new_tokens": 1024, "do_sample": True, "temperature": 0.2}),
        ({"do_sample": True, "top_k": 5}, {"max_new_tokens": 1024, "do_sample": True, "top_k": 5}),
        ({"num_beams": 3, "image_aspect_ratio": "pad"}, {"max_new_tokens": 1024, "do_sample": False, "num_beams": 3}),
    ],
)
def test_generation_kwargs_are_greedy_unless_asked(gen_kwargs, options):
    assert read_generation_kwargs(gen_kwargs) == (options, [])


@pytest.mark.parametrize("batch_size", [1, 4])
def test_rounds_build_on_the_answers_before(chat_class, checkpoint, docs, tiny, batch_size):
    def in_rounds(doc, round_idx=0, previous_output=None, previous_round_info=None):
        text = f"{doc['question']} {' '.join(previous_output or [])}"
        messages = to_messages({**doc, "question": text})
        if round_idx == 0:
            return messages
        assert previous_round_info == (None if round_idx == 1 else round_idx - 1)
        return messages, round_idx > doc["id"], previous_output, round_idx

    model = build(chat_class, checkpoint, docs, num_vision_tokens=16, batch_size=batch_size)
    results = model.generate_until_multi_round([request(doc, in_rounds, max_new_tokens=3) for doc in docs[:3]])
    for doc, answers in zip(docs, results):
        expected = []
        for _ in range(doc["id"] + 1):
            messages = to_messages({**doc, "question": f"{doc['question']} {' '.join(expected)}"})
            expected.append(own_answer(tiny, messages, 16, 3).text)
        assert answers == expected


def test_a_task_without_further_rounds_is_asked_once(chat_class, checkpoint, docs):
    model = build(chat_class, checkpoint, docs)
    repeat = request(docs[0], lambda doc, **_: to_messages(doc))
    assert [len(answers) for answers in model.generate_until_multi_round([repeat])] == [1]


def test_command_line_arguments_make_the_model(chat_class, checkpoint):
    arguments = f"pretrained={checkpoint},num_vision_tokens=16,dtype=bfloat16"
    model = chat_class.create_from_arg_string(arguments, {"batch_size": "2", "max_batch_size": None, "device": "cpu"})
    assert (model.num_vision_tokens, model.batch_size, model.rank, model.world_size) == (16, 2, 0, 1)
    assert model.model.dtype == torch.bfloat16 and model.device.type == "cpu"


def test_a_count_stored_for_generation_is_what_is_encoded(chat_class, tiny, docs, checkpoint, tmp_path):
    model, processor = tiny
    save_checkpoint(tmp_path / "stored", model, processor)
    config = type(model.generation_config)(**{**model.generation_config.to_dict(), "num_vision_tokens": 4})
    config.save_pretrained(tmp_path / "stored")
    stored = build(chat_class, str(tmp_path / "stored"), docs)
    asked = build(chat_class, checkpoint, docs, num_vision_tokens=4)
    assert stored.generate_until([request(docs[0])]) == asked.generate_until([request(docs[0])])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_vision_tokens": 50}, "`num_vision_tokens`=50: .* Nearest: 49 or 64"),
        ({"num_vision_tokens": "9x4"}, r"`num_vision_tokens`=\(9, 4\): .*\(8, 8\)"),
        ({"num_vision_tokens": "many"}, "`num_vision_tokens`='many'"),
        ({"num_vision_token": 16}, "`num_vision_token`=16. Did you mean `num_vision_tokens`?"),
        ({"conv_template": "chatml"}, "`conv_template`='chatml'.* Known: pretrained, num_vision_tokens, batch_size"),
        ({"batch_size": "auto"}, "`batch_size`='auto': a number"),
        ({"batch_size": 0}, "`batch_size`=0: a number"),
    ],
)
def test_wrong_arguments_are_refused_by_name(chat_class, checkpoint, options, message):
    with pytest.raises(ValueError, match=message):
        chat_class(pretrained=checkpoint, **options)


def test_what_cannot_be_asked_is_refused(chat_class, checkpoint, docs):
    model = build(chat_class, checkpoint, docs)
    with pytest.raises(NotImplementedError, match="1 requests ask for log-likelihoods"):
        model.loglikelihood([request(docs[0])])
    heard = request(docs[0], lambda doc: [{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}])
    with pytest.raises(ValueError, match="type 'audio': TokenFLEX takes text, image and video"):
        model.generate_until([heard])
    assert model.generate_until([]) == []


def test_nothing_of_lmms_eval_is_imported_before_it_is_asked_for():
    assert "lmms_eval" not in sys.modules
    with pytest.raises(AttributeError, match="no attribute 'TokenFlex'"):
        lmms_eval_model.TokenFlex  # noqa: B018
