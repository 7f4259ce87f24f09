"""The doors of training and evaluation: what is refused, with field, value and what is allowed."""

import json
import re

import pytest
from ml_collections import ConfigDict

from configs import (
    end_digit,
    grpo_qwen3_4b,
    qwen3_4b,
    smollm2_135m,
    smollm2_chain_sum,
    three_parts,
    tiny,
    your_data,
)
from spiral_jax.core.config import ConfigError, defaults, from_plain, to_plain
from spiral_jax.core.groups import Role
from spiral_jax.core.mesh import group_count_multiple
from spiral_jax.run.setup import check_evaluation, check_training, set_up_training
from spiral_jax.tasks.problem import Problem, TaskError

CONFIGS = {
    module.__name__: module
    for module in (
        tiny,
        qwen3_4b,
        grpo_qwen3_4b,
        smollm2_135m,
        smollm2_chain_sum,
        end_digit,
        three_parts,
        your_data,
    )
}


def config(**changes):
    """The quickstart's, with changes `section__field=value`."""
    c = tiny.get_config()
    for field, value in changes.items():
        section, name = field.split("__")
        c[section][name] = value
    return c


def words(value):
    return set(re.findall(r"[\w.-]+", str(value)))


def assert_refused(check, c, field, *parts):
    """`check(c)` names the field, its value, and the given parts of what is allowed."""
    with pytest.raises(ConfigError) as refusal:
        check(c)
    message = str(refusal.value)
    section, name = field.split(".")
    assert f"config.{field}" in message
    assert words(c[section][name]) <= words(message)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_file_is_valid_and_locked(name):
    c = CONFIGS[name].get_config()
    check_training(c)
    assert c.is_locked


BAD = {
    "aggregation.subset_size": (9, "search.traces = 8"),
    "aggregation.subsets": (71, "C(N=8, S=4) = 70"),
    "aggregation.traces": (1, ">= 2"),
    "aggregation.rounds": (0, ">= 1"),
    "aggregation.order": ("sorted", "shuffled, sampled"),
    "batch.problems": (0, ">= 1"),
    "batch.search_groups": (7, "divisor of the 16"),
    "batch.aggregation_groups": (24, "divisor of the 64"),
    "batch.search_lengths": (((16, 26), (8, 26)), "ascending"),
    "batch.aggregation_lengths": (((124, 11),), "aggregation.max_tokens = 12"),
    "loss.estimator": ("reinforce", "marginal_mean, with_without"),
    "loss.normalizer": ("mean", "unbiased, sum"),
    "loss.length_gate": (-1.0, ">= 0"),
    "loss.tis_cap": (-1.0, ">= 0"),
    "loss.kl_coef": (-0.1, ">= 0"),
    "loss.logprob_chunk": (0, ">= 1"),
    "optimizer.schedule": ("step", "constant, linear, cosine"),
    "optimizer.lr": (0.0, "> 0"),
    "optimizer.warmup_steps": (-1, ">= 0"),
    "search.temperature": (0.0, "> 0"),
    "aggregation.temperature": (0.0, "> 0"),
    "sampling.memory": (0.0, "above 0"),
    "sampling.cache_dtype": ("int4", "compute, int8"),
    "sampling.keep_rate": (0.0, "> 0"),
    "sampling.max_ratio": (0.5, ">= 1"),
    "sampling.rows": (-1, ">= 0"),
    "search.max_tokens": (0, ">= 1"),
    "prompt.template": ("jinja", "chat, plain"),
    "prompt.truncated": ("skip", "keep_tail, drop, mark"),
    "prompt.thinking": ("none", "answer_only, full"),
    "prompt.stop": ((1.5,), "texts or ids"),
    "model.hf_path": ("", "directory"),
    "model.param_dtype": ("int8", "float32 or bfloat16 at model.lora_rank = 0"),
    "model.compute_dtype": ("float16", "float32, bfloat16"),
    "model.remat": ("everything", "none, dots, attention, layer"),
    "model.attention": ("cuda", "auto, xla, gpu, tpu"),
    "task.name": ("gsm", "jsonl, parquet, hf, two_halves, end_digit, three_parts, reasoning_gym"),
    "task.reward": ("my_reward", "package.module:function"),
    "eval.search_temperature": (-0.5, ">= 0"),
    "eval.aggregation_temperature": (-0.5, ">= 0"),
    "eval.top_p": (0.0, "above 0 and at most 1"),
    "eval.min_p": (1.0, "below 1"),
    "eval.subsets": (3, "= 2"),
    "train.steps": (0, ">= 1"),
    "train.grace_s": (0.0, "> 0"),
    "train.wait_s": (0.0, "> 0"),
    "verifier.workers": (0, ">= 1"),
    "verifier.max_error_rate": (1.5, "between 0 and 1"),
    "verifier.max_timeout_rate": (-0.1, "between 0 and 1"),
    "verifier.timeout_s": (0.0, "> 0"),
    "verifier.memory_gb": (0.0, "> 0"),
    "verifier.environment": ((1,), "names of variables"),
    "checkpoint.keep": (0, ">= 1"),
    "checkpoint.keep_best": ("reward", "single, pass_at_n, majority, aggregated"),
    "metrics.writers": (("tensorbord",), "tensorboard, wandb, trackio"),
    "profile.steps": ((3, 3), "0 <= first < end"),
    "resume.allow": (("train.step",), "fields or sections"),
}


@pytest.mark.parametrize("field", BAD)
def test_training_refuses_a_bad_value_with_field_value_and_what_is_allowed(field):
    value, allowed = BAD[field]
    c = config(**{field.replace(".", "__"): value})
    assert_refused(check_training, c, field, allowed)


TUPLES = {
    "batch.search_lengths": [(16, 26), ((16,),), (("a", 26),)],
    "batch.aggregation_lengths": [(124, 12), ((124, 12, 3),)],
    "eval.limits": [("a",), ((6, 12),)],
}


@pytest.mark.parametrize("field", TUPLES)
def test_a_tuple_of_other_things_is_refused_and_a_missing_comma_is_named(field):
    for value in TUPLES[field]:
        c = config(**{field.replace(".", "__"): value})
        assert_refused(check_training, c, field, "integers")
    c = config(batch__search_lengths=(16, 26))
    assert_refused(check_training, c, "batch.search_lengths", "comma behind it: ((16, 26),)")


def test_the_seed_is_refused_too():
    c = config()
    c.seed = -1
    with pytest.raises(ConfigError, match="config.seed = -1.*>= 0"):
        check_training(c)


# --- fields that do not go together ---------------------------------------------------------------


def test_one_subset_gives_search_no_signal():
    c = config(aggregation__subsets=1)
    assert_refused(check_training, c, "aggregation.subsets", ">= 2", "no signal")
    c.loss.estimator = "aggregator_only"  # does not train search
    c.batch.aggregation_groups = 16
    check_training(c)


WITHOUT_SIGNAL = [
    ("disjoint_sets", {}, "aggregation.subsets", "search.traces // subset_size = 2"),
    ("disjoint_sets", {"aggregation__subsets": 1}, "aggregation.subsets", ">= 2"),
    (
        "paragator",
        {"aggregation__subset_size": 8, "aggregation__subsets": 1},
        "aggregation.subset_size",
        "below search.traces = 8",
    ),
    ("pkpo", {"aggregation__subset_size": 1}, "aggregation.subset_size", ">= 2 for pkpo"),
    ("polychromic", {"aggregation__subset_size": 1}, "aggregation.subset_size", ">= 2 for poly"),
    (
        "polychromic",
        {"search__traces": 16, "aggregation__subset_size": 8},
        "aggregation.subset_size",
        "C(N=16, S) = 12870 is at most 2000",
    ),
    (
        "online_multitask",
        {"search__traces": 1, "aggregation__subset_size": 1, "aggregation__subsets": 1},
        "search.traces",
        "no baseline",
    ),
    ("rloo", {"search__traces": 1}, "search.traces", ">= 2 for rloo"),
    ("grpo_nostd", {"search__traces": 1}, "search.traces", ">= 2 for grpo_nostd"),
]


@pytest.mark.parametrize(("estimator", "changes", "field", "allowed"), WITHOUT_SIGNAL)
def test_an_estimator_refuses_sets_that_give_it_no_signal(estimator, changes, field, allowed):
    c = config(loss__estimator=estimator, **changes)
    assert_refused(check_training, c, field, allowed)


WITHOUT_SECOND_ROUND = [
    ({"loss__estimator": "paragator"}, "aggregation.rounds", ("1 for paragator", "marginal_mean")),
    (
        {"aggregation__subsets": 2, "aggregation__traces": 2},
        "aggregation.rounds",
        ("1 at 4 traces a round", "2 distinct sets of 4"),
    ),
    ({"batch__aggregation_groups": 96}, "batch.aggregation_groups", ("divisor of the 128",)),
]


@pytest.mark.parametrize(("changes", "field", "allowed"), WITHOUT_SECOND_ROUND)
def test_a_second_round_needs_an_estimator_sets_and_micro_batches(changes, field, allowed):
    check_training(config(aggregation__rounds=2))
    assert_refused(check_training, config(aggregation__rounds=2, **changes), field, *allowed)


def test_grpo_has_no_aggregation_so_its_rounds_are_as_idle_as_its_sets():
    check_training(config(loss__estimator="grpo", aggregation__rounds=2, aggregation__subsets=99))


def test_micro_batches_are_as_long_as_the_traces():
    c = config(search__max_tokens=27)
    assert_refused(check_training, c, "batch.search_lengths", "search.max_tokens = 27")


def test_a_run_starts_from_one_thing_and_adapters_need_a_rank():
    c = config(model__adapter_path="a")
    assert_refused(check_training, c, "model.adapter_path", "empty at model.lora_rank = 0")
    on_experts = config(model__lora_experts=True)
    assert_refused(check_training, on_experts, "model.lora_experts", "False at model.lora_rank = 0")
    c.model.lora_rank, c.model.init_from = 4, "w"
    assert_refused(check_training, c, "model.init_from", "empty beside model.adapter_path")


def test_a_plain_prompt_has_no_chat_template_to_fill():
    c = config(prompt__template="plain", prompt__system="You are a mathematician.")
    assert_refused(check_training, c, "prompt.system", "empty", "prompt.search")
    c = config(prompt__template="plain")
    with c.prompt.template_kwargs.unlocked():
        c.prompt.template_kwargs.tone = "dry"
    assert_refused(check_training, c, "prompt.template_kwargs", "{}", "no chat template")


def test_without_evaluations_there_is_no_best_checkpoint():
    c = config(checkpoint__keep_best="aggregated", eval__problems=0)
    assert_refused(check_training, c, "checkpoint.keep_best", "empty at eval.problems = 0")
    c.eval.problems = 8
    check_training(c)


def test_the_profiler_takes_a_first_and_an_end_step():
    check_training(config(profile__steps=(0, 1)))
    for steps in ((1,), (-1, 2), (0.0, 1.0)):
        assert_refused(check_training, config(profile__steps=steps), "profile.steps", "first < end")


def test_metric_writers_are_each_named_once():
    c = config(metrics__writers=("tensorboard", "tensorboard"))
    assert_refused(check_training, c, "metrics.writers", "at most once")


def test_a_resumed_run_may_change_fields_and_sections_but_not_its_permission():
    check_training(config(resume__allow=("train.steps", "verifier", "seed")))
    for field in ("resume", "resume.allow", "train.", "seed.x", "nowhere"):
        assert_refused(check_training, config(resume__allow=(field,)), "resume.allow", field)


def test_jsonl_needs_a_training_file_and_a_held_out_one_unless_nothing_is_evaluated():
    c = defaults()
    c.model.hf_path = "somewhere"
    assert_refused(check_training, c, "task.train_path", "jsonl")
    c.task.train_path = "train.jsonl"
    assert_refused(check_training, c, "task.eval_path", "eval.problems = 0")
    c.eval.problems = 0
    check_training(c)


# --- the door of evaluations; `evaluation/settings.py` has tests of its own numbers ---------------


def test_an_evaluation_needs_no_training_data_and_no_batches():
    c = defaults()
    c.model.hf_path, c.task.eval_path = "somewhere", "test.jsonl"
    c.batch.search_lengths, c.loss.estimator = ((1, 1),), "grpo"
    check_evaluation(c)
    c.task.eval_path = ""
    assert_refused(check_evaluation, c, "task.eval_path", "jsonl")


SHARED = (
    "aggregation.order",
    "model.hf_path",
    "model.compute_dtype",
    "prompt.truncated",
    "search.temperature",
    "sampling.memory",
    "eval.top_p",
    "task.name",
    "task.reward",
    "verifier.workers",
    "verifier.environment",
)


@pytest.mark.parametrize("field", SHARED)
def test_an_evaluation_refuses_what_training_refuses_where_it_reads_it(field):
    value, allowed = BAD[field]
    check_evaluation(config())
    c = config(**{field.replace(".", "__"): value})
    assert_refused(check_evaluation, c, field, allowed)


def test_an_evaluation_checks_its_own_numbers():
    assert_refused(check_evaluation, config(eval__n=3), "aggregation.subset_size", "eval.n = 3")
    c = config(eval__limits=(8, 27))
    assert_refused(check_evaluation, c, "eval.limits", "search.max_tokens = 26")


@pytest.mark.parametrize("reward", ["math", "code", "code_all", "instructions"])
def test_every_reward_of_the_package_may_be_named(reward):
    check_training(config(task__reward=reward))
    c = config()
    c.task.rewards = ConfigDict({"any": reward})
    check_training(c)


def test_rewards_go_by_data_source_from_the_config_to_the_verifier(tmp_path):
    rows = [
        {"problem": "1?", "answer": "5", "data_source": "sums"},
        {"problem": "2?", "data_source": "own-v1.5"},
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    c = config(task__name="jsonl", task__train_path=str(path), task__eval_path=str(path))
    c.eval.problems = 1
    by_source = {"sums": "math", "own-v1.5": "small_rewards:slow_coin"}
    c.task.rewards = ConfigDict(by_source, allow_dotted_keys=True)
    choice = set_up_training(from_plain(to_plain(c))).reward
    assert [choice.of(Problem("p", "?", "", row)) for row in rows] == [
        "math",
        "small_rewards:slow_coin",
    ]
    with c.task.rewards.unlocked():
        c.task.rewards = {"sums": "math"}
    with pytest.raises(ConfigError, match=r"no reward.*data_source: 'own-v1\.5' \(2\)"):
        set_up_training(c)
    c.task.reward = "math"  # which needs an answer
    with pytest.raises(TaskError, match="train:2: there is no answer"):
        set_up_training(c)
    with c.task.rewards.unlocked():
        c.task.rewards = {"sums": "nothing"}
    assert_refused(check_training, c, "task.rewards", "package.module:function")


def test_references_that_mathematics_cannot_read_end_the_start(tmp_path):
    rows = [{"problem": f"{i}?", "answer": answer} for i, answer in enumerate(("5", "3/4x"))]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    c = config(task__name="jsonl", task__train_path=str(path), task__eval_path=str(path))
    c.eval.problems = 1
    with pytest.raises(TaskError, match=r"2 of 4 reference answers[^$]*train:2: '3/4x'"):
        set_up_training(c)


def test_micro_batches_that_are_not_given_hold_every_prompt_and_divide_the_groups():
    c = config(batch__search_lengths=(), batch__aggregation_lengths=())
    c.batch.search_groups = c.batch.aggregation_groups = 0
    setup = set_up_training(c)  # which checks the longest prompts by the tokenizer
    search, aggregation = (setup.training.learner.shapes[role] for role in Role)
    assert search.lengths == ((16, 26),)
    ((P, G),) = aggregation.lengths
    assert P >= 124 and P % 16 == 0 and G == 12  # 124: what tiny.py states
    multiple = group_count_multiple(setup.mesh)
    for shapes in (search, aggregation):
        assert shapes.most_groups % shapes.micro_groups == shapes.micro_groups % multiple == 0

    c = your_data.get_config()
    c.mesh.data = 1
    learner = check_training(c).training.learner
    for role, shapes in learner.shapes.items():
        longest = shapes.lengths[-1][0] + c[role.label].traces * 2048
        assert shapes.micro_groups * longest <= 32_768 < 2 * shapes.micro_groups * longest
    widths = [P for P, _ in learner.shapes[Role.AGGREGATION].lengths]
    # the problem and four candidates of 2,048 tokens, and some hundred tokens around them
    assert 1024 + 4 * 2048 + 100 < widths[-1] < 1024 + 4 * 2048 + 1200 and len(widths) == 3


def test_groups_that_the_mesh_does_not_divide_are_refused_where_they_are_not_given():
    c = config(batch__search_groups=0, mesh__data=3)
    assert_refused(check_training, c, "batch.problems", "data * fsdp = 3")
