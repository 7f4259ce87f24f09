"""What one chip computes, moves and sends in a compiled program, read from its HLO.

A walk that takes a loop's body as often as the loop runs. XLA's own cost analysis counts a loop's
body once, an update for a pass over the whole array, and no collective.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import NamedTuple

from spiral_jax.planning.hlo import Computation, Instruction, Module
from spiral_jax.planning.kernels import kernel_flops
from spiral_jax.planning.traffic import COLLECTIVES, START, hbm_bytes, targets

# Operations that move nothing: they name, or make what is not stored.
_FREE = {
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "constant",
    "iota",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "domain",
    "async-done",
    "async-update",
    *(f"{kind}-done" for kind in COLLECTIVES),
}


class UnknownLoop(ValueError):
    """A loop whose number of passes the program's text does not say, and nobody else has said."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one chip does.

    Attributes:
      flops: operations of matrix products, two a multiply-add.
      hbm_bytes: read and written in HBM.
      sent_bytes: to other chips, by kind of collective.
    """

    flops: float = 0.0
    hbm_bytes: float = 0.0
    sent_bytes: dict[str, float] = dataclasses.field(default_factory=dict)

    def __add__(self, other: Cost) -> Cost:
        sent = {
            kind: self.sent_bytes.get(kind, 0.0) + other.sent_bytes.get(kind, 0.0)
            for kind in self.sent_bytes | other.sent_bytes
        }
        return Cost(self.flops + other.flops, self.hbm_bytes + other.hbm_bytes, sent)

    def __mul__(self, times: float) -> Cost:
        sent = {kind: times * sent for kind, sent in self.sent_bytes.items()}
        return Cost(times * self.flops, times * self.hbm_bytes, sent)

    @property
    def all_sent_bytes(self) -> float:
        return sum(self.sent_bytes.values())


def cost_of(
    module: Module, passes: dict[str, float], kernels: dict[str, Cost] | None = None
) -> Cost:
    """The whole program.

    Args:
      passes: how often loops run whose text does not say so: a pattern of `Instruction.op_name` ->
        passes, which may be 0, or a mean. The first that matches counts.
      kernels: costs of a call of kernels that read as much as is in use, by pattern too.

    Raises:
      UnknownLoop: a loop that no pattern matches.
    """
    walk = _Walk(module, passes, kernels or {})
    return walk.computation(module.entry.name)


class _Walk:
    def __init__(self, module: Module, passes: dict[str, float], kernels: dict[str, Cost]):
        self.module, self.passes, self.kernels = module, passes, kernels
        self.computation = functools.cache(self._computation)

    def _computation(self, name: str) -> Cost:
        where, total = self.module.computations[name], Cost()
        for instruction in where.instructions.values():
            total += self._instruction(instruction, where)
        return total

    def _instruction(self, instruction: Instruction, where: Computation) -> Cost:
        operation = instruction.operation
        if operation == "while":
            times = self._passes(instruction, where)
            return self._all_called(instruction) * times if times else Cost()
        if operation == "conditional":
            branches = [self.computation(name) for name in instruction.called]
            return max(branches, key=lambda cost: (cost.flops, cost.hbm_bytes))
        if operation in ("call", "async-start"):
            return self._all_called(instruction)
        if operation in _FREE:
            return Cost()
        if operation == "custom-call":
            for pattern, cost in self.kernels.items():
                if re.search(pattern, instruction.op_name):
                    return cost
        moved = hbm_bytes(instruction, where, self.module)
        kind = operation.removesuffix("-start")
        if kind in COLLECTIVES:
            sent = self._sent(kind, instruction, where)
            return Cost(hbm_bytes=moved, sent_bytes=sent)
        return Cost(self._flops(instruction, where), moved, self._fused_sent(instruction))

    def _all_called(self, instruction: Instruction) -> Cost:
        return sum((self.computation(name) for name in instruction.called), Cost())

    def _flops(self, instruction: Instruction, where: Computation) -> float:
        if instruction.operation == "dot":
            return _dot_flops(instruction, where)
        if instruction.operation == "convolution":
            return _convolution_flops(instruction, where)
        if instruction.operation == "custom-call":
            return kernel_flops(instruction, where) or 0.0
        if instruction.operation == "fusion":
            inside = self.module.computations[instruction.called[0]]
            return sum(self._flops(part, inside) for part in inside.instructions.values())
        return 0.0

    def _fused_sent(self, instruction: Instruction) -> dict[str, float]:
        """What is sent by collectives that run beside the work of a fusion.

        The compiler writes such a collective into several fusions; it is counted where it starts.
        """
        if instruction.operation != "fusion":
            return {}
        inside = self.module.computations[instruction.called[0]]
        starts_here = START in targets(inside)
        total = Cost()
        for part in inside.instructions.values():
            if part.operation not in COLLECTIVES:
                total += Cost(sent_bytes=self._fused_sent(part))
            elif starts_here:
                total += Cost(sent_bytes=self._sent(part.operation, part, inside))
        return total.sent_bytes

    def _sent(self, kind: str, collective: Instruction, where: Computation) -> dict[str, float]:
        """Bytes that a chip sends on a ring of the collective's group."""
        operands = sum(
            array.bytes for name in collective.operands for array in where.instructions[name].arrays
        )
        n = _group_size(collective, self.module.partitions)
        share = (n - 1) / n
        sent = {
            "all-gather": operands * (n - 1),
            "all-reduce": 2 * share * operands,
            "reduce-scatter": share * operands,
            "all-to-all": share * operands,
            "collective-permute": operands,
        }
        return {kind: sent[kind]}

    def _passes(self, loop: Instruction, where: Computation) -> float:
        for pattern, times in self.passes.items():
            if re.search(pattern, loop.op_name):
                return times
        if match := re.search(r"known_trip_count[^\d}]*(\d+)", loop.attributes):
            return int(match[1])
        times = _counted_passes(loop, where, self.module)
        if times is None:
            name = f"{loop.name} ({loop.op_name or 'of the compiler'})"
            raise UnknownLoop(f"loop {name}: how often it runs is unknown")
        return times


class _Bound(NamedTuple):
    """The condition `smaller < larger` under which a loop goes on."""

    smaller: Instruction
    larger: Instruction


def _counted_passes(loop: Instruction, where: Computation, module: Module) -> int | None:
    """Passes of `for (i = first; i < end; i += 1)` with constants for both; else None."""
    bound = _bound(module.computations[loop.attribute("condition")], module)
    if bound is None:
        return None
    start = _value_at_start(bound.smaller, loop, where)
    end = _value_at_start(bound.larger, loop, where)
    return None if start is None or end is None else max(0, end - start)


def _bound(condition: Computation, module: Module) -> _Bound | None:
    """The comparison that a loop's condition consists of; None if it is anything else."""
    test = condition.through(condition.root.name)
    if test.operation == "fusion":
        # The comparison may stand alone in a computation of its own; what that takes as
        # parameters are instructions of the condition.
        inside = module.computations[test.called[0]]
        compare = inside.through(inside.root.name)
        given = dict(zip([p.name for p in inside.parameters], test.operands, strict=True))
        sides = [inside.through(name) for name in compare.operands]
        sides = [condition.through(given[s.name]) if s.name in given else s for s in sides]
    else:
        compare = test
        sides = [condition.through(name) for name in compare.operands]
    if compare.operation != "compare":
        return None
    direction = compare.attribute("direction")
    if direction == "LT":
        return _Bound(smaller=sides[0], larger=sides[1])
    if direction == "GT":
        return _Bound(smaller=sides[1], larger=sides[0])
    return None


def _value_at_start(side: Instruction, loop: Instruction, where: Computation) -> int | None:
    """Value of one side of a loop's condition before the first pass, if it is a constant."""
    if side.operation == "get-tuple-element":
        carried = where.through(loop.operands[0])
        if carried.operation != "tuple":
            return None
        side = where.through(carried.operands[int(side.attribute("index"))])
    is_number = side.operation == "constant" and re.fullmatch(r"-?\d+", side.text)
    return int(side.text) if is_number else None


def _dot_flops(dot: Instruction, where: Computation) -> float:
    left = where.instructions[dot.operands[0]].arrays[0].shape
    axes = re.findall(r"\d+", dot.attribute("lhs_contracting_dims") or "")
    contracted = math.prod(left[int(axis)] for axis in axes)
    return 2.0 * math.prod(dot.arrays[0].shape) * contracted


def _convolution_flops(convolution: Instruction, where: Computation) -> float:
    """Operations of a convolution, which a TPU's matrix products are.

    A batch axis of a product may be a spatial one whose window meets one element.
    """
    left, right = (where.instructions[name].arrays[0].shape for name in convolution.operands[:2])
    out = convolution.arrays[0].shape
    left_labels, right_labels, out_labels = re.split("_|->", convolution.attribute("dim_labels"))
    window = convolution.attribute("window") or ""
    fields = {name: value.split("x") for name, value in re.findall(r"(\w+)=([\dx_\-]+)", window)}

    def number(field: str, axis: int, default: int) -> int:
        return int(fields[field][axis]) if field in fields else default

    taps = 1
    for label in filter(str.isdigit, out_labels):
        axis = int(label)
        padding = fields["pad"][axis] if "pad" in fields else "0_0"
        taps *= _valid_taps(
            size=left[left_labels.index(label)],
            kernel=right[right_labels.index(label)],
            out=out[out_labels.index(label)],
            stride=number("stride", axis, 1),
            low=int(padding.split("_")[0]),
            left_dilation=number("lhs_dilate", axis, 1),
            right_dilation=number("rhs_dilate", axis, 1),
        )
    features = right[right_labels.index("i")] * out[out_labels.index("f")]
    groups = int(convolution.attribute("batch_group_count") or 1)
    return 2.0 * taps * out[out_labels.index("b")] * features / groups


@functools.cache
def _valid_taps(
    *,
    size: int,
    kernel: int,
    out: int,
    stride: int,
    low: int,
    left_dilation: int,
    right_dilation: int,
) -> int:
    """Pairs of (output position, window position) along one axis that meet an element.

    The others meet padding, or a hole of a dilated operand.
    """
    count = 0
    reach = (size - 1) * left_dilation
    for k in range(kernel):
        for o in range(out):
            at = o * stride - low + k * right_dilation
            count += 0 <= at <= reach and at % left_dilation == 0
    return count


_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))?\s*\{([^}]*)\}"
)


def _group_size(collective: Instruction, partitions: int) -> int:
    """Chips of one group of a collective.

    `replica_groups` is a list, an iota [groups, size], or axes of a mesh.
    """
    if match := _MESH_GROUPS.search(collective.attributes):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        axes = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, _, part in axes)
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", collective.attributes):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", collective.attributes):
        return len(match[1].split(","))
    return partitions
