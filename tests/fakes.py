"""Small real implementations that tests use in place of costly ones."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import tokenizers
from llguidance import LLExecutor
from llguidance.numpy import fill_next_token_bitmask_par

from jaxserve.engine.grammar import GrammarCompiler, Matcher
from jaxserve.engine.info import STEP_TOKEN_BOUNDS, EngineInfo, EngineStats
from jaxserve.engine.request import (
    FinishReason,
    Request,
    SamplingParams,
    Timeline,
    TokenLogprobs,
    Update,
)
from jaxserve.errors import EngineStopped, QueueFull
from jaxserve.structured_outputs import Grammar, Vocabulary
from jaxserve.text.tokenizer import BYTE_OF_LETTER, Tokenizer

EOS = 257  # of `byte_tokenizer`


class EchoEngine:
    """Answers each prompt with its own tokens, one a step, then again from the start.

    Steps run on a thread, `step_s` apart. The k-th likeliest token at any position is the true
    one plus k, with the logprob -1 - k. Stops at `max_tokens`, or before a `stop_token_ids` entry.
    A grammar is kept to: where it forbids the prompt's token, the first one that it allows comes.
    """

    def __init__(
        self,
        deliver: Callable[[list[Update]], None],
        *,
        step_s: float = 0.0,
        vocab_size: int = 256,
        max_model_len: int = 128,
        max_waiting: int = 64,
        max_logprobs: int = 20,
        dies_at: int | None = None,  # a prompt token that ends the engine when it is generated
        fails_at: int | None = None,  # a prompt token that ends its request alone
    ) -> None:
        self.info = EngineInfo(
            model="echo",
            max_model_len=max_model_len,
            vocab_size=vocab_size,
            max_logprobs=max_logprobs,
            max_num_seqs=max_waiting,
            max_waiting=64,  # more than it takes: it refuses by itself
            max_num_batched_tokens=1024,
            page_size=16,
            num_pages=100,
            num_slots=max_waiting,
            eos_tokens=(),
            device="none",
            dtype="none",
            quantization="none",
            kv_cache_dtype="float32",
            attention="none",
            num_programs=0,
            ready_s=0.0,
        )
        self.aborted: list[str] = []
        self.error: Exception | None = None
        self._deliver = deliver
        self._step_s = step_s
        self._dies_at, self._fails_at = dies_at, fails_at
        self._live: dict[str, tuple[Request, int]] = {}
        self._compiler: GrammarCompiler | None = None
        self._matchers: dict[str, Matcher] = {}
        self._num_steps = 0
        self._num_generated = 0
        self._num_prompt_tokens = 0
        self._finished: dict[str, int] = {}
        self._started: dict[str, float] = {}
        self._is_dead = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Learns what tokens are made of."""
        self._compiler = GrammarCompiler(vocabulary, vocab_size=260, eos_tokens=(EOS,))

    def prepare(self, grammar: Grammar) -> None:
        """Compiles a grammar."""
        assert self._compiler is not None
        self._compiler.matcher_for(grammar)

    def submit(self, request: Request) -> None:
        """Admits a request."""
        if (grammar := request.params.grammar) is not None:
            assert self._compiler is not None
            self._matchers[request.request_id] = self._compiler.matcher_for(grammar)
        with self._wake:
            if self._is_dead:
                raise EngineStopped("the echo engine is closed")
            if len(self._live) >= self.info.max_num_seqs:
                raise QueueFull(f"{len(self._live)} requests wait already")
            self._live[request.request_id] = (request, 0)
            self._num_prompt_tokens += len(request.prompt_tokens)
            self._wake.notify()

    def abort(self, request_ids: Sequence[str]) -> None:
        """Drops requests; remembers which."""
        with self._wake:
            for request_id in request_ids:
                if self._live.pop(request_id, None) is not None:
                    self.aborted.append(request_id)

    def stats(self) -> EngineStats:
        """Returns the counters."""
        with self._wake:
            if self._is_dead:
                raise EngineStopped("the echo engine is closed")
            return EngineStats(
                num_running=len(self._live),
                num_waiting=0,
                num_pages_free=100 - len(self._live),
                num_pages=100,
                num_steps=self._num_steps,
                prompt_tokens=self._num_prompt_tokens,
                generation_tokens=self._num_generated,
                prefix_queries=0,
                prefix_hits=0,
                num_preemptions=0,
                num_finished={**self._finished, "abort": len(self.aborted)},
                num_compiles_since_ready=0,
                host_gap_s=0.0,
                step_s=0.0,
                step_tokens=(self._num_steps, *(0,) * len(STEP_TOKEN_BOUNDS)),
                step_tokens_sum=self._num_steps,
            )

    def close(self) -> None:
        """Ends the thread."""
        with self._wake:
            self._is_dead = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._live or self._is_dead)
                if self._is_dead:
                    return
                updates = [self._advance(*entry) for entry in list(self._live.values())]
                self._is_dead = self._is_dead or self.error is not None
                self._num_steps += 1
                self._num_generated += len(updates)
            self._deliver(updates)
            if self._step_s:
                time.sleep(self._step_s)

    def _advance(self, request: Request, count: int) -> Update:
        prompt, params = request.prompt_tokens, request.params
        token = prompt[count % len(prompt)]
        matcher = self._matchers.get(request.request_id)
        if matcher is not None:
            token = _allowed(matcher, token)
        if token in (self._dies_at, self._fails_at):
            del self._live[request.request_id]
            if token == self._dies_at:
                self.error = RuntimeError("the device is gone")
            return Update(request_id=request.request_id, error="the step failed")
        reason: FinishReason | None = None
        stop_token = None
        is_complete = matcher is not None and matcher.is_complete
        if is_complete or token == EOS:
            reason = "stop"
        elif token in params.stop_token_ids:
            reason, stop_token = "stop", token
        elif count + 1 >= (params.max_tokens or math.inf):
            reason = "length"
        self._live[request.request_id] = (request, count + 1)
        if reason is not None:
            del self._live[request.request_id]
            self._finished[reason] = self._finished.get(reason, 0) + 1
        prompt_logprobs = None
        if count == 0 and params.prompt_logprobs is not None:
            known = [self._logprobs(token, params.prompt_logprobs) for token in prompt[1:]]
            prompt_logprobs = (None, *known)
        has_logprobs = params.logprobs is not None
        return Update(
            request_id=request.request_id,
            tokens=(token,),
            logprobs=(self._answer_logprobs(token, params),) if has_logprobs else (),
            prompt_logprobs=prompt_logprobs,
            finish_reason=reason,
            stop_token=stop_token,
            timeline=Timeline(self._started.setdefault(request.request_id, time.monotonic()), 0),
            is_complete=is_complete and token != EOS,
        )

    def _answer_logprobs(self, token: int, params: SamplingParams) -> TokenLogprobs:
        if not params.logprob_token_ids:
            return self._logprobs(token, params.logprobs or 0)
        size = self.info.vocab_size
        listed = ((wanted, -1.0 - (wanted - token) % size) for wanted in params.logprob_token_ids)
        return TokenLogprobs(token=token, logprob=-1.0, rank=1, top=tuple(listed))

    def _logprobs(self, token: int, count: int) -> TokenLogprobs:
        top = tuple(((token + k) % self.info.vocab_size, -1.0 - k) for k in range(count))
        return TokenLogprobs(token=token, logprob=-1.0, rank=1, top=top)


def _allowed(matcher: Matcher, token: int) -> int:
    """Returns `token` if it may come next, else the first that may, whitespace last.

    The matcher has seen it.
    """
    if not matcher.has_started:
        matcher.advance(token)
        return token
    mask = np.zeros((1, 9), np.int32)
    fill_next_token_bitmask_par(LLExecutor(1), [(matcher.inner, 0)], mask)
    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    if token not in allowed:
        token = int(min(allowed, key=lambda one: (one <= ord(" "), one)))
    matcher.advance(token)
    return token


def byte_tokenizer(
    chat_template: str | None = None,
    *,
    marks: Sequence[str] = (),  # more special tokens
    add_bos_token: bool | None = None,
) -> Tokenizer:
    """Returns a tokenizer whose tokens are the bytes, then <bos>, <eos>, <|user|>, <|end|>."""
    alphabet = dict(BYTE_OF_LETTER)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>", "<|user|>", "<|end|>", *marks])
    return Tokenizer(
        backend,
        special_tokens={"bos_token": "<bos>", "eos_token": "<eos>"},
        add_bos_token=add_bos_token,
        chat_template=chat_template,
    )
