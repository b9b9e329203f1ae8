"""What an engine says about itself: lines while loading, facts once ready, counters at a moment.

Host only: imports no jax. msgspec encodes the facts and the counters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Report = Callable[[str], None]  # takes a line about loading, for the log

STEP_TOKEN_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """Facts that hold from ready until close."""

    model: str
    max_model_len: int  # tokens of prompt and answer together
    vocab_size: int
    max_logprobs: int
    max_num_seqs: int
    max_waiting: int  # requests, beside those that have a slot
    max_num_batched_tokens: int
    page_size: int
    num_pages: int
    num_slots: int
    eos_tokens: tuple[int, ...]
    device: str  # each of the mesh
    mesh: str = "1x1"  # data x tensor, or data x expert x tensor
    num_processes: int = 1  # that hold a part of the mesh
    dtype: str  # of weights that are not quantised
    quantization: str  # types of weights that are, or "none"
    kv_cache_dtype: str
    attention: str  # what it runs on
    experts: str = "none"  # what their products run on; "none" for a model without
    products: str = "none"  # what those with weights quantised by groups run on
    num_programs: int  # compiled step programs
    ready_s: float  # from the start of loading until ready
    scheduling_policy: str = "fcfs"
    enable_prefix_caching: bool = True


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """A snapshot for /metrics. `num_running` to `num_pages` are of now; the rest only grows."""

    num_running: int = 0
    num_waiting: int = 0
    num_pages_free: int = 0
    num_pages: int = 0
    num_steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0  # prompt tokens looked up
    prefix_hits: int = 0  # prompt tokens found
    num_preemptions: int = 0
    num_finished: dict[str, int] = field(default_factory=dict)  # by finish reason
    num_compiles_since_ready: int = 0
    host_gap_s: float = 0.0  # time the device waited for the host
    step_s: float = 0.0  # time in steps
    # Steps by the tokens they computed: bounded as STEP_TOKEN_BOUNDS says, then all larger ones.
    step_tokens: tuple[int, ...] = (0,) * (len(STEP_TOKEN_BOUNDS) + 1)
    step_tokens_sum: int = 0
