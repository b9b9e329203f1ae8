"""Already quantised checkpoints, in their true formats, against the floats they stand for."""

import numpy as np
import pytest

from jaxserve.errors import WeightError
from jaxserve.mesh import mesh_of_one
from jaxserve.models.checkpoint import QuantizedCheckpoint, open_checkpoint
from jaxserve.models.loading import abstract_model, dummy_params, load_params, stored_formats
from jaxserve.ops.quantization import QuantizedWeight
from tests.checkpoints import folder_tensors, write_llama_folder
from tests.dense_llama import DenseLlama
from tests.models.forward import FLOAT32, logits_of
from tests.quantized_checkpoints import (
    awq,
    fp8_blocks,
    fp8_channels,
    fp8_tensor,
    gptq,
    int8_channels,
    packed,
    write_quantized,
)

TOKENS = np.random.default_rng(0).integers(3, 300, 24).tolist()


def compressed(weights, *, format, activations=None):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


def weights(kind, bits, strategy, **more):
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}


DYNAMIC = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
CASES = {
    "compressed-tensors int8, w8a16": (
        compressed(weights("int", 8, "channel"), format="int-quantized"),
        int8_channels,
    ),
    "compressed-tensors int8, w8a8": (
        compressed(weights("int", 8, "channel"), format="int-quantized", activations=DYNAMIC),
        int8_channels,
    ),
    "compressed-tensors fp8 by channel": (
        compressed(weights("float", 8, "channel"), format="float-quantized"),
        fp8_channels,
    ),
    "compressed-tensors fp8 by block": (
        compressed(
            weights("float", 8, "block", block_structure=[64, 64]), format="float-quantized"
        ),
        fp8_blocks(64, "weight_scale"),
    ),
    "compressed-tensors packed 8 bit by channel": (
        compressed(weights("int", 8, "channel"), format="pack-quantized"),
        lambda weight, random: packed(8, weight.shape[1])(weight, random),
    ),
    "compressed-tensors packed 4 bit": (
        compressed(weights("int", 4, "group", group_size=32), format="pack-quantized"),
        packed(4, 32),
    ),
    "compressed-tensors packed 4 bit with zero points": (
        compressed(
            {**weights("int", 4, "group", group_size=32), "symmetric": False},
            format="pack-quantized",
        ),
        packed(4, 32, has_zero=True),
    ),
    "fp8 static": ({**FP8, "activation_scheme": "static"}, fp8_tensor),
    "fp8 blocks": ({**FP8, "fmt": "e4m3", "weight_block_size": [128, 128]}, fp8_blocks(128)),
    "awq": (AWQ, awq(32)),
    "gptq": (GPTQ, gptq(4, 32, is_symmetric=True)),
    "gptq 8 bit with zero points": (
        {**GPTQ, "bits": 8, "sym": False},
        gptq(8, 32, is_symmetric=False),
    ),
    "gptq with zero points": ({**GPTQ, "sym": False}, gptq(4, 32, is_symmetric=False)),
    "gptq in activation order": (
        {**GPTQ, "desc_act": True},
        gptq(4, 32, is_symmetric=True, has_order=True),
    ),
    "gptq with biases of zeros": (GPTQ, gptq(4, 32, is_symmetric=True, bias=0.0)),
    "gptq v2": (
        {**GPTQ, "sym": False, "checkpoint_format": "gptq_v2"},
        gptq(4, 32, is_symmetric=False, zero_offset=0),
    ),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    # 128 and 64 divide what must be divided; 64 rows of k and v are half a block of 128.
    folder = tmp_path_factory.mktemp("float")
    return write_llama_folder(
        folder, seed=3, tied=False, hidden=128, ffn=256, heads=4, kv_heads=2, layers=2
    )


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_dequantised_model(tmp_path, source, case):
    config, quantizer = CASES[case]
    twin = write_quantized(source, tmp_path / "model", config, quantizer)
    expected = DenseLlama(twin).logits(TOKENS)
    actual = logits_of(tmp_path / "model", TOKENS, chunks=(24,))
    assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()
    # Quantised it was: the original gives other logits.
    assert np.abs(DenseLlama(source).logits(TOKENS) - expected).max() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_matrices_are_kept_as_they_are_stored(tmp_path, source, case):
    config, quantizer = CASES[case]
    twin = write_quantized(source, tmp_path / "model", config, quantizer)
    floats = folder_tensors(twin)
    with open_checkpoint(tmp_path / "model") as checkpoint:
        assert isinstance(checkpoint, QuantizedCheckpoint)
        assert {name for name in checkpoint.names if not name.endswith(".bias")} == set(floats)
        assert all(checkpoint.shape(name) == floats[name].shape for name in floats)
        model = abstract(checkpoint)
        params = load_params(model, checkpoint, lambda done, total: None)
        for name, index in (("q_proj", np.s_[5:70, 7:99]), ("down_proj", np.s_[:, :40])):
            full = next(full for full in floats if name in full)
            part = checkpoint.read(full, tuple(slice(*i.indices(10**6)) for i in index))
            np.testing.assert_allclose(part, floats[full][index], atol=1e-6)
    kinds = {
        parameter.name: isinstance(parameter.value, QuantizedWeight)
        for parameter in model.parameters
    }
    assert kinds == {name: "proj" in name for name in floats}
    dummies = dummy_params(model, 0)
    assert [(array.shape, array.dtype) for array in params] == [
        (array.shape, array.dtype) for array in dummies
    ]


def abstract(checkpoint, quantization="auto"):
    return abstract_model(
        checkpoint.config,
        mesh_of_one(),
        dtype=FLOAT32,
        activation_dtype=FLOAT32,
        quantization=quantization,
        formats=stored_formats(checkpoint),
    )


def test_a_bias_that_is_not_of_zeros_is_not_dropped(tmp_path, source):
    write_quantized(source, tmp_path / "model", GPTQ, gptq(4, 32, is_symmetric=True, bias=0.5))
    with open_checkpoint(tmp_path / "model") as checkpoint:
        with pytest.raises(WeightError, match=r"does not use: model.layers.0.*\.bias"):
            load_params(abstract(checkpoint), checkpoint, lambda done, total: None)


def test_without_weights_the_config_says_what_is_quantised(tmp_path, source):
    write_quantized(source, tmp_path / "model", AWQ, awq(32))
    with open_checkpoint(tmp_path / "model") as checkpoint:
        expected = abstract(checkpoint)
    with open_checkpoint(tmp_path / "model", has_weights=False) as checkpoint:
        actual = abstract(checkpoint)
    assert (actual.names, actual.shapes) == (expected.names, expected.shapes)
    assert len(dummy_params(actual, 0)) == len(expected.shapes)


def test_quantising_what_is_quantised_is_refused_unless_it_is_the_same(tmp_path, source):
    write_quantized(source, tmp_path / "model", AWQ, awq(32))
    with open_checkpoint(tmp_path / "model") as checkpoint:
        with pytest.raises(WeightError, match="'int8'; the checkpoint is quantised already, to in"):
            abstract(checkpoint, "int8")
        assert abstract(checkpoint, "int4").shapes == abstract(checkpoint).shapes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes' is not supported; supported: compress"),
        ({**AWQ, "version": "gemv"}, "awq: version = gemv is not supported; supported: gemm"),
        ({**AWQ, "bits": 8}, "awq: bits = 8 is not supported; supported: 4"),
        ({**GPTQ, "bits": 3}, "gptq: bits = 3 is not supported; supported: 4, 8"),
        ({**GPTQ, "dynamic": {"-:lm_head": {}}}, "gptq: dynamic = "),
        ({**GPTQ, "group_size": 0}, "group_size is 0"),
        ({**FP8, "weight_block_size": [128, 0]}, "weight_block_size = .128, 0. is not supported"),
        (compressed(weights("int", 8, "group"), format="int-quantized"), "group_size is None"),
        (
            compressed(
                weights("int", 8, "channel"),
                format="int-quantized",
                activations=weights("float", 8, "token"),
            ),
            "input_activations = .'float', 8, True. is not supported; supported: symmetric int",
        ),
        ("int8", "quantization_config is 'int8'; it must be an object"),
        ({**FP8, "fmt": "e5m2"}, "fp8: fmt = e5m2 is not supported; supported: e4m3"),
        (
            compressed(weights("float", 4, "tensor_group"), format="nvfp4-pack-quantized"),
            "format = .'nvfp4-pack-quantized', 'float', 4. is not supported",
        ),
    ],
)
def test_what_is_not_supported_is_named_beside_what_is(tmp_path, source, config, message):
    write_quantized(source, tmp_path / "model", config, int8_channels)
    with pytest.raises(WeightError, match=message):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize(
    ("config", "quantizer", "message"),
    [
        ({**GPTQ, "group_size": 48}, gptq(4, 32, is_symmetric=True), "48 columns share a scale"),
        ({**GPTQ, "group_size": 64}, gptq(4, 32, is_symmetric=True), "scales has shape"),
        (GPTQ, gptq(4, 32, is_symmetric=False), "config.json says sym"),
        (GPTQ, gptq(4, 32, is_symmetric=True, has_order=True), "says no desc_act"),
        ({**FP8, "activation_scheme": "static"}, fp8_channels, "input_scale"),
        (FP8, int8_channels, "the data is int8; config.json says float8_e4m3fn"),
    ],
)
def test_parts_that_do_not_go_together_name_the_matrix(
    tmp_path, source, config, quantizer, message
):
    write_quantized(source, tmp_path / "model", config, quantizer)
    with pytest.raises(WeightError, match=message):
        logits_of(tmp_path / "model", TOKENS, chunks=(24,))
