"""8-bit KV caches: their scales, and the engine on them."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.batch import Batch, ScaledCache
from jaxserve.engine.kv_scales import kv_scales_for, measured_peaks
from jaxserve.errors import WeightError
from jaxserve.mesh import mesh_of_one
from jaxserve.models.checkpoint import open_checkpoint
from jaxserve.models.loading import abstract_model, load_params
from jaxserve.ops.attention import attend
from tests.checkpoints import folder_tensors, write_json, write_llama_folder, write_shards
from tests.dense_llama import DenseLlama
from tests.kernels.ragged_batches import dense_attention

FLOAT32, INT8, FLOAT8 = (jnp.dtype(name) for name in ("float32", "int8", "float8_e4m3fn"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Large enough logits that an error of attention shows in them.
    return write_llama_folder(tmp_path_factory.mktemp("llama"), seed=2, scale=1.0)


def add_scales(source, target, names, scheme=None, size=1, value=None):
    """Writes a copy of the folder with a scale of (layer + 1) / 448 under each name."""
    target.mkdir()
    tensors = folder_tensors(source)
    for layer in range(2):
        for name in names:
            number = (layer + 1) / 448 if value is None else value
            full = np.full((size,), number, np.float32)
            tensors[f"model.layers.{layer}.self_attn.{name}"] = full
    for file in source.iterdir():
        if "safetensors" not in file.name:
            (target / file.name).write_bytes(file.read_bytes())
    write_shards(target, tensors, 1)
    if scheme is not None:
        with open_checkpoint(source) as checkpoint:
            config = dict(checkpoint.config)
        config["quantization_config"] = {"quant_method": "fp8", "kv_cache_scheme": scheme}
        write_json(target / "config.json", config)
    return target


def scales_of(folder, dtype):
    with open_checkpoint(folder) as checkpoint:
        model = abstract_model(
            checkpoint.config, mesh_of_one(), dtype=FLOAT32, activation_dtype=FLOAT32
        )
        params = load_params(model, checkpoint, lambda done, total: None)
        return kv_scales_for(model, params, checkpoint, dtype), measured_peaks(model, params)


def test_only_8_bit_caches_have_scales_and_float8_takes_1(folder):
    assert scales_of(folder, FLOAT32)[0] is None
    np.testing.assert_array_equal(scales_of(folder, FLOAT8)[0], np.ones((2, 2, 2, 16)))


def test_int8_measures_a_scale_for_each_channel(folder):
    scales, peaks = scales_of(folder, INT8)
    largest = np.maximum(peaks, np.median(peaks, axis=(2, 3), keepdims=True))
    np.testing.assert_allclose(scales, largest * 2.5 / 127, rtol=1e-6)
    # The values of layer 0 are a product of normalised embeddings: they can be had in numpy.
    tensors = folder_tensors(folder)
    tokens = np.random.default_rng(0).integers(320, size=256)
    x = tensors["model.embed_tokens.weight"][tokens]
    x = x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5)
    x = x * tensors["model.layers.0.input_layernorm.weight"]
    v = x @ tensors["model.layers.0.self_attn.v_proj.weight"].T
    np.testing.assert_allclose(peaks[0, 1].ravel(), np.abs(v).max(0), rtol=1e-4)


@pytest.mark.parametrize(
    "names",
    [
        ("k_scale", "v_scale"),
        ("k_proj.k_scale", "v_proj.v_scale"),
        ("k_proj.output_scale", "v_proj.output_scale"),
    ],
)
def test_the_checkpoints_scales_are_taken(folder, tmp_path, names):
    scaled = add_scales(folder, tmp_path / "scaled", names)
    expected = np.broadcast_to(np.array([1, 2], np.float32)[:, None, None, None], (2, 2, 2, 16))
    np.testing.assert_allclose(scales_of(scaled, FLOAT8)[0], expected / 448, rtol=1e-6)
    np.testing.assert_allclose(scales_of(scaled, INT8)[0], expected / 127, rtol=1e-6)


def test_scales_meant_for_integers_are_told_apart(folder, tmp_path):
    scheme = {"num_bits": 8, "type": "int"}
    scaled = add_scales(folder, tmp_path / "scaled", ("k_scale", "v_scale"), scheme)
    scales = scales_of(scaled, INT8)[0]
    np.testing.assert_allclose(scales[:, 0, 0, 0], np.array([1, 2]) / 448, rtol=1e-6)


def test_channels_of_very_different_size_survive_int8():
    """One scale for a layer would round the small channels of the keys to nothing."""
    random = np.random.default_rng(0)
    size = np.where(np.arange(16) == 3, 300.0, 1.0)
    q, k, v = (random.standard_normal((24, 2, 16), np.float32) for _ in range(3))
    k = (k * size).astype(np.float32)
    q[:, :, 3] /= 300
    expected = dense_attention(q, k, v, scale=0.25)
    batch = Batch(
        tokens=jnp.zeros(24, jnp.int32),
        positions=jnp.arange(24, dtype=jnp.int32),
        kv_lens=jnp.array([24], jnp.int32),
        page_table=jnp.array([[1, 0]], jnp.int32),
        cu_q_lens=jnp.array([0, 24], jnp.int32),
        counts=jnp.array([0, 1], jnp.int32),
        attention="reference",
        experts="reference",
    )
    pages = (jnp.zeros((2, 16, 32), jnp.int8),) * 2

    def error(k_scale):
        v_scale = np.full((2, 16), np.abs(v).max() / 127, np.float32)
        cache = ScaledCache(pages=pages, k_scale=jnp.asarray(k_scale), v_scale=jnp.asarray(v_scale))
        out, cache = attend(*map(jnp.asarray, (q, k, v)), cache, batch, scale=0.25)
        assert cache.pages[0].dtype == jnp.int8
        return np.abs(out - expected).max()

    by_channel = np.abs(k).max(0) / 127
    assert error(by_channel.astype(np.float32)) < 0.03
    assert error(np.full((2, 16), by_channel.max(), np.float32)) > 0.1


def test_scales_of_single_heads_are_refused(folder, tmp_path):
    scaled = add_scales(folder, tmp_path / "scaled", ("k_scale", "v_scale"), size=2)
    with pytest.raises(WeightError, match="k_scale has 2 numbers; a layer has one scale"):
        scales_of(scaled, FLOAT8)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_scales_that_are_no_scales_are_refused(folder, tmp_path, value):
    scaled = add_scales(folder, tmp_path / "scaled", ("k_scale", "v_scale"), value=value)
    with pytest.raises(WeightError, match="k_scale is .*; a scale is positive"):
        scales_of(scaled, FLOAT8)


def test_a_scheme_of_other_numbers_is_refused(folder, tmp_path):
    for scheme in ({"num_bits": 4, "type": "int"}, {"num_bits": 8, "type": "nf"}):
        target = tmp_path / scheme["type"]
        scaled = add_scales(folder, target, ("k_scale", "v_scale"), scheme)
        with pytest.raises(WeightError, match="kv_cache_scheme = .* is not supported; supported"):
            scales_of(scaled, FLOAT8)


def test_scales_of_some_layers_only_are_refused(folder, tmp_path):
    scaled = add_scales(folder, tmp_path / "scaled", ("k_scale",))
    with pytest.raises(WeightError, match="lacks model.layers.0.self_attn.v_scale"):
        scales_of(scaled, FLOAT8)


@pytest.mark.parametrize(
    ("kv_cache_dtype", "least", "most"),
    [
        ("fp8", 0.01, 0.3),
        pytest.param("fp8_e5m2", 0.01, 0.6, marks=pytest.mark.slow),
        ("int8", 1e-3, 0.1),
    ],
)
def test_the_engines_logprobs_are_as_good_as_its_cache(
    folder, tmp_path, kv_cache_dtype, least, most
):
    """Prompts long enough for chunks, so that later ones read what earlier ones stored."""
    prompt = np.random.default_rng(5).integers(3, 300, 150).tolist()
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, prompt_logprobs=0)
    options = {"max_num_seqs": 2, "max_num_batched_tokens": 64, "block_size": 4, "dtype": "float32"}
    options |= {"compile_cache_dir": str(tmp_path), "kv_cache_dtype": kv_cache_dtype}
    with LLM(str(folder), **options) as llm:
        output = llm.generate([prompt], params, use_tqdm=False)[0]
        assert llm._client.stats().num_compiles_since_ready == 0
    actual = [
        entry[token].logprob
        for token, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
    ]
    logits = DenseLlama(folder).logits(prompt)[:-1]
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = logprobs[np.arange(len(prompt) - 1), prompt[1:]]
    error = np.abs(np.array(actual) - expected).max()
    assert least <= error <= most
