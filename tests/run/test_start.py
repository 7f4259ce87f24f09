"""Where a new run starts: another run's weights alone, or an adapter; refusals name the field."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from small_runs import make_run, random_like

from configs import tiny
from spiral_jax.core.config import ConfigError, digest, to_plain
from spiral_jax.core.mesh import weight_shardings, with_shardings
from spiral_jax.learner.state import init_state
from spiral_jax.model import hf
from spiral_jax.model.adapter import abstract_lora, save_adapter
from spiral_jax.model.architecture import read_architecture
from spiral_jax.run.checkpoint import CheckpointError, Checkpoints
from spiral_jax.run.setup import check_training
from spiral_jax.run.start import Start, find_trained, trained_digest
from spiral_jax.run.workdir import read_config

PATH = hf.BUNDLED["bundled:tiny"]
LORA = {"lora_rank": 4, "lora_alpha": 6.0}


def config(**model):
    c = tiny.get_config()
    c.model.update(model)
    check_training(c)
    return c


def model_of(c):
    return hf.model_config(read_architecture(PATH), c.model)


def start_of(c, mesh, path=PATH):
    return Start(path, model_of(c), mesh, c.model.adapter_path, c.model.init_from)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, mesh):
    """(workdir, what was trained by step) of a LoRA and of a full run, with steps 1 and 2."""
    made = {}
    for kind, fields in (("lora", LORA), ("full", {"lora_rank": 0, "lora_alpha": 6.0})):
        c, path = config(**fields), tmp_path_factory.mktemp(kind) / "run"
        made[kind] = path, make_run(path, c, model_of(c), mesh, steps=(1, 2))
    return made


@pytest.fixture(scope="module")
def base(mesh):
    """The bundled checkpoint's parameters, as a LoRA run loads them."""
    return hf.load_params(PATH, model_of(config(**LORA)), mesh)


def assert_same(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: (np.asarray(a) == np.asarray(b)).all(), tree, expected)
    )


@pytest.mark.parametrize("step", [1, 2])
def test_a_run_starts_from_the_adapters_of_another_runs_step(runs, base, mesh, step):
    path, trained = runs["lora"]
    c = config(**LORA, init_from=f"{path}@{step}")
    # Another optimizer, whose state has another structure: only weights are read.
    c.optimizer.clip_norm = 1.0
    params, lora = start_of(c, mesh).load()
    assert_same(lora, trained[step])
    assert_same(params, base)
    learner = check_training(c).training.learner
    frozen, state = init_state(learner, model_of(c), mesh, params, lora)
    assert frozen is params and int(state.step) == 0
    assert_same(state.trained, trained[step])


def test_the_digest_of_what_was_trained_is_of_its_numbers_alone(mesh, tmp_path):
    """Of two runs that save the same arrays, and of one that saves others at the same step."""
    c, digests = config(**LORA), []
    for name, scale in (("one", 0.1), ("again", 0.1), ("other", 0.2)):
        make_run(tmp_path / name, c, model_of(c), mesh, scale=scale)
        digests.append(trained_digest(f"{tmp_path / name}@1"))
    assert digests[0] == digests[1] != digests[2]
    with pytest.raises(CheckpointError, match="no checkpoint of step 7"):
        trained_digest(f"{tmp_path / 'one'}@7")


def test_a_full_run_starts_from_the_parameters_of_another(runs, mesh):
    path, trained = runs["full"]
    params, lora = start_of(config(init_from=f"{path}@2"), mesh).load()
    assert lora is None
    assert_same(params, trained[2])


def test_a_run_starts_from_a_peft_adapter(mesh, tmp_path):
    c = config(**LORA, adapter_path=str(tmp_path))
    expected = random_like(abstract_lora(model_of(c)), mesh, 0)
    save_adapter(tmp_path, expected, model_of(c), "base")
    assert_same(start_of(c, mesh).load()[1], expected)


def test_without_either_the_adapters_are_fresh_and_the_parameters_the_checkpoints(base, mesh):
    params, lora = start_of(config(**LORA), mesh).load()
    assert lora is None
    assert_same(params, base)


@pytest.mark.parametrize(
    ("reader", "searcher"), [("@1", "base"), ("", "@2"), ("@1", "@2"), ("@1", "")]
)
def test_an_evaluation_pairs_two_policies_and_adapters_of_the_base_change_nothing(
    runs, base, mesh, reader, searcher
):
    path, trained = runs["lora"]

    def name(suffix):
        return f"{path}{suffix}" if suffix.startswith("@") else suffix

    start = start_of(config(**LORA, init_from=name(reader)), mesh)
    policies = {reader: start.load_policy()}
    if searcher:
        policies[searcher] = start.searcher(name(searcher)).load_policy()
    for suffix, policy in policies.items():
        assert_same(policy["params"], base)
        if suffix.startswith("@"):
            assert_same(policy["lora"], trained[int(suffix[1:])])
        else:
            assert not any(np.asarray(a).any() for a in jax.tree.leaves(policy["lora"]))


def test_a_policy_without_adapters_is_parameters_alone(base, mesh):
    policy = start_of(config(), mesh).load_policy()
    assert policy.keys() == {"params"}


# --- starts that do not fit -----------------------------------------------------------------------

BAD = {
    "no run there": (LORA, "{lora}/nowhere@1", ("holds no run",)),
    "no step": (LORA, "{lora}", ("WORKDIR@step", "checkpoints")),
    "no step behind an @": (LORA, "me@host/run", ("WORKDIR@step",)),
    "no such step": (LORA, "{lora}@7", ("no checkpoint of step 7", "[1, 2]")),
    "another rank": (LORA | {"lora_rank": 8}, "{lora}@2", ("model.lora_rank = 4", "8")),
    "another alpha": (LORA | {"lora_alpha": 7.0}, "{lora}@2", ("model.lora_alpha = 6.0", "7.0")),
    "full from LoRA": (
        {"lora_rank": 0},
        "{lora}@2",
        ("model.lora_rank = 4", "0", "spiral_jax.export"),
    ),
    "LoRA from full": (LORA, "{full}@2", ("model.lora_rank = 0", "4", "spiral_jax.export")),
}


@pytest.mark.parametrize("name", BAD)
def test_a_start_that_does_not_fit_is_an_error_that_names_the_field(runs, mesh, name):
    fields, init_from, parts = BAD[name]
    init_from = init_from.format(lora=runs["lora"][0], full=runs["full"][0])
    with pytest.raises(ConfigError) as refusal:
        start_of(config(**fields, init_from=init_from), mesh).check()
    for part in ("config.model.init_from", init_from, *parts):
        assert part in str(refusal.value)


def test_a_run_without_adapters_on_experts_is_no_start_for_one_with_them(runs, mesh):
    start = start_of(config(**LORA, init_from=f"{runs['lora'][0]}@2"), mesh)
    on_experts = dataclasses.replace(start.model, lora_experts=True)
    with pytest.raises(ConfigError, match="model.lora_experts = False, this one True"):
        dataclasses.replace(start, model=on_experts).check()


def test_another_base_is_an_error_that_names_both(runs, mesh, tmp_path):
    c = config(**LORA, init_from=f"{runs['lora'][0]}@2")
    with pytest.raises(ConfigError) as refusal:
        start_of(c, mesh, tmp_path).check()
    for part in ("model.hf_path", str(PATH), str(tmp_path)):
        assert part in str(refusal.value)


def test_weights_of_another_shape_are_an_error_that_names_them(runs, mesh):
    path, _ = runs["lora"]
    shapes = {"layers": {"q": {"a": jax.ShapeDtypeStruct((4, 128, 5), np.float32)}}}
    target = with_shardings(shapes, weight_shardings(shapes, mesh))
    with Checkpoints(path / "checkpoints", None) as checkpoints:
        with pytest.raises(CheckpointError, match="trained/layers/q/a.*128, 4.*there"):
            checkpoints.restore_part({"trained": target})
        with pytest.raises(CheckpointError, match="lacks weights/layers/q/a"):
            checkpoints.restore_part({"weights": target})


# --- runs of earlier versions ---------------------------------------------------------------------


def rewrite_config(path, **fields):
    """Writes fields `section__name` into config.json, with a digest that fits no longer."""
    content = json.loads((path / "config.json").read_bytes())
    for field, value in fields.items():
        section, name = field.split("__")
        content[section][name] = value
    (path / "config.json").write_text(json.dumps(content | {"config_digest": "old"}))


def test_a_run_of_an_earlier_version_is_read_as_this_one_would_have_written_it(
    runs, mesh, tmp_path
):
    path, trained = runs["lora"]
    old = shutil.copytree(path, tmp_path / "old")
    rewrite_config(old, loss__dual_clip=0.0, sampling__verdict_delay=2)
    c = config(**LORA)
    assert read_config(old) == (to_plain(c), digest(c))
    assert digest(find_trained(old, step=1).c) == digest(c)
    start = start_of(config(**LORA, init_from=f"{old}@1"), mesh)
    assert_same(start.load()[1], trained[1])


def test_a_run_of_an_earlier_version_that_meant_something_else_is_refused(runs, mesh, tmp_path):
    old = shutil.copytree(runs["lora"][0], tmp_path / "old")
    rewrite_config(old, loss__clip_high=0.28)
    start = start_of(config(**LORA, init_from=f"{old}@1"), mesh)
    with pytest.raises(ConfigError) as refusal:
        start.check()
    for part in (str(old), "loss.clip_high", "0.28"):
        assert part in str(refusal.value)
