"""Which attention kernel a device gets, and what is said where it cannot serve."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from jaxserve.errors import ConfigError
from jaxserve.ops.attention import LayerShape, choose_backend
from pallas_kernels.targets import TPU

CPU = SimpleNamespace(platform="cpu", device_kind="cpu")
TPU_DEVICE = SimpleNamespace(platform="tpu", device_kind=TPU.device_kinds[0])
H100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", compute_capability="9.0")
T4 = SimpleNamespace(platform="gpu", device_kind="Tesla T4", compute_capability="7.5")
L4 = SimpleNamespace(platform="gpu", device_kind="NVIDIA L4", compute_capability="8.9")
A100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0")


def shape(**changes):
    """Returns a layer of Llama-3.1-8B's, in a small step."""
    values = {
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "page_size": 64,
        "kv_dtype": jnp.dtype(jnp.bfloat16),
        "tokens": 256,
        "sequences": 64,
        "pages_per_sequence": 128,
    }
    return LayerShape(**values | changes)


@pytest.mark.parametrize(
    ("device", "backend"),
    [(CPU, "reference"), (TPU_DEVICE, "tpu"), (H100, "gpu"), (A100, "triton")],
)
def test_a_device_gets_the_kernel_made_for_it(device, backend):
    choice = choose_backend("auto", device, shape())
    assert (choice.backend, choice.warning) == (backend, None)


def test_a_device_without_a_kernel_gets_the_reference_and_says_why():
    choice = choose_backend("auto", T4, shape())
    assert choice.backend == "reference"
    assert choice.warning is not None
    assert "slower reference" in choice.warning and "7.5" in choice.warning


def test_a_shape_that_one_kernel_refuses_gets_the_other():
    choice = choose_backend("auto", H100, shape(head_dim=100))
    assert (choice.backend, choice.warning) == ("triton", None)


def test_a_shape_that_every_kernel_refuses_gets_the_reference_and_says_why():
    choice = choose_backend("auto", H100, shape(head_dim=512))
    assert choice.backend == "reference"
    assert choice.warning is not None
    assert choice.warning.count("512") == 2 and "triton: " in choice.warning


def test_a_type_of_pages_that_a_card_cannot_convert_is_refused():
    float8 = shape(kv_dtype=jnp.dtype(jnp.float8_e4m3fn))
    choice = choose_backend("auto", A100, float8)
    assert choice.backend == "reference"
    assert choice.warning is not None and "float8_e4m3fn" in choice.warning
    assert choose_backend("auto", L4, float8).backend == "triton"


def test_a_tpu_kind_that_nothing_is_known_of_is_named():
    device = SimpleNamespace(platform="tpu", device_kind="TPU v99")
    choice = choose_backend("auto", device, shape())
    assert choice.backend == "reference"
    assert choice.warning is not None and "TPU v99" in choice.warning


def test_what_is_asked_for_is_used_or_refused():
    assert choose_backend("reference", H100, shape()).warning is None
    with pytest.raises(ConfigError, match="'tpu'; a cpu has reference$"):
        choose_backend("tpu", CPU, shape())
    with pytest.raises(ConfigError, match="'gpu' cannot serve this model: .*8.0"):
        choose_backend("gpu", A100, shape())


def test_a_page_table_too_large_for_a_tpu_is_refused_by_number():
    choice = choose_backend("auto", TPU_DEVICE, shape(pages_per_sequence=2**20))
    assert choice.backend == "reference"
    assert choice.warning is not None and "SMEM" in choice.warning
