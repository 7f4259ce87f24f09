"""Bytes that an instruction of a compiled program reads and writes in HBM."""

from __future__ import annotations

from spiral_jax.planning.hlo import Array, Computation, Instruction, Module

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


def targets(inside: Computation) -> set[str]:
    """Targets of a computation's custom calls."""
    return {_target(one) for one in inside.instructions.values() if one.operation == "custom-call"}


def uncounted_kernels(module: Module) -> list[str]:
    """Targets of custom calls that compute something: their operations are in no cost."""
    every = set().union(*(targets(computation) for computation in module.computations.values()))
    return sorted(every - {START, _DONE, *_FREE_CALLS})


def _target(one: Instruction) -> str:
    return (one.attribute("custom_call_target") or "").strip('"')


def hbm_bytes(one: Instruction, where: Computation, module: Module) -> float:
    """HBM bytes that an instruction reads and writes; what moves in place or in parts, at the size
    of what moves.
    """
    if one.operation == "custom-call" and _target(one) in _FREE_CALLS:
        return 0
    if one.operation.endswith("-done"):  # the start has read; its own type names the source too
        return sum(array.hbm_bytes for array in one.arrays)
    read = 0
    for index, name in enumerate(one.operands):
        if name in where.instructions:
            whole = where.instructions[name].arrays
            if any(array.hbm_bytes for array in whole):
                read += _read_bytes(one, index, whole, module)
    if one.operation.endswith("-start"):
        return read
    return read + _written_bytes(one, where, module)


def _read_bytes(user: Instruction, index: int, whole: tuple[Array, ...], module: Module) -> float:
    """Bytes that `user` reads of its operand number `index`."""
    size = sum(array.hbm_bytes for array in whole)
    if user.operation in ("dynamic-slice", "slice", "gather") and index == 0:
        return min(size, sum(array.bytes for array in user.arrays))
    if user.operation == "slice-start":
        return min(size, user.arrays[-2].bytes)  # (source, slice, context)
    if user.operation in ("dynamic-update-slice", "scatter") and index == 0:
        return 0
    if user.operation == "tuple" or (
        user.operation == "custom-call" and _target(user) in (START, _DONE)
    ):
        return 0  # handed on
    if user.operation == "fusion":
        inside = module.computations[user.called[0]]
        return min(size, _parameter_bytes(inside, inside.parameters[index].name, whole, module))
    return size


def _parameter_bytes(
    inside: Computation, name: str, whole: tuple[Array, ...], module: Module
) -> float:
    total = 0.0
    if inside.instructions[name].is_root:
        return sum(array.hbm_bytes for array in whole)
    for user in inside.users(name):
        if user.operation == "bitcast":
            total += _parameter_bytes(inside, user.name, whole, module)
        elif user.operation not in COLLECTIVES or START in targets(inside):
            for index in [i for i, operand in enumerate(user.operands) if operand == name]:
                total += _read_bytes(user, index, whole, module)
    return total


def _written_bytes(one: Instruction, where: Computation, module: Module) -> float:
    size = sum(array.hbm_bytes for array in one.arrays)
    if not size:
        return 0
    if one.operation == "dynamic-update-slice":
        return sum(array.bytes for array in where.instructions[one.operands[1]].arrays)
    if one.operation == "scatter":
        return sum(array.bytes for array in where.instructions[one.operands[-1]].arrays)
    if one.operation == "fusion":
        inside = module.computations[one.called[0]]
        root = inside.through(inside.root.name)
        if START in targets(inside) and root.operation == "custom-call":
            return 0  # its end writes
        parts = (
            [inside.through(name) for name in root.operands]
            if root.operation == "tuple"
            else [root]
        )
        if len(parts) == len(one.arrays):
            return sum(
                _part_written(part, array, inside, module)
                for part, array in zip(parts, one.arrays, strict=True)
                if array.hbm_bytes
            )
    return size


def _part_written(part: Instruction, array: Array, inside: Computation, module: Module) -> float:
    if part.operation == "parameter" or part.operation in COLLECTIVES:
        return 0  # handed on
    if part.operation in ("dynamic-update-slice", "scatter", "fusion"):
        return min(array.hbm_bytes, _written_bytes_in(part, inside, module))
    return array.hbm_bytes


def _written_bytes_in(part: Instruction, inside: Computation, module: Module) -> float:
    """The same inside of a fusion, where layouts do not say what lies in HBM."""
    if part.operation == "fusion":
        deeper = module.computations[part.called[0]]
        root = deeper.through(deeper.root.name)
        if root.operation in ("dynamic-update-slice", "scatter", "fusion"):
            return _written_bytes_in(root, deeper, module)
        return sum(array.bytes for array in part.arrays)
    update = part.operands[1 if part.operation == "dynamic-update-slice" else -1]
    return sum(array.bytes for array in inside.instructions[update].arrays)
