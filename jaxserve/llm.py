"""The offline API: `LLM(...).generate(...)`, with vLLM's names.

Importing it imports no jax; creating an `LLM` does.
"""

from __future__ import annotations

import itertools
import random
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from jaxserve.beam_search import BeamSearch, BeamSearchParams
from jaxserve.config import EngineConfig, ServerConfig, from_table
from jaxserve.engine.request import SamplingParams, Update
from jaxserve.errors import EngineStopped, RequestError
from jaxserve.generation import build_requests, encode_prompt
from jaxserve.offline import Answer, Mailbox, Sample, run
from jaxserve.offline_beams import beam_output, candidates_of
from jaxserve.outputs import BeamSearchOutput, RequestOutput
from jaxserve.server.model_text import ModelText, find_model, load_text
from jaxserve.text.chat_template import ChatTemplate, encode_chat
from jaxserve.text.grammar import vocabulary_of
from jaxserve.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jaxserve.engine.client import EngineClient

Prompt = str | list[int] | Mapping[str, Any]  # text, tokens, or a dict with one of them
Params = SamplingParams | Sequence[SamplingParams]
_PROMPT_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}


class LLM:
    """A model in this process. Any thread may use it, also inside a running event loop.

    The keywords are `EngineConfig`'s options. Sampling repeats from run to run for a given
    `seed` as long as the calls are made in the same order. Close it, or use it in a `with`.
    """

    def __init__(self, model: str = "demo", **options: Any) -> None:
        self.config = from_table(EngineConfig, {"model": model, **options})
        self._text = _load_text(self.config)
        mailbox = Mailbox()
        self._mailbox = mailbox
        self._client = _start_engine(self.config, mailbox.deliver)
        self._has_vocabulary = False
        self._close = weakref.finalize(self, self._client.close)
        self._request_ids = map(str, itertools.count())
        # Not for secrets: a fixed sequence is what `seed` promises.
        self._seeds = random.Random(self.config.seed)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Returns the results in the order of `prompts`.

        Everything is checked before the first prompt runs: `RequestError` names what is wrong.
        Ctrl-C aborts what is outstanding. A dead engine raises `EngineStopped`.
        """
        self._check_open()
        parsed = [_parse_prompt(prompt) for prompt in _as_list(prompts)]
        return self._run(parsed, sampling_params, use_tqdm, priority)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: Params | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Returns the answers to one conversation, or to each of a list of conversations.

        Special tokens typed inside a message stay plain text. Raises as `generate` does.
        """
        self._check_open()
        template = self._template(chat_template)
        is_one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if is_one else messages
        parsed = []
        for conversation in conversations:
            chat = encode_chat(
                template,
                self._text.tokenizer,
                conversation,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables=chat_template_kwargs,
            )
            parsed.append((chat.text, chat.tokens, ""))
        return self._run(parsed, sampling_params, use_tqdm, priority)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        *,
        priority: int | Sequence[int] | None = None,
    ) -> list[BeamSearchOutput]:
        """Returns the best continuations of each prompt, best first, in the order of `prompts`.

        Raises as `generate` does.
        """
        self._check_open()
        info, tokenizer = self._client.info, self._text.tokenizer
        params.check_logprobs(info.max_logprobs)
        given = [_parse_prompt(prompt) for prompt in _as_list(prompts)]
        priorities = _one_each(priority or 0, int, len(given), "priority")
        searches = [
            BeamSearch(
                encode_prompt(prompt, tokenizer, info),
                params,
                eos_tokens=info.eos_tokens,
                max_model_len=info.max_model_len,
            )
            for _, prompt, _ in given
        ]
        while True:
            rounds = [search.prompts for search in searches]
            answers = [
                self._answer(
                    None,
                    list(beam),
                    given[index][2],
                    params=searches[index].step_params,
                    priority=priorities[index],
                )
                for index, beams in enumerate(rounds)
                for beam in beams
            ]
            if not answers:
                return [beam_output(search, params, tokenizer) for search in searches]
            outputs = iter(run(self._client, self._mailbox, answers))
            for search, beams in zip(searches, rounds, strict=True):
                if beams:
                    search.advance([candidates_of(next(outputs)) for _ in beams])

    def get_tokenizer(self) -> Tokenizer:
        """Returns the model's tokenizer."""
        return self._text.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Returns the sampling options that the model recommends (its generation_config.json)."""
        return SamplingParams(**self._text.defaults)

    def close(self) -> None:
        """Stops the engine and frees the device's memory. Closing again does nothing."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LLM({self.config.model!r}{'' if self._close.alive else ', closed'})"

    def _check_open(self) -> None:
        if not self._close.alive:
            raise EngineStopped("this LLM is closed")

    def _template(self, source: str | None) -> ChatTemplate:
        tokenizer = self._text.tokenizer
        if source is not None:
            return ChatTemplate(source, special_tokens=tokenizer.special_tokens)
        if self._text.chat_template is None:
            raise RequestError(
                "the model has no chat template; pass one as chat_template=", param="chat_template"
            )
        return self._text.chat_template

    def _run(
        self,
        prompts: Sequence[tuple[str | None, str | list[int], str]],  # shown, given, cache salt
        sampling_params: Params | None,
        use_tqdm: bool,
        priority: int | Sequence[int] | None,
    ) -> list[RequestOutput]:
        params = _one_each(
            self.get_default_sampling_params() if sampling_params is None else sampling_params,
            SamplingParams,
            len(prompts),
            "sampling_params",
        )
        priorities = _one_each(priority or 0, int, len(prompts), "priority")
        answers = [
            self._answer(*prompt, params=params[index], priority=priorities[index])
            for index, prompt in enumerate(prompts)
        ]
        self._prepare(answers)
        with _Progress(len(answers), is_shown=use_tqdm) as progress:
            return run(
                self._client,
                self._mailbox,
                answers,
                is_by_priority=self.config.scheduling_policy == "priority",
                on_output=progress.advance,
            )

    def _prepare(self, answers: Sequence[Answer]) -> None:
        """Compiles the grammars of the answers; `RequestError` for one that cannot be."""
        samples = [sample for answer in answers for sample in answer.samples]
        grammars = dict.fromkeys(sample.request.params.grammar for sample in samples)
        for grammar in grammars:
            if grammar is None:
                continue
            # Not at the start: it takes a moment, and few need it.
            if not self._has_vocabulary and (vocabulary := vocabulary_of(self._text.tokenizer)):
                self._client.set_vocabulary(vocabulary)
                self._has_vocabulary = True
            self._client.prepare(grammar)

    def _answer(
        self,
        shown: str | None,
        prompt: str | list[int],
        cache_salt: str,
        *,
        params: SamplingParams,
        priority: int,
    ) -> Answer:
        request_id = next(self._request_ids)
        requests = build_requests(
            request_id,
            prompt,
            params,
            tokenizer=self._text.tokenizer,
            info=self._client.info,
            priority=priority,
            cache_salt=cache_salt,
            draw_seed=lambda: self._seeds.getrandbits(63),
        )
        samples = [Sample(request, self._text.tokenizer) for request in requests]
        return Answer(request_id=request_id, prompt=shown, samples=samples)


def generate(
    prompts: Prompt | Sequence[Prompt],
    sampling_params: Params | None = None,
    *,
    model: str = "demo",
    use_tqdm: bool = True,
    **options: Any,
) -> list[RequestOutput]:
    """Returns the results of one call on a model that is loaded for it and closed again."""
    with LLM(model, **options) as llm:
        return llm.generate(prompts, sampling_params, use_tqdm=use_tqdm)


def _start_engine(config: EngineConfig, deliver: Callable[[list[Update]], None]) -> EngineClient:
    """Returns a running engine. Tests put a fake in this function's place."""
    from jaxserve.engine.client import EngineThread

    return EngineThread(config, deliver, report=_report)


def _load_text(config: EngineConfig) -> ModelText:
    """Returns the model's text side. Tests put a fake in this function's place."""
    return load_text(find_model(config), config, ServerConfig())


def _report(line: str) -> None:
    print(f"jaxserve: {line}", file=sys.stderr, flush=True)


def _as_list(prompts: Any) -> list[Any]:
    """Returns a list of prompts from one prompt or many."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError(
            f"prompts is a {type(prompts).__name__}; it takes text, tokens or a list of them",
            param="prompts",
        )
    return [list(prompts)] if prompts and isinstance(prompts[0], int) else list(prompts)


def _parse_prompt(prompt: Any) -> tuple[str | None, str | list[int], str]:
    """Returns a prompt as text to show, what to encode, and its cache salt."""
    if isinstance(prompt, str):
        return prompt, prompt, ""
    if isinstance(prompt, Mapping):
        if unknown := sorted(map(str, prompt.keys() - _PROMPT_KEYS)):
            raise RequestError(
                f"a prompt has the keys {unknown}; known: {sorted(_PROMPT_KEYS)}", param="prompts"
            )
        text, tokens = prompt.get("prompt"), prompt.get("prompt_token_ids")
        salt = prompt.get("cache_salt") or ""
        if tokens is not None:
            return text, list(tokens), salt
        if isinstance(text, str):
            return text, text, salt
        raise RequestError("a prompt needs `prompt` or `prompt_token_ids`", param="prompts")
    if isinstance(prompt, Sequence):
        return None, list(prompt), ""
    raise RequestError(
        f"a prompt is a {type(prompt).__name__}; it takes text, tokens or a dict", param="prompts"
    )


def _one_each(value: Any, kind: type, count: int, name: str) -> Sequence[Any]:
    """Returns one value for each prompt from one for all or a list of them."""
    values = [value] * count if isinstance(value, kind) else list(value)
    if len(values) != count:
        raise RequestError(f"{name} has {len(values)} entries for {count} prompts", param=name)
    if wrong := [entry for entry in values if not isinstance(entry, kind)]:
        raise RequestError(f"{name} holds {wrong[0]!r}; it takes {kind.__name__}", param=name)
    return values


class _Progress:
    """A progress bar over the prompts, with the tokens per second so far."""

    def __init__(self, total: int, *, is_shown: bool) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=total, desc="prompts", disable=not is_shown, dynamic_ncols=True, unit="prompt"
        )
        self._num_tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def advance(self, output: RequestOutput) -> None:
        """Counts one finished prompt."""
        self._num_tokens += sum(len(sample.token_ids) for sample in output.outputs)
        elapsed = self._bar.format_dict["elapsed"] or 0.0
        if elapsed > 0:
            self._bar.set_postfix_str(f"{self._num_tokens / elapsed:.1f} tok/s", refresh=False)
        self._bar.update()
