"""Notices when an answer goes round in circles: the same few tokens, again and again.

Host only: imports no jax.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxserve.errors import RequestError

MAX_PATTERN = 256  # tokens; each costs a comparison for every token generated


@dataclass(frozen=True, kw_only=True)
class RepetitionDetection:
    """Ends an answer whose last tokens are `min_count` copies of one pattern. Names are vLLM's."""

    max_pattern_size: int = 0  # tokens of the longest pattern looked for; 0 looks for none
    min_pattern_size: int = 1
    min_count: int = 2

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_pattern_size", 0, MAX_PATTERN),
            ("min_pattern_size", 1, max(self.max_pattern_size, 1)),
            ("min_count", 2, 2**31 - 1),
        ):
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise RequestError(
                    f"repetition_detection.{name} is {value!r}; it must be in [{low}, {high}]",
                    param=f"repetition_detection.{name}",
                )


class RepetitionWatch:
    """Sees the tokens of one answer as they come. One thread at a time may use it.

    `_runs[p]` counts the last tokens in a row that equal the token `p` before them: 4 for
    `a b a b a b` and p = 2.
    """

    def __init__(self, detection: RepetitionDetection) -> None:
        self._min_count = detection.min_count
        self._sizes = range(detection.min_pattern_size, detection.max_pattern_size + 1)
        self._runs = dict.fromkeys(self._sizes, 0)
        self._tokens: list[int] = []

    def push(self, token: int) -> bool:
        """Returns True when `token` completes a repetition."""
        tokens, runs = self._tokens, self._runs
        tokens.append(token)
        is_repeated = False
        for size in self._sizes:
            if len(tokens) <= size:
                break
            runs[size] = runs[size] + 1 if tokens[-1 - size] == token else 0
            is_repeated = is_repeated or runs[size] >= size * (self._min_count - 1)
        return is_repeated
