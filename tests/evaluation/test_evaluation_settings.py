"""What an evaluation samples, by its two doors, and the numbers that they refuse."""

import pytest

from configs import tiny
from spiral_jax.core.config import ConfigError, digest
from spiral_jax.evaluation.settings import for_command, for_training


def config(**overrides):
    c = tiny.get_config()
    c.eval.n = 32
    for field, value in overrides.items():
        room, name = field.split("__")
        c[room][name] = value
    return c


REFUSED_BY_THE_COMMAND = {
    "eval.problems": (0, ">= 1"),
    "eval.n": (1001, "at most 1000"),
    "eval.subset_size": (33, "eval.n = 32"),
    "eval.subsets": (9, "eval.n // eval.subset_size = 8"),
    "eval.traces": (0, ">= 1"),
    "eval.population": (33, "eval.n = 32"),
    "eval.set_size": (9, "eval.population = 8"),
    "eval.rounds": (0, ">= 1"),
    "eval.wave": (0, ">= 1"),
    "eval.limits": ((8, 8), "ascending"),
    "eval.searcher": ("runs/newest", "WORKDIR@step"),
    "model.init_from": ("runs/newest", "WORKDIR@step"),
    "aggregation.subset_size": (33, "eval.n = 32"),
}
REFUSED_IN_TRAINING = {
    "eval.subset_size": (9, "search.traces = 8"),
    "eval.subsets": (3, "search.traces // eval.subset_size = 2"),
    "eval.traces": (0, ">= 1"),
    "eval.population": (9, "search.traces = 8"),
    "eval.set_size": (9, "eval.population = 8"),
}


def check_refused(door, c, field, value, allowed):
    door(c)
    room, name = field.split(".")
    c[room][name] = value
    with pytest.raises(ConfigError) as error:
        door(c)
    for part in (f"config.{field}", repr(value if name != "limits" else list(value)), allowed):
        assert part in str(error.value)


@pytest.mark.parametrize("field", REFUSED_BY_THE_COMMAND)
def test_the_command_refuses_numbers_that_cannot_be(field):
    check_refused(for_command, config(), field, *REFUSED_BY_THE_COMMAND[field])


@pytest.mark.parametrize("field", REFUSED_IN_TRAINING)
def test_training_refuses_numbers_that_cannot_be(field):
    c = config(eval__rounds_in_training=1)
    check_refused(for_training, c, field, *REFUSED_IN_TRAINING[field])


@pytest.mark.parametrize("limits", [(0,), (8, 4), (1_000_000,), (4.0,)])
def test_limits_are_whole_ascending_and_below_that_of_a_search_trace(limits):
    with pytest.raises(ConfigError, match="eval.limits"):
        for_command(config(eval__limits=limits))


def test_training_checks_only_what_its_evaluations_use():
    for_training(config(eval__population=9))  # no rounds of RSA
    for_training(config(eval__problems=0, eval__subsets=99))
    assert not for_training(config(loss__estimator="grpo", eval__subsets=99)).aggregates


def test_the_command_samples_the_numbers_of_eval():
    c = config(eval__subset_size=3, eval__limits=(4, 8))
    settings = for_command(c)
    assert (settings.n, settings.subset_size, settings.limits) == (32, 3, (4, 8))
    assert settings.rounds == c.eval.rounds and settings.aggregates
    c.eval.subset_size = 0
    assert for_command(c).subset_size == c.aggregation.subset_size


def test_training_samples_as_many_traces_as_training_does_and_no_limits():
    c = config(eval__limits=(4, 8), eval__rounds_in_training=2)
    settings = for_training(c)
    assert (settings.n, settings.rounds, settings.limits) == (c.search.traces, 2, ())


def test_the_digest_is_of_the_configuration_with_the_numbers_that_are_sampled():
    c = config(eval__subset_size=3, eval__rounds_in_training=1)
    given = digest(c)
    found = for_training(c).config_digest
    assert digest(c) == given != found
    c.eval.n, c.eval.rounds, c.eval.limits = c.search.traces, 1, ()
    c.aggregation.subset_size = 3
    assert found == digest(c)
