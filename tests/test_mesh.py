"""What `--mesh` understands, and what it is told where a model or a machine does not fit."""

from dataclasses import dataclass

import jax
import pytest

from jaxserve.errors import ConfigError
from jaxserve.mesh import MeshShape, mesh_for, num_parts, parse_mesh, spec_for


@dataclass(frozen=True)
class Sizes:
    num_heads: int = 16
    num_kv_heads: int = 8
    ffw_size: int = 64
    num_experts: int = 0
    expert_ffw_size: int = 0


SMOLLM2 = Sizes(num_heads=9, num_kv_heads=3, ffw_size=1536)


@pytest.mark.parametrize(
    ("description", "data", "tensor"),
    [
        ("1", 1, 1),
        ("4", 1, 4),
        ("2x4", 2, 4),
        (" 8 x 1 ", 8, 1),
        ("data=2,tensor=4", 2, 4),
        ("tensor=4, data=2", 2, 4),
        ("tensor=8", 1, 8),
        ("data=8", 8, 1),
    ],
)
def test_descriptions(description, data, tensor):
    assert parse_mesh(description) == MeshShape(data=data, tensor=tensor)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("2x", r"mesh '2x' is not understood; write 2x4 \(data x tensor\)"),
        ("", r"mesh '' is not understood"),
        ("-1x2", r"mesh '-1x2' is not understood"),
        ("2x2x2x2", r"mesh '2x2x2x2' is not understood"),
        ("0x4", r"mesh '0x4' has a size of 0"),
        ("data=2,model=4", r"mesh 'data=2,model=4' must name data, expert and tensor"),
        ("data=2,data=4", r"must name data, expert and tensor, each"),
    ],
)
def test_other_descriptions_are_refused(description, message):
    with pytest.raises(ConfigError, match=message):
        parse_mesh(description)


def test_too_few_devices_are_counted_and_a_cpu_is_told_how_to_have_more():
    with pytest.raises(
        ConfigError,
        match=r"mesh 4x4 needs 16 devices; there are 8 \(cpu\)\. .* JAX_NUM_CPU_DEVICES=16",
    ):
        mesh_for(MeshShape(data=4, tensor=4), Sizes())


@pytest.mark.parametrize(
    ("sizes", "tensor", "message"),
    [
        (SMOLLM2, 4, r"mesh 2x4 .*tensor=4 does not divide its 9 heads\. With 8 devices 8x1 would"),
        (SMOLLM2, 4, r"tensor may be 1, 3$"),
        (Sizes(num_heads=24, num_kv_heads=3), 4, r"tensor=4 neither divides its 3 KV heads nor"),
        (Sizes(ffw_size=66), 4, r"tensor=4 does not divide its feed-forward width of 66"),
        (Sizes(ffw_size=66), 4, r"8x1 and 4x2 would; tensor may be 1, 2$"),
    ],
)
def test_a_model_that_does_not_divide_is_told_what_would(sizes, tensor, message):
    with pytest.raises(ConfigError, match=message):
        mesh_for(MeshShape(data=2, tensor=tensor), sizes)


def test_kv_heads_are_copied_where_there_are_fewer_than_devices():
    mesh = mesh_for(MeshShape(data=2, tensor=4), Sizes(num_heads=8, num_kv_heads=2))
    assert dict(mesh.shape) == {"data": 2, "expert": 1, "tensor": 2, "copy": 2}
    assert num_parts(mesh, "kv_heads") == 2
    assert num_parts(mesh, "heads") == num_parts(mesh, "vocab") == num_parts(mesh, "ffw") == 4
    assert num_parts(mesh, "rank") == 2 and num_parts(mesh, "hidden") == num_parts(mesh, None) == 1


@dataclass(frozen=True)
class ExpertSizes(Sizes):
    num_experts: int = 16
    expert_ffw_size: int = 32


@pytest.mark.parametrize(
    ("expert", "tensor", "kv_heads", "order"),
    [(2, 4, 8, "expert tensor"), (4, 2, 4, "expert tensor"), (8, 1, 2, "tensor expert")],
)
def test_experts_and_kv_heads_are_split_each_in_its_own_number(expert, tensor, kv_heads, order):
    shape = MeshShape(expert=expert, tensor=tensor)
    mesh = mesh_for(shape, ExpertSizes(num_kv_heads=kv_heads))
    assert mesh.axis_names == ("data", *order.split(), "copy")
    assert num_parts(mesh, "experts") == expert and num_parts(mesh, "expert_ffw") == tensor
    assert num_parts(mesh, "kv_heads") == kv_heads and num_parts(mesh, "heads") == 8


@pytest.mark.parametrize(
    ("sizes", "shape", "message"),
    [
        (Sizes(), MeshShape(expert=2), "expert=2 is for a model with experts"),
        (ExpertSizes(num_experts=6), MeshShape(expert=4), "expert=4 does not divide its 6 experts"),
        (
            ExpertSizes(expert_ffw_size=33),
            MeshShape(tensor=2),
            "tensor=2 does not divide its experts' width of 33",
        ),
        (
            ExpertSizes(num_kv_heads=4, num_heads=24, ffw_size=96, num_experts=18),
            MeshShape(expert=3, tensor=1),
            "expert=3 times tensor=1 neither divides its 4 KV heads",
        ),
        (Sizes(num_heads=9), MeshShape(expert=2, tensor=2), "expert=2 times tensor=2 does not"),
    ],
)
def test_experts_that_do_not_divide_are_refused(sizes, shape, message):
    with pytest.raises(ConfigError, match=message):
        mesh_for(shape, sizes)


def test_axes_become_specs():
    mesh = mesh_for(MeshShape(data=2, tensor=4), Sizes())
    assert spec_for(mesh, ("heads", "hidden")) == jax.P(("expert", "tensor", "copy"), None)
    assert spec_for(mesh, ("kv_heads", None)) == jax.P(("expert", "tensor"), None)
