"""A compiled program's HLO text as objects: computations, instructions, and the arrays that those
make.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "token": 0,
}  # fmt: skip
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply|branch_computations|true_computation|false_computation)="
                     r"(\{[^}]*\}|%?[\w.\-]+)")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's type. `on_chip`: it lies in memory other than HBM, as S(1) in
    its layout says.
    """

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool = False

    @property
    def bytes(self) -> int:
        return _BYTES[self.dtype] * math.prod(self.shape)

    @property
    def hbm_bytes(self) -> int:
        return 0 if self.on_chip else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`%name = arrays operation(operands), attributes`; `text` is what stands in the parentheses."""

    name: str
    arrays: tuple[Array, ...]
    operation: str
    operands: tuple[str, ...]
    text: str
    attributes: str
    is_root: bool

    @property
    def op_name(self) -> str:
        """Where in the Python program it comes from, such as "jit(f)/decode/while"; "" where the
        compiler made it.
        """
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def attribute(self, name: str) -> str | None:
        """Value of `name=...`: a word, or what stands in braces."""
        found = re.search(rf"(?:^|, ){name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
        return found[1].strip("%") if found else None

    @property
    def called(self) -> list[str]:
        """Names of the computations that it calls, in the order of the text."""
        groups = _CALLED.findall(self.attributes)
        return [name for group in groups for name in re.findall(r"[\w.\-]+", group)]


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in their order."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(one for one in self.instructions.values() if one.is_root)

    @property
    def parameters(self) -> list[Instruction]:
        found = [one for one in self.instructions.values() if one.operation == "parameter"]
        return sorted(found, key=lambda one: int(one.text))

    def users(self, name: str) -> list[Instruction]:
        return [one for one in self.instructions.values() if name in one.operands]

    def through(self, name: str) -> Instruction:
        """The instruction of that name, or what it merely renames."""
        one = self.instructions[name]
        while one.operation in ("bitcast", "copy") and one.operands[0] in self.instructions:
            one = self.instructions[one.operands[0]]
        return one


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: Computation
    partitions: int

    def loops(self) -> Iterator[Instruction]:
        for computation in self.computations.values():
            yield from (
                one for one in computation.instructions.values() if one.operation == "while"
            )

    def arrays(self) -> Iterator[Array]:
        """Every array of the program that exists in memory: those inside of fused computations do
        not.
        """
        fused = {
            name
            for computation in self.computations.values()
            for one in computation.instructions.values()
            if one.operation == "fusion"
            for name in one.called
        }
        for computation in self.computations.values():
            if computation.name not in fused:
                for one in computation.instructions.values():
                    yield from one.arrays


def parse(text: str) -> Module:
    """`Compiled.as_text()` -> Module.

    Raises:
      ValueError: there is no entry computation.
    """
    computations, entry, name, lines = {}, None, None, []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name, lines = match[2], []
            entry = name if match[1] else entry
        elif line == "}" and name:
            instructions = [one for one in map(_instruction, lines) if one]
            computations[name] = Computation(name, {one.name: one for one in instructions})
            name = None
        elif name:
            lines.append(line)
    if entry not in computations:
        raise ValueError("not the text of a compiled program: no ENTRY computation")
    partitions = re.search(r"num_partitions=(\d+)", text.split("\n", 1)[0])
    return Module(computations, computations[entry], int(partitions[1]) if partitions else 1)


def arrays_of(kind: str) -> tuple[Array, ...]:
    """All arrays of a type, tuples flattened."""
    return tuple(
        Array(
            dtype,
            tuple(int(size.lstrip("<=")) for size in shape.split(",") if size),
            "S(" in layout,
        )
        for dtype, shape, layout in _ARRAY.findall(kind)
        if dtype in _BYTES
    )


def _instruction(line: str) -> Instruction | None:
    line = line.strip()
    is_root, line = line.startswith("ROOT "), line.removeprefix("ROOT ")
    name, equals, rest = line.partition(" = ")
    if not equals or not name.startswith("%"):
        return None
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    operation, rest = rest[: rest.index("(")], rest[rest.index("(") :]
    end = _closing(rest)
    inside = rest[1:end]
    attributes = rest[end + 1 :].lstrip(", ")
    return Instruction(
        name[1:],
        arrays_of(kind),
        operation,
        tuple(_NAME.findall(inside)),
        inside,
        attributes,
        is_root,
    )


def _closing(text: str) -> int:
    """Index of the parenthesis that closes the one at 0."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")
