"""Where a new run starts: another run's weights alone, or an adapter; refusals name the field."""

import jax
import numpy as np
import pytest
from small_runs import make_run, random_like

from configs import tiny
from spiral_jax.core.config import ConfigError
from spiral_jax.core.config_checks import validate
from spiral_jax.core.mesh import weight_shardings
from spiral_jax.learner.step import init_state
from spiral_jax.model import hf
from spiral_jax.model.adapter import abstract_lora, save_adapter
from spiral_jax.model.architecture import read_architecture
from spiral_jax.run.checkpoint import CheckpointError, Checkpoints
from spiral_jax.run.start import check_start, load_policies, load_start

PATH = hf.BUNDLED["bundled:tiny"]


def config(**model):
    c = tiny.get_config()
    c.model.update(model)
    validate(c)
    return c


def model_of(c):
    return hf.model_config(read_architecture(PATH), c.model)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, mesh):
    """Workdirs of a LoRA run and of a full one with checkpoints of steps 1 and 2, and what was
    trained in them.
    """
    made = {}
    for kind, rank in (("lora", 4), ("full", 0)):
        c, path = config(lora_rank=rank, lora_alpha=6.0), tmp_path_factory.mktemp(kind) / "run"
        made[kind] = path, make_run(path, c, model_of(c), mesh, steps=(1, 2))
    return made


def assert_same(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: (np.asarray(a) == np.asarray(b)).all(), tree, expected)
    )


@pytest.mark.parametrize("suffix, step", [("", 2), ("@1", 1), ("@2", 2)])
def test_a_run_starts_from_the_adapters_of_another_runs_step(runs, mesh, suffix, step):
    path, trained = runs["lora"]
    c = config(lora_rank=4, lora_alpha=6.0, init_from=f"{path}{suffix}")
    c.optimizer.clip_norm = (
        1.0  # another optimizer, whose state has another structure: only weights are read
    )
    model = model_of(c)
    base, lora = load_start(c, PATH, model, mesh)
    assert_same(lora, trained[step])
    assert_same(base, hf.load_params(PATH, model, mesh))
    frozen, state = init_state(c, model, base, mesh, lora)
    assert frozen is base and int(state.step) == 0
    assert_same(state.trained, trained[step])


def test_a_full_run_starts_from_the_parameters_of_another(runs, mesh):
    path, trained = runs["full"]
    c = config(init_from=str(path))
    params, lora = load_start(c, PATH, model_of(c), mesh)
    assert lora is None
    assert_same(params, trained[2])


def test_a_run_starts_from_a_peft_adapter(mesh, tmp_path):
    c = config(lora_rank=4, lora_alpha=6.0, adapter_path=str(tmp_path))
    expected = random_like(abstract_lora(model_of(c)), mesh, 0)
    save_adapter(tmp_path, expected, model_of(c), "base")
    assert_same(load_start(c, PATH, model_of(c), mesh)[1], expected)


def test_without_either_the_adapters_are_fresh_and_the_parameters_the_checkpoints(mesh):
    c = config(lora_rank=4)
    base, lora = load_start(c, PATH, model_of(c), mesh)
    assert lora is None
    assert_same(base, hf.load_params(PATH, model_of(c), mesh))


BAD = {
    "no run there": ({"lora_rank": 4}, "{lora}/nowhere", "holds no run"),
    "no such step": (
        {"lora_rank": 4, "lora_alpha": 6.0},
        "{lora}@7",
        r"no checkpoint of step 7; it has \[1, 2\]",
    ),
    "another rank": (
        {"lora_rank": 8, "lora_alpha": 6.0},
        "{lora}",
        "model.lora_rank = 4, this one 8",
    ),
    "another alpha": (
        {"lora_rank": 4, "lora_alpha": 7.0},
        "{lora}",
        "model.lora_alpha = 6.0, this one 7.0",
    ),
    "full from LoRA": (
        {"lora_rank": 0},
        "{lora}",
        "model.lora_rank = 4, this one 0.*spiral_jax.export",
    ),
    "LoRA from full": (
        {"lora_rank": 4},
        "{full}",
        "model.lora_rank = 0, this one 4.*spiral_jax.export",
    ),
}


def test_an_evaluation_pairs_two_policies_and_the_base_among_them_has_adapters_that_change_nothing(
    runs, mesh
):
    path, trained = runs["lora"]
    base = hf.load_params(PATH, model_of(config(lora_rank=4, lora_alpha=6.0)), mesh)
    for reader, searcher in (
        (f"{path}@1", "base"),
        ("", f"{path}@2"),
        (f"{path}@1", f"{path}@2"),
        (f"{path}@1", ""),
    ):
        c = config(lora_rank=4, lora_alpha=6.0, init_from=reader)
        c.eval.searcher = searcher
        found = load_policies(c, PATH, model_of(c), mesh)
        for name, policy in zip((reader, searcher), found, strict=True):
            if policy is None:
                assert name == ""  # the same as the model
            elif "@" in name:
                assert_same(policy["lora"], trained[int(name[-1])])
            else:
                assert not any(np.asarray(a).any() for a in jax.tree.leaves(policy["lora"]))
                assert_same(policy["params"], base)


@pytest.mark.parametrize("name", BAD)
def test_a_start_that_does_not_fit_is_an_error_that_names_the_field(runs, name):
    fields, init_from, expected = BAD[name]
    c = config(**fields, init_from=init_from.format(lora=runs["lora"][0], full=runs["full"][0]))
    with pytest.raises(ConfigError, match=f"config.model.init_from = .*{expected}"):
        check_start(c, PATH, model_of(c))


def test_another_base_is_an_error_that_names_both(runs, tmp_path):
    c = config(lora_rank=4, lora_alpha=6.0, init_from=str(runs["lora"][0]))
    with pytest.raises(ConfigError, match=f"model.hf_path = '{PATH}', this one '{tmp_path}'"):
        check_start(c, tmp_path, model_of(c))


def test_two_starts_or_an_adapter_without_a_rank_are_refused():
    with pytest.raises(
        ConfigError, match="config.model.adapter_path = 'a': must be empty at model.lora_rank = 0"
    ):
        config(adapter_path="a")
    with pytest.raises(
        ConfigError, match="config.model.init_from = 'w': must be empty beside model.adapter_path"
    ):
        config(adapter_path="a", init_from="w", lora_rank=4)


def test_weights_of_another_shape_are_an_error_that_names_them(runs, mesh):
    path, _ = runs["lora"]
    shapes = {"layers": {"q": {"a": jax.ShapeDtypeStruct((4, 128, 5), np.float32)}}}
    target = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        shapes,
        weight_shardings(shapes, mesh),
    )
    with Checkpoints(path / "checkpoints", None) as checkpoints:
        with pytest.raises(
            CheckpointError, match="trained/layers/q/a is float32.*4, 128, 4.*there"
        ):
            checkpoints.restore_part({"trained": target})
        with pytest.raises(CheckpointError, match="lacks weights/layers/q/a"):
            checkpoints.restore_part({"weights": target})
