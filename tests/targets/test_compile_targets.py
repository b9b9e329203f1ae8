"""The step program compiled for one TPU or one H100 that is not here; `scripts/test` installs what
that takes. Every kind of device and more models are in `test_mesh_steps`, eight at a time."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxserve.engine.step import DeviceState
from scripts.compile_targets import MODELS, Case, compile_case, inspect, use_compilers

pytestmark = pytest.mark.slow

BOUNDS = tomllib.loads((Path(__file__).parent / "bounds.toml").read_text())

# Widths and vocabulary decide what a compiler meets: two layers show it, in less time. A TPU's
# takes half a minute for each, so no TPU gets both buckets; the script does all.
CASES = [
    (Case(target=target, model=model, num_layers=num_layers), bucket)
    for target, model, num_layers, buckets in (
        ("v5e", "llama-3.1-8b", 2, ("mixed",)),
        ("v6e", "llama-3.1-8b", 2, ("decode",)),
        ("h100", "llama-3.1-8b", 2, ("decode", "mixed")),
        ("h100", "gemma-3-27b", 6, ("mixed",)),
        ("a100", "llama-3.1-8b", 1, ("mixed",)),
        ("v5e", "smollm2-135m", None, ("decode",)),
        ("h100", "smollm2-135m", None, ("mixed",)),
    )
    for bucket in buckets
]


@pytest.mark.parametrize(
    ("case", "bucket"), CASES, ids=[f"{case.target}-{case.model}-{name}" for case, name in CASES]
)
def test_the_step_compiles_in_place_and_within_its_bound(case, bucket):
    use_compilers()
    program = compile_case(case, bucket)
    assert program.faults == ()
    bound = BOUNDS[case.target][case.model][bucket]
    assert program.temp_bytes <= bound["temp_mib"] * 2**20
    assert program.num_state_copies == 0
    # One kernel a layer for one-token steps on a TPU (two on a GPU: parts of contexts are merged),
    # and more for prefills: none is lost, none is run twice.
    layers = case.num_layers or MODELS[case.model]["num_hidden_layers"]
    assert program.num_kernels == bound["layer_kernels"] * layers


def test_what_must_not_be_in_a_step_is_found():
    array = jax.ShapeDtypeStruct((8,), jnp.float32)
    state = DeviceState(cache=((array,),), page_table=array, last_token=array, sampling=())

    def step(state):
        jax.debug.callback(print, state.last_token[0])
        return state.page_table + 1

    compiled = jax.jit(step).lower(state).compile()
    program = inspect(compiled, state, (8, 8), 0.0, is_alone=True)
    assert program.faults == ("it has a call to the host", "0 of 96 state bytes are in place")


def test_an_exchange_is_a_fault_of_a_program_for_one_device():
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("tensor",))
    array = jax.ShapeDtypeStruct((8,), jnp.float32)
    state = DeviceState(cache=(), page_table=array, last_token=array, sampling=())
    split = jax.sharding.PartitionSpec("tensor")
    total = jax.shard_map(
        lambda x: jax.lax.psum(x, "tensor"), mesh=mesh, in_specs=split, out_specs=split
    )
    compiled = jax.jit(total).lower(array).compile()
    alone, many = (
        inspect(compiled, state, (8, 8), 0.0, is_alone=is_alone).faults
        for is_alone in (True, False)
    )
    assert set(alone) - set(many) == {"one device has all-reduce"}


def test_the_compilers_are_silent_where_they_are_not_used():
    code = "import jax; assert jax.devices()[0].platform == 'cpu'"
    path = os.pathsep.join([str(Path(sys.prefix) / "compilers"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
