"""Plans for GPUs: the compiler that may not be there, library calls, and a real program."""

import importlib.util

import pytest
from test_costs import module_of

from configs import tiny
from spiral_jax.core.config import ConfigError
from spiral_jax.planning import gpus
from spiral_jax.planning.compiled import compile_kept
from spiral_jax.planning.costs import cost_of
from spiral_jax.planning.hlo import parse
from spiral_jax.planning.inventory import take_inventory
from spiral_jax.planning.kernels import counted_by_formula, workspace_bytes
from spiral_jax.planning.planned_program import decode_program, prefill_program
from spiral_jax.planning.profile import profile
from spiral_jax.planning.shipped_models import planned_model
from spiral_jax.planning.text import source_line
from spiral_jax.planning.topology import find_topology, make_mesh
from spiral_jax.planning.traffic import uncounted_kernels
from spiral_jax.planning.usage import usage_of
from spiral_jax.planning.work import Assumptions, work_of_step

NEEDS_COMPILER = pytest.mark.skipif(
    gpus.missing_compiler() is not None, reason=str(gpus.missing_compiler())
)

B, T, S, H, J, E = 2, 256, 512, 8, 4, 64


def attention_call(target, results, mask):
    config = (
        f'{{"cudnn_fmha_backend_config": {{"intermediate_tensor_shape": '
        f'{{"dimensions": ["{B}", "{H}", "{T}", "{S}"]}}, "mask_type": "{mask}"}}}}'
    )
    return module_of(
        f"  %q = bf16[{B},{T},{H},{E}] parameter(0)\n"
        f"  %k = bf16[{B},{S},{J},{E}] parameter(1)\n"
        f"  ROOT %a = ({results}, u8[0]) custom-call(%q, %k), "
        f'custom_call_target="{target}", backend_config={config}'
    )


@pytest.mark.parametrize(("mask", "share"), [("PADDING", 1), ("PADDING_CAUSAL", 0.5)])
def test_attention_is_two_products_forward_and_five_backward(mask, share):
    product = 2 * B * H * T * S * E * share
    out, keys = f"bf16[{B},{H},{T},{E}]", f"bf16[{B},{J},{S},{E}]"

    forward = attention_call("__cudnn$fmhaSoftmax", f"{out}, f32[{B},{H},{T}]", mask)
    cost = cost_of(forward, {})
    assert cost.flops == 2 * product
    queries = 2 * B * T * H * E
    assert cost.hbm_bytes == 2 * queries + 2 * B * S * J * E + 4 * B * H * T
    assert workspace_bytes(forward) == 0

    backward = attention_call("__cudnn$fmhaSoftmaxBackward", f"{out}, {keys}, {keys}", mask)
    assert cost_of(backward, {}).flops == 5 * product
    sums = 4 * B * H * T * (E + 1)
    keys_of_query_heads = 2 * 2 * B * S * H * E
    assert workspace_bytes(backward) == sums + keys_of_query_heads
    assert counted_by_formula(backward) == ["__cudnn$fmhaSoftmaxBackward"]
    assert not uncounted_kernels(backward)


def test_a_cublas_call_is_a_product_and_another_call_is_named():
    module = module_of(
        "  %a = bf16[16,32] parameter(0)\n"
        "  %b = bf16[32,24] parameter(1)\n"
        '  %p = (bf16[16,24], s8[64]) custom-call(%a, %b), custom_call_target="__cublas$gemm", '
        'backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
        '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}\n'
        '  ROOT %s = f32[16] custom-call(%p), custom_call_target="other"'
    )
    assert cost_of(module, {}).flops == 2 * 16 * 24 * 32
    assert counted_by_formula(module) == ["__cublas$gemm"]
    assert uncounted_kernels(module) == ["other"]


def test_without_the_plugin_gpus_are_planned_by_arithmetic(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "[plan-gpu]" in gpus.missing_compiler()
    assert find_topology("b200:16").devices is None


def test_a_plugin_that_cannot_be_loaded_is_an_error_of_one_line(monkeypatch):
    def fail(**arguments):
        raise NotImplementedError("topology not implemented for cuda\nmore")

    monkeypatch.setattr(gpus, "missing_compiler", lambda: None)
    monkeypatch.setattr(gpus.topologies, "get_topology_desc", fail)
    with pytest.raises(ConfigError) as raised:
        find_topology("h100:8")
    message = str(raised.value)
    assert "--topology=h100:8" in message and "not implemented for cuda" in message
    assert "[plan-gpu]" in message and "\n" not in message


def test_hosts_are_full_or_there_is_one(monkeypatch):
    monkeypatch.setattr(gpus, "missing_compiler", lambda: None)
    with pytest.raises(ConfigError, match=r"h100:12: .* multiple of 8"):
        find_topology("h100:12")


@NEEDS_COMPILER
@pytest.mark.parametrize("name", ["h100:8", "h200:1", "b200:16", "rtx4090:1"])
def test_gpus_are_described_to_the_compiler(name):
    topology = find_topology(name)
    assert len(topology.devices) == topology.chips
    assert topology.devices[0].device_kind.startswith(topology.chip.name)
    assert len({device.process_index for device in topology.devices}) == max(1, topology.chips // 8)


@NEEDS_COMPILER
def test_a_program_of_the_tiny_model_computes_what_the_ideal_count_says(tmp_path, monkeypatch):
    monkeypatch.setenv("SPIRAL_JAX_PLANS", str(tmp_path))
    c = tiny.get_config()
    topology = find_topology("h100:1")
    mesh = make_mesh(c.mesh, topology)
    inventory = take_inventory(c, planned_model(c.model)[0], mesh, topology.chip.hbm_bytes)
    result = profile(prefill_program(inventory, prompt=5), topology, free=0.0)
    assert result.compiled and result.fits and not result.kernels
    assert 0.99 <= result.flops_ratio <= 1.1
    assert "compiled programs' HLO" in source_line([result])


@NEEDS_COMPILER
def test_decoding_lays_no_weights_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setenv("SPIRAL_JAX_PLANS", str(tmp_path))
    c = tiny.get_config()
    topology = find_topology("h100:1")
    mesh = make_mesh(c.mesh, topology)
    inventory = take_inventory(c, planned_model(c.model)[0], mesh, topology.chip.hbm_bytes)
    works = work_of_step(inventory.settings, Assumptions())
    usage = usage_of(works, inventory.engine.schedule, row_occupancy=1.0)
    program, arch = decode_program(inventory, usage), inventory.model.arch
    options = topology.compiler_options | program.compiler_options
    module = parse(compile_kept(program.lower(), topology.name, options).text)
    joined = [
        each.arrays[0].shape
        for each in module.instructions()
        if each.operation == "concatenate" and each.arrays[0].dtype == "f32"
    ]
    narrowest = arch.J * arch.E
    wide = [shape for shape in joined if shape[0] in (arch.D, arch.F) and shape[1] >= narrowest]
    assert not wide
