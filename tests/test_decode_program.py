"""The decode loop's compiled program: it copies and gathers no weights and no caches, and holds little beside them."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from spiral_jax import mesh as meshes
from spiral_jax.model.architecture import Architecture
from spiral_jax.model.qwen3 import Block, ModelConfig, init_variables
from spiral_jax.sampling import static

ARCH = Architecture(V=97, D=256, F=1024, L=4, H=4, J=2, E=64, norm_eps=1e-6, rope_theta=1e4, tied=False)
MODEL = ModelConfig(ARCH)
DECODE = {"U": 8, "C": 1, "P": 9, "G": 40}  # two groups a device: with one, XLA's CPU backend copies its caches
MOVES = ("copy", "transpose", "convert", "concatenate", "dynamic-slice", "gather", "all-gather", "all-to-all")


def one_device():
    return jax.make_mesh((1, 1, 1), meshes.AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])


def shape_of(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def compiled_decode(mesh, layers=lambda tree, layers: layers):
    """The program, compiled from shapes alone; `layers(stacked, separate)` replaces what the loop reads."""
    U, C, P, G = DECODE.values()
    tree = jax.eval_shape(lambda: init_variables(MODEL, jax.random.key(0)))
    tree = jax.tree.map(shape_of, tree, meshes.weight_shardings(tree, mesh))
    rows = [((U, P), np.int32), ((U,), np.int32), ((U, 6), np.int32), ((U,), bool)]
    rows = [jax.ShapeDtypeStruct(*row, sharding=meshes.group_sharding(mesh)) for row in rows]
    with jax.set_mesh(mesh):
        prepare = static._unstack.lower(tree, ARCH.L, mesh)
        weights = jax.tree.map(shape_of, prepare.out_info, prepare.compile().output_shardings)
        weights = weights.replace(layers=layers(tree["params"]["layers"], weights.layers))
        return static._generate.lower(
            weights, *rows, config=MODEL, C=C, G=G, seed=0, temperature=1.0, stop_ids=(1,)
        ).compile()  # fmt: skip


def moves_in_decode_loop(program):
    """Elements of every array that the body of the decode loop, and all it calls, copies or gathers."""
    text = program.as_text()
    found = re.finditer(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.M | re.S)
    computations = {match[1]: match[2] for match in found}

    def reach(name, seen):
        if name not in seen:
            seen.add(name)
            called = r"(?:calls|body|condition|to_apply)=%?([\w.\-]+)"
            for callee in re.findall(called, computations[name]):
                reach(callee, seen)
        return seen

    bodies = [reach(name, set()) for name in re.findall(r" while\([^\n]*body=%?([\w.\-]+)", text)]
    (loop,) = [names for names in bodies if any("Block.decode" in computations[name] for name in names)]
    operation = rf"= \w+\[([\d,]*)\]\S* ({'|'.join(MOVES)})\("
    moves = [match for name in loop for match in re.findall(operation, computations[name])]
    return [math.prod(int(size) for size in shape.split(",") if size) for shape, _ in moves]


def sizes_on_one_device(mesh):
    """Elements of the smallest kernel, of the own cache of one layer (keys or values), and of its prompt cache."""
    (U, C, P, G), cut = DECODE.values(), meshes.group_count_multiple(mesh)
    heads = ARCH.J * ARCH.E // mesh.shape["tensor"]
    return ARCH.D * heads, U // cut * C * G * heads, U // cut * P * heads


def temporary_bytes_allowed():
    """All caches, the layer that prefill's scan holds, and 10 % of the weights (measured: 1.3 %)."""
    _, own, prompt = sizes_on_one_device(one_device())
    layer = ARCH.parameters / ARCH.L
    return 4 * (2 * ARCH.L * (own + prompt) + layer + 0.1 * ARCH.parameters)


@pytest.fixture(scope="module")
def program(mesh):
    return compiled_decode(mesh)


@pytest.mark.devices8
def test_decode_loop_copies_and_gathers_no_weight(mesh, program):
    kernel, own, prompt = sizes_on_one_device(mesh)
    assert max(size for size in moves_in_decode_loop(program) if size not in (own, prompt)) < kernel


@pytest.mark.devices8
@pytest.mark.xfail(strict=True, reason="XLA transposes every cache to heads first at every token")
def test_decode_loop_copies_no_cache(mesh, program):
    assert not {*sizes_on_one_device(mesh)[1:]} & {*moves_in_decode_loop(program)}


def test_decode_holds_its_caches_and_little_else(mesh, program):
    if mesh.size > 1:
        program = compiled_decode(one_device())
    assert program.memory_analysis().temp_size_in_bytes <= temporary_bytes_allowed()


class SlicingBlock:
    """A decode loop over stacked weights: each layer takes its own from them, `anew` at every token or not."""

    def __init__(self, config):
        self.block = Block(config)

    def apply(self, layer, x, step_U, *rest, method):
        index = jnp.where(step_U[0] < 0, 0, layer["index"]) if "anew" in layer else layer["index"]
        own = jax.tree.map(lambda a: a[index], layer["stacked"])
        return self.block.apply({"params": own}, x, step_U, *rest, method=method)


@pytest.mark.parametrize("when", ["anew", "once"])
def test_a_loop_that_slices_stacked_weights_would_fail_these_tests(monkeypatch, when):
    monkeypatch.setattr(static, "Block", SlicingBlock)
    index = jax.ShapeDtypeStruct((), np.int32)
    layers = lambda stacked, separate: tuple({"stacked": stacked, "index": index, when: index} for _ in separate)  # noqa: E731
    program = compiled_decode(one_device(), layers)
    if when == "anew":
        assert max(moves_in_decode_loop(program)) >= ARCH.D * ARCH.F
    else:
        assert program.memory_analysis().temp_size_in_bytes > temporary_bytes_allowed()
