"""Projections of one input against dense merged weights in float64, written down by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiral_jax.model.linear import Linear, joint_linear

D, R, ALPHA = 40, 4, 6.0
SCALE = ALPHA / R
LEAD = 3, 7  # axes of the input before its width
FEATURES = {"q": 24, "k": 16, "v": 16}


class Projections(nn.Module):
    """x -> what each of `names` makes of it, in its own product or together."""

    names: tuple[str, ...]
    rank: int = R
    joint: bool = True

    def setup(self):
        self.of = {
            name: Linear(D, FEATURES[name], jnp.float32, self.rank, ALPHA) for name in self.names
        }

    def __call__(self, x):
        if self.joint:
            return joint_linear(x, *self.of.values())
        return [projection(x) for projection in self.of.values()]


def random_arrays(names, dtype=np.float32):
    """x, variables as the module has them, and a cotangent of each output."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    x = jnp.asarray(draw(*LEAD, D), dtype)
    params = {f"of_{name}": {"kernel": draw(D, FEATURES[name])} for name in names}
    lora = {f"of_{name}": {"a": draw(D, R), "b": draw(R, FEATURES[name])} for name in names}
    cotangents = [jnp.asarray(draw(*LEAD, FEATURES[name]), dtype) for name in names]
    return x, {"params": params, "lora": lora}, cotangents


def by_hand(names, x, variables, cotangents):
    """Outputs, and gradients by x and by variables, of x (W + s A B)."""
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (x, variables, cotangents))
    (x, variables, cotangents), outputs = wide, []
    x_NxD, d_x, gradient = x.reshape(-1, D), 0.0, {"params": {}, "lora": {}}
    for name, d_out in zip(names, cotangents, strict=True):
        name = f"of_{name}"
        w = variables["params"][name]["kernel"]
        a, b = variables["lora"][name]["a"], variables["lora"][name]["b"]
        merged = w + SCALE * a @ b
        outputs.append(x @ merged)
        d_x = d_x + d_out @ merged.T
        d_merged = x_NxD.T @ d_out.reshape(-1, d_out.shape[-1])
        gradient["params"][name] = {"kernel": d_merged}
        gradient["lora"][name] = {"a": SCALE * d_merged @ b.T, "b": SCALE * a.T @ d_merged}
    return outputs, d_x, gradient


def relative(found, expected):
    """Of each pair of arrays: L2 of the difference over L2."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return [np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b) for a, b in pairs]


@pytest.mark.parametrize("names", [("q",), ("k", "v"), ("v", "q", "k")], ids="+".join)
@pytest.mark.parametrize(
    ("dtype", "within"),
    # products of 40 numbers rounded at 6e-8; sums of rounded products at 4e-3, three in a row
    [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)],
    ids=["float32", "bfloat16"],
)
def test_values_and_gradients_are_those_of_dense_merged_weights(names, dtype, within):
    x, variables, cotangents = random_arrays(names, dtype)
    outputs, pull = jax.vjp(lambda x, v: Projections(names).apply(v, x), x, variables)
    expected, expected_d_x, expected_gradient = by_hand(names, x, variables, cotangents)
    d_x, gradient = pull(cotangents)
    assert [out.shape for out in outputs] == [(*LEAD, FEATURES[name]) for name in names]
    assert {out.dtype for out in outputs} == {d_x.dtype} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
    found = outputs, d_x, gradient
    assert max(relative(found, (expected, expected_d_x, expected_gradient))) <= within


def test_gradients_of_adapters_are_summed_over_rows_in_float32():
    """Each row adds 1 to every sum, so bfloat16 would stop at 256 or round to a multiple of 16."""
    rows, ones = 4099, jnp.ones((4099, D), jnp.bfloat16)
    names = ("k", "v")
    lora = {
        f"of_{name}": {"a": jnp.full((D, R), 1 / D), "b": jnp.eye(R, FEATURES[name])}
        for name in names
    }
    params = {f"of_{name}": {"kernel": jnp.zeros((D, FEATURES[name]))} for name in names}

    def total(lora):
        outputs = Projections(names).apply({"params": params, "lora": lora}, ones)
        return sum(jnp.sum(out.astype(jnp.float32)) for out in outputs)

    for gradient in jax.grad(total)(lora).values():
        np.testing.assert_array_equal(gradient["a"], np.full((D, R), SCALE * rows))


@pytest.mark.parametrize("names", [("k", "v"), ("q", "k", "v")], ids="+".join)
def test_adapters_share_their_first_product_and_its_two_cotangents(names):
    x, variables, cotangents = random_arrays(names)

    def products(joint):
        """Matrix products of the forward pass, and of both passes."""

        def outputs(x, variables):
            return Projections(names, joint=joint).apply(variables, x)

        def both_passes(x, variables):
            return jax.vjp(outputs, x, variables)[1](cotangents)

        lowered = [jax.jit(f).lower(x, variables).as_text() for f in (outputs, both_passes)]
        return np.array([text.count("dot_general") for text in lowered])

    saved, more = products(joint=False) - products(joint=True), len(names) - 1
    # x A forward; d_A and what A gives to d_x backward
    assert saved.tolist() == [more, 3 * more]


def test_without_adapters_there_are_the_bare_products_alone():
    x, variables, _ = random_arrays(("q", "k"))
    outputs = Projections(("q", "k"), rank=0).apply({"params": variables["params"]}, x)
    for out, weights in zip(outputs, variables["params"].values(), strict=True):
        assert relative(out, np.asarray(x, np.float64) @ weights["kernel"])[0] <= 1e-6
