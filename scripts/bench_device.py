#!/usr/bin/env python
"""Times the whole engine on the device at hand, with random weights, against the roofline.

    python scripts/bench_device.py --model llama-3.1-8b --batch 1 16 64 256 --context 1024 4096

Needs jax, flax and numpy; nothing is installed or fetched, and no weights are read. Where torch and
transformers are installed and see the same GPU, --transformers runs their static batch beside it.
"decode" is tokens in a second once every sequence decodes, "bound" what reading the weights and the
contexts once a step would allow at the measured copy bandwidth, "gap" the host time between steps
that the device may have waited. "prefill" is prompt tokens in a second, bound by the measured
matrix rate.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout, with nothing installed

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from jaxserve.config import EngineConfig  # noqa: E402
from jaxserve.engine.core import EngineCore  # noqa: E402
from jaxserve.engine.request import Request, SamplingParams  # noqa: E402
from scripts.device_limits import measured_limits  # noqa: E402
from scripts.model_shapes import MODELS  # noqa: E402

_WARM_STEPS = 8
# Of a number, scales and zeros of int4 included. Some of int4's matrices have 8 bits.
_QUANTIZED_BYTES = {"int8": 1.0, "fp8": 1.0, "int4": 0.5 + 5 / 32}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one batch achieved."""

    prefill_rate: float  # prompt tokens/s
    decode_rate: float  # new tokens/s
    gap_s: float  # host time between two steps


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """The bytes and flops that a step of a model cannot do without."""

    layer_weights: int
    step_bytes: int  # read in each step: layers and head whole, of the embedding next to nothing
    token_bytes: int  # keys and values of a token
    pair_flops: int  # of attention, for a pair of query and key

    def decode_bound(self, batch: int, context: int, bandwidth: float) -> float:
        """Returns tokens/s if memory were read once a step and nothing else took time."""
        return batch * bandwidth / (self.step_bytes + batch * context * self.token_bytes)

    def prefill_bound(self, context: int, rate: float) -> float:
        """Returns tokens/s if only products took time."""
        return rate / (2 * self.layer_weights + self.pair_flops * context / 2)


def model_size(
    hf_config: dict[str, Any],
    weight_bytes: int,
    kv_bytes: int,
    quantization: str = "auto",
) -> ModelSize:
    """Returns the size of a model whose numbers take `weight_bytes` and `kv_bytes` each.

    The numbers of quantised layers take less.
    """
    hidden, vocab = hf_config["hidden_size"], hf_config["vocab_size"]
    head_dim = hf_config.get("head_dim") or hidden // hf_config["num_attention_heads"]
    layers, kv_heads = hf_config["num_hidden_layers"], hf_config["num_key_value_heads"]
    num_heads, ffw = hf_config["num_attention_heads"], hf_config["intermediate_size"]
    weights = layers * hidden * (2 * num_heads * head_dim + 2 * kv_heads * head_dim + 3 * ffw)
    return ModelSize(
        layer_weights=weights,
        step_bytes=int(
            weights * _QUANTIZED_BYTES.get(quantization, weight_bytes)
            + hidden * vocab * weight_bytes
        ),
        token_bytes=2 * layers * kv_heads * head_dim * kv_bytes,
        pair_flops=4 * layers * num_heads * head_dim,
    )


def num_prefill_steps(batch: int, context: int, max_step_tokens: int) -> int:
    """Returns how many steps bring in all prompts, at most.

    Decodes come first: sequences that are in write a token in each step of the others' prefill.
    """
    return -(-batch * context // max(1, max_step_tokens - batch))


def num_new_tokens(batch: int, context: int, max_step_tokens: int, num_steps: int) -> int:
    """Returns how many tokens each sequence may write, so that none ends while it is timed."""
    return 2 * num_prefill_steps(batch, context, max_step_tokens) + 2 * _WARM_STEPS + num_steps


def measure(core: EngineCore, batch: int, context: int, num_steps: int) -> Figures | str:
    """Runs a batch with contexts of about `context`. Returns figures, or why there are none."""
    info = core.info
    num_new = num_new_tokens(batch, context, info.max_num_batched_tokens, num_steps)
    total = context + num_new
    if total > info.max_model_len:
        return f"needs {total} tokens a sequence; the limit is {info.max_model_len}"
    pages = batch * -(-total // info.page_size)
    if batch > info.max_num_seqs:
        return f"{batch} sequences; the engine has {info.max_num_seqs} slots"
    if pages > info.num_pages:
        return f"needs {pages} pages of {info.page_size} tokens; the device holds {info.num_pages}"
    random = np.random.default_rng(time.monotonic_ns())
    params = SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True)
    names = [str(index) for index in range(batch)]
    for name in names:
        prompt = tuple(random.integers(1000, info.vocab_size, context).tolist())
        core.add(Request(request_id=name, prompt_tokens=prompt, params=params))
    started_s = time.perf_counter()
    answered: set[str] = set()
    while len(answered) < batch:
        answered.update(update.request_id for update in core.step() if update.tokens)
    prefill_s = time.perf_counter() - started_s
    for _ in range(_WARM_STEPS):
        core.step()
    before, started_s = core.stats(), time.perf_counter()
    tokens = 0
    for _ in range(num_steps):
        tokens += sum(len(update.tokens) for update in core.step())
    decode_s = time.perf_counter() - started_s
    after = core.stats()
    core.abort(names)
    while core.has_work:
        core.step()
    if after.num_finished != before.num_finished:
        return "sequences ended while they were timed"
    return Figures(
        prefill_rate=batch * context / prefill_s,
        decode_rate=tokens / decode_s,
        gap_s=(after.host_gap_s - before.host_gap_s) / num_steps,
    )


def transformers_rate(hf_config: dict[str, Any], batch: int, context: int, num_steps: int) -> float:
    """Returns the tokens/s of transformers' `generate` on one static batch on the same GPU."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**hf_config)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        prompt = torch.randint(1000, hf_config["vocab_size"], (batch, context))
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def seconds(count: int) -> float:
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        model.generate(prompt, max_new_tokens=count, min_new_tokens=count, **options)
        torch.cuda.synchronize()
        return time.perf_counter() - started_s

    seconds(2)
    return batch * num_steps / (seconds(num_steps + 1) - seconds(1))


def engine_for(model: str, hf_config: dict[str, Any], options: argparse.Namespace) -> EngineCore:
    """Returns an engine with random weights for a config.json that holds nothing else."""
    with tempfile.TemporaryDirectory(prefix="bench-device-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(hf_config))
        config = EngineConfig(
            model=folder,
            load_format="dummy",
            enable_prefix_caching=False,
            max_num_seqs=max(options.batch),
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_model_len=max(
                context
                + num_new_tokens(batch, context, options.max_num_batched_tokens, options.steps)
                for context in options.context
                for batch in options.batch
            ),
            gpu_memory_utilization=options.gpu_memory_utilization,
            quantization=options.quantization,
            kv_cache_dtype=options.kv_cache_dtype,
            **({"dtype": options.dtype} if options.dtype else {}),
        )
        return EngineCore(config, lambda line: print(line.replace(folder, model), file=sys.stderr))


def main() -> int:
    """Prints the table. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="cut the model to this many layers")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--steps", type=int, default=64, help="decode steps that are timed")
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--dtype", help="of the weights; default: the device's")
    parser.add_argument("--quantization", default="auto", help="as `jaxserve serve` takes it")
    parser.add_argument("--kv-cache-dtype", default="auto", help="as `jaxserve serve` takes it")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--transformers", action="store_true", help="run transformers as well")
    options = parser.parse_args()
    # The measured arrays must fit beside what the engine takes later.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    bandwidth, rate = measured_limits()
    print(f"measured: copies {bandwidth / 1e9:.0f} GB/s, products {rate / 1e12:.1f} Tflop/s")
    hf_config = dict(MODELS[options.model])
    hf_config["num_hidden_layers"] = options.layers or hf_config["num_hidden_layers"]
    core = engine_for(options.model, hf_config, options)
    number_bytes = (
        jnp.dtype(name).itemsize for name in (core.info.dtype, core.info.kv_cache_dtype)
    )
    size = model_size(hf_config, *number_bytes, options.quantization)
    print(
        f"{options.model} ({hf_config['num_hidden_layers']} layers), {core.info.device}, "
        f"{core.info.dtype}, quantization {options.quantization}, "
        f"attention {core.info.attention}"
    )
    print(
        f"{'batch':>5} {'context':>7} {'prefill':>9} {'share':>6} {'decode':>9} {'bound':>9} "
        f"{'share':>6} {'gap us':>7}"
    )
    cases = [(batch, context) for context in options.context for batch in options.batch]
    for batch, context in cases:
        figures = measure(core, batch, context, options.steps)
        start = f"{batch:5} {context:7}"
        if isinstance(figures, str):
            print(f"{start} left out: {figures}", flush=True)
            continue
        # Half of the sequences came in during the first half of the prefills, and so on.
        grown = num_prefill_steps(batch, context, options.max_num_batched_tokens) // 2
        middle = context + grown + _WARM_STEPS + options.steps // 2
        bound = size.decode_bound(batch, middle, bandwidth)
        print(
            f"{start} {figures.prefill_rate:9.0f} "
            f"{figures.prefill_rate / size.prefill_bound(context, rate):6.1%} "
            f"{figures.decode_rate:9.1f} {bound:9.1f} {figures.decode_rate / bound:6.1%} "
            f"{figures.gap_s * 1e6:7.0f}",
            flush=True,
        )
    core.close()
    if options.transformers:
        for batch, context in cases:
            value = transformers_rate(hf_config, batch, context, options.steps)
            print(f"transformers batch {batch} context {context}: {value:.1f} tok/s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
