"""A rollout without a model: the second implementation of the sampler protocol writes what it is told to."""

import dataclasses

import numpy as np

from configs import tiny
from spiral_jax import prompts
from spiral_jax.groups import GroupRequests, Groups, Role, Stop
from spiral_jax.model import hf
from spiral_jax.progress import Progress
from spiral_jax.rollout import Actor
from spiral_jax.tasks.problem import Problem, Task
from spiral_jax.verifier.verifier import Verifier

TOKENIZER = prompts.load_tokenizer(hf.resolve_path("bundled:tiny"))


@dataclasses.dataclass
class ScriptedSampler:
    """A `Sampler` whose traces are texts: `script(role, cursor, set, trace)`; "..." at the end means cut off."""

    script: object
    calls: list = dataclasses.field(default_factory=list)

    def prepare(self, variables):
        return variables

    def sample(self, weights, requests: GroupRequests) -> Groups:
        self.calls.append(requests)
        U, C, G = len(requests), requests.traces, requests.max_tokens
        trace, length = np.zeros((U, C, G), np.int32), np.zeros((U, C), np.int32)
        stop = np.zeros((U, C), np.int32)
        for u in range(U):
            _, _, cursor, _, role, k = requests.id_Ux6[u]
            for i in range(C):
                text = self.script(Role(role), int(cursor), int(k), i)
                ids = TOKENIZER.encode(text, add_special_tokens=False)
                ids = ids if text.endswith("...") else [*ids, TOKENIZER.eos_token_id]
                stop[u, i] = Stop.LENGTH if text.endswith("...") else Stop.STOP
                trace[u, i, : len(ids)], length[u, i] = ids, len(ids)
        return Groups(requests, trace, length, np.zeros((U, C, G), np.float32), stop)


def number_task() -> Task:
    """Problem "left=CURSOR": the answer is always 7."""
    problem = lambda cursor: Problem(id=f"p{cursor}", text=f"left={cursor}", answer="7")  # noqa: E731
    return Task(train=problem, held_out=problem, held_out_size=100, fingerprint="numbers")


def make_actor(script, task=None, **overrides) -> Actor:
    c = tiny.get_config()
    c.batch.problems, c.batch.search_groups, c.batch.aggregation_groups, c.sampling.wave = 4, 4, 16, 6
    c.search.max_tokens = 32
    for field, value in overrides.items():
        room, name = field.split("__")
        c[room][name] = value
    scaffold = prompts.make_scaffold(TOKENIZER, c.prompt, (TOKENIZER.eos_token_id,))
    verifier = Verifier("math", workers=1, timeout_s=5.0)
    return Actor(c, task or number_task(), scaffold, ScriptedSampler(script), verifier, Progress(1, 0))
