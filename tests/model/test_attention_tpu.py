"""The TPU kernels: interpreted here against softmax in float64, and compiled for a TPU that is not
here.
"""

import functools
import importlib.util
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from spiral_jax.model.attention import tpu, tpu_tiles
from spiral_jax.model.attention.part import Attended, Cotangents
from spiral_jax.planning.costs import cost_of
from spiral_jax.planning.hlo import parse
from spiral_jax.planning.traffic import uncounted_kernels

pytestmark = pytest.mark.cpu_bits("kernels for TPUs, in Pallas's interpreter")

QUERY_BLOCK, KEY_BLOCK = 128, 256  # of float32 with four heads a key


class Part(NamedTuple):
    """Keys that queries attend to, and how."""

    k: np.ndarray
    v: np.ndarray
    kv_len: np.ndarray
    causal: bool


class Case(NamedTuple):
    """Queries and the parts under one softmax."""

    q: np.ndarray
    q_len: np.ndarray
    parts: tuple[Part, ...]
    d_out: np.ndarray


def _random_case(sizes, q_len, prompt_len, own_len):
    """A prompt of S tokens and T own ones; lengths are lists over B."""
    B, T, S, H, J, E = sizes
    rng = np.random.default_rng(0)

    def normal(*shape):
        # values that bfloat16 holds, so that the oracle sees what the kernel sees
        return np.asarray(jnp.asarray(rng.normal(size=shape), jnp.bfloat16), np.float64)

    # Queries of this size make sharp softmaxes next to flat ones.
    q = normal(B, T, H, E) * 2.0 ** rng.integers(-2, 3, size=(B, T, H, 1))
    prompt = Part(normal(B, S, J, E), normal(B, S, J, E), np.array(prompt_len), causal=False)
    own = Part(normal(B, T, J, E), normal(B, T, J, E), np.array(own_len), causal=True)
    return Case(q, np.array(q_len), (prompt, own), normal(B, T, H, E))


def _behind(length_B, a_BxT):
    """bool: which tokens of `a` lie behind the lengths, with a's number of axes."""
    behind = np.arange(a_BxT.shape[1]) >= length_B[:, None]
    return behind.reshape(behind.shape + (1,) * (a_BxT.ndim - 2))


def _poisoned(a, length_B, poison, dtype=jnp.float32):
    return jnp.asarray(np.where(_behind(length_B, a), poison, a), dtype)


# --- The oracle -----------------------------------------------------------------------------------


class Dense(NamedTuple):
    """Output, log-sum-exp and cotangents of attention to the visible keys of all parts."""

    out: np.ndarray
    lse: np.ndarray
    d_q: np.ndarray
    d_keys: list
    d_values: list


def _dense(case):
    """In float64, entry by entry and head by head; zero in rows and keys that do not exist."""
    B, T, H, E = case.q.shape
    result = Dense(
        np.zeros_like(case.q),
        np.full((B, H, T), -np.inf),
        np.zeros_like(case.q),
        [np.zeros_like(part.k) for part in case.parts],
        [np.zeros_like(part.v) for part in case.parts],
    )
    for b in range(B):
        for h in range(H):
            _add_dense_head(case, result, b, h)
    return result


def _add_dense_head(case, result, b, h):
    rows = case.q_len[b]
    j = h // (case.q.shape[2] // case.parts[0].k.shape[2])
    q, d_out = case.q[b, :rows, h], case.d_out[b, :rows, h]
    k = np.concatenate([part.k[b, : part.kv_len[b], j] for part in case.parts])
    v = np.concatenate([part.v[b, : part.kv_len[b], j] for part in case.parts])
    if not (len(q) and len(k)):
        return

    hidden = [_hidden(part, rows, part.kv_len[b]) for part in case.parts]
    scale = q.shape[-1] ** -0.5
    score = np.where(np.concatenate(hidden, axis=1), -np.inf, scale * q @ k.T)
    top = score.max(axis=1, keepdims=True)
    weight = np.exp(score - top)
    total = weight.sum(axis=1, keepdims=True)
    p = weight / total

    d_p = d_out @ v.T
    d_score = p * (d_p - (p * d_p).sum(axis=1, keepdims=True))
    d_k, d_v = scale * d_score.T @ q, p.T @ d_out

    result.out[b, :rows, h] = p @ v
    result.lse[b, h, :rows] = (top + np.log(total))[:, 0]
    result.d_q[b, :rows, h] = scale * d_score @ k
    start = 0
    for part, d_keys, d_values in zip(case.parts, result.d_keys, result.d_values, strict=True):
        length = part.kv_len[b]
        d_keys[b, :length, j] += d_k[start : start + length]
        d_values[b, :length, j] += d_v[start : start + length]
        start += length


def _hidden(part, rows, length):
    later = np.arange(length) > np.arange(rows)[:, None]
    return later if part.causal else np.zeros_like(later)


# --- The kernels, interpreted ---------------------------------------------------------------------


class Composed(NamedTuple):
    """What the two parts give together."""

    attended: Attended
    parts: tuple[Attended, ...]
    cotangents: tuple[Cotangents, ...]


@functools.partial(jax.jit, static_argnames="causal")
def _compose(q, q_len, keys, values, lengths, d_out, *, causal):
    """Forward of each part, merged by log-sum-exp; backward of each with the merged result."""
    parts = [
        tpu.forward(q, k, v, q_len, length, causal=c)
        for k, v, length, c in zip(keys, values, lengths, causal, strict=True)
    ]
    lse = functools.reduce(jnp.logaddexp, [part.lse_BxHxT for part in parts])
    shares = [jnp.swapaxes(jnp.exp(part.lse_BxHxT - lse), 1, 2)[..., None] for part in parts]
    out = sum(s * part.out_BxTxHxE for s, part in zip(shares, parts, strict=True)).astype(q.dtype)

    # Rows behind the length have no meaning, whoever made them.
    behind = jnp.arange(q.shape[1]) >= q_len[:, None]
    attended = Attended(
        jnp.where(behind[:, :, None, None], jnp.nan, out),
        jnp.where(behind[:, None, :], jnp.nan, lse),
    )
    cotangents = [
        tpu.backward(q, k, v, q_len, length, attended, d_out, causal=c)
        for k, v, length, c in zip(keys, values, lengths, causal, strict=True)
    ]
    return Composed(Attended(out, lse), tuple(parts), tuple(cotangents))


def _run(case, dtype=jnp.float32):
    """Interpreted, with poison behind all lengths."""
    with pltpu.force_tpu_interpret_mode(True):
        return _compose(
            _poisoned(case.q, case.q_len, np.nan, dtype),
            jnp.asarray(case.q_len, jnp.int32),
            [_poisoned(part.k, part.kv_len, np.inf, dtype) for part in case.parts],
            [_poisoned(part.v, part.kv_len, np.nan, dtype) for part in case.parts],
            [jnp.asarray(part.kv_len, jnp.int32) for part in case.parts],
            _poisoned(case.d_out, case.q_len, 1e30, dtype),
            causal=tuple(part.causal for part in case.parts),
        )


def _assert_agrees(case, composed, tolerance):
    expected = _dense(case)
    exists = ~_behind(case.q_len, case.q)[:, :, 0, 0]
    lse = np.swapaxes(composed.attended.lse_BxHxT, 1, 2)[exists]
    expected_lse = np.swapaxes(expected.lse, 1, 2)[exists]
    has_keys = np.isfinite(expected_lse)

    for part in composed.parts:
        assert all(np.isfinite(np.asarray(a, np.float32)).all() for a in part)
    assert (lse[~has_keys] <= -1e30).all()
    _assert_close(lse[has_keys], expected_lse[has_keys], tolerance)
    _assert_close(
        np.asarray(composed.attended.out_BxTxHxE)[exists], expected.out[exists], tolerance
    )

    d_q = sum(np.asarray(c.q_BxTxHxE, np.float64) for c in composed.cotangents)
    _assert_close(d_q, expected.d_q, tolerance)
    for cotangent, d_k, d_v in zip(
        composed.cotangents, expected.d_keys, expected.d_values, strict=True
    ):
        _assert_close(cotangent.k_BxSxJxE, d_k, tolerance)
        _assert_close(cotangent.v_BxSxJxE, d_v, tolerance)


def _assert_zero_behind(case, composed):
    for part, cotangent in zip(case.parts, composed.cotangents, strict=True):
        behind = np.broadcast_to(_behind(part.kv_len, part.k), part.k.shape)
        assert not np.asarray(cotangent.k_BxSxJxE)[behind].any()
        assert not np.asarray(cotangent.v_BxSxJxE)[behind].any()


def _assert_close(result, expected, tolerance):
    """Relative to the largest number of the array, or of 1 where all are small."""
    result = np.asarray(result, np.float64)
    assert np.isfinite(result).all()
    error = np.abs(result - expected).max(initial=0)
    assert error <= tolerance * np.abs(expected).max(initial=1)


# Scores reach 60: float32 holds them to 4e-6, which is then their weight's relative error.
FLOAT32_TOLERANCE = 1e-5

# Weights, d_score and results are rounded to 8 bits, so each is off by up to 2**-9 of itself.
BFLOAT16_TOLERANCE = 2**-7

FLOAT32_SIZES = (6, 300, 300, 8, 2, 64)


@pytest.mark.parametrize(
    ("q_len", "prompt_len"),
    [
        ([0, 1, QUERY_BLOCK - 1, QUERY_BLOCK, QUERY_BLOCK + 1, 300], [300] * 6),
        ([300] * 6, [0, 1, KEY_BLOCK - 1, KEY_BLOCK, KEY_BLOCK + 1, 300]),
        ([300, 257, 256, 255, 2, 1], [1, 2, 299, 257, 130, 0]),
    ],
)
def test_two_parts_under_one_softmax_agree_with_float64(q_len, prompt_len):
    case = _random_case(FLOAT32_SIZES, q_len, prompt_len, own_len=q_len)
    composed = _run(case)
    _assert_agrees(case, composed, FLOAT32_TOLERANCE)
    _assert_zero_behind(case, composed)


def test_fewer_own_keys_than_queries_and_none_at_all():
    """Without any key, the output is 0, log-sum-exp is finite, and all cotangents are 0."""
    lengths = {"prompt_len": [0, 0, 0, 0, 300, 1], "own_len": [0, 0, 0, 1, 0, 130]}
    case = _random_case(FLOAT32_SIZES, [300, 1, 0, 300, 300, 300], **lengths)
    composed = _run(case)
    _assert_agrees(case, composed, FLOAT32_TOLERANCE)
    _assert_zero_behind(case, composed)


def test_bfloat16_agrees_with_float64():
    """Whole lanes of head size, and one head a key."""
    case = _random_case((2, 130, 70, 2, 2, 128), [130, 77], [70, 33], own_len=[130, 77])
    _assert_agrees(case, _run(case, jnp.bfloat16), BFLOAT16_TOLERANCE)


# --- Which tiles are computed and fetched ---------------------------------------------------------


def _shape(T, S, block_q, block_k, causal):
    sizes = {"B": 1, "T": T, "S": S, "J": 1, "R": 2, "E": 128}
    return tpu_tiles.Shape(
        **sizes, block_q=block_q, block_k=block_k, dtype=jnp.dtype("float32"), causal=causal
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("block_q", "block_k"), [(2, 3), (4, 2), (3, 3)])
@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 0), (12, 12), (1, 12), (12, 1), (7, 6), (0, 5)])
def test_nothing_is_computed_or_fetched_that_no_query_sees(causal, block_q, block_k, q_len, kv_len):
    shape = _shape(12, 12, block_q, block_k, causal)
    visible = np.zeros((12, 12), bool)
    visible[:q_len, :kv_len] = True
    visible &= np.tri(12, dtype=bool) if causal else True

    lengths = np.array([q_len]), np.array([kv_len])
    for inside in ("keys", "queries"):
        fetched, needed_blocks = [], []
        outer_blocks, inner_blocks = shape.query_blocks, shape.key_blocks
        place = tpu_tiles.fetch_with_keys_inside
        if inside == "queries":
            outer_blocks, inner_blocks = inner_blocks, outer_blocks
            place = tpu_tiles.fetch_with_queries_inside

        for outer, inner in np.ndindex(outer_blocks, inner_blocks):
            query, key = (outer, inner) if inside == "keys" else (inner, outer)
            tile = tpu_tiles.Tile(shape, query * block_q, key * block_k, q_len, kv_len)
            pairs = visible[query * block_q :, key * block_k :][:block_q, :block_k]
            assert bool(tile.is_needed()) == pairs.any()
            assert bool(tile.is_complete()) == (pairs.all() and pairs.shape == (block_q, block_k))

            blocks = tuple(int(i) for i in place(shape, 0, outer, inner, *lengths))
            fetched.append(blocks)
            if pairs.any():
                assert blocks == (query, key)
                needed_blocks.append(blocks)

        # A block that nothing needs is fetched where a loop starts anew and where lengths end.
        for side in (0, 1):
            assert _changes(fetched, side) <= _changes(needed_blocks, side) + 2


def _changes(blocks, side):
    """How often a sequence of steps fetches a block of one side anew."""
    return sum(a[side] != b[side] for a, b in zip(blocks, blocks[1:], strict=False))


# --- Compiled -------------------------------------------------------------------------------------


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, which compiles for TPUs, is absent"
)
def test_compiles_for_v5e_without_scores_in_memory(monkeypatch):
    """The three kernels with the 4B model's heads, at lengths that are not whole blocks."""
    B, T, S, H, J, E = 1, 1000, 700, 32, 8, 128
    devices = _v5e_devices(monkeypatch)
    mesh = topologies.make_mesh(devices, (len(devices.devices),), ("x",))

    def array(dtype, *shape):
        sharding = NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def attend(q, k, v, q_len, kv_len, d_out):
        attended = tpu.forward(q, k, v, q_len, kv_len, causal=False)
        return tpu.backward(q, k, v, q_len, kv_len, attended, d_out, causal=False)

    q, k = array(jnp.bfloat16, B, T, H, E), array(jnp.bfloat16, B, S, J, E)
    length = array(jnp.int32, B)
    on_every_chip = jax.shard_map(
        attend, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False
    )
    compiled = jax.jit(on_every_chip).lower(q, k, k, length, length, q).compile()

    program = compiled.as_text()
    calls = re.findall(r"%(attention_\w+?)[.\d]* = .*custom-call\(", program)
    assert sorted(calls) == ["attention_d_keys", "attention_d_queries", "attention_forward"]
    sizes = [set(size.split(",")) for size in re.findall(r"\w\d+\[([\d,]+)\]", program)]
    assert not any({"1000", "700"} <= size for size in sizes)

    # 2 + 3 + 4 products, counted by the kernels themselves
    expected = pytest.approx(2 * 9 * B * H * T * S * E, rel=0.01)
    assert compiled.cost_analysis()["flops"] == expected
    module = parse(program)  # as plans read it
    assert cost_of(module, {}).flops == expected and not uncounted_kernels(module)


def _v5e_devices(monkeypatch):
    """Without asking a metadata server that is not there."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # other tests compile meanwhile
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
