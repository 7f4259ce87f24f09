"""The strict order of the rooms, and their doors: the files that others may import."""

import ast
import pathlib

import spiral_jax

ROOT = pathlib.Path(spiral_jax.__file__).parent
SOURCES = [path.relative_to(ROOT) for path in sorted(ROOT.rglob("*.py"))]
# All rooms in their order, each with its files that other rooms or commands import.
DOORS = {
    "core": "command config distributed errors faults functions groups mesh metrics progress",
    "model": "adapter architecture attention flops hf products tensor_files transformer trees",
    "tasks": "answer finite hub jsonl load overlap problem tiny_tokenizer",
    "prompts": "prompts scaffold settings tokenizer",
    "verifier": "choice pool references rewards settings verifier",
    "objective": "advantages control_variate estimators explain rewards settings subsets weights",
    "sampling": "decode engine memory prefill programs protocol settings shapes weights",
    "learner": "blocks logprobs settings state step",
    "rollout": "actor collect feed judge populations requests settings stages traces",
    "evaluation": "answers comparison measures results settings stages statistics tables wave",
    "run": "checkpoint evaluation_run log preemption rehearsal setup start trace_log training_run "
    "workdir",
    "planning": "text work",
    "reporting": "axes evaluation_figures main_page series style summary",
    "studies": "across design directory gather processes runner text",
}
ORDER = list(DOORS)
OF_ALL = ("spiral_jax.STARTED", "spiral_jax.__version__")


def imported_files(path):
    """Room and file of what a file imports: at its top, in functions, for type checkers."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("spiral_jax.") and name not in OF_ALL:
                yield name.split(".")[1:3]


def test_a_file_imports_from_its_room_and_rooms_before_it_and_no_command():
    wrong = set()
    for path in SOURCES:
        room = path.parts[0]
        allowed = ORDER[: ORDER.index(room) + 1] if room in ORDER else ORDER
        if room == "library.py":  # is what commands are made of, and training is one of them
            allowed = [*ORDER, "train"]
        if room == "assets":  # is copied to where nothing of the package is
            allowed = []
        for imported_room, *file in imported_files(path):
            if imported_room not in allowed:
                wrong.add(f"{path} imports {'/'.join([imported_room, *file])}")
    assert not wrong, "\n".join(sorted(wrong))


def test_only_doors_are_imported_from_outside_a_room():
    unused = {(room, file) for room, files in DOORS.items() for file in files.split()}
    wrong = set()
    for path in SOURCES:
        for room, *file in imported_files(path):
            if room == path.parts[0] or room not in DOORS:
                continue
            if file[0] not in DOORS[room].split():
                wrong.add(f"{path} imports {room}/{file[0]}")
            unused.discard((room, file[0]))
    assert not wrong, "new doors:\n" + "\n".join(sorted(wrong))
    assert not unused, f"doors that nobody uses: {sorted(unused)}"


def test_train_is_a_page():
    assert len((ROOT / "train.py").read_text().splitlines()) <= 130
