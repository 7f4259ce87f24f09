"""What benchmarks/one_device.py measures, in the order of its worth, and what is asked of it.

A case is a call of a method of a contestant, a process of `benchmarks/peers` that holds the device
while it lives. Cases of one contestant stand together: a start loads and compiles for minutes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from configs import qwen3_4b
from spiral_jax.core.groups import Role
from spiral_jax.model.architecture import Architecture
from spiral_jax.planning.shipped_models import planned_model


class GroupShape(NamedTuple):
    """The groups that are sampled at once: C traces of up to G tokens after P of a prompt."""

    groups: int
    C: int
    P: int
    G: int


# What fits beside 16 GB of weights; a quarter of the paper's trace length.
SHAPES = {
    Role.SEARCH: GroupShape(16, 8, 1024, 1024),
    Role.AGGREGATION: GroupShape(8, 4, 9216, 1024),
}
# Of a small model, whose tokens take as long as the kernels that they start.
SMALL_MODEL, SMALL_MODEL_SHAPE = "SmolLM2-135M", GroupShape(16, 8, 128, 256)
SHORT = {Role.SEARCH: GroupShape(2, 8, 64, 16), Role.AGGREGATION: GroupShape(2, 4, 128, 16)}
REMATS = ("attention", "dots")
DATA_SHEET = (
    "h100"  # of `spiral_jax.planning.topology.CHIPS`: whose peak and bandwidth shares are of
)
# Rows that transformers takes at once; where they do not fit, its process halves them.
TRAINED_ROWS = {Role.SEARCH: 4, Role.AGGREGATION: 1}

OURS, THEIRS, LAYER = "spiral_device", "transformers_device", "attention_device"
# In answer to `load`: the 4B model would take hours there.
NO_ACCELERATOR = {"skip": "jax finds no accelerator; --small tries the program on CPUs"}
# Asked of cuDNN's backend on one H100: operations a second over the card's peak, and the ratio to
# transformers, more than 1 where ours is faster.
PREFILL_TARGETS = {role: {"mfu": 0.60, "ratio_to_transformers": 1.0} for role in Role}
TRAIN_TARGETS = {
    Role.SEARCH: {"mfu": 0.45, "ratio_to_transformers": 3.0},
    Role.AGGREGATION: {"mfu": 0.40, "ratio_to_transformers": 4.0},
}


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A process of `benchmarks/peers`, and the arguments of its `load`."""

    file: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        attention = self.arguments.get("attention")
        return f"{self.file} with attention {attention}" if attention else self.file


@dataclasses.dataclass(frozen=True)
class Case:
    """A number that is measured.

    Attributes:
      peer: name of the case that it is compared with; "" = it is a peer's itself.
      targets: least values of fields of its result.
    """

    name: str
    contestant: Contestant
    method: str
    arguments: dict[str, Any]
    peer: str = ""
    targets: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def peer_name(self) -> str:
        """Names end with who computes: cudnn or transformers."""
        return self.peer.rpartition(", ")[2]


def architecture(small: bool, name: str = "") -> Architecture:
    """Qwen3-4B's sizes or those of SMALL_MODEL; small ones to try the program itself."""
    arch = planned_model(qwen3_4b.get_config().model)[0].arch
    if small:
        return dataclasses.replace(arch, V=2048, D=256, F=512, L=2, H=8, J=2, E=32)
    if name == SMALL_MODEL:
        return dataclasses.replace(arch, V=49152, D=576, F=1536, L=30, H=9, J=3, E=64)
    return arch


def all_cases(small: bool) -> list[Case]:
    """In the order in which they are worth their time."""
    shapes = SHORT if small else SHAPES
    return [
        *layer_cases(("cudnn", "gpu"), shapes, small),
        *model_cases("gpu", shapes, small),
        *small_model_cases("gpu", small),
        *transformers_cases(shapes, small),
        *model_cases("xla", shapes, small),
        *layer_cases(("xla",), shapes, small),
    ]


def layer_cases(
    attentions: tuple[str, ...], shapes: dict[Role, GroupShape], small: bool
) -> Iterator[Case]:
    """One layer's attention: of prompts as prefill computes it, and of a group in training."""
    layer = Contestant(LAYER, {"small": small})
    for role, (groups, C, P, G) in shapes.items():
        group = f"a group of {P:,} + {C} x {G:,}"
        for method, what in (
            ("prompts", f"{groups} prompts of {P:,}"),
            ("forward", f"{group}, forward"),
            ("both_passes", f"{group}, both passes"),
        ):
            for attention in attentions:
                peer = "" if attention == "cudnn" else f"layer, {what}, cudnn"
                arguments = {"role": role.label, "attention": attention}
                yield Case(f"layer, {what}, {attention}", layer, method, arguments, peer)


def model_cases(attention: str, shapes: dict[Role, GroupShape], small: bool) -> Iterator[Case]:
    """Ours: sampling, and training on what was sampled. Decoding attends without a backend."""
    ours = Contestant(OURS, {"small": small, "attention": attention})
    tried = attention == "gpu"
    for role, shape in shapes.items():
        yield Case(
            f"{prefill_name(shape)}, {attention}",
            ours,
            "prefill",
            {"role": role.label},
            f"{prefill_name(shape)}, transformers",
            PREFILL_TARGETS[role] if tried else {},
        )
    for remat in REMATS:
        for role, shape in shapes.items():
            if remat == REMATS[0]:
                yield Case(
                    f"{decode_name(shape)}, {attention}",
                    ours,
                    "decode",
                    {"role": role.label},
                    f"{decode_name(shape)}, transformers",
                )
            yield Case(
                f"{train_name(shape)}, {attention}, remat {remat}",
                ours,
                "train",
                {"role": role.label, "remat": remat},
                f"{train_name(shape)}, transformers",
                TRAIN_TARGETS[role] if tried else {},
            )


def small_model_cases(attention: str, small: bool) -> Iterator[Case]:
    """A token of a small model, all rows at once."""
    shape = SHORT[Role.SEARCH] if small else SMALL_MODEL_SHAPE
    arguments = {"small": small, "attention": attention, "model": SMALL_MODEL}
    name = f"{SMALL_MODEL}, {decode_name(shape)}, {attention}"
    yield Case(name, Contestant(OURS, arguments), "decode", {"role": Role.SEARCH.label})


def transformers_cases(shapes: dict[Role, GroupShape], small: bool) -> Iterator[Case]:
    """The peer: each trace has a row, with its own copy of the prompt."""
    arch = dataclasses.asdict(architecture(small))
    theirs = Contestant(THEIRS, {"arch": arch, "small": small})
    calls = []
    for role, shape in shapes.items():
        groups, C, P, G = shape
        prompts, rows = {"rows": groups, "P": P}, {"rows": groups * C, "P": P, "tokens": G // 8}
        group = {"rows": TRAINED_ROWS[role], "C": C, "P": P, "G": G}
        calls += [
            (0, "prefill", prefill_name(shape), prompts),
            (1, "train", train_name(shape), group),
        ]
        calls += [(2, "decode", decode_name(shape), rows)]
    for _, method, name, arguments in sorted(calls, key=lambda call: call[0]):
        yield Case(f"{name}, transformers", theirs, method, arguments)


def prefill_name(shape: GroupShape) -> str:
    return f"prefill {shape.groups} x {shape.P:,}"


def decode_name(shape: GroupShape) -> str:
    return f"decode {shape.groups} x ({shape.P:,} + {shape.C} x {shape.G:,})"


def train_name(shape: GroupShape) -> str:
    return f"train {shape.P:,} + {shape.C} x {shape.G:,}"
