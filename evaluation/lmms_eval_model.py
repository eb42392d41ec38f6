"""
The lmms-eval chat model, with the vision-token count as a model argument:

    lmms-eval --model tokenflex --model_args pretrained=outputs/tokenflex-7b,num_vision_tokens=64 --tasks mmstar
"""

import functools
import json
import time
from collections import defaultdict
from collections.abc import Iterator

from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers.utils import logging

from .harness import Answer, HarnessModel


logger = logging.get_logger(__name__)

MAX_NEW_TOKENS = 1024
GENERATION_OPTIONS = (
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "num_beams",
    "repetition_penalty",
)


def read_generation_kwargs(gen_kwargs: dict) -> tuple[dict, list[str]]:
    """
    A task's generation kwargs as options of `generate`, and the strings that end an answer.

    A temperature above 0 means sampling unless `do_sample` says otherwise. A blank line ends no answer: lmms-eval
    fills it in for every task that names no end, for the sake of few-shot prompts, and it would cut reasoning short.

    Example:

    ```python
    >>> from tokenflex.evaluation.lmms_eval_model import read_generation_kwargs

    >>> read_generation_kwargs({"max_new_tokens": 16, "temperature": 0, "until": ["\\n\\n", "ASSISTANT:"]})
    ({'max_new_tokens': 16, 'do_sample': False}, ['ASSISTANT:'])
    ```
    """
    until = gen_kwargs.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    ignored = {name: value for name, value in gen_kwargs.items() if name not in (*GENERATION_OPTIONS, "until")}
    if ignored:
        logger.warning_once(f"The tasks' generation kwargs {ignored} mean nothing to TokenFLEX and are ignored.")
    options = {name: gen_kwargs[name] for name in GENERATION_OPTIONS if gen_kwargs.get(name) is not None}
    options = {"max_new_tokens": MAX_NEW_TOKENS, **options}
    temperature = options.pop("temperature", None)
    options["do_sample"] = temperature != 0 and bool(options.get("do_sample", temperature))
    if options["do_sample"]:
        options |= {} if temperature is None else {"temperature": temperature}
    else:
        options = {name: value for name, value in options.items() if name not in ("top_p", "top_k")}
    return options, [end for end in until if end and end != "\n\n"]


def cut(text: str, until: list[str]) -> str:
    """The text up to the first of the strings that end it."""
    for end in until:
        text = text.split(end)[0]
    return text.strip()


class ChatModel(HarnessModel):
    """
    TokenFLEX as lmms-eval's chat models are asked; `TokenFlexChat` is this class with `lmms_eval.api.model.lmms` as
    its base.

    Args:
        pretrained (`str`):
            A checkpoint folder or Hub id.
        num_vision_tokens (`int` or `str`, *optional*):
            The vision-token count of every image, the grid as `8x12`, or `low`, `high` or `auto`. Defaults to the
            checkpoint's.
        batch_size (`int` or `str`, *optional*, defaults to 1):
            Requests answered at a time.
        device (`str`, *optional*):
            Device of the model; `auto` spreads it over all GPUs. Under `accelerate launch` each process has its own.
        max_batch_size:
            Passed by lmms-eval, not used.
        options:
            `dtype` and `attn_implementation`; others are refused by name.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        num_vision_tokens: int | str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **options,
    ):
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"`batch_size`={batch_size!r}: a number of requests, such as 8.")
        self.accelerator = Accelerator()
        if self.accelerator.num_processes > 1:
            device = str(self.accelerator.device)
        super().__init__(pretrained, num_vision_tokens, device=device, **options)
        self.batch_size = int(batch_size)
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    def loglikelihood(self, requests: list) -> list:
        raise NotImplementedError(
            f"{len(requests)} requests ask for log-likelihoods, but TokenFLEX answers by generation only: choose "
            "tasks of output type `generate_until`, as for lmms-eval's other chat models."
        )

    def generate_until(self, requests: list) -> list:
        """
        Answers requests in batches of those with equal generation kwargs.

        Args:
            requests (`list[Instance]`):
                Their `args` are `(context, doc_to_messages, generation kwargs, document's id, task, split)`.

        Returns:
            `list[GenerationResult]`: In the order of the requests; input tokens include vision tokens.
        """
        from lmms_eval.api.instance import GenerationResult, TokenCounts
        from lmms_eval.models.model_utils.gen_metrics import log_metrics

        answers, start = [None] * len(requests), time.perf_counter()
        for batch in self._batches(requests):
            messages = [self._messages(requests[index]) for index in batch]
            for index, answer in zip(batch, self._answer(requests[batch[0]], messages)):
                answers[index] = answer
                context, _, gen_kwargs, *_ = requests[index].args
                self.cache_hook.add_partial("generate_until", (context, gen_kwargs), answer.text)
        seconds, tokens = time.perf_counter() - start, sum(answer.output_tokens for answer in answers)
        if answers:
            vision_tokens = sum(answer.vision_tokens for answer in answers) / len(answers)
            more = {"rank": self.rank, "vision_tokens_per_request": vision_tokens}
            log_metrics(seconds, tokens, tokens / seconds, additional_metrics=more)
        return [GenerationResult(a.text, TokenCounts(a.input_tokens, a.output_tokens)) for a in answers]

    def generate_until_multi_round(self, requests: list) -> list[list[str]]:
        """
        Answers requests whose task writes each round's messages from the answers before, until it says that one was
        the last.

        Args:
            requests (`list[Instance]`): As in `generate_until`.

        Returns:
            `list[list[str]]`: The answers of each request, one per round.
        """
        answers = [[] for _ in requests]
        for batch in self._batches(requests):
            turns = {index: (self._messages(requests[index]), None) for index in batch}
            while turns:
                messages = [messages for messages, _ in turns.values()]
                for index, answer in zip(turns, self._answer(requests[batch[0]], messages)):
                    answers[index].append(answer.text)
                following = {
                    index: self._following_turn(requests[index], answers[index], state)
                    for index, (_, state) in turns.items()
                }
                turns = {index: turn for index, turn in following.items() if turn is not None}
        return answers

    def _batches(self, requests: list) -> Iterator[list[int]]:
        """Indices of requests that can be answered together."""
        groups = defaultdict(list)
        for index, request in enumerate(requests):
            groups[json.dumps(request.args[2], sort_keys=True, default=str)].append(index)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Answering", unit="request") as progress:
            for group in groups.values():
                for start in range(0, len(group), self.batch_size):
                    batch = group[start : start + self.batch_size]
                    yield batch
                    progress.update(len(batch))

    def _messages(self, request, **round_options):
        _, doc_to_messages, _, doc_id, task, split = request.args
        return doc_to_messages(self.task_dict[task][split][doc_id], **round_options)

    def _following_turn(self, request, answers: list[str], state) -> tuple | None:
        """The next round's messages and what the task wants handed back; `None` after the last."""
        turn = self._messages(
            request, round_idx=len(answers), previous_output=list(answers), previous_round_info=state
        )
        if not isinstance(turn, tuple) or len(turn) != 4:
            return None
        messages, is_over, _, state = turn
        return None if is_over else (messages, state)

    def _answer(self, request, messages: list) -> list[Answer]:
        """Answers messages with the generation kwargs of a request."""
        from lmms_eval.protocol import ChatMessages

        options, until = read_generation_kwargs(request.args[2])
        answers = self.answer([ChatMessages(messages=m).to_hf_messages() for m in messages], **options)
        for answer in answers:
            answer.text = cut(answer.text, until)
        return answers


@functools.cache
def _chat_class() -> type:
    from lmms_eval.api.model import lmms

    class TokenFlexChat(ChatModel, lmms):
        __doc__ = ChatModel.__doc__

    return TokenFlexChat


def __getattr__(name: str):
    # lmms-eval asks for a subclass of its own class, and need not be installed.
    if name == "TokenFlexChat":
        return _chat_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
