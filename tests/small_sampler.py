"""What the sampler's tests share: a small random model far from uniform, requests, comparisons."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from spiral_jax.core import mesh as meshes
from spiral_jax.core.groups import GroupRequests, Groups, pad_rows, take_groups
from spiral_jax.model.architecture import Architecture
from spiral_jax.model.transformer import ModelConfig, init_variables
from spiral_jax.sampling.draw import Draw
from spiral_jax.sampling.engine import Engine
from spiral_jax.sampling.protocol import sample
from spiral_jax.sampling.settings import DecodeSettings, Schedule

C, G, V = 3, 12, 97
# Every layer is compiled by itself, so one takes half the time of two; test_families.py has more.
ARCH = Architecture(
    V=V, D=32, F=48, L=1, H=4, J=2, E=8, norm_eps=1e-3, rope_theta=777.0, tied=False
)
MODEL = ModelConfig(ARCH, lora_rank=4)
DRAW = Draw(temperature=0.7)
OTHER_PROGRAM = 1e-5  # nat; float32 sums in another order, log-probs down to about -10
# Pages for all rows at their longest, and so few that rows must wait for them.
AMPLE = {"pages": 65, "rows": (12,)}
SCARCE = {"pages": 29, "rows": (4, 8), "page": 2, "width": 2}


def random_variables(config, mesh):
    """Parameters and adapters far from their initial values.

    The entropy of the next token is about 3 of log(97) = 4.6 nat.
    """

    def make(path, leaf):
        name = meshes.path_name(path)
        rng = np.random.default_rng([*name.encode()])
        values = (
            rng.uniform(0.5, 1.5, leaf.shape) if "norm" in name else rng.normal(0, 0.2, leaf.shape)
        )
        return values.astype(leaf.dtype)

    tree = jax.tree_util.tree_map_with_path(
        make, jax.eval_shape(lambda: init_variables(config, jax.random.key(0)))
    )
    return jax.device_put(tree, meshes.weight_shardings(tree, mesh))


def one_device():
    return jax.make_mesh(
        (1, 1, 1), meshes.AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )


def make_settings(mesh, stop_ids=(), **changes):
    settings = DecodeSettings(MODEL, jnp.float32, DRAW, 0, stop_ids, 8, mesh)
    return dataclasses.replace(settings, **changes)


def make_schedule(
    pages=65,
    rows=(12,),
    page=4,
    width=C,
    together=C,
    prompts=(8, 16),
    trace=G,
    chunk=5,
    prefill_tokens=32,
    fill=1,
):
    return Schedule(page, pages, rows, width, together, prompts, trace, chunk, prefill_tokens, fill)


def make_engine(mesh, stop_ids=(), schedule=None, **changes):
    return Engine(make_settings(mesh, stop_ids, **changes), make_schedule(**(schedule or {})))


def requests_of(rows, cursor=0, step=0, traces=C, max_tokens=G, limit_UxC=None):
    prompt_UxP, prompt_len_U = pad_rows([np.asarray(row) for row in rows])
    id_Ux6 = np.zeros((len(rows), 6), np.int32)
    id_Ux6[:, 1], id_Ux6[:, 2] = step, cursor + np.arange(len(rows))
    return GroupRequests(prompt_UxP, prompt_len_U, id_Ux6, traces, max_tokens, limit_UxC)


def mixed_requests(**which):
    """Nine prompts of 1 to 16 tokens; some end with the id 0, which is also what pads them."""
    rng = np.random.default_rng(5)
    rows = [rng.integers(0, V, n) for n in (3, 16, 8, 9, 1, 12, 7, 2, 5)]
    for u in (0, 3, 4):
        rows[u][-1] = 0
    rows[7][:] = 0
    return requests_of(rows, **which)


class ListFeed:
    """A feed of groups of any widths, all there from the start.

    Attributes:
      groups: the completed ones, in the order in which they ended.
    """

    def __init__(self, requests):
        self.waiting, self.asked, self.groups = list(requests), len(requests), []

    def next(self, now):
        return self.waiting.pop(0) if self.waiting else None

    def done(self, group, now):
        self.groups.append(group)

    def finished(self):
        return len(self.groups) == self.asked


def run_to_end(sampling):
    """Its metrics, once the feed is finished."""
    for _ in sampling:
        pass
    return sampling.metrics()


class Recorded:
    """A sampler that keeps its last stream, for the metrics."""

    def __init__(self, sampler):
        self.sampler = sampler

    def stream(self, weights, feed):
        self.sampling = self.sampler.stream(weights, feed)
        return self.sampling


def sample_with_metrics(sampler, weights, requests):
    """(groups, metrics) of `sample`."""
    recorded = Recorded(sampler)
    return sample(recorded, weights, requests), recorded.sampling.metrics()


def assert_bit_equal(groups, expected):
    for name in ("trace_UxCxG", "trace_len_UxC", "logprob_UxCxG", "stop_UxC"):
        np.testing.assert_array_equal(getattr(groups, name), getattr(expected, name), err_msg=name)


def assert_same_up_to_rounding(groups, expected):
    for name in ("trace_UxCxG", "trace_len_UxC", "stop_UxC"):
        np.testing.assert_array_equal(getattr(groups, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(
        groups.logprob_UxCxG, expected.logprob_UxCxG, rtol=0, atol=OTHER_PROGRAM
    )


def compilations(run):
    """How many programs `run()` compiles."""
    compiled = []

    def listen(event, *_, **__):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(compiled)


def groups_at(groups: Groups, *index):
    return take_groups(groups, np.array(index))
