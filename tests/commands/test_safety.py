"""What is read cannot run: no pickle, no eval, no code of a checkpoint or data set."""

import ast
import pathlib

import pytest

import spiral_jax

ROOT = pathlib.Path(spiral_jax.__file__).parent.parent
FOLDERS = ("spiral_jax", "configs", "launch")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml"}
# The builtins; `jax.jit(f).lower().compile()` is an attribute.
CALLS = {"eval", "exec", "compile", "__import__"}
READERS = {"load", "loads"}  # of these modules, of which some formats are pickle
READS_PICKLE = {"torch", "np", "numpy", "pandas"}


def findings(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names = names or [alias.name for alias in node.names]
            yield from (f"import {name}" for name in names if name.split(".")[0] in MODULES)
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            off = isinstance(node.value, ast.Constant) and node.value.value is False
            yield from () if off else (f"{node.arg} is not False",)
        if isinstance(node, ast.Call):
            function = node.func
            safe = {keyword.arg for keyword in node.keywords} & {"allow_pickle"}
            if isinstance(function, ast.Name) and function.id in CALLS:
                yield f"{function.id}()"
            if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
                name = function.value.id
                if name in READS_PICKLE and function.attr in READERS and not safe:
                    yield f"{name}.{function.attr}()"


# Programs that models write are executed here and nowhere else, in a process made for it.
RUNNER = ROOT / "spiral_jax" / "verifier" / "program_runner.py"


def test_no_file_of_the_program_runs_what_it_reads_but_the_one_that_is_made_for_it():
    unsafe = {path: set(findings(ast.parse(path.read_text()))) for path in SOURCES}
    assert {path: lines for path, lines in unsafe.items() if lines} == {
        RUNNER: {"exec()", "compile()"}
    }


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import yaml",
        "eval(text)",
        "exec(text)",
        "__import__(name)",
        "np.load(path)",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=given)",
    ],
)
def test_the_walk_finds_what_it_looks_for(code):
    assert list(findings(ast.parse(code)))


def test_the_walk_allows_what_is_safe():
    code = ["np.load(path, allow_pickle=False)", "f(trust_remote_code=False)"]
    code += ["lowered.compile()", "json.loads(text)"]
    assert not list(findings(ast.parse("; ".join(code))))
