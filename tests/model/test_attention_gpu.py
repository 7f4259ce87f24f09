"""cuDNN's attention: what jax must have, what is refused, compiled calls, and numbers on a GPU."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as private
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spiral_jax.model.attention import gpu
from spiral_jax.model.attention.part import Attended
from spiral_jax.planning.gpus import missing_compiler
from spiral_jax.planning.hlo import parse
from spiral_jax.planning.topology import find_topology

NEEDS_COMPILER = pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
NEEDS_GPU = pytest.mark.skipif(
    jax.devices()[0].platform != "gpu", reason="jax has no GPU: cuDNN is not emulated"
)


def test_the_installed_jax_has_the_private_names_with_the_arguments_that_we_pass():
    assert gpu.unavailable() is None


def forward_of_jax_0_12(
    query, key, value, bias, q_seqlen, kv_seqlen, q_offsets, kv_offsets, page_table_k,
    page_table_v, score_mod_args, scale, seed, dropout_rate, variadic_args, mask_type, layout,
    sliding_window_length, score_mod, is_training,
):  # fmt: skip
    raise NotImplementedError


def test_names_of_jax_0_12_are_known_and_unknown_ones_are_a_reason(monkeypatch):
    monkeypatch.setattr(private, "_dot_product_attention_fwd_impl", forward_of_jax_0_12)
    assert gpu.unavailable() is None
    monkeypatch.setattr(private, "_dot_product_attention_fwd_impl", lambda query, key, sink: None)
    reason = gpu.unavailable()
    assert "forward" in reason and "sink" in reason and jax.__version__ in reason
    assert "\n" not in reason


def test_a_name_that_is_gone_is_a_reason(monkeypatch):
    monkeypatch.delattr(private, "_dot_product_attention_bwd_p_wrapper")
    reason = gpu.unavailable()
    assert "_bwd_p_wrapper" in reason and jax.__version__ in reason and "\n" not in reason


H100, A100, B200 = (9, 0), (8, 0), (10, 0)


@pytest.mark.parametrize(
    ("dtype", "E", "capability"),
    [
        (jnp.bfloat16, 128, H100),
        (jnp.float16, 8, A100),
        (jnp.bfloat16, 256, H100),
        (jnp.bfloat16, 256, B200),
    ],
)
def test_what_cudnn_takes(dtype, E, capability):
    assert gpu.refusal(dtype, E, capability) is None


@pytest.mark.parametrize(
    ("dtype", "E", "capability", "parts"),
    [
        (jnp.float32, 128, H100, ("float32", "bfloat16")),
        (jnp.bfloat16, 100, H100, ("100", "multiples of 8", "256")),
        (jnp.bfloat16, 264, H100, ("264", "256", "9.0")),
        (jnp.bfloat16, 136, A100, ("136", "128", "8.0")),
        (jnp.bfloat16, 192, B200, ("192", "128", "10.0")),
    ],
)
def test_what_cudnn_refuses_is_told_in_one_line(dtype, E, capability, parts):
    reason = gpu.refusal(dtype, E, capability)
    assert all(part in reason for part in parts) and "\n" not in reason


# Compiled for GPUs that are not there.


def forward_and_backward(q, k, v, q_len, kv_len, d_out, *, causal):
    attended = gpu.forward(q, k, v, q_len, kv_len, causal=causal)
    return attended, gpu.backward(q, k, v, q_len, kv_len, attended, d_out, causal=causal)


def compiled(B, T, S, H, J, E, causal):
    """HLO of both passes on two H100s, each with its own B / 2."""
    topology = find_topology("h100:2")
    mesh = Mesh(np.array(topology.devices), ("data",))

    def array(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, P("data")))

    def each_shard(*arrays):
        return forward_and_backward(*arrays, causal=causal)

    queries, keys, lengths = array(B, T, H, E), array(B, S, J, E), array(B, dtype=jnp.int32)
    program = jax.jit(jax.shard_map(each_shard, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
    lowered = program.lower(queries, keys, keys, lengths, lengths, queries)
    return parse(lowered.compile(compiler_options=topology.compiler_options).as_text())


@NEEDS_COMPILER
@pytest.mark.parametrize(
    ("T", "S", "causal"),
    [(1280, 1280, True), (1280, 640, False), (1, 192, False), (130, 130, True)],
)
def test_one_call_each_way_without_scores_transposes_or_copies(T, S, causal):
    module = compiled(4, T, S, H=8, J=2, E=64, causal=causal)
    targets = [
        instruction.attribute("custom_call_target").strip('"')
        for instruction in module.instructions()
        if instruction.operation == "custom-call"
    ]
    attention = sorted(target for target in targets if "fmha" in target)
    assert attention == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]

    filled_T, filled_S = (-(-length // gpu.BLOCK) * gpu.BLOCK for length in (T, S))
    keys = 2 * filled_S * 2 * 64
    for instruction in module.instructions():
        for array in instruction.arrays:
            rest = list(array.shape)
            if filled_T in rest:
                rest.remove(filled_T)
                assert filled_S not in rest or filled_S == gpu.BLOCK, array  # no scores
            if instruction.operation in ("transpose", "copy"):
                assert math.prod(array.shape) < keys, instruction


# On a GPU.


@dataclasses.dataclass
class Case:
    """Two parts: queries to prompt keys, all of them, and to own keys, causal."""

    q: np.ndarray
    prompt_k: np.ndarray
    prompt_v: np.ndarray
    own_k: np.ndarray
    own_v: np.ndarray
    d_out: np.ndarray
    len_B: np.ndarray
    prompt_len_B: np.ndarray


def rounded(array):
    """float64 numbers that bfloat16 holds, so that the oracle computes with the same inputs."""
    return np.asarray(jnp.asarray(array, jnp.bfloat16), np.float64)


def random_case(lengths, prompt_lengths, T, S, *, H=4, J=2, E=64, shift=0.0):
    """`shift` moves every score by about -shift**2 * E**0.5."""
    rng = np.random.default_rng(0)
    B = len(lengths)

    def draw(length, heads, centre=0.0):
        return rounded(centre + rng.normal(size=(B, length, heads, E)))

    return Case(
        q=draw(T, H, shift),
        prompt_k=draw(S, J, -shift),
        prompt_v=draw(S, J),
        own_k=draw(T, J, -shift),
        own_v=draw(T, J),
        d_out=draw(T, H),
        len_B=np.array(lengths),
        prompt_len_B=np.array(prompt_lengths),
    )


def dense(case):
    """out, lse and the five gradients by the definition, in float64; 0 behind the lengths."""
    R = case.q.shape[2] // case.own_k.shape[2]
    out, lse = np.zeros_like(case.q), np.zeros(case.q.shape[:3])
    gradients = [
        np.zeros_like(array)
        for array in (case.q, case.prompt_k, case.prompt_v, case.own_k, case.own_v)
    ]
    d_q, d_prompt_k, d_prompt_v, d_own_k, d_own_v = gradients
    for b, (n, p) in enumerate(zip(case.len_B, case.prompt_len_B, strict=True)):
        hidden = np.concatenate([np.zeros((n, p)), np.triu(np.ones((n, n)), 1)], axis=1)
        for h in range(case.q.shape[2]):
            j = h // R
            q, d_out = case.q[b, :n, h], case.d_out[b, :n, h]
            k = np.concatenate([case.prompt_k[b, :p, j], case.own_k[b, :n, j]])
            v = np.concatenate([case.prompt_v[b, :p, j], case.own_v[b, :n, j]])
            scale = q.shape[-1] ** -0.5
            score = np.where(hidden, -np.inf, scale * q @ k.T)
            lse[b, :n, h] = np.logaddexp.reduce(score, axis=1)
            weight = np.exp(score - lse[b, :n, h, None])
            out[b, :n, h] = weight @ v
            d_weight = d_out @ v.T
            d_score = weight * (d_weight - np.sum(weight * d_weight, axis=1, keepdims=True))
            d_q[b, :n, h] = scale * d_score @ k
            d_k, d_v = scale * d_score.T @ q, weight.T @ d_out
            d_prompt_k[b, :p, j] += d_k[:p]
            d_prompt_v[b, :p, j] += d_v[:p]
            d_own_k[b, :n, j] += d_k[p:]
            d_own_v[b, :n, j] += d_v[p:]
    return out, lse, gradients


def poisoned(array, len_B, value):
    behind = np.arange(array.shape[1])[None] >= len_B[:, None]
    return jnp.asarray(np.where(behind[..., None, None], value, array), jnp.bfloat16)


def merged(a, b):
    lse = jnp.logaddexp(a.lse_BxHxT, b.lse_BxHxT)

    def weighted(part):
        weight_BxHxT = jnp.exp(part.lse_BxHxT - lse)
        return part.out_BxTxHxE * jnp.moveaxis(weight_BxHxT, 1, 2)[..., None]

    return Attended((weighted(a) + weighted(b)).astype(a.out_BxTxHxE.dtype), lse)


@jax.jit
def two_parts(q, prompt_k, prompt_v, own_k, own_v, d_out, len_B, prompt_len_B):
    prompt, own = (prompt_k, prompt_v, len_B, prompt_len_B), (own_k, own_v, len_B, len_B)
    attended = merged(
        gpu.forward(q, *prompt, causal=False),
        gpu.forward(q, *own, causal=True),
    )
    from_prompt = gpu.backward(q, *prompt, attended, d_out, causal=False)
    from_own = gpu.backward(q, *own, attended, d_out, causal=True)
    d_q = from_prompt.q_BxTxHxE.astype(jnp.float32) + from_own.q_BxTxHxE
    return attended, [d_q, *from_prompt[1:], *from_own[1:]]


def computed(case, poison):
    traces = (poisoned(array, case.len_B, poison) for array in (case.q, case.own_k, case.own_v))
    prompts = (
        poisoned(array, case.prompt_len_B, poison) for array in (case.prompt_k, case.prompt_v)
    )
    q, own_k, own_v = traces
    d_out = poisoned(case.d_out, case.len_B, poison)
    lengths = jnp.asarray(case.len_B, jnp.int32), jnp.asarray(case.prompt_len_B, jnp.int32)
    return two_parts(q, *prompts, own_k, own_v, d_out, *lengths)


def assert_close(case, poison=np.nan):
    """Within bfloat16: weights, d_score and results are rounded to 8 bits, a part's d_q once more.

    A sum of such numbers is off by some 2**-8 of its largest terms; 2 % of the largest result is
    five times that. lse is float32 all along.
    """
    out, lse, gradients = dense(case)
    attended, d_inputs = computed(case, poison)
    for b, n in enumerate(case.len_B):
        np.testing.assert_allclose(attended.lse_BxHxT[b, :, :n].T, lse[b, :n], atol=2e-3)
    assert np.all(np.isfinite(attended.lse_BxHxT))
    for actual, expected in zip([attended.out_BxTxHxE, *d_inputs], [out, *gradients], strict=True):
        actual = np.asarray(actual, np.float64)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=0.02 * np.max(np.abs(expected)))


@NEEDS_GPU
@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_parts_are_the_dense_softmax_and_nothing_behind_the_lengths_reaches_them(poison):
    lengths = [0, 1, 127, 128, 129, 200, 5, 200]
    prompts = [9, 0, 128, 129, 1, 300, 127, 300]
    assert_close(random_case(lengths, prompts, T=200, S=300), poison)


@NEEDS_GPU
@pytest.mark.parametrize("E", [128, 256])
def test_larger_heads(E):
    assert_close(random_case([64, 100], [70, 128], T=128, S=128, J=1, E=E))


@NEEDS_GPU
def test_very_negative_scores_with_keys_that_end_in_half_a_block():
    """lse near -120, S = 64 (mod 128): where cuDNN's backward pass on Hopper has given NaN."""
    case = random_case([192, 64], [192, 192], T=192, S=192, shift=4.0)
    assert np.all(np.abs(dense(case)[1][0] + 120) < 20)
    assert_close(case)


@NEEDS_GPU
def test_a_single_query():
    assert_close(random_case([1, 1], [128, 64], T=1, S=128))
    assert_close(random_case([1], [128], T=1, S=128, shift=4.0))


@NEEDS_GPU
def test_without_keys_nothing_comes_out():
    q, k = jnp.ones((1, 8, 4, 64), jnp.bfloat16), jnp.full((1, 8, 2, 64), jnp.nan, jnp.bfloat16)
    lengths = jnp.array([8]), jnp.array([0])
    attended, cotangents = forward_and_backward(q, k, k, *lengths, q, causal=False)
    assert np.all(attended.lse_BxHxT <= -1e30) and np.all(np.isfinite(attended.lse_BxHxT))
    assert not np.any(attended.out_BxTxHxE)
    assert not any(np.any(cotangent) for cotangent in cotangents)
