"""What one chip computes, moves and sends in a compiled program, read from its HLO: a walk that
takes a loop's body as often as the loop runs.

XLA's own cost analysis counts a loop's body once, an update for a pass over the whole array, and no
collective.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

from spiral_jax.planning.hlo import Computation, Instruction, Module
from spiral_jax.planning.traffic import COLLECTIVES, START, hbm_bytes, targets

# Operations that move nothing: they name, or make what is not stored.
_FREE = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "iota", "after-all", "partition-id",
         "replica-id", "opt-barrier", "domain")  # fmt: skip


class UnknownLoop(ValueError):
    """A loop whose number of passes the program's text does not say, and nobody else has said."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one chip: operations of matrix products (two a multiply-add), bytes read and written in HBM, bytes sent to
    other chips by kind of collective."""

    flops: float = 0.0
    hbm_bytes: float = 0.0
    sent_bytes: dict[str, float] = dataclasses.field(default_factory=dict)

    def __add__(self, other: Cost) -> Cost:
        kinds = self.sent_bytes.keys() | other.sent_bytes.keys()
        sent = {
            kind: self.sent_bytes.get(kind, 0.0) + other.sent_bytes.get(kind, 0.0) for kind in kinds
        }
        return Cost(self.flops + other.flops, self.hbm_bytes + other.hbm_bytes, sent)

    def __mul__(self, times: float) -> Cost:
        sent = {kind: times * sent for kind, sent in self.sent_bytes.items()}
        return Cost(times * self.flops, times * self.hbm_bytes, sent)

    @property
    def all_sent_bytes(self) -> float:
        return sum(self.sent_bytes.values())


def cost_of(module: Module, passes: dict[str, float]) -> Cost:
    """The whole program.

    Args:
      passes: how often loops run whose text does not say so: a pattern of `Instruction.op_name` ->
        passes, which may be 0, or a mean. The first that matches counts.

    Raises:
      UnknownLoop: a loop that no pattern matches.
    """
    walk = _Walk(module, passes)
    return walk.computation(module.entry.name)


class _Walk:
    def __init__(self, module: Module, passes: dict[str, float]):
        self.module, self.passes = module, passes
        self.computation = functools.cache(self._computation)

    def _computation(self, name: str) -> Cost:
        where, total = self.module.computations[name], Cost()
        for one in where.instructions.values():
            total += self._instruction(one, where)
        return total

    def _instruction(self, one: Instruction, where: Computation) -> Cost:
        if one.operation == "while":
            times = self._passes(one, where)
            inside = (
                Cost()
                if times == 0
                else sum((self.computation(name) for name in one.called), Cost())
            )
            return inside * times
        if one.operation == "conditional":
            return max(
                (self.computation(name) for name in one.called),
                key=lambda cost: (cost.flops, cost.hbm_bytes),
            )
        if one.operation in ("call", "async-start"):
            return sum((self.computation(name) for name in one.called), Cost())
        if one.operation in _FREE or one.operation in ("async-done", "async-update"):
            return Cost()
        base = one.operation.removesuffix("-start")
        if base in COLLECTIVES:
            return Cost(
                hbm_bytes=hbm_bytes(one, where, self.module),
                sent_bytes=self._sent(base, one, where),
            )
        if one.operation.endswith("-done") and one.operation.removesuffix("-done") in COLLECTIVES:
            return Cost()
        return Cost(
            self._flops(one, where), hbm_bytes(one, where, self.module), self._fused_sent(one)
        )

    def _flops(self, one: Instruction, where: Computation) -> float:
        if one.operation == "dot":
            return _dot_flops(one, where)
        if one.operation == "convolution":
            return _convolution_flops(one, where)
        if one.operation == "fusion":
            inside = self.module.computations[one.called[0]]
            return sum(self._flops(part, inside) for part in inside.instructions.values())
        return 0.0

    def _fused_sent(self, one: Instruction) -> dict[str, float]:
        """Collectives that the compiler put inside of a fusion, to run beside its work; counted
        where they start.
        """
        total = Cost()
        if one.operation == "fusion":
            inside = self.module.computations[one.called[0]]
            starts = START in targets(inside)
            for part in inside.instructions.values():
                if part.operation in COLLECTIVES:
                    total += Cost(
                        sent_bytes=self._sent(part.operation, part, inside) if starts else {}
                    )
                else:
                    total += Cost(sent_bytes=self._fused_sent(part))
        return total.sent_bytes

    def _sent(self, kind: str, one: Instruction, where: Computation) -> dict[str, float]:
        """Bytes that a chip sends on a ring of the collective's group."""
        operands = sum(
            array.bytes for name in one.operands for array in where.instructions[name].arrays
        )
        n = _group_size(one, self.module.partitions)
        share = (n - 1) / n
        return {
            kind: {
                "all-gather": operands * (n - 1),
                "all-reduce": 2 * share * operands,
                "reduce-scatter": share * operands,
                "all-to-all": share * operands,
                "collective-permute": operands,
            }[kind]
        }

    def _passes(self, loop: Instruction, where: Computation) -> float:
        for pattern, times in self.passes.items():
            if re.search(pattern, loop.op_name):
                return times
        if match := re.search(r"known_trip_count[^\d}]*(\d+)", loop.attributes):
            return int(match[1])
        times = _counted_passes(loop, where, self.module)
        if times is None:
            raise UnknownLoop(
                f"loop {loop.name} ({loop.op_name or 'of the compiler'}): how often it runs is unknown"
            )
        return times


def _counted_passes(loop: Instruction, where: Computation, module: Module) -> int | None:
    """Passes of `for (i = first; i < end; i += 1)` with constants for both; None for any other
    loop.
    """
    condition = module.computations[loop.attribute("condition")]
    test = condition.through(condition.root.name)
    if test.operation == "fusion":  # the comparison alone, in a computation of its own
        inside = module.computations[test.called[0]]
        outer = dict(zip([one.name for one in inside.parameters], test.operands, strict=True))
        compare = inside.through(inside.root.name)
        sides = [condition.through(outer.get(inside.through(name).name, name))
                 if inside.through(name).operation == "parameter" else inside.through(name)
                 for name in compare.operands]  # fmt: skip
        test = compare
    elif test.operation == "compare":
        sides = [condition.through(name) for name in test.operands]
    if test.operation != "compare" or test.attribute("direction") not in ("LT", "GT"):
        return None
    if test.attribute("direction") == "GT":
        sides.reverse()
    start, end = (_constant(side, loop, where) for side in sides)
    return None if start is None or end is None else max(0, end - start)


def _constant(side: Instruction, loop: Instruction, where: Computation) -> int | None:
    """Value before the first pass of one side of a loop's test."""
    if side.operation == "get-tuple-element":
        carried = where.through(loop.operands[0])
        if carried.operation != "tuple":
            return None
        side = where.through(carried.operands[int(side.attribute("index"))])
    return (
        int(side.text)
        if side.operation == "constant" and re.fullmatch(r"-?\d+", side.text)
        else None
    )


def _dot_flops(one: Instruction, where: Computation) -> float:
    left = where.instructions[one.operands[0]].arrays[0].shape
    contracted = [
        int(axis) for axis in re.findall(r"\d+", one.attribute("lhs_contracting_dims") or "")
    ]
    return 2.0 * math.prod(one.arrays[0].shape) * math.prod(left[axis] for axis in contracted)


def _convolution_flops(one: Instruction, where: Computation) -> float:
    """A TPU's matrix products are convolutions: a batch axis may be a spatial one whose window
    meets one element.
    """
    left, right = (where.instructions[name].arrays[0].shape for name in one.operands[:2])
    left_labels, right_labels, out_labels = re.split("_|->", one.attribute("dim_labels"))
    out = one.arrays[0].shape
    window = one.attribute("window") or ""
    settings = {name: value.split("x") for name, value in re.findall(r"(\w+)=([\dx_\-]+)", window)}
    taps = 1
    for axis in (label for label in out_labels if label.isdigit()):
        i = int(axis)
        get = lambda name, default: settings[name][i] if name in settings else default  # noqa: B023, E731
        taps *= _valid_taps(
            size=left[left_labels.index(axis)],
            kernel=right[right_labels.index(axis)],
            out=out[out_labels.index(axis)],
            stride=int(get("stride", 1)),
            low=int(str(get("pad", "0_0")).split("_")[0]),
            left_dilation=int(get("lhs_dilate", 1)),
            right_dilation=int(get("rhs_dilate", 1)),
        )
    features = right[right_labels.index("i")] * out[out_labels.index("f")]
    groups = int(one.attribute("batch_group_count") or 1)
    return 2.0 * taps * out[out_labels.index("b")] * features / groups


@functools.cache
def _valid_taps(
    size: int, kernel: int, out: int, stride: int, low: int, left_dilation: int, right_dilation: int
) -> int:
    """Pairs of (output position, window position) along one axis that meet an element, not padding
    or a hole.
    """
    count = 0
    reach = (size - 1) * left_dilation
    for k in range(kernel):
        for o in range(out):
            at = o * stride - low + k * right_dilation
            count += 0 <= at <= reach and at % left_dilation == 0
    return count


def _group_size(one: Instruction, partitions: int) -> int:
    """Chips of one group of a collective; `replica_groups` is a list, an iota [groups, size], or
    axes of a mesh.
    """
    if found := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))?\s*\{([^}]*)\}", one.attributes
    ):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        named = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, _, part in named)
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", one.attributes):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", one.attributes):
        return len(found[1].split(","))
    return partitions
