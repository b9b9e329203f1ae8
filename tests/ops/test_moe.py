"""Routing and mixing against numpy, token by token and expert by expert."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.ops.moe import (
    ExpertsChoice,
    Routing,
    choose_experts_backend,
    mix_experts,
    route,
    router_logits,
    sort_by_expert,
)
from jaxserve.ops.quantization import QuantizedWeight

TOKENS, HIDDEN, FFW, EXPERTS, TOP_K = 12, 64, 96, 8, 3


@pytest.fixture
def weights():
    random = np.random.default_rng(0)
    shapes = ((EXPERTS, FFW, HIDDEN), (EXPERTS, FFW, HIDDEN), (EXPERTS, HIDDEN, FFW))
    return [random.standard_normal(shape, np.float32) * shape[2] ** -0.5 for shape in shapes]


@pytest.fixture
def x():
    return np.random.default_rng(1).standard_normal((TOKENS, HIDDEN), np.float32)


def routing_of(x):
    router = np.random.default_rng(2).standard_normal((EXPERTS, HIDDEN), np.float32)
    return route(router_logits(x, jnp.asarray(router)), TOP_K, is_renormalized=True)


def mix(x, routing, weights, *, num_tokens=TOKENS, first_expert=0):
    run = jax.jit(mix_experts, static_argnames=("activation", "backend"))
    return np.asarray(
        run(
            jnp.asarray(x),
            routing,
            *map(jnp.asarray, weights),
            first_expert=jnp.int32(first_expert),
            num_tokens=jnp.int32(num_tokens),
            activation=jax.nn.silu,
            backend="reference",
        )
    )


def expected(x, routing, weights, experts=range(EXPERTS)):
    gate, up, down = (weight.astype(np.float64) for weight in weights)
    out = np.zeros(x.shape)
    for token, (chosen, factors) in enumerate(zip(*map(np.asarray, routing), strict=True)):
        for expert, factor in zip(chosen, factors, strict=True):
            if expert in experts:
                inner = gate[expert] @ x[token]
                inner = inner / (1 + np.exp(-inner)) * (up[expert] @ x[token])
                out[token] += factor * (down[expert] @ inner)
    return out


def test_tokens_are_mixed_as_they_are_routed(x, weights):
    routing = routing_of(x)
    np.testing.assert_allclose(
        mix(x, routing, weights), expected(x, routing, weights), rtol=1e-5, atol=1e-5
    )


def test_devices_with_some_of_the_experts_make_up_the_whole(x, weights):
    routing = routing_of(x)
    total = 0.0
    for first in range(0, EXPERTS, 2):
        part = mix(x, routing, [weight[first : first + 2] for weight in weights],
                   first_expert=first)  # fmt: skip
        experts = range(first, first + 2)
        np.testing.assert_allclose(
            part, expected(x, routing, weights, experts), rtol=1e-5, atol=1e-5
        )
        total += part
    np.testing.assert_allclose(total, mix(x, routing, weights), rtol=1e-5, atol=1e-5)


def test_a_token_comes_out_the_same_in_any_company(x, weights):
    routing = routing_of(x)
    alone = mix(x, routing, weights)
    random = np.random.default_rng(3)
    for token in range(TOKENS):
        others = random.standard_normal(x.shape, np.float32)
        place = int(random.integers(TOKENS))  # its row may change too
        others[place] = x[token]
        moved = routing_of(others)
        moved = Routing(*(new.at[place].set(old[token])
                          for new, old in zip(moved, routing, strict=True)))  # fmt: skip
        np.testing.assert_array_equal(mix(others, moved, weights)[place], alone[token])


def test_padding_is_routed_nowhere(x, weights):
    routing = routing_of(x)
    x[7:] = np.nan
    out = mix(x, routing, weights, num_tokens=7)
    np.testing.assert_array_equal(out[7:], 0)
    np.testing.assert_allclose(
        out[:7], expected(x[:7], Routing(*(part[:7] for part in routing)), weights),
        rtol=1e-5, atol=1e-5,
    )  # fmt: skip
    assert sort_by_expert(routing.experts, 0, EXPERTS, 7).sizes.sum() == 7 * TOP_K


def test_pairs_are_sorted_by_expert_and_found_again():
    experts = jnp.array([[2, 0], [1, 2], [0, 3]], jnp.int32)
    pairs = sort_by_expert(experts, 1, 2, 3)  # experts 1 and 2 are here
    assert pairs.sizes.tolist() == [1, 2]
    assert pairs.tokens[:3].tolist() == [1, 0, 1]
    assert pairs.places[jnp.array([1, 0, 1]), jnp.array([0, 0, 1])].tolist() == [0, 1, 2]
    assert sorted(pairs.places.reshape(-1).tolist()) == list(range(6))


def test_weights_are_probabilities_of_all_experts_or_of_the_tokens_own():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]]))
    routing = route(logits, 2, is_renormalized=False)
    assert routing.experts.tolist() == [[1, 3]]
    np.testing.assert_allclose(routing.weights, [[0.4, 0.3]], rtol=1e-5)
    own = route(logits, 2, is_renormalized=True).weights
    np.testing.assert_allclose(own, [[4 / 7, 3 / 7]], rtol=1e-5)
    np.testing.assert_allclose(own, jax.nn.softmax(logits[:, jnp.array([1, 3])]), rtol=1e-5)


def test_the_routers_logits_are_float32_whatever_flows(x):
    router = jnp.asarray(np.random.default_rng(2).standard_normal((EXPERTS, HIDDEN)), jnp.bfloat16)
    rounded = jnp.asarray(x, jnp.bfloat16)
    logits = router_logits(rounded, router)
    exact = np.asarray(rounded, np.float64) @ np.asarray(router, np.float64).T
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-5)


DENSE = jax.ShapeDtypeStruct((EXPERTS, FFW, HIDDEN), jnp.bfloat16)


def device_of(platform, kind):
    return SimpleNamespace(platform=platform, device_kind=kind)


TPU = device_of("tpu", "TPU v5 lite")


def quantized(dtype, *, groups=1, scales=FFW, **leaves):
    scale = jax.ShapeDtypeStruct((EXPERTS, groups, scales), jnp.float32)
    data = jax.ShapeDtypeStruct((EXPERTS, FFW, HIDDEN), jnp.dtype(dtype))
    return QuantizedWeight(data=data, scale=scale, **leaves)


@pytest.mark.parametrize("weight", [DENSE, quantized("int8"), quantized("float8_e4m3fn")])
def test_a_tpu_has_a_kernel_for_experts_unless_the_reference_is_asked_for(weight):
    chosen = ExpertsChoice(backend="tpu", warning=None)
    assert choose_experts_backend("auto", TPU, [weight]) == chosen
    for requested, device in (("reference", TPU), ("auto", device_of("cpu", "cpu"))):
        asked = ExpertsChoice(backend="reference", warning=None)
        assert choose_experts_backend(requested, device, [weight]) == asked


@pytest.mark.parametrize(
    ("device", "weight", "reason"),
    [
        (device_of("gpu", "NVIDIA H100"), DENSE, "there is none for a gpu"),
        (device_of("tpu", "TPU v99"), DENSE, "not TPU v99"),
        (TPU, quantized("int4"), "it takes no int4"),
        (TPU, quantized("int8", groups=2), "one scale a row, not 2 x 96 scales a matrix"),
        (TPU, quantized("float8_e4m3fn", scales=1), "one scale a row, not 1 x 1 scales a matrix"),
        (TPU, quantized("int8", zero=DENSE), "it takes no int8 with zeros or with columns in"),
        (TPU, quantized("int8", order=DENSE), "it takes no int8 with zeros or with columns in"),
    ],
)
def test_experts_without_a_kernel_say_why(device, weight, reason):
    choice = choose_experts_backend("auto", device, [DENSE, weight])
    assert choice.backend == "reference"
    assert choice.warning.startswith("experts run on the slower reference, not on a kernel: ")
    assert reason in choice.warning
