"""Keeps answers to their grammars: compiles them, follows each sequence, says what may come next.

The engine knows token ids only; what llguidance must know of text is a `Vocabulary`, which the
text side sends once. Host only: imports no jax.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import llguidance
import numpy as np
from llguidance.numpy import fill_next_token_bitmask_par

from jaxserve.engine.packing import Packed
from jaxserve.engine.sequence import SpanResult, StepPlan
from jaxserve.errors import RequestError
from jaxserve.structured_outputs import Grammar, Vocabulary

COMPILE_LIMIT_S = 2.0
MAX_COMPILED = 32  # kept for the next request; each holds at most about 20 MB
_MAX_REASON = 500  # characters of llguidance's
_NUM_COMPILERS = 2

# Smaller than llguidance's own, so that a compilation ends within a second and a mask, at worst, in
# some tenths of one, whatever the grammar.
_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=200_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_lexer_states=10_000,  # 1 to 2 kB each
    max_grammar_size=200_000,
    verbose_errors=False,
)


class Matcher:
    """Follows one sequence's output through its grammar. The engine thread owns it.

    It survives preemption, as the sequence's tokens do.
    """

    def __init__(self, grammar: Grammar, inner: llguidance.LLMatcher) -> None:
        self.inner = inner
        self.num_tokens = 0  # of the output, seen so far
        self.error: str | None = None  # why it cannot go on
        self.is_complete = False  # nothing may follow what came
        self.has_started = not grammar.start_after_tokens
        self._start_after = grammar.start_after_tokens
        self._recent: deque[int] = deque(maxlen=len(self._start_after))

    def advance(self, token: int) -> None:
        """Takes in the output's next token; one that is not allowed is an `error`."""
        self.num_tokens += 1
        if self.has_started:
            if not self.inner.consume_token(token):
                self.error = _reason(self.inner)
            # Asked now: the next mask may fail, and then the inner one has stopped, too.
            self.is_complete = self.error is None and self.inner.is_stopped()
            return
        self._recent.append(token)
        self.has_started = tuple(self._recent) == self._start_after


class GrammarCompiler:
    """Compiles grammars on threads of its own and keeps the newest. Any thread may use it."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        vocab_size: int,  # of the masks
        eos_tokens: tuple[int, ...],
    ) -> None:
        self._mask_words = -(-vocab_size // 32)
        self._executor = llguidance.LLExecutor(1)
        self._compiled: OrderedDict[str, Future[llguidance.LLMatcher]] = OrderedDict()
        self._lock = threading.Lock()  # guards `_compiled`
        self._pool = ThreadPoolExecutor(_NUM_COMPILERS, thread_name_prefix="grammar")
        # Seconds for a large vocabulary: whoever sends it must not wait.
        self._tokenizer = self._pool.submit(
            llguidance.LLTokenizer,
            _Tokens(vocabulary, vocab_size, eos_tokens[0]),  # type: ignore[arg-type]
            eos_token=list(eos_tokens),
        )

    def matcher_for(self, grammar: Grammar) -> Matcher:
        """Returns a matcher at the grammar's start, from the cache or once it is compiled.

        Raises `RequestError` with the compiler's reason, or when that takes too long.
        """
        tokenizer = self._tokenizer.result()
        with self._lock:
            future = self._compiled.get(grammar.source)
            if future is None:
                future = self._pool.submit(self._compile, grammar.source, tokenizer)
                self._compiled[grammar.source] = future
            self._compiled.move_to_end(grammar.source)
            while len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        try:
            error = future.exception(COMPILE_LIMIT_S)
        except (TimeoutError, CancelledError):
            raise _refusal(
                grammar, f"it was not compiled within {COMPILE_LIMIT_S:g} s, the limit"
            ) from None
        if error is not None:
            self._forget(grammar.source, future)
            reason = str(error) if isinstance(error, ValueError) else "its compiler failed"
            raise _refusal(grammar, reason) from error
        return Matcher(grammar, future.result().deep_copy())

    def close(self) -> None:
        """Ends the threads once they are done."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _forget(self, source: str, future: Future[llguidance.LLMatcher]) -> None:
        with self._lock:
            if self._compiled.get(source) is future:
                del self._compiled[source]

    def _compile(self, source: str, tokenizer: llguidance.LLTokenizer) -> llguidance.LLMatcher:
        """Returns a grammar that has given its first mask: some faults only show there."""
        matcher = llguidance.LLMatcher(tokenizer, source, log_level=0, limits=_LIMITS)
        mask = np.zeros((1, self._mask_words), np.int32)
        if not matcher.is_error():
            fill_next_token_bitmask_par(self._executor, [(matcher, 0)], mask)
        if matcher.is_error():
            raise ValueError(_reason(matcher))
        if matcher.is_stopped():
            raise ValueError("it allows nothing but an empty answer")
        return matcher


class MaskFiller:
    """Fills the masks of a step's rows, in parallel and without the GIL. The engine thread owns it.

    Of a grammar with an error the mask is junk, and its next token is one more error.
    """

    def __init__(self, *, mask_words: int, eos_tokens: Iterable[int]) -> None:
        self._mask_words = mask_words
        self._executor: llguidance.LLExecutor | None = None
        bits = np.ones(mask_words * 32, np.uint8)
        bits[list(eos_tokens)] = 0
        self._but_eos = np.packbits(bits, bitorder="little").view(np.int32)

    def fill(
        self, plan: StepPlan, packed: Packed
    ) -> np.ndarray | None:  # [ranks * rows, ceil(vocab / 32)] i32; None without grammars
        """Returns what may come next in each row of logits that a grammar constrains."""
        if not plan.has_grammar:
            return None
        num_rows = packed.num_rows
        masks = np.zeros((packed.blob.shape[0] * num_rows, self._mask_words), np.int32)
        matchers = []
        rows = []
        for span, (rank, first) in zip(packed.spans, packed.places, strict=True):
            matcher = span.sequence.matcher
            if matcher is None or not span.samples:
                continue
            last = rank * num_rows + first + span.num_rows - 1
            rows.append((span, last))
            if matcher.has_started:
                matchers.append((matcher.inner, last))
            else:
                masks[last] = self._but_eos
        if matchers:
            if self._executor is None:
                self._executor = llguidance.LLExecutor()
            fill_next_token_bitmask_par(self._executor, matchers, masks)
        for span, last in rows:
            if span.sequence.request.params.ignore_eos:
                self._without_eos(masks[last])
            # Rows that score the prompt have the same slot, which keeps one mask.
            masks[last - span.num_rows + 1 : last] = masks[last]
        return masks

    def _without_eos(self, mask: np.ndarray) -> None:
        """Takes out the tokens that end an answer, unless they are all that is left."""
        others = mask & self._but_eos
        if others.any():
            mask[:] = others


def advance(plan: StepPlan, results: Iterable[SpanResult]) -> None:
    """Shows a step's tokens to the matchers of its sequences, before they are committed."""
    if not plan.has_grammar:
        return
    for span, result in zip(plan.spans, results, strict=True):
        sequence = span.sequence
        if sequence.matcher is None or not span.samples or sequence.is_finished:
            continue
        assert result.token is not None
        sequence.matcher.advance(result.token)


class _Tokens:
    """A vocabulary as llguidance takes it; it asks for token ids by these names."""

    bos_token_id = None
    is_tokenizer_wrapper = True

    def __init__(self, vocabulary: Vocabulary, vocab_size: int, eos_token: int) -> None:
        tokens = vocabulary.tokens[:vocab_size]
        self.tokens = [*tokens, *[b""] * (vocab_size - len(tokens))]
        self.special_token_ids = [one for one in vocabulary.special_tokens if one < vocab_size]
        self.eos_token_id = eos_token
        self._bytes = {piece: token for token, piece in enumerate(self.tokens) if len(piece) == 1}

    def __call__(self, text: bytes | str) -> list[int]:
        """Returns some spelling of a text: llguidance compares it with what it wrote."""
        data = text.encode() if isinstance(text, str) else text
        return [self._bytes[data[i : i + 1]] for i in range(len(data))]


def _refusal(grammar: Grammar, reason: str) -> RequestError:
    return RequestError(f"{grammar.param} cannot be honoured: {reason}", param=grammar.param)


def _reason(matcher: llguidance.LLMatcher) -> str:
    """Returns what llguidance says, cut to a length that fits an error."""
    text = matcher.get_error().replace("<non-verbose/>", "").strip()
    if text.startswith("NoExtension"):
        return "no answer at all fits it"
    return text if len(text) <= _MAX_REASON else text[:_MAX_REASON] + " ..."
