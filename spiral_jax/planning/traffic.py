"""Bytes that an instruction of a compiled program reads and writes in HBM."""

from __future__ import annotations

from spiral_jax.planning.hlo import Array, Computation, Instruction, Module
from spiral_jax.planning.kernels import counted_by_formula

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# A collective that runs beside other work is written into the fusion that starts it, into those
# that it runs beside, and into the one that ends it.
START, _DONE = "AsyncCollectiveStart", "AsyncCollectiveDone"
_FREE_CALLS = (
    "AllocateBuffer",
    "ConcatBitcast",
    "AssumeGatherIndicesInBound",
    "GatherScatterIndicesBitpacked",
)
_IN_PLACE = {"dynamic-update-slice": 1, "scatter": -1}  # which operand is what they write


def targets(inside: Computation) -> set[str]:
    """Targets of a computation's custom calls."""
    calls = [each for each in inside.instructions.values() if each.operation == "custom-call"]
    return {call.target for call in calls}


def uncounted_kernels(module: Module) -> list[str]:
    """Targets of custom calls that compute something: their operations are in no cost."""
    every = set().union(*(targets(computation) for computation in module.computations.values()))
    return sorted(every - {START, _DONE, *_FREE_CALLS, *counted_by_formula(module)})


def hbm_bytes(instruction: Instruction, where: Computation, module: Module) -> float:
    """HBM bytes that an instruction reads and writes.

    What moves in place or in parts counts at the size of what moves.
    """
    if instruction.target in _FREE_CALLS:
        return 0
    if instruction.operation.endswith("-done"):
        # the start has read; its own type names the source too
        return _hbm_size(instruction.arrays)
    read = 0
    for index, name in enumerate(instruction.operands):
        if name in where.instructions:
            operand = where.instructions[name].arrays
            if any(array.hbm_bytes for array in operand):
                read += _read_bytes(instruction, index, operand, module)
    if instruction.operation.endswith("-start"):
        return read
    return read + _written_bytes(instruction, where, module)


def _size(arrays: tuple[Array, ...]) -> int:
    return sum(array.bytes for array in arrays)


def _hbm_size(arrays: tuple[Array, ...]) -> int:
    return sum(array.hbm_bytes for array in arrays)


def _read_bytes(user: Instruction, index: int, operand: tuple[Array, ...], module: Module) -> float:
    """Bytes that `user` reads of its operand number `index`, whose arrays are given."""
    size = _hbm_size(operand)
    if user.operation in ("dynamic-slice", "slice", "gather") and index == 0:
        return min(size, _size(user.arrays))
    if user.operation == "slice-start":
        return min(size, user.arrays[-2].bytes)  # (source, slice, context)
    if user.operation in _IN_PLACE and index == 0:
        return 0
    if user.operation == "tuple" or _is_async_marker(user):
        return 0  # handed on
    if user.operation == "fusion":
        inside = module.computations[user.called[0]]
        parameter = inside.parameters[index].name
        return min(size, _parameter_bytes(inside, parameter, operand, module))
    return size


def _is_async_marker(instruction: Instruction) -> bool:
    """Whether it starts or ends a collective that runs beside other work."""
    return instruction.target in (START, _DONE)


def _parameter_bytes(
    inside: Computation, name: str, operand: tuple[Array, ...], module: Module
) -> float:
    """Bytes that a fusion reads of one parameter, whose arrays are given."""
    if inside.instructions[name].is_root:
        return _hbm_size(operand)
    total = 0.0
    for user in inside.users(name):
        if user.operation == "bitcast":
            total += _parameter_bytes(inside, user.name, operand, module)
        elif user.operation not in COLLECTIVES or START in targets(inside):
            for index, other in enumerate(user.operands):
                if other == name:
                    total += _read_bytes(user, index, operand, module)
    return total


def _written_bytes(instruction: Instruction, where: Computation, module: Module) -> float:
    size = _hbm_size(instruction.arrays)
    if not size:
        return 0
    if instruction.operation in _IN_PLACE:
        return _update_size(instruction, where)
    if instruction.operation != "fusion":
        return size

    inside = module.computations[instruction.called[0]]
    root = inside.through(inside.root.name)
    if START in targets(inside) and root.operation == "custom-call":
        return 0  # its end writes
    parts = [root]
    if root.operation == "tuple":
        parts = [inside.through(name) for name in root.operands]
    if len(parts) != len(instruction.arrays):
        return size
    return sum(
        _part_written(part, array, inside, module)
        for part, array in zip(parts, instruction.arrays, strict=True)
        if array.hbm_bytes
    )


def _update_size(instruction: Instruction, where: Computation) -> int:
    """Bytes of what an update in place writes."""
    operand = instruction.operands[_IN_PLACE[instruction.operation]]
    return _size(where.instructions[operand].arrays)


def _part_written(part: Instruction, array: Array, inside: Computation, module: Module) -> float:
    """Bytes that a fusion writes of one of its arrays; `part` makes it."""
    if part.operation == "parameter" or part.operation in COLLECTIVES:
        return 0  # handed on
    if part.operation in _IN_PLACE or part.operation == "fusion":
        return min(array.hbm_bytes, _written_inside(part, inside, module))
    return array.hbm_bytes


def _written_inside(part: Instruction, inside: Computation, module: Module) -> float:
    """The same of a part of a fusion, where layouts do not say what lies in HBM."""
    if part.operation != "fusion":
        return _update_size(part, inside)
    deeper = module.computations[part.called[0]]
    root = deeper.through(deeper.root.name)
    if root.operation in _IN_PLACE or root.operation == "fusion":
        return _written_inside(root, deeper, module)
    return _size(part.arrays)
