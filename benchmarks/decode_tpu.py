"""What does the decode program of a 4B run do on a TPU? Compiled for a slice that need not exist, read from its HLO.

    pip install 'libtpu==0.0.42.*'       # the one that belongs to jax 0.10.2; needs no TPU
    python -m benchmarks.decode_tpu --topology=v5p:2x2x2 --json=docs/decode_tpu.json

Reports, for the program of all slot classes of `configs/qwen3_4b.py` on one chip:
  copies      arrays as large as the smallest cache or weight that the program copies or gathers, beside its arguments
  temporary   memory beside the arguments, as a share of them; the bar is 5 %
  bytes       that one decode step reads and writes in HBM, against weights + allocated keys and values; the bar is 1.3

Bytes are counted from the operands and results of the loop body's instructions, what lies in on-chip memory (S(1) in
its layout) left out, an in-place update or a gather at the size of what it moves: XLA's own cost analysis takes an
update for a pass over the whole cache.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import re
import time

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from benchmarks.machine import machine
from configs import qwen3_4b
from spiral_jax import mesh as meshes
from spiral_jax.model import hf
from spiral_jax.model.architecture import Architecture
from spiral_jax.sampling.programs import abstract_state, decode_program
from spiral_jax.sampling.weights import abstract_weights
from spiral_jax.setup import make_samplers

TOPOLOGY = flags.DEFINE_string("topology", "v5p:2x2x2", "a TPU slice that libtpu knows")
JSON = flags.DEFINE_string("json", None, "file that gets the report")

# config.json of Qwen3-4B-Instruct-2507
ARCH = Architecture(V=151936, D=2560, F=9728, L=36, H=32, J=8, E=128, norm_eps=1e-6, rope_theta=5e6, tied=True)
MOVES = ("copy", "copy-start", "transpose", "all-gather", "all-gather-start", "all-to-all", "collective-permute")


def main(argv: list[str]) -> None:
    c = qwen3_4b.get_config()
    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY.value).devices)
    mesh = Mesh(devices.reshape(-1, c.mesh.fsdp, c.mesh.tensor), meshes.AXES, axis_types=(AxisType.Auto,) * 3)
    engine, _ = make_samplers(c, hf.model_config(ARCH, c.model), mesh, (151645, 151643))
    shards = meshes.group_count_multiple(mesh)
    start = time.monotonic()
    program = decode_program(engine.settings, engine.schedule, engine.schedule.decode_rows(shards)[-1]).run
    report = {"machine": machine(), "topology": TOPOLOGY.value, "classes": [list(row) for row in c.sampling.classes]}
    report |= {"compile_seconds": round(time.monotonic() - start), **read(program, engine)}
    print(json.dumps(report, indent=1))
    if JSON.value:
        pathlib.Path(JSON.value).write_text(json.dumps(report, indent=1) + "\n")


def read(program: jax.stages.Compiled, engine: object) -> dict:
    """The report's numbers; bytes and counts are those of one chip."""
    settings, memory = engine.settings, program.memory_analysis()
    weights = jax.tree.leaves(abstract_weights(settings.config, settings.mesh))
    caches = [
        leaf
        for slots in engine.schedule.classes
        for state in [abstract_state(settings, slots)]
        for leaf in jax.tree.leaves((state.prompt, state.own))
    ]
    on_chip = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape))  # noqa: E731
    smallest = min(on_chip(leaf) for leaf in weights + caches if len(leaf.shape) > 1 and min(leaf.shape) > 64)
    ideal = sum(on_chip(leaf) * leaf.dtype.itemsize for leaf in weights + caches)
    text = program.as_text()
    step_bytes = decode_step_bytes(text)
    return {
        "copies": copies(text, smallest),
        "argument_gb": memory.argument_size_in_bytes / 1e9,
        "temporary_share": memory.temp_size_in_bytes / memory.argument_size_in_bytes,
        "aliased_gb": memory.alias_size_in_bytes / 1e9,
        "weights_and_caches_gb": ideal / 1e9,
        "step_gb": step_bytes / 1e9,
        "step_over_ideal": step_bytes / ideal,
    }


def copies(text: str, smallest: int) -> dict[str, int]:
    """How often the program moves an array of at least `smallest` elements, by operation and shape."""
    found: dict[str, int] = {}
    for kind, shape, operation in re.findall(rf"= (\w+)\[([\d,]*)\]\S* ({'|'.join(MOVES)})\(", text):
        if math.prod(int(size) for size in shape.split(",") if size) >= smallest:
            name = f"{operation} {kind}[{shape}]"
            found[name] = found.get(name, 0) + 1
    return found


BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (\([^=]*?\)|\S+) ([\w\-]+)\((.*)$")
MOVES_NOTHING = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "iota", "copy-done", "after-all")
ENTERS = ("while", "conditional", "call")


def decode_step_bytes(text: str) -> int:
    """HBM bytes of one pass through the body of the decode loop, loops and branches inside it taken once."""
    parts = {m[1]: m[2] for m in re.finditer(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.M | re.S)}

    def holds_a_layer(name: str, seen: set[str]) -> bool:
        if name in seen or name not in parts:
            return False
        seen.add(name)
        called = re.findall(r"(?:calls|body|to_apply)=%?([\w.\-]+)", parts[name])
        return "Block.project" in parts[name] or any(holds_a_layer(callee, seen) for callee in called)

    (body,) = {name for name in re.findall(r" while\([^\n]*body=%?([\w.\-]+)", text) if holds_a_layer(name, set())}
    return _bytes_of(parts, body)


def _bytes_of(parts: dict[str, str], name: str) -> int:
    total, types = 0, {}
    for line in parts[name].splitlines():
        if not (match := INSTRUCTION.match(line)):
            continue
        result, kind, operation, rest = match.groups()
        types[result] = kind
        if operation in ENTERS:
            keys = r"(?:body|to_apply|true_computation|false_computation|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
            called = [callee for group in re.findall(keys, rest) for callee in re.findall(r"[\w.\-]+", group)]
            branches = [_bytes_of(parts, callee) for callee in called if callee in parts]
            total += max(branches, default=0)
        if operation in MOVES_NOTHING + ENTERS:
            continue
        operands = [_hbm_bytes(types.get(operand, "")) for operand in re.findall(r"%([\w.\-]+)", rest.split("), ")[0])]
        moved = sum(operands) + (
            0 if operation == "copy-start" else _hbm_bytes(kind)
        )  # its result names its source too
        fused = re.search(r"calls=%([\w.\-]+)", rest)
        inside = parts.get(fused[1], "") if fused else line
        for updated in re.findall(r"= (\S+) dynamic-update-slice\(", inside):
            moved -= 2 * _hbm_bytes(updated)  # read and written only where it changes
        if re.search(r" gather\(", inside):
            moved -= max(operands, default=0)
        total += max(moved, 0)
    return total


def _hbm_bytes(kind: str) -> int:
    return sum(
        BYTES[dtype] * math.prod(int(size) for size in shape.split(",") if size)
        for dtype, shape, layout in ARRAY.findall(kind)
        if dtype in BYTES and "S(1)" not in layout
    )


if __name__ == "__main__":
    app.run(main)
