"""Decides what the configuration leaves to the engine, from the model and the device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxserve.config import EngineConfig
from jaxserve.engine.packing import Limits
from jaxserve.engine.request import MAX_EOS_TOKENS
from jaxserve.errors import ConfigError, WeightError
from jaxserve.mesh import num_parts
from jaxserve.models.loading import AbstractModel
from jaxserve.models.quantizing import ProductsChoice, products_choice
from jaxserve.ops.attention import Choice, LayerShape, choose_backend
from jaxserve.ops.moe import ExpertsChoice, choose_experts_backend
from pallas_kernels.ragged_paged_attention import KVLayout

_CPU_KV_BYTES = 2 * 2**30

_KV_DTYPES = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}


@dataclass(frozen=True, kw_only=True)
class Dtypes:
    """Number types of a configuration."""

    weights: jnp.dtype
    activations: jnp.dtype
    kv_cache: jnp.dtype


@dataclass(frozen=True, kw_only=True)
class DeviceDefaults:
    """What a kind of device does well."""

    page_size: int
    num_slots: int
    max_step_tokens: int
    min_rows: int  # smallest row bucket


# A CPU multiplies a single bfloat16 row ten times slower than two rows.
DEFAULTS = {
    "cpu": DeviceDefaults(page_size=16, num_slots=32, max_step_tokens=512, min_rows=2),
    "gpu": DeviceDefaults(page_size=16, num_slots=256, max_step_tokens=2048, min_rows=8),
    "tpu": DeviceDefaults(page_size=64, num_slots=256, max_step_tokens=2048, min_rows=8),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything decided before anything is compiled, but for the number of pages.

    Sizes are of one rank; a layout, a page's bytes and `vocab_part` are of one device.
    """

    limits: Limits
    attention: Choice
    experts: ExpertsChoice | None  # None: the model has none
    products: ProductsChoice | None  # None: no weights are quantised by groups
    num_layers: int
    vocab_part: int  # tokens whose logits each device computes
    min_rows: int
    max_waiting: int

    @property
    def layout(self) -> KVLayout:
        """How the attention backend keeps pages."""
        return self.attention.layout

    @property
    def warnings(self) -> list[str]:
        """Why what is slower than it might be is so."""
        chosen = (self.attention, self.experts, self.products)
        return [choice.warning for choice in chosen if choice is not None and choice.warning]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""
        return self.layout.page_bytes() * self.num_layers


def dtypes_for(config: EngineConfig, platform: str) -> Dtypes:
    """Returns the number types; on a CPU, bfloat16 weights where its instructions know them."""
    weights = config.dtype
    if weights == "auto":
        weights = "bfloat16" if platform != "cpu" or _has_bfloat16_instructions() else "float32"
    # XLA's CPU backend is slow at everything in bfloat16 but products summed in float32.
    activations = "float32" if platform == "cpu" else weights
    kv_cache = weights if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    return Dtypes(
        weights=jnp.dtype(weights),
        activations=jnp.dtype(activations),
        kv_cache=jnp.dtype(_KV_DTYPES.get(kv_cache, kv_cache)),
    )


def settings_for(
    config: EngineConfig, model: AbstractModel, dtypes: Dtypes, mesh: Mesh
) -> Settings:
    """Returns the sizes of a configuration; ConfigError for ones that cannot work."""
    device = mesh.devices.flat[0]
    defaults = DEFAULTS[device.platform]
    num_slots = _chosen(config.max_num_seqs, defaults.num_slots)
    page_size = _chosen(config.page_size, defaults.page_size)
    max_step_tokens = _chosen(config.max_num_batched_tokens, defaults.max_step_tokens)
    max_model_len = _chosen(config.max_model_len, model.config.max_positions)
    if max_model_len > model.config.max_positions:
        raise ConfigError(
            f"max_model_len is {max_model_len}; the model has "
            f"{model.config.max_positions} positions"
        )
    for name, value in (
        ("max_num_seqs", num_slots),
        ("page_size", page_size),
        ("max_num_batched_tokens", max_step_tokens),
    ):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if max_model_len < 2:
        raise ConfigError(f"max_model_len is {max_model_len}; it must be at least 2")
    if config.max_logprobs > model.config.vocab_size:
        raise ConfigError(
            f"max_logprobs is {config.max_logprobs}; the vocabulary has "
            f"{model.config.vocab_size} tokens"
        )
    limits = Limits(
        num_slots=num_slots,
        pages_per_sequence=-(-max_model_len // page_size),
        page_size=page_size,
        vocab_size=model.vocab_size,
        max_model_len=max_model_len,
        max_step_tokens=max_step_tokens,
        num_ranks=num_parts(mesh, "rank"),
    )
    shape = LayerShape(
        heads=model.config.num_heads // num_parts(mesh, "heads"),
        kv_heads=model.config.num_kv_heads // num_parts(mesh, "kv_heads"),
        head_dim=model.config.head_dim,
        page_size=page_size,
        kv_dtype=dtypes.kv_cache,
        tokens=max_step_tokens,
        sequences=num_slots,
        pages_per_sequence=limits.pages_per_sequence,
    )
    return Settings(
        limits=limits,
        attention=choose_backend(config.attention_backend, device, shape),
        experts=_experts(config.attention_backend, model, device),
        products=products_choice((each.value for each in model.parameters), device),
        num_layers=model.config.num_layers,
        vocab_part=model.vocab_size // num_parts(mesh, "vocab"),
        min_rows=defaults.min_rows,
        max_waiting=_chosen(config.max_num_queued_reqs, max(64, 4 * num_slots * limits.num_ranks)),
    )


def _experts(requested: str, model: AbstractModel, device: jax.Device) -> ExpertsChoice | None:
    weights = [parameter.value for parameter in model.parameters if len(parameter.dense.shape) == 3]
    return choose_experts_backend(requested, device, weights) if weights else None


def temporary_bytes_of(program: jax.stages.Compiled) -> int:
    """Returns what a program takes on each device beside its arguments.

    What it returns in place of a donated argument is none of it.
    """
    sizes: Any = program.memory_analysis()
    kept = max(0, sizes.output_size_in_bytes - sizes.alias_size_in_bytes)
    return int(sizes.temp_size_in_bytes) + int(kept)


def num_pages_for(
    config: EngineConfig,
    settings: Settings,
    *,
    num_devices: int,  # of this process
    memory_bytes: int | None,  # of each device; None: unknown, as of a CPU
    model_bytes: int,  # on each device
    temporary_bytes: int,  # of the largest program, on each device
) -> int:
    """Returns how many KV pages each rank gets; ConfigError, with the numbers, if a request
    won't fit.

    A CPU gets 2 GiB, the devices of a process together; a device that knows its memory gets what
    weights and programs leave of it.
    """
    limits = settings.limits
    needed = limits.pages_per_sequence
    if config.num_pages != "auto":
        num_pages = config.num_pages
    else:
        if config.kv_cache_memory_bytes != "auto":
            available = config.kv_cache_memory_bytes
        elif memory_bytes is not None:
            usable = int(memory_bytes * config.gpu_memory_utilization)
            available = usable - model_bytes - temporary_bytes
        else:
            available = _CPU_KV_BYTES // num_devices
        # More than every slot at full length can never be used.
        num_pages = min(available // settings.page_bytes, needed * limits.num_slots)
    if num_pages < needed:
        raise ConfigError(
            f"{num_pages} KV pages of {settings.page_bytes / 2**20:.2f} MiB fit; one request of "
            f"max_model_len {limits.max_model_len} needs {needed}: lower max_model_len to "
            f"{max(num_pages, 0) * limits.page_size} or raise kv_cache_memory_bytes"
        )
    return num_pages


def _chosen(value: int | str, default: int) -> int:
    return default if isinstance(value, str) else value


def _has_bfloat16_instructions() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def device_line(device: jax.Device) -> str:
    """Returns a device in words, for logs."""
    kind = device.device_kind
    return kind if kind == device.platform else f"{device.platform} ({kind})"


def eos_tokens_of(hf_config: dict[str, Any], generation_config: dict[str, Any]) -> tuple[int, ...]:
    """Returns the tokens that end an answer, by either file."""
    tokens: set[int] = set()
    for source in (hf_config, generation_config):
        value = source.get("eos_token_id")
        tokens.update([value] if isinstance(value, int) else value or [])
    if len(tokens) > MAX_EOS_TOKENS:
        raise WeightError(f"eos_token_id has {len(tokens)} entries; the limit is {MAX_EOS_TOKENS}")
    return tuple(sorted(tokens))
