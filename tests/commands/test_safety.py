"""What is read cannot run: no pickle, no eval, no code of a checkpoint's or data set's own in any
file.
"""

import ast
import pathlib

import pytest

import spiral_jax

ROOT = pathlib.Path(spiral_jax.__file__).parent.parent
SOURCES = [
    path
    for folder in ("spiral_jax", "configs", "launch")
    for path in sorted((ROOT / folder).rglob("*.py"))
]

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
}  # the builtins; `jax.jit(f).lower().compile()` is an attribute
READERS = {"load", "loads"}  # of these modules, of which some formats are pickle
READS_PICKLE = {"torch", "np", "numpy", "pandas"}


def findings(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            yield from (f"import {name}" for name in names if name.split(".")[0] in MODULES)
        if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
            off = isinstance(node.value, ast.Constant) and node.value.value is False
            yield from () if off else (f"{node.arg} is not False",)
        if isinstance(node, ast.Call):
            function, safe = (
                node.func,
                {keyword.arg for keyword in node.keywords} & {"allow_pickle"},
            )
            if isinstance(function, ast.Name) and function.id in CALLS:
                yield f"{function.id}()"
            if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
                name = function.value.id
                if name in READS_PICKLE and function.attr in READERS and not safe:
                    yield f"{name}.{function.attr}()"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_of_the_program_runs_nothing_that_it_reads(path):
    assert not list(findings(ast.parse(path.read_text())))


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from pickle import loads", "import yaml", "eval(text)", "exec(text)", "__import__(name)",
        "np.load(path)", "torch.load(path)", "np.load(path, allow_pickle=True)", "f(trust_remote_code=True)",
        "f(trust_remote_code=given)",
    ],
)  # fmt: skip
def test_the_walk_finds_what_it_looks_for(code):
    assert list(findings(ast.parse(code)))


def test_the_walk_allows_what_is_safe():
    code = "np.load(path, allow_pickle=False); f(trust_remote_code=False); lowered.compile(); json.loads(text)"
    assert not list(findings(ast.parse(code)))
