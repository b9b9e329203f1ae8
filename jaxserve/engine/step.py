"""The one program a step runs: admit, forward, choose tokens, remember. Jitted once, here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxserve.batch import Batch, Cache, LayerState, Model, ScaledCache
from jaxserve.engine.packing import Limits, blob_layout, extras_layout
from jaxserve.engine.request import (
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_EOS_TOKENS,
    MAX_LOGIT_BIAS,
    MAX_STOP_TOKENS,
)
from jaxserve.models.loading import AbstractModel
from jaxserve.ops.parallel import gather_along
from jaxserve.ops.sampling import sample
from jaxserve.ops.sampling_state import (
    SamplingRows,
    SamplingState,
    WideParams,
    admit_narrow,
    admit_wide,
    init_sampling_state,
    load_history,
    record_tokens,
    set_grammar,
)
from pallas_kernels import grouped_matmul, ragged_paged_attention
from pallas_kernels.ragged_paged_attention import KVLayout

Parts: TypeAlias = dict[str, jax.Array]


# The step runs on every device of the mesh, on its own part of each array. Parts lie one behind
# the other along the first axis: each rank's, the same on all devices that share the rank, or each
# device's own (`per_device`). What is whole is the same everywhere.
WHOLE = PartitionSpec()
RANK = PartitionSpec("data")


def per_device(mesh: Mesh) -> PartitionSpec:
    """Returns how an array is split of which each device has a part of its own."""
    return PartitionSpec(mesh.axis_names)


@flax.struct.dataclass
class DeviceState:
    """What stays on the device between steps. Donated to each step, which returns it anew.

    Shapes are those of one device's part.
    """

    cache: Cache
    page_table: jax.Array  # [slots, pages_per_sequence] i32
    last_token: jax.Array  # [slots] i32, chosen last
    sampling: SamplingState


@dataclass(frozen=True, kw_only=True)
class StepSpec:
    """What shapes the program besides its bucket; hashable, closed over by the jitted function."""

    mesh: Mesh
    limits: Limits
    max_logprobs: int
    attention: ragged_paged_attention.Backend
    experts: grouped_matmul.Backend
    is_gathered: bool = False  # every device gets all ranks' output, as one process reads it


def state_specs(mesh: Mesh) -> DeviceState:
    """Returns how the state is split, a DeviceState of PartitionSpecs for (parts of) its arrays."""
    sampling: dict[str, Any] = dict.fromkeys(SamplingState.__dataclass_fields__, RANK)
    own = per_device(mesh)
    sampling |= {"output_counts": own, "in_prompt": own}
    specs: dict[str, Any] = {
        "cache": own,
        "page_table": RANK,
        "last_token": RANK,
        "sampling": SamplingState(**sampling),
    }
    return DeviceState(**specs)


def init_state(
    limits: Limits, layout: KVLayout, num_layers: int, num_pages: int, vocab_part: int
) -> DeviceState:
    """Returns a device's part of an idle engine: empty slots, zeroed pages, scales of 1."""
    return DeviceState(
        cache=tuple(_init_cache(layout, num_pages) for _ in range(num_layers)),
        page_table=jnp.zeros((limits.num_slots, limits.pages_per_sequence), jnp.int32),
        last_token=jnp.zeros((limits.num_slots,), jnp.int32),
        sampling=init_sampling_state(
            limits.num_slots,
            limits.vocab_size,
            vocab_part=vocab_part,
            max_bias=MAX_LOGIT_BIAS,
            max_bad_words=MAX_BAD_WORDS,
            max_bad_word_tokens=MAX_BAD_WORD_TOKENS,
            max_stop_tokens=MAX_STOP_TOKENS + MAX_EOS_TOKENS,
        ),
    )


def _init_cache(layout: KVLayout, num_pages: int) -> LayerState:
    pages = tuple(jnp.zeros(leaf.shape, leaf.dtype) for leaf in layout.shapes(num_pages))
    if layout.dtype.itemsize > 1:
        return pages
    ones = jnp.ones((layout.kv_heads, layout.head_dim), jnp.float32)
    return ScaledCache(pages=pages, k_scale=ones, v_scale=ones)


def make_step(spec: StepSpec, model: AbstractModel, bucket: tuple[int, int]) -> jax.stages.Wrapped:
    """Returns the jitted step of one bucket; see `step` for its arguments, each a rank's part."""

    def bound(
        params: tuple[jax.Array, ...],
        state: DeviceState,
        blob: jax.Array,
        extras: jax.Array,
        grammar: jax.Array,
    ) -> tuple[DeviceState, jax.Array]:
        module = nnx.merge(model.graph, jax.tree.unflatten(model.tree, params))
        state, report = step(module, state, blob[0], extras[0], grammar, spec=spec, bucket=bucket)
        if spec.is_gathered:
            report = gather_along(report, "rank").reshape(-1, report.shape[1])
        return state, report

    param_specs = tuple(shape.sharding.spec for shape in model.shapes)
    on_mesh = jax.shard_map(
        bound,
        mesh=spec.mesh,
        in_specs=(param_specs, state_specs(spec.mesh), RANK, RANK, RANK),
        out_specs=(state_specs(spec.mesh), WHOLE if spec.is_gathered else RANK),
        check_vma=False,  # what is gathered is the same on all devices, which it cannot know
    )
    return jax.jit(on_mesh, donate_argnums=1)


def step(
    model: Model,
    state: DeviceState,
    blob: jax.Array,  # [blob_layout.size] i32
    extras: jax.Array,  # [extras_layout.size] i32, read where the blob says so
    grammar: jax.Array,  # [rows, ceil(vocab / 32)] u32, allowed next, read where the blob says so
    *,
    spec: StepSpec,
    bucket: tuple[int, int],  # tokens, rows
) -> tuple[DeviceState, jax.Array]:  # [rows, 3 + 2 * max_logprobs] i32, see `ops.sampling.sample`
    """Computes one step. Returns the new state, and for each row of logits its token and logprobs.

    The order matters: admissions first, because their rows are computed in the same step.
    """
    parts = blob_layout(spec.limits, *bucket).split(blob)
    state = _admit(state, parts, extras, spec.limits)
    with jax.named_scope("forward"):
        batch = _batch(state, parts, spec)
        hidden, cache = model(batch, state.cache)
    rows = SamplingRows(
        slots=parts["row_slots"],
        positions=batch.positions[parts["row_tokens"]] + 1,
        targets=parts["row_targets"],
    )
    logits = model.logits(hidden[parts["row_tokens"]])
    with jax.named_scope("sampling"):
        # A loop of one or no turn writes the masks in place; a cond would copy them.
        sampling = lax.fori_loop(
            0,
            parts["has_grammar"][0],
            lambda _, sampling: set_grammar(sampling, rows.slots, grammar),
            state.sampling,
        )
        tokens, report = sample(logits, sampling, rows, max_logprobs=spec.max_logprobs)
        choosing = jnp.where(rows.targets < 0, rows.slots, spec.limits.num_slots)
        state = dataclasses.replace(
            state,
            cache=cache,
            last_token=state.last_token.at[choosing].set(tokens, mode="drop"),
            sampling=record_tokens(sampling, rows, tokens),
        )
    return state, report


def _admit(state: DeviceState, parts: Parts, extras: jax.Array, limits: Limits) -> DeviceState:
    """Writes new sequences' parameters to their slots, and granted pages to the page table."""
    slots = parts["admitted_slots"]
    floats = lax.bitcast_convert_type(parts["admitted_floats"], jnp.float32)
    sampling = admit_narrow(state.sampling, slots, floats, parts["admitted_ints"])
    sampling = lax.fori_loop(
        0,
        parts["has_extras"][0],
        lambda _, sampling: _admit_extras(sampling, extras_layout(limits).split(extras)),
        sampling,
    )
    table = state.page_table.reshape(-1)
    table = table.at[parts["grant_places"]].set(parts["grant_pages"], mode="drop")
    return dataclasses.replace(
        state, sampling=sampling, page_table=table.reshape(state.page_table.shape)
    )


def _admit_extras(sampling: SamplingState, parts: Parts) -> SamplingState:
    wide = WideParams(
        bias_tokens=parts["bias_tokens"],
        bias_values=lax.bitcast_convert_type(parts["bias_values"], jnp.float32),
        allowed=lax.bitcast_convert_type(parts["allowed"], jnp.uint32),
        bad_words=parts["bad_words"],
        recent=parts["recent"],
        stop_tokens=parts["stop_tokens"],
    )
    sampling = admit_wide(sampling, parts["wide_slots"], wide)
    is_output = parts["history_is_output"] != 0
    return load_history(sampling, parts["history_slots"], parts["history_tokens"], is_output)


def _batch(state: DeviceState, parts: Parts, spec: StepSpec) -> Batch:
    """Returns the model's input: a decoding sequence's token comes from its slot."""
    tokens, cu_q_lens, kv_lens = parts["tokens"], parts["cu_q_lens"], parts["kv_lens"]
    slots = jnp.minimum(parts["sequence_slots"], spec.limits.num_slots - 1)
    num_rows = kv_lens.shape[0]
    # One-token sequences come first, so that sequence i's token is token i.
    newest = jnp.where(parts["takes_device_token"] != 0, state.last_token[slots], tokens[:num_rows])
    index = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    sequence = (index[:, None] >= cu_q_lens[None, 1:]).sum(1, dtype=jnp.int32)
    sequence = jnp.minimum(sequence, num_rows - 1)
    position = kv_lens[sequence] - cu_q_lens[sequence + 1] + index
    is_real = index < cu_q_lens[-1]
    return Batch(
        tokens=lax.dynamic_update_slice(tokens, newest, (0,)),
        positions=jnp.where(is_real, position, 0),
        kv_lens=kv_lens,
        page_table=state.page_table[slots],
        cu_q_lens=cu_q_lens,
        counts=parts["counts"],
        attention=spec.attention,
        experts=spec.experts,
    )
