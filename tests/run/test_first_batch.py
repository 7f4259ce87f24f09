"""What a run shows of its first rollouts, above all where they give no batch; scripted traces."""

import contextlib
import dataclasses
import io
import json

import pytest
from scripted_sampler import TOKENIZER, ScriptedSampler, number_task, prompt_text, scripted_training

from configs import tiny
from spiral_jax.core.groups import Role
from spiral_jax.objective.advantages import compute_advantages
from spiral_jax.reporting.main_page import write_report
from spiral_jax.rollout.collect import NoSignal
from spiral_jax.run.examples import Examples
from spiral_jax.run.setup import set_up_training
from spiral_jax.run.trace_log import read_traces, trace_files
from spiral_jax.train import train
from spiral_jax.verifier.pool import VerifierFailure


def always_wrong(role, cursor, k, i):
    return f"{'left' if role is Role.SEARCH else 'right'}={i} \\boxed{{8}}"


class Refusing:
    """A verifier that judges nothing."""

    def longest_s(self, items):
        return 60.0

    def judge(self, items):
        raise VerifierFailure("no judge")


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_prompt_and_a_trace_of_search_and_of_each_round_are_printed_before_any_verdict(
    rounds, capsys
):
    training = scripted_training(always_wrong, at_once=100, aggregation__rounds=rounds)
    training = training.with_actor(verifier=Refusing(), show=Examples(TOKENIZER).show)
    problems = training.actor.first_kept(5)
    with pytest.raises(VerifierFailure, match="no judge"):
        list(training.actor.rollouts(None, 0, problems))
    printed = capsys.readouterr().out
    assert printed.count(" prompt, ") == printed.count(" trace\n") == 1 + rounds
    for round in range(rounds + 1):
        first = next(call for call in training.sampler.calls if call.id_Ux6[0, 3] == round)
        assert prompt_text(first) in printed
        assert str(first.prompt_UxP[0, : first.prompt_len_U[0]].tolist()) in printed
    for role in Role:
        ids = TOKENIZER.encode(always_wrong(role, 5, 0, 0), add_special_tokens=False)
        assert TOKENIZER.decode(ids) in printed


def test_the_verdict_on_what_was_printed_follows(capsys):
    training = scripted_training(always_wrong).with_actor(show=Examples(TOKENIZER).show)
    problems = training.actor.first_kept(0)
    for rollout in training.actor.rollouts(None, 0, problems):
        problems.add(rollout, compute_advantages("marginal_mean", rollout.rewards()))
    lines = [line for line in capsys.readouterr().out.splitlines() if "verdict" in line]
    assert lines == [
        "--- verdict on that search trace: wrong, reward 0",
        "--- verdict on that aggregation trace: wrong, reward 0",
    ]


def scripted_setup(reward=""):
    """Of a training whose traces are all wrong; everything else of it is real."""
    c = tiny.get_config()
    c.task.reward = reward
    c.batch.problems, c.batch.search_groups, c.batch.aggregation_groups = 4, 4, 8
    c.eval.problems = 3
    setup, sampler = set_up_training(c), ScriptedSampler(always_wrong)
    changes = {"task": number_task(), "strategy": None, "sampler": sampler, "eval_sampler": sampler}
    return dataclasses.replace(setup, **changes)


def test_a_start_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def broken(sampler):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ScriptedSampler, "start_report", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(scripted_setup(), str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def without_signal(tmp_path_factory):
    """A run whose first batch has no signal: (its directory, its error, what it has printed)."""
    setup = scripted_setup()
    workdir = tmp_path_factory.mktemp("without_signal") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(NoSignal) as failed:
        train(setup, str(workdir))
    return workdir, str(failed.value), out.getvalue()


def test_a_first_batch_without_signal_has_shown_its_prompts_and_the_evaluation_before_it(
    without_signal,
):
    workdir, error, printed = without_signal
    assert printed.count("--- search prompt") == printed.count("--- aggregation prompt") == 1
    (line,) = [line for line in printed.splitlines() if line.startswith("evaluation at step 0")]
    (row,) = [json.loads(line) for line in (workdir / "evaluations.jsonl").open()]
    assert "3 problems" in line and "single trace 0.0 [0.0, 0.0] %" in line
    assert row["single"]["mean"] == 0.0


def test_the_traces_of_a_failed_batch_are_named_in_the_error_and_the_report_reads_them(
    without_signal,
):
    workdir, error, _ = without_signal
    (file,) = trace_files(workdir / "traces").values()
    assert str(file) in error and "0 of 16 problems" in error
    rows = list(read_traces(file))
    assert len({row["cursor"] for row in rows}) == 16 and {row["kept"] for row in rows} == {False}
    said = write_report(str(workdir), str(workdir))
    assert "16 problems of 1 steps" in said
    assert "No step is finished yet: the traces" in (workdir / "report.html").read_text()


def test_an_evaluation_that_cannot_be_judged_leaves_its_traces_too(tmp_path):
    workdir = tmp_path / "run"
    with pytest.raises(VerifierFailure) as failed:
        train(scripted_setup("small_rewards:unable_to_judge_aggregation"), str(workdir))
    (file,) = trace_files(workdir / "traces").values()
    assert str(file) in str(failed.value) and "KeyError: 'right'" in str(failed.value)
    rows = list(read_traces(file))
    # 3 problems: 8 search traces, and 2 sets of 4 of them, each read by 2 aggregation traces
    search = [row for row in rows if row["role"] == "search"]
    assert len(search) == 3 * 8 and {row["verdict"] for row in search} == {"wrong"}
    aggregation = [row for row in rows if row["role"] == "aggregation"]
    assert len(aggregation) == 3 * 4 and {row["verdict"] for row in aggregation} == {"error"}
    assert {len(row["subset"]) for row in aggregation} == {4}
    assert "3 problems of 1 steps" in write_report(str(workdir), str(workdir))
