"""Imports only go down: DESIGN's five floors, walked file by file."""

import ast
import pathlib

import pytest

import spiral_jax

ROOT = pathlib.Path(spiral_jax.__file__).parent

FLOORS = {
    0: {"groups", "config", "config_checks", "metrics", "mesh", "distributed", "faults"},
    1: {"model", "tasks", "prompts", "templates", "verifier", "estimators", "measures", "flops"}
    | {
        "objective.subsets",
        "objective.set_advantages",
        "objective.own_advantages",
        "objective.advantages",
    }
    | {"objective.loss_weights"},
    2: {"sampling", "objective.logprobs", "objective.loss", "batching"},
    3: {
        "setup",
        "initial",
        "rollout",
        "rollout_feed",
        "collect",
        "train_step",
        "evaluation",
        "evaluation_feed",
    }
    | {"results", "comparison"}
    | {"run_log", "saving", "preemption", "watchdog", "guards"}
    | {
        "checkpoint",
        "workdir",
        "telemetry",
        "trace_log",
        "curves",
        "progress",
        "reporting",
        "environment",
        "metric_writers",
    }
    | {"scaling_plots", "studies", "planning"},
    4: {
        "train",
        "evaluate",
        "plan",
        "report",
        "study",
        "sft",
        "export",
        "spiral_infer",
        "prepare_data",
    },
}
# Within a floor a module may import its neighbours; commands may not import each other.
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}


def room_of(module: str) -> str | None:
    parts = module.split(".")[1:]
    for depth in (2, 1):
        if ".".join(parts[:depth]) in FLOOR_OF:
            return ".".join(parts[:depth])
    return None


def imported_modules(path: pathlib.Path) -> list[str]:
    modules = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    own = [module for module in modules if module.split(".")[0] == "spiral_jax"]
    return [module for module in own if module != "spiral_jax.STARTED"]  # a number in __init__.py


SOURCES = [path for path in sorted(ROOT.rglob("*.py")) if path.name != "__init__.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_stands_on_a_floor_and_imports_nothing_from_above(path):
    module = "spiral_jax." + ".".join(path.relative_to(ROOT).with_suffix("").parts)
    floor = FLOOR_OF[room_of(module)]
    above = {m for m in imported_modules(path) if FLOOR_OF[room_of(m)] > floor}
    assert not above, f"{module} (floor {floor}) imports {sorted(above)}"


def test_commands_do_not_import_each_other():
    for command in FLOORS[4]:
        imported = {room_of(module) for module in imported_modules(ROOT / f"{command}.py")}
        assert not imported & FLOORS[4], command


def test_every_floor_entry_is_a_file_or_package():
    for room in FLOOR_OF:
        path = ROOT / room.replace(".", "/")
        assert path.with_suffix(".py").exists() or path.is_dir(), room
