"""What one program needs of a chip: memory by kind, costs of its unit, the roofline."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from spiral_jax.planning.compiled import Compiled, compile_kept
from spiral_jax.planning.costs import Cost, cost_of
from spiral_jax.planning.hlo import Array, Module, parse
from spiral_jax.planning.kernels import counted_by_formula, workspace_bytes
from spiral_jax.planning.planned_program import Forbidden, PlannedProgram
from spiral_jax.planning.roofline import Roofline, roofline
from spiral_jax.planning.topology import Topology
from spiral_jax.planning.traffic import uncounted_kernels


@dataclasses.dataclass(frozen=True)
class Profile:
    """Bytes and costs of one chip.

    Attributes:
      memory: bytes by kind, all that lies there while it runs.
      room: bytes that the chip has for it.
      roofline: of a unit.
      unit: cost of one pass of the outer loop. `call`: of all that is outside of it.
      compiled: whether the numbers come from the compiler, or from arithmetic: without a compiler,
        and the costs of what is too large to be compiled.
      seconds: what compiling took.
      largest: the largest array that the compiled program makes.
      forbidden: what of `PlannedProgram.forbidden` it makes all the same.
      kernels: its custom calls whose operations are not counted.
      by_formula: those whose operations are counted by a formula.
    """

    program: PlannedProgram
    memory: dict[str, int]
    room: int
    roofline: Roofline
    unit: Cost
    call: Cost
    compiled: bool
    seconds: float = 0.0
    largest: Array | None = None
    forbidden: list[str] = dataclasses.field(default_factory=list)
    kernels: list[str] = dataclasses.field(default_factory=list)
    by_formula: list[str] = dataclasses.field(default_factory=list)

    @property
    def needed(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.needed <= self.room

    @property
    def flops_ratio(self) -> float | None:
        """Operations of a unit over the ideal count; None where either is not known."""
        return _ratio(self.unit.flops, self.program.ideal_flops)

    @property
    def hbm_ratio(self) -> float | None:
        """Bytes that a unit moves over the ideal count; None where either is not known."""
        return _ratio(self.unit.hbm_bytes, self.program.ideal_hbm_bytes)

    def to_plain(self) -> dict[str, Any]:
        """For JSON: bytes, operations and seconds of one chip and one unit."""
        largest = self.largest and f"{self.largest.dtype}{list(self.largest.shape)}"
        return {
            "program": self.program.name,
            "source": "compiled" if self.compiled else "arithmetic",
            "compile_seconds": round(self.seconds, 1),
            "fits": self.fits,
            "memory_bytes": self.memory,
            "argument_bytes": self.program.arguments,
            "needed_bytes": self.needed,
            "room_bytes": self.room,
            "unit": self.program.unit,
            "unit_tokens": self.program.tokens,
            "flops": self.unit.flops,
            "flops_over_ideal": self.flops_ratio,
            "hbm_bytes": self.unit.hbm_bytes,
            "hbm_bytes_over_ideal": self.hbm_ratio,
            "sent_bytes": self.unit.sent_bytes,
            "once_a_call": dataclasses.asdict(self.call),
            "roofline_seconds": dataclasses.asdict(self.roofline),
            "seconds": self.roofline.seconds,
            "bound": self.roofline.bound,
            "largest_array": largest,
            "checked_for": sorted(self.program.forbidden),
            "forbidden_arrays": self.forbidden,
            "uncounted_kernels": self.kernels,
            "kernels_by_formula": self.by_formula,
        }


def profile(program: PlannedProgram, topology: Topology, free: float) -> Profile:
    """Compiles the program, or estimates it where no compiler for the chips is installed.

    Args:
      free: share of a chip's memory that must stay free.

    Raises:
      UnknownLoop: see `costs.cost_of`.
    """
    if topology.devices is None:
        memory = program.memory | {
            "activations": program.kept,
            "temporaries": program.estimated_temporary,
        }
        return _estimate(program, topology, free, memory)

    target = topology.name + topology.description
    options = topology.compiler_options | program.compiler_options
    compiled = compile_kept(program.lower(), target, options)
    if compiled.needed:
        return _estimate(program, topology, free, {"program": compiled.needed}, compiled.seconds)

    module = parse(compiled.text)
    unit, call = unit_and_call(module, program.unit_loop, program.passes, program.kernels)
    return Profile(
        program=program,
        memory=_memory(program, compiled, workspace_bytes(module)),
        room=_room(topology, free),
        roofline=roofline(unit, topology.chip, topology.chips),
        unit=unit,
        call=call,
        compiled=True,
        seconds=compiled.seconds,
        largest=largest_array(module),
        forbidden=forbidden_arrays(module, program.forbidden),
        kernels=uncounted_kernels(module),
        by_formula=counted_by_formula(module),
    )


def _estimate(
    program: PlannedProgram,
    topology: Topology,
    free: float,
    memory: dict[str, int],
    seconds: float = 0.0,
) -> Profile:
    """The costs by arithmetic: without a compiler, or of what is too large to be compiled."""
    return Profile(
        program=program,
        memory=memory,
        room=_room(topology, free),
        roofline=roofline(program.estimate, topology.chip, topology.chips),
        unit=program.estimate,
        call=Cost(),
        compiled=False,
        seconds=seconds,
    )


def _room(topology: Topology, free: float) -> int:
    return int((1 - free) * topology.chip.hbm_bytes)


def _ratio(value: float, ideal: float) -> float | None:
    return value / ideal if ideal and value else None


def unit_and_call(
    module: Module,
    unit_loop: str,
    passes: dict[str, float],
    kernels: dict[str, Cost] | None = None,
) -> tuple[Cost, Cost]:
    """Cost of one pass of the unit loop, and of everything outside of it; see `costs.cost_of`.

    Without such a loop all is the unit.
    """
    if not unit_loop:
        return cost_of(module, passes, kernels), Cost()
    call = cost_of(module, {unit_loop: 0} | passes, kernels)
    return cost_of(module, {unit_loop: 1} | passes, kernels) + call * -1, call


def largest_array(module: Module) -> Array:
    """The largest array that the program makes, its arguments left out."""
    given = {
        (array.dtype, array.shape)
        for parameter in module.entry.parameters
        for array in parameter.arrays
    }
    made = [array for array in module.arrays() if (array.dtype, array.shape) not in given]
    return max(made, key=lambda array: array.bytes)


def forbidden_arrays(module: Module, forbidden: dict[str, Forbidden]) -> list[str]:
    """Those that the program makes, such as "logits f32[4, 4096, V]"."""
    made = set()
    for array in module.arrays():
        for name, what in forbidden.items():
            if _is_forbidden(array.shape, what):
                made.add(f"{name} {array.dtype}{list(array.shape)}")
    return sorted(made)


def _is_forbidden(shape: tuple[int, ...], what: Forbidden) -> bool:
    for i, size in enumerate(shape):
        others = shape[:i] + shape[i + 1 :]
        is_multiple = any(other % what.multiple == 0 for other in others)
        if size in what.sizes and math.prod(others) >= what.others and is_multiple:
            return True
    return False


def _memory(program: PlannedProgram, compiled: Compiled, workspace: int) -> dict[str, int]:
    """What the compiler and its libraries allot, beside what lies there anyway."""
    memory = {name: size for name, size in program.memory.items() if size}
    if program.kept:
        memory["activations"] = min(program.kept, compiled.temporary)
    memory["temporaries"] = compiled.temporary - memory.get("activations", 0)
    memory["results"] = compiled.results - compiled.aliased
    memory["padding"] = max(0, compiled.arguments - program.arguments)  # of tiles
    if workspace:
        memory["workspace"] = workspace
    return memory
