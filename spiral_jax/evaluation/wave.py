"""Held-out problems -> records of what the policy made of them (`measures.py` says what is in one).

    held-out problems -> N search traces -> disjoint subsets -> aggregation traces
                                         -> rounds of self-aggregation (RSA)

Training calls `Evaluator.evaluate` every `eval.every` steps; `python -m spiral_jax.evaluate` calls
`Evaluator.wave` itself, wave by wave. Both make the same results.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from spiral_jax.core.config import ConfigError
from spiral_jax.core.groups import Groups, Purpose, Stop, concat_groups
from spiral_jax.core.progress import Progress
from spiral_jax.evaluation.answers import number_classes
from spiral_jax.evaluation.measures import (
    BOOTSTRAP_DRAWS,
    Answers,
    accuracy,
    any_correct,
    set_votes,
)
from spiral_jax.evaluation.results import make_results
from spiral_jax.evaluation.settings import EvaluationSettings
from spiral_jax.evaluation.stages import evaluation_stages
from spiral_jax.evaluation.statistics import bootstrap_weights, mean_and_interval
from spiral_jax.prompts.prompts import search_prompt
from spiral_jax.prompts.scaffold import Scaffold
from spiral_jax.rollout.feed import Course, Feed, Listed
from spiral_jax.rollout.judge import Strategy, reward, trace_texts
from spiral_jax.rollout.requests import Asked, Writer
from spiral_jax.rollout.stages import Stage
from spiral_jax.rollout.traces import Rollouts, Round
from spiral_jax.sampling.protocol import Sampler
from spiral_jax.tasks.problem import Problem, Task
from spiral_jax.verifier.pool import VerifierFailure
from spiral_jax.verifier.rewards import Status, Verdict
from spiral_jax.verifier.settings import VerifierSettings
from spiral_jax.verifier.verifier import Verifier, check_failures, count_verdicts

Record = dict[str, Any]


class FailedEvaluation(VerifierFailure):
    """Too many answers could not be judged.

    Attributes:
      rollouts: the problems with the traces of search, and of plain aggregation where it was
        reached; judged as far as they could be, with advantages that are all 0.
    """

    def __init__(self, message: str, rollouts: Rollouts):
        super().__init__(message)
        self.rollouts = rollouts


@dataclasses.dataclass(frozen=True)
class Judged:
    """A stage's verified traces of B problems, as many for each.

    Attributes:
      groups: in problem order, rewards filled in.
      texts, verdicts: of every trace, in order.
      answers: B rows, numbered by `number_classes`.
    """

    groups: Groups
    texts: list[str]
    verdicts: list[Verdict]
    answers: list[Answers]

    def rows(self) -> list[dict[str, Any]]:
        """The stage's part of each problem's record."""
        B = len(self.answers)
        length = self.groups.trace_len_UxC.reshape(B, -1)
        cut_off = (self.groups.stop_UxC == Stop.LENGTH).astype(int).reshape(B, -1)
        rows = [
            {
                "answer": self.answers[b],
                "length": length[b].tolist(),
                "cut_off": cut_off[b].tolist(),
            }
            for b in range(B)
        ]
        for row, reward_C in zip(rows, self.groups.reward_UxC.reshape(B, -1), strict=True):
            if ((reward_C > 0) & (reward_C < 1)).any():  # else they are what the answers say
                row["reward"] = [None if np.isnan(r) else float(r) for r in reward_C]
        return rows

    def counts(self, label: str) -> Counter:
        """Verdicts and sampled tokens of the stage."""
        counts = count_verdicts(self.verdicts) | {"sampled_tokens": self.groups.sampled_tokens}
        return Counter({f"{label}_{name}": count for name, count in counts.items()})


class Wave(NamedTuple):
    """What became of some held-out problems.

    Attributes:
      records: one of each problem.
      counts: verdicts, sampled tokens and what cleaning took out of candidates, by stage
        (`search_*`, `aggregation_*`, `rsa_*`).
      groups: with their rewards, by stage.
    """

    records: list[Record]
    counts: Counter
    groups: dict[str, Groups]


def held_out_problems(settings: EvaluationSettings, task: Task, scaffold: Scaffold) -> list[Asked]:
    """The first `eval.problems` held-out problems, without those that are too long to ask.

    Raises:
      ConfigError: none is left.
    """
    asked = []
    for index in range(settings.problems):
        problem = task.held_out(index)
        prompt_P = search_prompt(scaffold, problem.text)
        if len(prompt_P) <= settings.max_problem_tokens:
            asked.append(Asked(index, problem, prompt_P))
    if not asked:
        raise ConfigError(
            f"none of the {settings.problems} held-out problems has a search prompt of at most "
            f"config.prompt.max_problem_tokens = {settings.max_problem_tokens} tokens: raise it."
        )
    return asked


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """What turns held-out problems into records; policies are arguments.

    Attributes:
      order: config.aggregation.order.
      failures: which shares of verifier failures in a stage end it.
      strategy: names the strategy of a search trace; None where nothing does.
      between_chunks: called once a decode chunk, for whoever must look up in time.
      show: is given each stage's groups before any is judged, and again with their verdicts.
    """

    settings: EvaluationSettings
    order: str
    task: Task
    scaffold: Scaffold
    sampler: Sampler
    verifier: Verifier
    failures: VerifierSettings
    strategy: Strategy | None
    progress: Progress
    between_chunks: Callable[[], None]
    show: Callable[[Stage, Groups], None]

    def held_out(self) -> list[Asked]:
        """See `held_out_problems`."""
        return held_out_problems(self.settings, self.task, self.scaffold)

    def evaluate(self, policy: Any, step: int) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Evaluates all held-out problems, after `step` steps of training.

        Returns:
          the row of evaluations.jsonl, see `summarise`; and the content of a results.json, with all
          measures of `python -m spiral_jax.evaluate` and comparable with its files: None where
          nothing is aggregated.
        """
        asked = self.held_out()
        wave = self.wave(policy, asked, step)
        row = summarise(self.settings, step, wave.records, wave.counts)
        row |= _mean_rewards(wave.groups)
        if not self.settings.aggregates:
            return row, None
        name = f"step {step} of {self.settings.config_digest}"
        problems = {each.cursor: each.problem for each in asked}
        return row, make_results(self.settings, name, problems, wave.records, wave.counts)

    def wave(
        self, policy: Any, asked: Sequence[Asked], step: int = 0, search_policy: Any = None
    ) -> Wave:
        """All stages of an evaluation of B held-out problems.

        Args:
          step: of training, which has its own random numbers; the command's are those of step 0.
          search_policy: draws the search traces; None: `policy` does.

        Raises:
          FailedEvaluation: see `check_failures`.
        """
        stages = evaluation_stages(self.settings)
        given = None
        if search_policy is not None:
            given = self._sample(search_policy, stages[:1], asked, step)
        feed = self._sample(policy, stages, asked, step, given)
        courses = [feed.courses[each.cursor] for each in asked]

        sampled = {
            stage.name: concat_groups([course.of_stage(stage) for course in courses])
            for stage in stages
        }
        for stage in stages:
            self.show(stage, sampled[stage.name])
        problems = [each.problem for each in asked]
        judged = {}
        for stage in stages:
            judged[stage.name] = self._judge(problems, sampled[stage.name])
            self.show(stage, judged[stage.name].groups)
            try:
                check_failures(judged[stage.name].verdicts, self.failures)
            except VerifierFailure as error:
                raise FailedEvaluation(str(error), _rollouts(courses, judged)) from error
        counts = Counter()
        for stage in stages:
            counts += judged[stage.name].counts(stage.label)
        counts += feed.cleaned
        records = self._search_records(courses, judged["search"])
        for stage in stages[1:]:
            _add_to_records(records, courses, stage, judged[stage.name])
        return Wave(records, counts, {name: each.groups for name, each in judged.items()})

    def _sample(
        self,
        policy: Any,
        stages: Sequence[Stage],
        asked: Sequence[Asked],
        step: int,
        given: Feed | None = None,
    ) -> Feed:
        """All groups of the stages; `given` has the problems' search groups."""
        writer = Writer(self.scaffold, Purpose.EVALUATION, step, self.settings.seed, self.order)
        feed = Feed(stages, writer, Listed(() if given else asked))
        for each in asked if given else ():
            feed.begin_with(each, given.courses[each.cursor].of_stage(stages[0]))
        with self.progress.phase("sampling"):
            for _ in self.sampler.stream(policy, feed):
                self.between_chunks()
        return feed

    def _judge(self, problems: list[Problem], groups: Groups) -> Judged:
        texts = trace_texts(self.scaffold.tokenizer, groups)
        per_problem = len(texts) // len(problems)
        items = [(text, problems[i // per_problem]) for i, text in enumerate(texts)]
        with self.progress.phase("verifying"):
            verdicts = self.verifier.verify(items)
        answers = number_classes(self.verifier, problems, texts, verdicts)
        return Judged(reward(groups, verdicts), texts, verdicts, answers)

    def _search_records(self, courses: Sequence[Course], judged: Judged) -> list[Record]:
        """Records with what search made of each problem, and with limits below its own."""
        problems = [course.asked.problem for course in courses]
        rows = judged.rows()
        if self.strategy is not None:
            per_problem = len(judged.texts) // len(problems)
            for b, problem in enumerate(problems):
                texts = judged.texts[b * per_problem : (b + 1) * per_problem]
                names = [self.strategy(text, problem) for text in texts]
                rows[b]["strategy"] = [None if name is None else str(name) for name in names]
        cut = {}
        for limit in self.settings.limits:
            of_limit = self._judge(problems, judged.groups.cut_at(limit))
            check_failures(of_limit.verdicts, self.failures)
            cut[limit] = of_limit.answers
        return [
            {
                "index": course.asked.cursor,
                "id": problems[b].id,
                "search": rows[b],
                "limits": [
                    {"limit": limit, "answer": answers[b]} for limit, answers in cut.items()
                ],
                "aggregation": None,
                "rsa": [],
            }
            for b, course in enumerate(courses)
        ]


def _rollouts(courses: Sequence[Course], judged: Mapping[str, Judged]) -> Rollouts:
    """Search, and plain aggregation where it is judged, as a step of training has them."""
    rounds = []
    if "aggregation" in judged:
        member_BxKxS = np.stack([course.member["aggregation"] for course in courses])
        rounds.append(Round(member_BxKxS, judged["aggregation"].groups))
    return Rollouts(
        problems=[course.asked.problem for course in courses],
        cursor_B=np.array([course.asked.cursor for course in courses]),
        search=judged["search"].groups,
        rounds=tuple(rounds),
    ).without_advantages()


def _add_to_records(
    records: list[Record], courses: Sequence[Course], stage: Stage, judged: Judged
) -> None:
    for record, course, row in zip(records, courses, judged.rows(), strict=True):
        if stage.label == "aggregation":
            record["aggregation"] = {"member": course.member[stage.name].tolist()} | row
        else:
            record["rsa"].append(row)


def summarise(
    s: EvaluationSettings, step: int, records: list[Record], counts: Counter
) -> dict[str, Any]:
    """An evaluation during training, in short.

    Measures with mean, 95 % bootstrap interval over problems (the resamples of results.json),
    standard error and count: `single` (mean own correctness of the N traces), `pass_at_n` (some
    trace is right), and with an aggregation stage `majority` (tie-aware vote of each aggregated
    subset's S candidates) and `aggregated` (mean over the `eval.subsets` disjoint subsets and their
    `eval.traces` traces). Shares: parse rate, cut-off share and mean length of each role. Problems
    whose prompt is too long are left out and counted (`too_long`).
    """
    search = [record["search"] for record in records]
    weight_RxB = bootstrap_weights(s.seed, len(records), BOOTSTRAP_DRAWS)
    measures = {
        "single": [accuracy(row["answer"]) for row in search],
        "pass_at_n": [any_correct(row["answer"]) for row in search],
    }
    sampled = sum(count for name, count in counts.items() if name.endswith("_sampled_tokens"))
    row = {
        "step": step,
        "problems": len(records),
        "too_long": s.problems - len(records),
        "traces": s.n,
        "sampled_tokens": sampled,
    }
    row |= _shares("search", search, counts)
    if s.aggregates:
        read = [record["aggregation"] for record in records]
        votes = [
            set_votes(of_search, of_sets["member"])
            for of_search, of_sets in zip(search, read, strict=True)
        ]
        measures["majority"] = [np.mean(votes_K) for votes_K in votes]
        measures["aggregated"] = [accuracy(of_sets["answer"]) for of_sets in read]
        row |= _shares("aggregation", read, counts)
        row["subsets"] = s.subsets
        row["subset_size"] = s.subset_size
        row["aggregation_traces"] = s.traces
    for name, value_B in measures.items():
        row[name] = dataclasses.asdict(mean_and_interval(value_B, weight_RxB))
    return row


def _mean_rewards(groups: dict[str, Groups]) -> dict[str, float]:
    """Of search and of plain aggregation, where answers have earned partial credit.

    Elsewhere they are the shares of right answers, which the row has. What we failed to verify is
    left out.
    """
    means, is_partial = {}, False
    for label in ("search", "aggregation"):
        if label not in groups:
            continue
        reward_UxC = groups[label].reward_UxC
        valid = reward_UxC[~np.isnan(reward_UxC)]
        is_partial |= bool(((valid > 0) & (valid < 1)).any())
        if valid.size:
            means[f"reward_{label}"] = float(valid.mean(dtype=np.float64))
    return means if is_partial else {}


def _shares(label: str, rows: list[dict[str, Any]], counts: Counter) -> dict[str, float]:
    verdicts = sum(counts[f"{label}_{status.value}"] for status in Status)
    return {
        f"parse_rate_{label}": (counts[f"{label}_correct"] + counts[f"{label}_wrong"]) / verdicts,
        f"cut_off_{label}": float(np.mean([row["cut_off"] for row in rows])),
        f"length_{label}": float(np.mean([row["length"] for row in rows])),
    }
