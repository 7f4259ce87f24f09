"""What does the decode program of a 4B run do on TPUs, and how fast could it be? From its HLO.

It is compiled for slices that need not exist, with pages in bfloat16 and in int8.

    pip install ".[plan]"
    python -m benchmarks.decode_tpu --json=docs/results/decode_tpu.json

Reports, for the program of all rows of `configs/qwen3_4b.py` on one chip of each slice:
  copies      arrays in HBM as large as the smallest array of pages or weights that the program
              copies or gathers, beside its arguments
  temporary   memory beside the arguments, as a share of them; the bar is 5 %
  bytes       that one decode step reads and writes in HBM, against weights and the keys and values
              that are used, as `spiral_jax.plan` assumes; the bar is 1.3. Kernels count what is
              used, by formula
  seconds     of decoding in a step of the paper's batch, at the roofline
"""

from __future__ import annotations

import json
import math
import pathlib
from collections import Counter
from typing import Any

import jax
from absl import app, flags

from benchmarks.machine import commit, machine
from benchmarks.scaling import MACHINES
from configs import qwen3_4b
from spiral_jax.planning.compiled import compile_kept
from spiral_jax.planning.hlo import Module, parse
from spiral_jax.planning.inventory import take_inventory
from spiral_jax.planning.planned_program import decode_program
from spiral_jax.planning.profile import unit_and_call
from spiral_jax.planning.roofline import roofline
from spiral_jax.planning.settings import apply_overrides
from spiral_jax.planning.shipped_models import planned_model
from spiral_jax.planning.topology import find_topology, make_mesh
from spiral_jax.planning.usage import usage_of
from spiral_jax.planning.work import Assumptions, work_of_step

TOPOLOGY = flags.DEFINE_list("topology", ["v5e:8x8", "v6e:8x8", "v5p:4x4x4"], "TPU slices")
JSON = flags.DEFINE_string("json", None, "file that gets the report")

MOVES = (
    "copy",
    "copy-start",
    "transpose",
    "all-gather",
    "all-gather-start",
    "all-to-all",
    "collective-permute",
)


def main(argv: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")
    reports = []
    for topology in TOPOLOGY.value:
        for cache_dtype in ("compute", "int8"):
            reports.append(report(topology, cache_dtype))
            print(json.dumps(reports[-1], indent=1), flush=True)
            if JSON.value:
                pathlib.Path(JSON.value).write_text(json.dumps(reports, indent=1) + "\n")


def report(name: str, cache_dtype: str) -> dict[str, Any]:
    """Of the program on one slice."""
    topology = find_topology(name)
    changes = MACHINES[name].overrides() | {"sampling.cache_dtype": cache_dtype}
    c = apply_overrides(qwen3_4b.get_config(), changes)
    model, _ = planned_model(c.model, topology.devices)
    inventory = take_inventory(c, model, make_mesh(c.mesh, topology), topology.chip.hbm_bytes)
    assumed = Assumptions()
    works = work_of_step(inventory.settings, assumed)
    usage = usage_of(works, inventory.engine.schedule, assumed.row_occupancy)
    program = decode_program(inventory, usage)

    options = topology.compiler_options | program.compiler_options
    compiled = compile_kept(program.lower(), topology.name, options or None)
    module = parse(compiled.text)
    step, _ = unit_and_call(module, program.unit_loop, program.passes, program.kernels)
    bound = roofline(step, topology.chip, topology.chips)
    steps = sum(work.sampled_tokens for work in works) / (inventory.shards * usage.rows)
    return {
        "machine": machine(),
        "commit": commit(),
        "topology": topology.name,
        "cache_dtype": cache_dtype,
        "sampler": inventory.pages(),
        "rows_that_draw": usage.rows * inventory.shards,
        "bound_by": usage.bound,
        "compile_seconds": round(compiled.seconds),
        "copies": copies(module, smallest_array([inventory.decode_weights, inventory.pool])),
        "argument_gb": compiled.arguments / 1e9,
        "temporary_share": compiled.temporary / compiled.arguments,
        "aliased_gb": compiled.aliased / 1e9,
        "weights_and_used_tokens_gb": program.ideal_hbm_bytes / 1e9,
        "step_gb": step.hbm_bytes / 1e9,
        "step_over_ideal": step.hbm_bytes / program.ideal_hbm_bytes,
        "step_ms": bound.seconds * 1e3,
        "decode_seconds": steps * bound.seconds,
    }


def smallest_array(tree: Any) -> int:
    """Elements of the smallest array of pages or matrix of a tree of shapes, on one chip."""
    shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(tree)]
    return min(math.prod(shape) for shape in shapes if len(shape) > 1 and min(shape) > 64)


def copies(module: Module, smallest: int) -> dict[str, int]:
    """How often the program moves an array to HBM, by operation and shape.

    Args:
      smallest: elements of the arrays that count, at least.
    """
    counts = Counter()
    for instruction in module.instructions():
        if instruction.operation not in MOVES:
            continue
        array = instruction.arrays[0]
        # one on the chip is read ahead of its use: no other array in HBM
        if math.prod(array.shape) >= smallest and not array.on_chip:
            counts[f"{instruction.operation} {array.dtype}{list(array.shape)}"] += 1
    return dict(counts)


if __name__ == "__main__":
    app.run(main)
