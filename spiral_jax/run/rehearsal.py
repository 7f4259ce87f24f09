"""What can be known of a run before it starts: prompts' lengths, rewards, sizes, memory.

Nothing is sampled and no weight is read. A start prints the lengths, `--dry_run` all of it.
"""

from __future__ import annotations

import math

import numpy as np

from spiral_jax.core.mesh import bytes_on_a_device, weight_shardings, with_shardings
from spiral_jax.learner.state import abstract_state, keeps_base
from spiral_jax.model import hf
from spiral_jax.prompts.prompts import search_prompt
from spiral_jax.run.setup import Setup, check_shapes
from spiral_jax.sampling.shapes import abstract_pool
from spiral_jax.sampling.weights import bytes_laid_out
from spiral_jax.tasks.problem import Problem
from spiral_jax.verifier.choice import RewardChoice
from spiral_jax.verifier.pool import VerifierFailure
from spiral_jax.verifier.rewards import WITHOUT_ANSWERS, Verdict
from spiral_jax.verifier.verifier import Verifier

WHOLE_CONFIG = "config"  # value of --dry_run that prints the configuration too

_MOST_MEASURED = 10_000  # problems whose prompts are tokenised: a second or two
_MEASURED_OF_ENDLESS = 256
_QUANTILES = {"median": 0.5, "90 % up to": 0.9, "99 % up to": 0.99, "longest": 1.0}
_GIB = 2**30


def dry_run(setup: Setup, value: str) -> None:
    """What `--dry_run=value` does: finds out all that it can, prints it, and writes nothing.

    Raises:
      VerifierFailure: see `rehearse`.
    """
    check_shapes(setup)
    print(rehearse(setup))
    if value == WHOLE_CONFIG:
        print(setup.c)
    print("config, data, rewards, tokenizer and shapes are fine; nothing was written")


def rehearse(setup: Setup) -> str:
    """All that can be known of a run, in lines; findings that want a look begin with "note".

    Raises:
      VerifierFailure: a reward function fails on a reference answer or on "".
    """
    parts = (
        setup.task.report,
        prompt_lengths(setup),
        _try_rewards(setup),
        _sizes(setup),
        _memory(setup),
    )
    return "\n".join(filter(None, parts))


def prompt_lengths(setup: Setup) -> str:
    """Quantiles of the search prompts' tokens, and how many problems are too long and left out."""
    problems = setup.task.problems
    if problems:
        step = math.ceil(len(problems) / _MOST_MEASURED)
        problems = problems[::step]
    else:
        problems = [setup.task.train(cursor) for cursor in range(_MEASURED_OF_ENDLESS)]
    lengths = np.array([len(search_prompt(setup.scaffold, p.text)) for p in problems])
    tokens = np.quantile(lengths, list(_QUANTILES.values()), method="inverted_cdf")
    shown = ", ".join(
        f"{share} {count:,}" for share, count in zip(_QUANTILES, tokens.tolist(), strict=True)
    )
    line = f"tokens of {len(lengths):,} search prompts: {shown}"
    limit = setup.c.prompt.max_problem_tokens
    too_long = int((lengths > limit).sum())
    if too_long:
        line += (
            f"\nnote: {too_long:,} of these {len(lengths):,} are longer than "
            f"prompt.max_problem_tokens = {limit:,}: such problems are left out"
        )
    return line


def _try_rewards(setup: Setup) -> str:
    """What each reward function makes of a reference answer, and of nothing."""
    lines = []
    with Verifier(setup.reward, setup.verifier) as verifier:
        for name in setup.reward.names:
            problem = _first_judged_by(name, setup.reward, setup)
            texts = {"an empty trace": ""}
            reference = problem.answers[0]
            if reference and name not in WITHOUT_ANSWERS:
                texts |= {
                    "its reference answer": reference,
                    "that in a box": f"\\boxed{{{reference}}}",
                }
            verdicts = verifier.verify([(text, problem) for text in texts.values()])
            lines += _reward_lines(name, problem, dict(zip(texts, verdicts, strict=True)))
    return "\n".join(lines)


def _first_judged_by(name: str, choice: RewardChoice, setup: Setup) -> Problem:
    return next((p for p in setup.task.problems if choice.of(p) == name), setup.task.train(0))


def _reward_lines(name: str, problem: Problem, verdicts: dict[str, Verdict]) -> list[str]:
    for what, verdict in verdicts.items():
        if verdict.is_failure:
            raise VerifierFailure(
                f"the reward {name!r} fails on {what} of problem {problem.id!r}: {verdict.detail}"
            )
    shown = (
        f"{what} earns {verdict.reward:g} ({verdict.status})" for what, verdict in verdicts.items()
    )
    lines = [f"reward {name}, problem {problem.id}: {'; '.join(shown)}"]
    empty, *of_reference = verdicts.values()
    if empty.reward == 1:
        lines.append("note: an empty trace earns the full reward")
    if of_reference and all(verdict.reward < 1 for verdict in of_reference):
        lines.append(
            f"note: the reference answer {problem.answer!r} does not earn the full reward: do the "
            "reward and the data belong together, or does it ask for more than an answer?"
        )
    return lines


def _sizes(setup: Setup) -> str:
    """What a step samples and trains on, at most."""
    training = setup.training
    stages, problems = training.stages.stages(), training.dynamic_sampling.problems
    tokens, words = 0, []
    for stage in stages:
        groups = 1 if stage.reads is None else training.stages.subsets
        traces = groups * stage.traces
        tokens += traces * stage.max_tokens
        words.append(f"{traces} {stage.name} traces of up to {stage.max_tokens:,} tokens")
    most = training.dynamic_sampling.most_tried
    lines = [
        f"a problem: {', '.join(words)}; {tokens:,} tokens",
        f"a step: trains on {problems} problems, {problems * tokens:,} sampled tokens at most; "
        f"tries up to {most}, {most * tokens:,} tokens",
    ]
    if replay := training.stages.replay:
        a_round = training.stages.subsets * training.stages.aggregation_traces
        answers = replay.problems * replay.reads * a_round
        lines.append(
            f"beside them it reads up to {replay.problems} stored populations: {answers} traces, "
            f"{answers * training.stages.aggregation_tokens:,} tokens"
        )
    for role, shapes in training.learner.shapes.items():
        lengths = ", ".join(f"{P:,} + {G:,}" for P, G in shapes.lengths)
        lines.append(
            f"{role.label} micro-batches: {shapes.micro_groups} groups of {shapes.traces} traces; "
            f"prompt + response tokens {lengths}"
        )
    return "\n".join(lines)


def _memory(setup: Setup) -> str:
    """Bytes of a device that are taken all the time, and how many it has where it says so."""
    learner, model, mesh = setup.training.learner, setup.model, setup.mesh
    held = {
        "weights that are trained and optimizer state": abstract_state(learner, model, mesh),
        "keys and values": abstract_pool(setup.sampler.settings, setup.sampler.schedule),
    }
    if keeps_base(learner, model):
        base = hf.abstract_params(model)
        held["frozen base"] = with_shardings(base, weight_shardings(base, mesh))
    sizes = {name: bytes_on_a_device(tree) for name, tree in held.items()}
    sizes["weights laid out for the sampler"] = bytes_laid_out(model, mesh)
    parts = ", ".join(f"{_words(size)} {name}" for name, size in sizes.items())
    stats = mesh.local_devices[0].memory_stats() or {}
    of = f" of its {_words(stats['bytes_limit'])}" if "bytes_limit" in stats else ""
    return (
        f"a device holds {_words(sum(sizes.values()))}{of}: {parts}; what programs need while they "
        "run comes on top (python -m spiral_jax.plan)"
    )


def _words(size: int) -> str:
    return f"{size / _GIB:.2f} GiB" if size > _GIB / 10 else f"{size / 2**20:.1f} MiB"
