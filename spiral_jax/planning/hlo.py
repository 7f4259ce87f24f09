"""A compiled program's HLO text as objects: computations, instructions, and their arrays."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1,
    "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4,
    "s64": 8, "u64": 8, "f64": 8, "c64": 8,
    "c128": 16, "token": 0,
}  # fmt: skip
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(
    r"(?:calls|body|condition|to_apply|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's type.

    Attributes:
      on_chip: it lies in memory other than HBM, as S(1) in its layout says.
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
    """`%name = arrays operation(text), attributes`; `operands` are the names in `text`."""

    name: str
    arrays: tuple[Array, ...]
    operation: str
    operands: tuple[str, ...]
    text: str
    attributes: str
    is_root: bool

    @property
    def op_name(self) -> str:
        """Where in the Python program it comes from, such as "jit(f)/decode/while".

        "" where the compiler made it.
        """
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def target(self) -> str:
        """What a custom call calls; "" of any other instruction."""
        return (self.attribute("custom_call_target") or "").strip('"')

    def attribute(self, name: str) -> str | None:
        """Value of `name=...`: a word, or what stands in braces."""
        match = re.search(rf"(?:^|, ){name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
        return match[1].strip("%") if match else None

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
        return next(each for each in self.instructions.values() if each.is_root)

    @property
    def parameters(self) -> list[Instruction]:
        """In the order in which a caller gives them."""
        parameters = [each for each in self.instructions.values() if each.operation == "parameter"]
        return sorted(parameters, key=lambda parameter: int(parameter.text))

    def users(self, name: str) -> list[Instruction]:
        return [each for each in self.instructions.values() if name in each.operands]

    def through(self, name: str) -> Instruction:
        """The instruction of that name, or what it merely renames."""
        this = self.instructions[name]
        while this.operation in ("bitcast", "copy") and this.operands[0] in self.instructions:
            this = self.instructions[this.operands[0]]
        return this


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: Computation
    partitions: int

    def instructions(self) -> Iterator[Instruction]:
        for computation in self.computations.values():
            yield from computation.instructions.values()

    def arrays(self) -> Iterator[Array]:
        """Every array of the program that exists in memory.

        Those inside of fused computations do not.
        """
        fused = set()
        for instruction in self.instructions():
            if instruction.operation == "fusion":
                fused.update(instruction.called)
        for computation in self.computations.values():
            if computation.name not in fused:
                for instruction in computation.instructions.values():
                    yield from instruction.arrays


def parse(text: str) -> Module:
    """`Compiled.as_text()` -> Module.

    Raises:
      ValueError: there is no entry computation.
    """
    computations, entry = {}, None
    name, lines = None, []  # of the computation that is being read
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name, lines = match[2], []
            if match[1]:
                entry = name
        elif line == "}" and name:
            computations[name] = _computation(name, lines)
            name = None
        elif name:
            lines.append(line)
    if entry not in computations:
        raise ValueError("not the text of a compiled program: no ENTRY computation")
    partitions = re.search(r"num_partitions=(\d+)", text.split("\n", 1)[0])
    return Module(computations, computations[entry], int(partitions[1]) if partitions else 1)


def _computation(name: str, lines: list[str]) -> Computation:
    instructions = [instruction for line in lines if (instruction := _instruction(line))]
    return Computation(name, {instruction.name: instruction for instruction in instructions})


def _instruction(line: str) -> Instruction | None:
    """None for a line that is none, such as a comment."""
    line = line.strip()
    is_root, line = line.startswith("ROOT "), line.removeprefix("ROOT ")
    name, equals, rest = line.partition(" = ")
    if not equals or not name.startswith("%"):
        return None
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    operation, rest = rest[:start], rest[start:]
    end = _closing(rest)
    inside = rest[1:end]
    return Instruction(
        name=name[1:],
        arrays=_arrays(kind),
        operation=operation,
        operands=tuple(_NAME.findall(inside)),
        text=inside,
        attributes=rest[end + 1 :].lstrip(", "),
        is_root=is_root,
    )


def _arrays(kind: str) -> tuple[Array, ...]:
    """All arrays of a type, tuples flattened."""
    arrays = []
    for dtype, sizes, layout in _ARRAY.findall(kind):
        if dtype in _BYTES:
            shape = tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
            arrays.append(Array(dtype, shape, on_chip="S(" in layout))
    return tuple(arrays)


def _closing(text: str) -> int:
    """Index of the parenthesis that closes the one at 0."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"no closing parenthesis in {text[:80]!r}")
