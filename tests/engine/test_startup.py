"""How an engine's pages are counted, and what it says of what it runs on."""

import dataclasses
import types

import jax
import jax.numpy as jnp

from jaxserve.config import EngineConfig
from jaxserve.engine import startup
from jaxserve.engine.abstract import AbstractEngine, abstract_engine
from jaxserve.models.quantizing import num_bytes
from scripts.model_shapes import MODELS
from tests.fakes import EchoEngine

MIB = 2**20
CONFIG = EngineConfig(
    model="small", max_model_len=1024, dtype="bfloat16", gpu_memory_utilization=1.0
)


def engine_of(model):
    return abstract_engine(CONFIG, MODELS[model] | {"num_hidden_layers": 1})


def test_what_a_program_writes_in_place_takes_no_memory_from_the_pages(monkeypatch):
    engine = engine_of("smollm2-135m")
    state, kept = (jax.ShapeDtypeStruct((size * MIB,), jnp.uint8) for size in (16, 4))
    step = jax.jit(lambda state, kept: (state + 1, kept + 1), donate_argnums=0)
    weights = sum(num_bytes(shape) for shape in engine.model.shapes)
    page_bytes = engine.settings.page_bytes
    limit = weights + engine.slot_bytes + 16 * MIB + page_bytes // 2  # half: pointers
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": limit})
    monkeypatch.setattr(startup, "local_device", lambda mesh: device)
    monkeypatch.setattr(AbstractEngine, "lower", lambda self, *sizes: step.lower(state, kept))
    # 12 of the 16 MiB: what is not donated is returned beside it.
    assert startup._num_pages(CONFIG, engine) == 12 * MIB // page_bytes


def test_the_ready_line_says_what_attention_and_experts_run_on():
    info = dataclasses.replace(EchoEngine(lambda updates: None).info, attention="tpu", mesh="1x2x2")
    assert "attention tpu, mesh 1x2x2, " in startup._ready_line(info)
    info = dataclasses.replace(info, experts="reference")
    assert "attention tpu, experts reference, mesh 1x2x2, " in startup._ready_line(info)


def test_an_engine_knows_what_its_experts_run_on():
    experts, dense = engine_of("qwen3-30b-a3b"), engine_of("smollm2-135m")
    assert experts.settings.experts.backend == experts.spec.experts == "reference"
    assert dense.settings.experts is None
    assert experts.settings.warnings == dense.settings.warnings == []
