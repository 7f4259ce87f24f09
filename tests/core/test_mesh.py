"""The mesh is what config says, and one table says where every array lies."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from spiral_jax.core import mesh as meshes
from spiral_jax.core.config import ConfigError, defaults
from spiral_jax.learner.settings import learner_settings
from spiral_jax.learner.state import abstract_state
from spiral_jax.model.architecture import Architecture, check_mesh
from spiral_jax.model.transformer import ModelConfig, init_variables

DEVICES = jax.device_count()
CUT = AbstractMesh((2, 2, 2), meshes.AXES)


def sizes(data, fsdp, tensor):
    return ConfigDict({"data": data, "fsdp": fsdp, "tensor": tensor})


def model_config(tied, lora_rank):
    arch = Architecture(
        V=96, D=48, F=80, L=3, H=6, J=2, E=16, norm_eps=1e-3, rope_theta=777.0, tied=tied
    )
    return ModelConfig(arch, lora_rank=lora_rank)


def leaves(tree):
    return {
        meshes.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.devices8
@pytest.mark.parametrize("axis", range(3))
def test_minus_one_takes_all_the_rest(axis):
    asked, shape = [1, 1, 1], [1, 1, 1]
    asked[axis], shape[axis] = -1, DEVICES
    mesh = meshes.make_mesh(sizes(*asked))
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == tuple(shape)
    assert set(mesh.devices.flat) == set(jax.devices())
    assert meshes.group_count_multiple(mesh) == shape[0] * shape[1]


@pytest.mark.devices8
def test_minus_one_takes_the_rest_of_eight():
    if DEVICES != 8:
        pytest.skip("needs 8 devices")
    assert meshes.make_mesh(sizes(2, -1, 2)).devices.shape == (2, 2, 2)
    assert meshes.make_mesh(sizes(2, 4, -1)).devices.shape == (2, 4, 1)
    assert meshes.make_mesh(sizes(1, 2, 4)).devices.shape == (1, 2, 4)


@pytest.mark.devices8
@pytest.mark.parametrize(
    "asked, message",
    [
        ((DEVICES + 1, 1, 1), f"there are {DEVICES} "),  # product too large
        ((-1, DEVICES + 1, 1), f"there are {DEVICES} "),  # nothing divides
        ((-1, -1, 1), "at most one may be -1"),
        ((0, 1, 1), "must be >= 1"),
        ((-1, 0, 1), "must be >= 1"),
        ((-2, 1, 1), "must be >= 1"),
    ],
)
def test_sizes_that_do_not_fit_are_an_error_that_shows_them(asked, message):
    with pytest.raises(ConfigError, match=message) as error:
        meshes.make_mesh(sizes(*asked))
    data, fsdp, tensor = asked
    assert f"config.mesh = data={data}, fsdp={fsdp}, tensor={tensor}" in str(error.value)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh asks of a device."""

    id: int
    coords: tuple[int, ...]
    device_kind: str
    platform: str = "tpu"
    core_on_chip: int = 0
    process_index: int = 0


@pytest.mark.parametrize(
    ("kind", "slice_shape", "shape"),
    [
        ("TPU v6 lite", (8, 8, 1), (4, 8, 2)),
        ("TPU v6 lite", (16, 16, 1), (2, 32, 4)),
        ("TPU v5", (4, 4, 4), (8, 8, 1)),
        ("TPU v5 lite", (8, 8, 1), (2, 8, 4)),
    ],
)
def test_axes_of_the_mesh_may_be_parts_of_a_slices_axes_and_tensor_lies_on_neighbours(
    kind, slice_shape, shape
):
    places = itertools.product(*map(range, slice_shape))
    chips = [Chip(i, coords, kind) for i, coords in enumerate(places)]
    devices = meshes.make_mesh(sizes(*shape), chips).devices
    assert devices.shape == shape and set(devices.flat) == set(chips)
    for row in devices.reshape(-1, shape[-1]):
        steps = np.abs(np.diff([chip.coords for chip in row], axis=0))
        assert (steps.sum(axis=1) == 1).all()


@pytest.mark.parametrize(
    "shape, parts",
    [
        ((1, 1, 3), ("config.mesh.tensor = 3", "2 key/value heads", "3 devices: 1.")),
        ((1, 1, 4), ("config.mesh.tensor = 4", "6 attention heads", "4 devices: 1, 2.")),
        ((2, 5, 1), ("config.mesh.fsdp = 5", "48 model dimensions", "10 devices: 1, 2.")),
        ((7, 1, 2), None),
        ((1, 16, 1), None),
    ],
)
def test_an_axis_that_does_not_divide_the_model_is_an_error_that_says_what_would(shape, parts):
    arch, mesh = model_config(tied=True, lora_rank=0).arch, AbstractMesh(shape, meshes.AXES)
    if parts is None:
        check_mesh(arch, mesh)
    else:
        with pytest.raises(ConfigError) as error:
            check_mesh(arch, mesh)
        assert all(part in str(error.value) for part in parts)


def test_placed_arrays_are_those_of_the_host():
    mesh, rng = meshes.make_mesh(sizes(-1, 1, 1)), np.random.default_rng(0)
    tree = {
        "a": rng.normal(size=(DEVICES, 3)),
        "b": rng.integers(0, 9, (2, DEVICES)),
        "c": np.array(7),
    }
    shardings = {
        "a": meshes.group_sharding(mesh),
        "b": meshes.group_sharding(mesh, leading=1),
        "c": meshes.replicated(mesh),
    }
    placed = meshes.place(tree, shardings)
    for name, array in tree.items():
        np.testing.assert_array_equal(placed[name], array.astype(placed[name].dtype))
        assert placed[name].sharding == shardings[name]
    pair = meshes.place((tree["a"], tree["a"] + 1), meshes.group_sharding(mesh))
    assert [array.sharding for array in pair] == [meshes.group_sharding(mesh)] * 2


@pytest.mark.parametrize(
    "name", ["params", "layers/o/bias", "layers/q", "layers/rotary/kernel", "layers/q/kernel/x"]
)
def test_an_unknown_path_is_an_error_that_names_it(name):
    with pytest.raises(KeyError, match=name):
        meshes.weight_spec(name, (3, 48, 96), CUT)


@pytest.mark.parametrize(
    "name, shape, spec, decode_spec",
    [
        ("embed", (96, 48), P("tensor", "fsdp"), P("tensor", None)),
        ("head", (48, 96), P("fsdp", "tensor"), P(None, "tensor")),
        ("final_norm", (48,), P(None), P(None)),
        ("layers/attention_norm", (3, 48), P(None, None), P(None, None)),
        ("layers/q_norm", (3, 16), P(None, None), P(None, None)),
        *[
            (f"layers/{n}/kernel", (3, 48, 96), P(None, "fsdp", "tensor"), P(None, None, "tensor"))
            for n in "qkv"
        ],
        ("layers/k/bias", (3, 96), P(None, "tensor"), P(None, "tensor")),
        ("layers/up/kernel", (3, 48, 80), P(None, "fsdp", "tensor"), P(None, None, "tensor")),
        ("layers/o/kernel", (3, 96, 48), P(None, "tensor", "fsdp"), P(None, "tensor", None)),
        ("layers/down/kernel", (3, 80, 48), P(None, "tensor", "fsdp"), P(None, "tensor", None)),
        ("layers/q/a", (3, 48, 4), P(None, "fsdp", None), P(None, None, None)),
        ("layers/q/b", (3, 4, 96), P(None, None, "tensor"), P(None, None, "tensor")),
        ("layers/down/a", (3, 80, 4), P(None, "tensor", None), P(None, "tensor", None)),
        ("layers/down/b", (3, 4, 48), P(None, None, "fsdp"), P(None, None, None)),
        *[
            (f"layers/experts/{n}", (3, 5, 48, 80), P(None, None, "fsdp", "tensor"), decode)
            for n in ("gate", "up")
            for decode in [P(None, None, None, "tensor")]
        ],
        (
            "last_layer/experts/down",
            (5, 80, 48),
            P(None, "tensor", "fsdp"),
            P(None, "tensor", None),
        ),
        ("last_layer/experts/router", (48, 5), P("fsdp", None), P(None, None)),
        ("last_layer/gate/kernel", (48, 80), P("fsdp", "tensor"), P(None, "tensor")),
        ("layers/1/gate/scale", (80,), P("tensor"), P("tensor")),
        ("layers/1/down/scale", (48,), P("fsdp"), P(None)),
        ("last_layer/q/a", (48, 4), P("fsdp", None), P(None, None)),
        ("last_layer/q_norm", (16,), P(None), P(None)),
        ("step", (), P(), P()),
        # an axis that two devices do not divide stays whole, the others are still cut
        ("embed", (97, 48), P(None, "fsdp"), P(None, None)),
        ("layers/q/kernel", (3, 47, 96), P(None, None, "tensor"), P(None, None, "tensor")),
        ("layers/o/kernel", (3, 5, 7), P(None, None, None), P(None, None, None)),
    ],
)
def test_spec_by_path(name, shape, spec, decode_spec):
    assert meshes.weight_spec(name, shape, CUT) == spec
    assert meshes.weight_spec(name, shape, CUT, decode=True) == decode_spec
    for prefix in ("opt/1/mu/", "trained/"):
        assert meshes.weight_spec(prefix + name, shape, CUT) == spec


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rank", [0, 4])
def test_the_table_knows_every_path_of_parameters_adapters_and_optimizer_state(tied, rank):
    config, c = model_config(tied, rank), defaults()
    o = c.optimizer
    o.clip_norm, o.weight_decay, o.warmup_steps, o.schedule = 1.0, 0.1, 3, "cosine"
    variables = jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))
    assert set(variables) == ({"params", "lora"} if rank else {"params"})
    state = leaves(abstract_state(learner_settings(c, groups={}), config, CUT))
    everything = leaves(variables) | state
    specs = {name: meshes.weight_spec(name, leaf.shape, CUT) for name, leaf in everything.items()}
    for name, leaf in everything.items():
        is_matrix = len(leaf.shape) >= 2 and "norm" not in name
        assert is_matrix == any(specs[name]), f"{name} is not cut as it should be"
        assert "fsdp" not in meshes.weight_spec(name, leaf.shape, CUT, decode=True), name
        if name in state:
            assert leaf.sharding.spec == specs[name], name
    trained = leaves(variables["lora" if rank else "params"])
    # In the stack and in the last layer each: 7 projections, 4 scales of norms. And the embedding,
    # the final norm, the head.
    assert len(trained) == (2 * 7 * 2 if rank else 2 * (7 + 4) + (2 if tied else 3))
    for name, leaf in trained.items():  # moments lie where their parameter lies
        paths = [path for path in state if path.endswith("/" + name)]
        assert len(paths) == 3, paths  # itself, mu, nu
        assert {specs[path] for path in paths} == {meshes.weight_spec(name, leaf.shape, CUT)}


@pytest.mark.devices8
def test_groups_lie_along_data_and_fsdp_and_are_whole_on_each_device(mesh):
    multiple = mesh.shape["data"] * mesh.shape["fsdp"]
    assert meshes.group_count_multiple(mesh) == multiple
    x_UxT = np.arange(3 * multiple * 5.0).reshape(3 * multiple, 5)
    placed = jax.device_put(x_UxT, meshes.group_sharding(mesh))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(3, 5)}
    placed = jax.device_put(x_UxT[None].repeat(2, 0), meshes.group_sharding(mesh, leading=1))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3, 5)}

    @jax.jit
    def double(x):
        return meshes.constrain_groups(2 * x)

    with jax.set_mesh(mesh):
        out = double(jax.device_put(x_UxT, jax.sharding.NamedSharding(mesh, P())))
    assert out.sharding.is_equivalent_to(meshes.group_sharding(mesh), 2)
    np.testing.assert_array_equal(out, 2 * x_UxT)
    np.testing.assert_array_equal(double(x_UxT), 2 * x_UxT)  # outside of a mesh


def test_shapes_with_shardings_say_what_and_where_and_hold_nothing():
    mesh = meshes.make_mesh(sizes(-1, 1, 1))
    tree = {"layers": {"q": {"kernel": np.zeros((3, 4, 8), np.float32)}}, "step": np.int32(7)}
    shardings = meshes.weight_shardings(tree, mesh)
    for shapes in (tree, jax.eval_shape(lambda: tree)):
        placed = leaves(meshes.with_shardings(shapes, shardings))
        for name, array in leaves(tree).items():
            expected = jax.ShapeDtypeStruct(
                array.shape, array.dtype, sharding=leaves(shardings)[name]
            )
            assert placed[name] == expected


@pytest.mark.devices8
def test_weight_shardings_place_a_tree_on_real_devices(mesh):
    tree = {
        "layers": {"q": {"kernel": np.zeros((3, 48, 96), np.float32)}},
        "final_norm": np.zeros(48, np.float32),
    }
    placed = jax.device_put(tree, meshes.weight_shardings(tree, mesh))
    kernel, norm = placed["layers"]["q"]["kernel"], placed["final_norm"]
    expected = (3, 48 // mesh.shape["fsdp"], 96 // mesh.shape["tensor"])
    assert {shard.data.shape for shard in kernel.addressable_shards} == {expected}
    assert {shard.data.shape for shard in norm.addressable_shards} == {(48,)}
    assert math.prod(mesh.devices.shape) == len(kernel.addressable_shards) == DEVICES
