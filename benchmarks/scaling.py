"""Plans of the paper's run for five machines, and what weak scaling costs on v5e.

Writes docs/results/scaling.md and docs/results/scaling/.

    pip install ".[plan]"
    python -m benchmarks.scaling [--only=v5e:8x8] [--table_only]

Compiles some forty programs of the 4B model, a minute or two each on two idle cores, one after the
other; what is compiled is kept (SPIRAL_JAX_PLANS), so a run that was stopped goes on.
`--table_only` writes the tables of the JSON files that are there.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any, NamedTuple

import jax
from absl import app, flags

from benchmarks.machine import commit, machine
from benchmarks.scaling_table import table
from configs import qwen3_4b
from spiral_jax.core.config import ConfigError
from spiral_jax.core.groups import Role
from spiral_jax.learner.blocks import abstract_block
from spiral_jax.learner.settings import RoleShapes
from spiral_jax.plan import say
from spiral_jax.planning.inventory import place_block, take_inventory
from spiral_jax.planning.planned_program import train_program
from spiral_jax.planning.profile import profile
from spiral_jax.planning.settings import apply_overrides, as_flags, mesh_overrides
from spiral_jax.planning.shipped_models import planned_model
from spiral_jax.planning.text import plan
from spiral_jax.planning.topology import find_topology, make_mesh
from spiral_jax.planning.work import Assumptions

ONLY = flags.DEFINE_string("only", None, 'one machine, or "weak" for the table of weak scaling')
TABLE_ONLY = flags.DEFINE_bool("table_only", False, "compile nothing")

OUT = pathlib.Path("docs/results/scaling")
FREE = 0.1


class Fit(NamedTuple):
    """What of the configuration belongs to a machine.

    Attributes:
      mesh: data, fsdp, tensor.
      groups: of a micro-batch, one a shard.
      remat: the fastest that fits, and the one that keeps the least if several are.
      attention_block: on v5p scores lie in HBM, whatever their size, so that large blocks pass
        through it less often.
    """

    mesh: tuple[int, int, int]
    groups: int
    remat: str = "attention"
    attention_block: int = 256

    def overrides(self) -> dict[str, Any]:
        return {
            **mesh_overrides(self.mesh),
            "batch.search_groups": self.groups,
            "batch.aggregation_groups": self.groups,
            "model.remat": self.remat,
            "model.attention_block": self.attention_block,
        }


MACHINES = {
    "v5e:8x8": Fit((2, 8, 4), 16),
    "v6e:8x8": Fit((4, 8, 2), 32),
    "v5p:4x4x4": Fit((8, 4, 2), 32, attention_block=512),
    "h100:8": Fit((1, 8, 1), 8),
    "h200:8": Fit((1, 8, 1), 8, remat="dots"),
}
# v5e slices of 16 to 256 chips: 4 x 4 of them hold the model, and `data` repeats them, each with 4
# groups.
WEAK = {"v5e:4x4": 1, "v5e:4x8": 2, "v5e:8x8": 4, "v5e:8x16": 8, "v5e:16x16": 16}


def main(argv: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")
    OUT.mkdir(parents=True, exist_ok=True)
    if not TABLE_ONLY.value:
        try:
            compile_plans()
        except ConfigError as error:
            sys.exit(f"error: {error}")
    pathlib.Path("docs/results/scaling.md").write_text(table(OUT))


def compile_plans() -> None:
    for name, fit in MACHINES.items():
        if ONLY.value in (None, name):
            overrides = fit.overrides()
            c = apply_overrides(qwen3_4b.get_config(), overrides)
            report = plan(c, name, Assumptions(), free=FREE, most_tries=0, say=say)
            write(name.replace(":", "_"), {"flags": as_flags(overrides), **report})
    if ONLY.value in (None, "weak"):
        write("weak", {"slices": [weak(name, data) for name, data in WEAK.items()]})


def weak(name: str, data: int) -> dict[str, Any]:
    """The train step on search groups of 1,024 + 8 x 1,024 tokens, four for each 16 chips."""
    fit = Fit((data, 4, 4), 4 * data, remat="layer")
    c, topology = apply_overrides(qwen3_4b.get_config(), fit.overrides()), find_topology(name)
    model, _ = planned_model(c.model, topology.devices)
    mesh = make_mesh(c.mesh, topology)
    inventory = take_inventory(c, model, mesh, topology.chip.hbm_bytes)
    shapes = RoleShapes(((1024, 1024),), micro_groups=4 * data, most_groups=16 * data, traces=8)
    block = abstract_block(Role.SEARCH, shapes, 1024, 1024)
    program = train_program(inventory, place_block(block, inventory.mesh))
    print(f"{name}: {topology.chips} chips", flush=True)
    return {
        "topology": name,
        "chips": topology.chips,
        **profile(program, topology, FREE).to_plain(),
    }


def write(name: str, report: dict[str, Any]) -> None:
    stamp = {"machine": machine(), "commit": commit()}
    (OUT / f"{name}.json").write_text(json.dumps(stamp | report, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
