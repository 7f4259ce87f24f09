"""What a compiled program costs, against programs whose cost can be counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from spiral_jax.planning.costs import Cost, UnknownLoop, cost_of
from spiral_jax.planning.hlo import parse
from spiral_jax.planning.profile import unit_and_call

OF_CPU_PROGRAM = pytest.mark.cpu_bits("XLA's program for CPUs as text")

M, N, K = 16, 24, 32
PRODUCT = 2 * M * N * K


def compiled(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    return parse(jax.jit(function).lower(*arguments).compile().as_text())


def module_of(body, computations=""):
    """A module whose entry computation has these lines."""
    return parse(
        f"HloModule m, num_partitions=8\n\n{computations}\nENTRY %main () -> f32[] {{\n{body}\n}}\n"
    )


@OF_CPU_PROGRAM
def test_a_product_is_two_operations_a_multiply_add_and_moves_its_arrays():
    module = compiled(lambda a, b: a @ b, ((M, K), jnp.float32), ((K, N), jnp.float32))
    assert cost_of(module, {}) == Cost(PRODUCT, 4 * (M * K + K * N + M * N))


@OF_CPU_PROGRAM
def test_a_loop_counts_as_often_as_it_runs_and_inner_loops_multiply():
    def inner(x, w):
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x)

    def outer(x, w):
        return jax.lax.scan(lambda x, w: (inner(x, w), None), x, w)[0]

    module = compiled(outer, ((M, K), jnp.float32), ((5, K, K), jnp.float32))
    assert cost_of(module, {}).flops == 5 * 3 * 2 * M * K * K


@OF_CPU_PROGRAM
def test_a_scan_reads_of_stacked_weights_one_layer_a_pass():
    layers = 64

    def scan(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    module = compiled(scan, ((1, K), jnp.float32), ((layers, K, K), jnp.float32))
    weights, read = 4 * layers * K * K, cost_of(module, {}).hbm_bytes
    # a slice may be copied out before it is used: not `layers` times all
    assert weights <= read <= 3.5 * weights


@OF_CPU_PROGRAM
def test_an_update_in_place_moves_what_changes():
    def write(cache, row):
        return jax.lax.dynamic_update_slice(cache, row, (7, 0))

    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4096, K), (1, K))]
    module = parse(jax.jit(write, donate_argnums=0).lower(*arguments).compile().as_text())
    assert cost_of(module, {}).hbm_bytes <= 4 * 3 * K


@OF_CPU_PROGRAM
def test_a_loop_of_unknown_length_must_be_stated():
    def some(x, w, n):
        with jax.named_scope("tokens"):
            return jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ w), x @ w)

    module = compiled(some, ((M, K), jnp.float32), ((K, K), jnp.float32), ((), jnp.int32))
    with pytest.raises(UnknownLoop, match="tokens/while"):
        cost_of(module, {})
    once = 2 * M * K * K
    assert cost_of(module, {r"/tokens/while$": 2.5}).flops == 3.5 * once
    unit, call = unit_and_call(module, r"/tokens/while$", {})
    assert (unit.flops, call.flops) == (once, once)


def test_a_kernel_that_reads_what_is_in_use_costs_what_is_said_of_it():
    body = """
  %pool = bf16[4096,128]{1,0} parameter(0)
  %own = f32[16]{0} custom-call(%pool), custom_call_target="k", metadata={op_name="f/own/call"}
  ROOT %all = f32[16]{0} custom-call(%pool), custom_call_target="k", metadata={op_name="f/all"}"""
    module, said = module_of(body), Cost(7.0, 11.0)
    whole = cost_of(module, {}).hbm_bytes
    assert whole == 2 * (2 * 4096 * 128 + 4 * 16)
    assert cost_of(module, {}, {r"\bown\b": said}) == Cost(7.0, whole / 2 + 11.0)


def test_of_a_branch_the_dearer_side_counts():
    body = """
  %p = pred[] constant(true)
  %x = f32[16,32]{1,0} constant({...})
  ROOT %out = f32[16,32]{1,0} conditional(%p, %x, %x), true_computation=%cheap, \
false_computation=%dear"""
    computations = """
%cheap (x: f32[16,32]) -> f32[16,32] {
  ROOT %x.1 = f32[16,32]{1,0} parameter(0)
}

%dear (x: f32[16,32]) -> f32[16,32] {
  %x.2 = f32[16,32]{1,0} parameter(0)
  %square = f32[16,16]{1,0} dot(%x.2, %x.2), lhs_contracting_dims={1}
  ROOT %back = f32[16,32]{1,0} dot(%square, %x.2), lhs_contracting_dims={1}
}
"""
    assert cost_of(module_of(body, computations), {}).flops == 2 * 2 * 16 * 16 * 32


@pytest.mark.parametrize(
    "line, flops",
    [
        # a plain product as the TPU compiler writes it
        ("%y = f32[24,40] convolution(%a, %b), dim_labels=bf_io->bf", 2 * 24 * 40 * 32),
        # a batch of 8 products: the batch is an axis whose window meets one element
        (
            "%y = f32[8,24,40] convolution(%c, %d), window={size=8 stride=7 pad=0_0 lhs_dilate=8}, "
            "dim_labels=0bf_0io->0bf",
            8 * 2 * 24 * 40 * 32,
        ),
        # a true one-dimensional convolution of 10 positions with 3 taps
        (
            "%y = f32[24,8,40] convolution(%e, %f), window={size=3}, dim_labels=b0f_0io->b0f",
            8 * 3 * 2 * 24 * 40 * 32,
        ),
        # padded by one on both sides: the outer positions meet two elements
        (
            "%y = f32[24,10,40] convolution(%e, %f), window={size=3 pad=1_1}, "
            "dim_labels=b0f_0io->b0f",
            (8 * 3 + 2 * 2) * 2 * 24 * 40 * 32,
        ),
    ],
)
def test_convolutions_count_the_taps_that_meet_an_element(line, flops):
    operands = """
  %a = f32[24,32]{1,0} parameter(0)
  %b = f32[32,40]{1,0} parameter(1)
  %c = f32[8,24,32]{2,1,0} parameter(2)
  %d = f32[8,32,40]{2,1,0} parameter(3)
  %e = f32[24,10,32]{2,1,0} parameter(4)
  %f = f32[3,32,40]{2,1,0} parameter(5)
  ROOT """
    assert cost_of(module_of(operands + line), {}).flops == flops


@pytest.mark.parametrize(
    "groups, size",
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([2,4]T(1,0)) {'axis_0'}", 2),
        ("replica_groups={}", 8),
    ],
)
@pytest.mark.parametrize(
    "kind, operand, sent",
    [
        ("all-gather", 100, lambda n: 400 * (n - 1)),  # a part goes to all others
        ("all-reduce", 100, lambda n: 2 * 400 * (n - 1) / n),  # reduce-scatter, then all-gather
        ("reduce-scatter", 100, lambda n: 400 * (n - 1) / n),
        ("collective-permute", 100, lambda n: 400),
    ],
)
def test_bytes_sent_on_a_ring_of_the_collectives_group(groups, size, kind, operand, sent):
    body = f"""
  %x = f32[{operand}]{{0}} parameter(0)
  ROOT %y = f32[{operand}]{{0}} {kind}(%x), {groups}, use_global_device_ids=true"""
    cost = cost_of(module_of(body), {})
    assert cost.sent_bytes == {kind: pytest.approx(sent(size))} and cost.flops == 0


def test_what_lies_on_the_chip_moves_nothing():
    body = """
  %x = f32[1024]{0} parameter(0)
  %start = (f32[1024]{0}, f32[1024]{0:S(1)}, u32[]{:S(2)}) copy-start(%x)
  %near = f32[1024]{0:S(1)} copy-done(%start)
  %y = f32[1024]{0:S(1)} negate(%near)
  ROOT %z = f32[1024]{0} copy(%y)"""
    assert cost_of(module_of(body), {}).hbm_bytes == 2 * 4096  # read once, written once
