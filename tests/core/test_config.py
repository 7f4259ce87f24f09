"""Configurations: locked, complete, checked early, with messages that name the field and what to
do.
"""


import pytest
from ml_collections import ConfigDict
from spiral_jax.core.config_checks import validate, validate_evaluation

from configs import grpo_qwen3_4b, qwen3_4b, smollm2_135m, smollm2_chain_sum, tiny
from spiral_jax.core.config import (
    ConfigError,
    defaults,
    difference,
    digest,
    for_evaluation,
    to_plain,
)

CONFIGS = {
    "tiny": tiny,
    "qwen3_4b": qwen3_4b,
    "grpo_qwen3_4b": grpo_qwen3_4b,
    "smollm2_135m": smollm2_135m,
    "smollm2_chain_sum": smollm2_chain_sum,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_file_is_valid_and_locked(name):
    c = CONFIGS[name].get_config()
    validate(c)
    assert c.is_locked


def test_an_unknown_field_is_an_error_that_names_the_nearest_one():
    c = tiny.get_config()
    with pytest.raises(AttributeError, match="learning_rate"):
        c.optimizer.learning_rate = 1.0
    with pytest.raises(AttributeError, match='Did you mean "subsets"'):
        c.aggregation.subset = 3


def test_a_value_of_another_type_is_an_error():
    with pytest.raises(TypeError):
        tiny.get_config().train.steps = "many"


BAD = {
    "aggregation.subset_size": (9, "between 1 and search.traces = 8"),
    "aggregation.subsets": (71, "C(N=8, S=4) = 70"),
    "aggregation.traces": (1, "every aggregation advantage is zero"),
    "aggregation.rounds": (0, ">= 1"),
    "batch.search_groups": (7, "divisor"),
    "batch.aggregation_groups": (24, "divisor"),
    "loss.estimator": ("reinforce", "marginal_mean, with_without"),
    "loss.normalizer": ("mean", "unbiased, sum"),
    "prompt.truncated": ("skip", "keep_tail, drop, mark"),
    "prompt.thinking": ("none", "answer_only, full"),
    "optimizer.schedule": ("step", "constant, linear, cosine"),
    "optimizer.lr": (0.0, "> 0"),
    "sampling.temperature": (0.0, "> 0"),
    "sampling.classes": (
        ((4, 8, 16, 26), (4, 4, 16, 52)),
        "with a class of C = 8 and G = 52 for P = 16",
    ),
    "sampling.cache_dtype": ("int4", "compute, int8"),
    "sampling.keep_rate": (0.0, "> 0"),
    "sampling.verdict_delay": (-1, ">= 0"),
    "eval.temperature": (-0.5, ">= 0"),
    "eval.top_p": (0.0, "above 0 and at most 1"),
    "eval.min_p": (1.0, "below 1"),
    "search.max_tokens": (27, None),
    "model.hf_path": ("", "directory"),
    "model.compute_dtype": ("float16", "float32, bfloat16"),
    "task.name": ("gsm", "jsonl, parquet, hf, two_halves, end_digit, reasoning_gym"),
    "task.reward": ("my_reward", "package.module:function"),
    "eval.subsets": (3, "between 1 and"),
    "train.steps": (0, ">= 1"),
    "verifier.timeout_s": (0.0, "> 0"),
    "loss.length_gate": (-1.0, ">= 0"),
    "loss.clip_low": (1.0, "below 1"),
    "loss.dual_clip": (0.5, "above 1"),
    "loss.kl_coef": (-0.1, ">= 0"),
    "model.remat": ("everything", "none, dots, attention, layer"),
    "profile.steps": ((3, 3), "0 <= first < end"),
}


@pytest.mark.parametrize("field", BAD)
def test_a_bad_value_is_refused_with_field_value_and_what_is_allowed(field):
    c, (value, allowed) = tiny.get_config(), BAD[field]
    room, name = field.split(".")
    c[room][name] = value
    with pytest.raises(ConfigError) as caught:
        validate(c)
    message = str(caught.value)
    assert "config." in message
    if allowed is None:  # the message names the field that has to grow with it
        assert "batch.search_lengths" in message and str(value) in message
    else:
        assert f"config.{field} = " in message and allowed in message


def test_the_ratio_is_truncated_or_clipped_but_not_both():
    c = tiny.get_config()
    c.loss.tis_cap, c.loss.clip_high = 2.0, 0.2
    with pytest.raises(ConfigError, match="config.loss.tis_cap = 2.0.*makes one update"):
        validate(c)


def test_one_subset_gives_search_no_signal():
    c = tiny.get_config()
    c.aggregation.subsets = 1
    with pytest.raises(ConfigError, match="every set advantage is zero"):
        validate(c)
    c.loss.estimator = "aggregator_only"
    c.batch.aggregation_groups = 16
    validate(c)


def _assert_refused(c, changes, words):
    c.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError) as caught:
        validate(c)
    assert words in str(caught.value)


@pytest.mark.parametrize("estimator, changes, words", [
    ("disjoint_sets", {}, "aggregation.subsets = 4: must be between 1 and search.traces // subset_size = 2"),
    ("disjoint_sets", {"aggregation.subsets": 1}, "every set advantage is zero"),
    ("paragator", {"aggregation.subset_size": 8, "aggregation.subsets": 1}, "below search.traces"),
    ("pkpo", {"aggregation.subset_size": 1}, "aggregation.subset_size = 1: must be >= 2 for pkpo"),
    ("polychromic", {"aggregation.subset_size": 1}, ">= 2 for polychromic"),
    ("polychromic", {"search.traces": 16}, "C(N=16, S) = 12870 is at most 2000"),
    ("online_multitask", {"search.traces": 1, "aggregation.subset_size": 1, "aggregation.subsets": 1}, "no baseline"),
    ("rloo", {"search.traces": 1}, ">= 2 for rloo"),
    ("grpo_nostd", {"search.traces": 1}, ">= 2 for grpo_nostd"),
])  # fmt: skip
def test_an_estimator_refuses_sets_that_give_it_no_signal(estimator, changes, words):
    c = tiny.get_config()
    c.loss.estimator = estimator
    if "search.traces" in changes and changes["search.traces"] > 8:
        c.aggregation.subset_size = 8
    _assert_refused(c, changes, words)


@pytest.mark.parametrize("changes, words", [
    ({"loss.estimator": "paragator"}, "aggregation.rounds = 2: must be 1 for paragator. More are defined for marginal"),
    ({"aggregation.subsets": 2, "aggregation.traces": 2}, "must be 1 at 4 traces a round. A later round needs 2"),
    ({"batch.aggregation_groups": 96}, "a divisor of the 128 aggregation groups of a step"),
])  # fmt: skip
def test_a_second_round_needs_an_estimator_sets_and_micro_batches_that_have_one(changes, words):
    c = tiny.get_config()
    c.aggregation.rounds = 2
    validate(c)
    _assert_refused(c, changes, words)


def test_grpo_has_no_aggregation_so_its_rounds_are_as_idle_as_its_sets():
    c = tiny.get_config()
    c.loss.estimator, c.aggregation.rounds = "grpo", 2
    validate(c)


def test_jsonl_needs_a_training_file_and_a_held_out_one_unless_nothing_is_evaluated():
    c = defaults()
    c.model.hf_path = "somewhere"
    with pytest.raises(ConfigError, match="task.train_path"):
        validate(c)
    c.task.train_path = "train.jsonl"
    with pytest.raises(ConfigError, match="eval.problems = 0"):
        validate(c)
    c.eval.problems = 0
    validate(c)


def test_difference_lists_each_changed_field_once():
    a, b = tiny.get_config(), tiny.get_config()
    b.optimizer.lr, b.seed = 0.5, 3
    assert difference(to_plain(a), to_plain(b)) == [
        f"optimizer.lr: {a.optimizer.lr} -> 0.5",
        "seed: 0 -> 3",
    ]
    assert difference(to_plain(a), to_plain(a)) == []


def test_digest_is_that_of_the_values_alone():
    assert digest(tiny.get_config()) == digest(ConfigDict(to_plain(tiny.get_config())))
    changed = tiny.get_config()
    changed.seed = 1
    assert digest(changed) != digest(tiny.get_config())


BAD_EVALUATIONS = {
    "eval.problems": (0, ">= 1"),
    "eval.n": (1001, "at most 1000"),
    "eval.subset_size": (33, "at most eval.n = 32"),
    "eval.subsets": (9, "at most eval.n // eval.subset_size = 8"),
    "eval.traces": (0, ">= 1"),
    "eval.population": (33, "at most eval.n = 32"),
    "eval.set_size": (9, "at most eval.population = 8"),
    "eval.rounds": (0, ">= 1"),
    "eval.wave": (0, ">= 1"),
    "eval.limits": ((8, 8), "ascending"),
    "sampling.temperature": (0.0, "> 0"),
}


@pytest.mark.parametrize("field", BAD_EVALUATIONS)
def test_an_evaluation_that_cannot_be_is_refused_with_field_value_and_what_is_allowed(field):
    c, (value, allowed) = tiny.get_config(), BAD_EVALUATIONS[field]
    validate_evaluation(c)
    room, name = field.split(".")
    c[room][name] = value
    with pytest.raises(ConfigError) as caught:
        validate_evaluation(c)
    assert f"config.{field} = " in str(caught.value) and allowed in str(caught.value)


@pytest.mark.parametrize("limits", [(0, 8), (8, 27), (16, 8), ("a",)])
def test_limits_are_within_what_is_sampled(limits):
    c = tiny.get_config()
    c.eval.limits = limits
    with pytest.raises(ConfigError, match="between 1 and search.max_tokens = 26"):
        validate_evaluation(c)


def test_fewer_traces_than_a_set_holds_are_refused():
    c = tiny.get_config()
    c.eval.n = 3
    with pytest.raises(
        ConfigError, match="config.aggregation.subset_size = 4: must be at most eval.n = 3"
    ):
        validate_evaluation(c)


def test_an_evaluation_needs_no_training_data_and_no_batches():
    c = defaults()
    c.model.hf_path, c.task.eval_path = "somewhere", "test.jsonl"
    c.batch.search_lengths, c.loss.estimator = ((1, 1),), "grpo"
    validate_evaluation(c)
    c.task.eval_path = ""
    with pytest.raises(ConfigError, match="config.task.eval_path"):
        validate_evaluation(c)


def test_the_evaluation_samples_its_own_numbers_and_leaves_the_given_config_alone():
    c = tiny.get_config()
    c.eval.n, c.eval.subset_size = 12, 3
    run = for_evaluation(c)
    assert (run.search.traces, run.aggregation.subset_size) == (12, 3)
    assert (c.search.traces, c.aggregation.subset_size) == (8, 4)


def test_rounds_during_training_need_a_population_among_the_search_traces():
    c = tiny.get_config()
    c.eval.population = 9
    validate(c)  # nobody asks for rounds
    c.eval.rounds_in_training = 1
    with pytest.raises(
        ConfigError, match=r"eval.population = 9: must be at most search.traces = 8"
    ):
        validate(c)
