"""A rollout without a model: the second implementation of the sampler protocol writes what it is
told to.
"""

import dataclasses
import itertools
import re

import numpy as np

from configs import tiny
from spiral_jax.core.groups import GroupRequests, Groups, Role, Stop
from spiral_jax.core.progress import Progress
from spiral_jax.model import hf
from spiral_jax.prompts.scaffold import make_scaffold
from spiral_jax.prompts.settings import PromptSettings
from spiral_jax.prompts.tokenizer import load_tokenizer
from spiral_jax.rollout.requests import Actor
from spiral_jax.tasks.problem import Problem, Task
from spiral_jax.verifier.settings import VerifierSettings
from spiral_jax.verifier.verifier import Verifier

TOKENIZER = load_tokenizer(hf.resolve_path("bundled:tiny"))


@dataclasses.dataclass
class ScriptedSampler:
    """A `Sampler` whose traces are texts: `script(role, cursor, set, trace)`; "..." at the end
    means cut off.
    """

    script: object
    at_once: int = 6
    calls: list = dataclasses.field(default_factory=list)

    def start_report(self):
        return "scripted: nothing to compile"

    def prepare(self, variables):
        return variables

    def stream(self, weights, feed):
        return ScriptedSampling(self, feed)

    def advance(self, feed, now):
        """Takes up to `at_once` groups, then returns them; yields what was sampled."""
        taken = []
        while len(taken) < self.at_once and (request := feed.next(now)) is not None:
            taken.append(request)
        self.calls += taken
        for request in taken:
            group = self.write(request)
            feed.done(group, now)
            yield group

    def write(self, request: GroupRequests) -> Groups:
        C, G = request.traces, request.max_tokens
        trace, length = np.zeros((1, C, G), np.int32), np.zeros((1, C), np.int32)
        stop = np.zeros((1, C), np.int32)
        _, _, cursor, _, role, k = request.id_Ux6[0]
        for i in range(C):
            text = self.script(Role(role), int(cursor), int(k), i)
            ids = TOKENIZER.encode(text, add_special_tokens=False)
            ids = ids if text.endswith("...") else [*ids, TOKENIZER.eos_token_id]
            stop[0, i] = Stop.LENGTH if text.endswith("...") else Stop.STOP
            trace[0, i, : len(ids)], length[0, i] = ids, len(ids)
        return Groups(request, trace, length, np.zeros((1, C, G), np.float32), stop)


class ScriptedSampling:
    """A `Sampling`; one turn of `sampler.advance` is one unit of virtual time."""

    def __init__(self, sampler, feed):
        self.sampler, self.feed, self.tokens = sampler, feed, 0

    def __iter__(self):
        for now in itertools.count():
            yield now
            if self.feed.finished():
                return
            for group in self.sampler.advance(self.feed, now):
                self.tokens += group.sampled_tokens

    def metrics(self):
        return {"sampling/generated_tokens": float(self.tokens)}


class ReadingSampler(ScriptedSampler):
    """Aggregation traces repeat the largest box that their prompt shows; search traces follow the
    script.
    """

    def write(self, request):
        if request.id_Ux6[0, 4] == Role.SEARCH:
            return super().write(request)
        text = TOKENIZER.decode(request.prompt_UxP[0, : request.prompt_len_U[0]])
        shown = max((int(box) for box in re.findall(r"boxed\{(\d)\}", text)), default=0)
        return ScriptedSampler(lambda role, cursor, k, i: f"\\boxed{{{shown}}}").write(request)


def number_task() -> Task:
    """Problem "left=CURSOR": the answer is always 7."""
    problem = lambda cursor: Problem(id=f"p{cursor}", text=f"left={cursor}", answer="7")  # noqa: E731
    return Task(train=problem, held_out=problem, held_out_size=100, fingerprint="numbers")


def make_actor(script, task=None, at_once=6, **overrides) -> Actor:
    c = tiny.get_config()
    c.batch.problems, c.batch.search_groups, c.batch.aggregation_groups = 4, 4, 16
    c.search.max_tokens = 32
    for field, value in overrides.items():
        room, name = field.split("__")
        c[room][name] = value
    settings = PromptSettings.from_config(c.prompt)
    scaffold = make_scaffold(TOKENIZER, settings, (TOKENIZER.eos_token_id,))
    verifier = Verifier("math", VerifierSettings(workers=1, timeout_s=5.0))
    return Actor(
        c,
        task or number_task(),
        scaffold,
        ScriptedSampler(script, at_once),
        verifier,
        Progress(1, 0),
    )
