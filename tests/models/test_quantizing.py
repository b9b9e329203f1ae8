"""Weights quantised at load: which, to what, how large, and how good the model is after it."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxserve.errors import WeightError
from jaxserve.mesh import AXES, mesh_of_one
from jaxserve.models.checkpoint import open_checkpoint
from jaxserve.models.checkpoint.contract import ZERO_STEPS
from jaxserve.models.loading import abstract_model, dummy_params, load_params
from jaxserve.models.quantizing import ProductsChoice, products_choice
from jaxserve.ops.quantization import Fused, Kernel, QuantizedWeight, dequantize, zero_steps
from tests.checkpoints import folder_tensors, write_llama_folder
from tests.dense_llama import DenseLlama
from tests.models.forward import FLOAT32, logits_of
from tests.quantized_checkpoints import write_quantized

TOKENS = np.random.default_rng(0).integers(3, 300, 40).tolist()
HIDDEN, FFW, HEADS, KV, VOCAB, LAYERS = 64, 128, 64, 32, 320, 2
PADDED_VOCAB = 384
# Of one layer, as [out, in].
MATRICES = (
    [(HEADS, HIDDEN), (KV, HIDDEN), (KV, HIDDEN), (HIDDEN, HEADS)]
    + [(FFW, HIDDEN), (FFW, HIDDEN), (HIDDEN, FFW)]
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_llama_folder(tmp_path_factory.mktemp("llama"), seed=3, tied=False)


def loaded(folder, quantization, mesh=None, dtype=FLOAT32):
    with open_checkpoint(folder) as checkpoint:
        model = abstract_model(
            checkpoint.config,
            mesh or mesh_of_one(),
            dtype=dtype,
            activation_dtype=FLOAT32,
            quantization=quantization,
        )
        return model, load_params(model, checkpoint, lambda done, total: None)


def values_of(model, params):
    """Returns the parameters by name, quantised ones as such."""
    leaves = iter(params)
    return {
        parameter.name: jax.tree.map(lambda _: next(leaves), parameter.value)
        for parameter in model.parameters
    }


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_layers_matrices_are_quantised_and_nothing_else(folder, quantization):
    model, params = loaded(folder, quantization)
    original = folder_tensors(folder)
    assert set(model.names) == set(original)
    bound = {"int8": 0.01, "int4": 0.15, "fp8": 0.05}[quantization]
    for name, value in values_of(model, params).items():
        if "proj" in name:
            assert isinstance(value, QuantizedWeight)
            dense = np.asarray(dequantize(value))
            error = np.linalg.norm(dense - original[name]) / np.linalg.norm(original[name])
            assert 1e-4 < error < bound, name
        else:
            rows = len(original[name])  # what follows them pads the vocabulary
            np.testing.assert_array_equal(value[:rows], original[name])
            assert not np.asarray(value[rows:]).any()


def grouped(groups, form):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return QuantizedWeight(
        data=jax.ShapeDtypeStruct((4096, 4096), jnp.int4, sharding=sharding),
        scale=jax.ShapeDtypeStruct((groups, 4096), jnp.float32, sharding=sharding),
        dtype="bfloat16",
        form=form,
    )


def test_products_that_have_no_kernel_are_counted_and_say_why():
    tpu = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
    by_kernel = grouped(128, Kernel(backend="tpu", max_rows=None, otherwise=Fused()))
    whole, wide = grouped(1, Fused()), grouped(16, Fused())
    assert products_choice([whole], tpu) is None
    chosen = ProductsChoice(backend="tpu", warning=None)
    assert products_choice([whole, by_kernel], tpu) == chosen
    mixed = products_choice([whole, by_kernel, wide], tpu)
    assert mixed.backend == "tpu and reference"
    assert mixed.warning.startswith("1 of 2 matrices")
    assert "groups of 256 columns" in mixed.warning
    cpu = SimpleNamespace(platform="cpu", device_kind="cpu")
    assert products_choice([wide], cpu) == ProductsChoice(backend="reference", warning=None)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("quantization", ["auto", "int8", "int4", "fp8"])
def test_memory_is_as_predicted(folder, quantization, dtype):
    dtype = jnp.dtype(dtype)
    model, params = loaded(folder, quantization, dtype=dtype)
    matrices = sum(out * in_ for out, in_ in MATRICES) * LAYERS
    rows = sum(out for out, _ in MATRICES) * LAYERS
    norms = (2 * LAYERS + 1) * HIDDEN
    others = 2 * PADDED_VOCAB * HIDDEN + norms
    narrow = sum(out * in_ for out, in_ in MATRICES if out != KV) * LAYERS  # k and v have int8
    groups, narrow_rows = narrow // 32, 2 * KV * LAYERS
    bytes_of_matrices = {
        "auto": matrices * dtype.itemsize,
        "int8": matrices + 4 * rows,
        "fp8": matrices + 4 * rows,
        "int4": narrow // 2 + (4 + 1) * groups + (matrices - narrow) + 4 * narrow_rows,
    }[quantization]
    assert model.device_bytes == others * dtype.itemsize + bytes_of_matrices
    assert model.num_params == matrices + 2 * VOCAB * HIDDEN + norms
    # A program's arguments take what was predicted: two int4 in a byte.
    program = jax.jit(lambda params: jnp.int32(0), keep_unused=True).lower(params).compile()
    assert program.memory_analysis().argument_size_in_bytes == model.device_bytes


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_dummy_weights_have_the_same_arrays(folder, quantization):
    model, params = loaded(folder, quantization)
    dummies = dummy_params(model, 0)
    assert [(array.shape, array.dtype) for array in dummies] == [
        (array.shape, array.dtype) for array in params
    ]
    for name, value in values_of(model, dummies).items():
        if "proj" in name:
            assert 0.015 < np.asarray(dequantize(value)).std() < 0.025


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_logits_are_those_of_the_dequantised_weights(folder, tmp_path, quantization):
    values = values_of(*loaded(folder, quantization))
    floats = iter(
        np.asarray(dequantize(values[name])) for name in folder_tensors(folder) if "proj" in name
    )
    twin = write_quantized(folder, tmp_path / "q", {}, lambda weight, random: ({}, next(floats)))
    actual = logits_of(folder, TOKENS, chunks=(9, 1, 30), quantization=quantization)
    expected = DenseLlama(twin).logits(TOKENS)
    assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_a_mesh_divides_data_and_scales_alike(folder, quantization):
    model, params = loaded(folder, quantization)
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 1, 2, 1), AXES)
    divided_model, divided = loaded(folder, quantization, mesh)
    whole_values, values = values_of(model, params), values_of(divided_model, divided)
    for name, part in values.items():
        for ours, theirs in zip(*map(jax.tree.leaves, (part, whole_values[name])), strict=True):
            rows = min(len(ours), len(theirs))  # the vocabulary is padded for each mesh
            ours, theirs = (np.asarray(leaf)[:rows].astype(np.float32) for leaf in (ours, theirs))
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    up = values["model.layers.0.mlp.up_proj.weight"]  # [ffw, hidden]: rows are divided
    assert up.data.addressable_shards[0].data.shape == (FFW // 2, HIDDEN)
    num_groups = 2 if quantization == "int4" else 1
    assert up.scale.addressable_shards[0].data.shape == (num_groups, FFW // 2)
    down = values["model.layers.0.mlp.down_proj.weight"]  # [hidden, ffw]: columns are, and groups
    assert down.data.addressable_shards[0].data.shape == (HIDDEN, FFW // 2)
    assert down.scale.addressable_shards[0].data.shape == (num_groups, HIDDEN)


def test_int4_leaves_8_bit_to_what_makes_keys_and_values(folder):
    for name, value in values_of(*loaded(folder, "int4")).items():
        if "proj" in name:
            is_narrow = not name.endswith(("k_proj.weight", "v_proj.weight"))
            assert value.data.dtype == (jnp.int4 if is_narrow else jnp.int8)
            assert value.num_groups == (value.data.shape[1] // 32 if is_narrow else 1)


def test_groups_are_as_small_as_the_mesh_asks_for(tmp_path):
    folder = write_llama_folder(tmp_path, seed=3, ffn=96)
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 1, 2, 1), AXES)
    values = values_of(*loaded(folder, "int4", mesh))
    down = values["model.layers.0.mlp.down_proj.weight"]  # 48 columns on each: groups of 16
    assert down.scale.shape == (6, HIDDEN)
    assert down.scale.addressable_shards[0].data.shape == (3, HIDDEN)


def test_zeros_of_stored_matrices_count_what_products_take_them_for():
    assert {name: zero_steps(name) for name in ZERO_STEPS} == ZERO_STEPS


def test_int4_refuses_widths_that_its_groups_do_not_divide(tmp_path):
    folder = write_llama_folder(tmp_path, hidden=80, heads=4, head_dim=20)
    with pytest.raises(WeightError, match=r"int4 needs widths that 32 divides; .* \(128, 80\)"):
        loaded(folder, "int4")
