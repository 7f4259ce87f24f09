"""One jitted, sharded train step for both kinds of trace.

    state, blocks -> for each block a loop over its micro-batches (gradients added in float32)
                  -> one Adam step -> state

Gradients of the two roles are accumulated apart, so that their norms can be read; they are added
before the update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spiral_jax.core import mesh as meshes
from spiral_jax.core.groups import Role
from spiral_jax.core.metrics import Max, Mean, empty, merge
from spiral_jax.learner.blocks import Block, MicroBatch
from spiral_jax.learner.logprobs import group_logprobs, length_mask
from spiral_jax.learner.loss import policy_loss, reference_kl
from spiral_jax.learner.settings import LearnerSettings
from spiral_jax.learner.state import TrainState, make_optimizer, variables
from spiral_jax.model.products import product_options, with_matmul_precision
from spiral_jax.model.transformer import ModelConfig

Metrics = dict[str, Mean | Max]


class Sums(NamedTuple):
    """Of some micro-batches: gradient (float32), loss and metrics, added up."""

    gradient: Any
    loss: jax.Array
    metrics: Metrics

    def add(self, other: Sums) -> Sums:
        gradient = jax.tree.map(jnp.add, self.gradient, other.gradient)
        return Sums(gradient, self.loss + other.loss, merge(self.metrics, other.metrics))


def block_scope(role: Role) -> str:
    """Scope of a role's micro-batches: a plan finds their loop in a compiled program by it."""
    return f"{role.label}_block"


def make_train_step(
    settings: LearnerSettings, config: ModelConfig
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Builds `train_step(state, base, blocks) -> (state, metrics)`, jitted; `state` is donated.

    The loss is the policy loss of `loss.py`, and kl_coef times the mean reference KL of the role's
    tokens. Where loss or gradient is not finite the state stays as it is, its count of steps too,
    and `skipped_update` is 1. Metrics are (sum, count) pairs by name: those of `loss.py`, loss and
    gradient norm of each role, and the norm of the whole gradient before clipping.
    """
    optimizer = make_optimizer(settings.optimizer)
    loss_of = {role: _make_loss(settings, config, role) for role in settings.shapes}

    def update(state: TrainState, gradient: Any) -> TrainState:
        updates, opt = optimizer.update(gradient, state.opt, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        return TrainState(step=state.step + 1, trained=trained, opt=opt)

    def keep(state: TrainState, gradient: Any) -> TrainState:
        del gradient
        return state

    def train_step(
        state: TrainState, base: Any, blocks: Sequence[Block]
    ) -> tuple[TrainState, Metrics]:
        metrics: Metrics = {}
        sums: dict[Role, Sums] = {}
        for role in dict.fromkeys(block.role for block in blocks):
            of_role = [block for block in blocks if block.role is role]
            sums[role] = _sum_role(loss_of[role], state.trained, base, of_role)
            metrics = merge(metrics, _name_metrics(role, sums[role]))
        gradient = jax.tree.map(lambda *parts: sum(parts), *(s.gradient for s in sums.values()))
        norm = optax.tree.norm(gradient)

        with jax.named_scope("optimizer"):
            finite = jnp.isfinite(sum(s.loss for s in sums.values())) & jnp.isfinite(norm)
            # Not a `where`, which would copy the moments.
            state = jax.lax.cond(finite, update, keep, state, gradient)
        metrics["grad_norm"] = Mean(norm, jnp.ones(()))
        metrics["skipped_update"] = Mean(1.0 - finite, jnp.ones(()))
        return state, metrics

    return jax.jit(
        with_matmul_precision(config.compute_dtype, train_step),
        donate_argnums=0,
        compiler_options=product_options(config.compute_dtype, jax.default_backend()),
    )


def _make_loss(
    settings: LearnerSettings, config: ModelConfig, role: Role
) -> Callable[..., tuple[jax.Array, Metrics]]:
    """Builds `loss(trained, base, micro_batch, tokens) -> (loss, metrics)` of a role.

    `tokens`: how many tokens of the role the step trains on, over which the reference KL is a mean.
    """
    reference = dataclasses.replace(config, lora_rank=0)

    def logprobs(
        model: ModelConfig, tree: dict[str, Any], micro: MicroBatch
    ) -> tuple[jax.Array, jax.Array]:
        return group_logprobs(
            model,
            tree,
            micro.prompt_UxP,
            micro.prompt_len_U,
            micro.trace_UxCxG,
            settings.temperature[role],
            settings.logprob_chunk,
            trace_len_UxC=micro.trace_len_UxC,
        )

    def loss(
        trained: Any, base: Any, micro: MicroBatch, tokens: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        logprob, entropy = logprobs(config, variables(config, base, trained), micro)
        mask = length_mask(micro.trace_len_UxC, logprob.shape[-1])
        value, metrics = policy_loss(
            logprob, entropy, micro.logprob_UxCxG, micro.weight_UxC, mask, settings.tis_cap
        )
        if settings.kl_coef:
            with jax.named_scope("reference"):
                reference_logprob, _ = logprobs(reference, {"params": base}, micro)
                kl = reference_kl(logprob, reference_logprob, mask)
            value += settings.kl_coef * kl.total / jnp.maximum(tokens, 1)
            metrics["reference_kl"] = jax.lax.stop_gradient(kl)
        return value, metrics

    return loss


def _sum_role(
    loss: Callable[..., tuple[jax.Array, Metrics]], trained: Any, base: Any, blocks: list[Block]
) -> Sums:
    """Over all micro-batches of a role's blocks."""
    tokens = sum(block.tokens() for block in blocks)

    # A program of its own, with nothing closed over: JAX then traces it once, not in each use.
    @jax.jit
    def sum_micro_batch(block: Block, a: jax.Array, trained: Any, base: Any, tokens: Any) -> Sums:
        micro = jax.tree.map(meshes.constrain_groups, block.micro_batch(a))
        value_and_grad = jax.value_and_grad(loss, has_aux=True)
        (value, metrics), gradient = value_and_grad(trained, base, micro, tokens)
        return Sums(jax.tree.map(lambda g: g.astype(jnp.float32), gradient), value, metrics)

    def sum_block(block: Block) -> Sums:
        def of_block(a: jax.Array) -> Sums:
            return sum_micro_batch(block, a, trained, base, tokens)

        with jax.named_scope(block_scope(block.role)):
            return _accumulate(of_block, block)

    total = sum_block(blocks[0])
    for block in blocks[1:]:
        total = total.add(sum_block(block))
    return total


def _accumulate(of_block: Callable[[jax.Array], Sums], block: Block) -> Sums:
    """Over the micro-batches of a block that hold groups."""
    first = jnp.int32(0)  # with its dtype: a bare 0 would be traced anew beside the loop's indices
    shapes = jax.eval_shape(of_block, first)
    gradient, loss = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype), (shapes.gradient, shapes.loss)
    )
    nothing = Sums(gradient, loss, empty(shapes.metrics))
    if len(block.prompt_len_AxU) == 1:  # nothing to add up: no room for a sum beside the gradient
        return jax.lax.cond(block.count > 0, of_block, lambda _: nothing, first)
    return jax.lax.fori_loop(first, block.count, lambda a, total: total.add(of_block(a)), nothing)


def _name_metrics(role: Role, sums: Sums) -> Metrics:
    """The metrics of a role under their names in the log."""
    metrics = dict(sums.metrics)
    for name in ("entropy", "reference_kl"):
        if name in metrics:
            metrics[f"{name}/{role.label}"] = metrics.pop(name)
    metrics[f"loss/{role.label}"] = Mean(sums.loss, jnp.ones(()))
    metrics[f"grad_norm/{role.label}"] = Mean(optax.tree.norm(sums.gradient), jnp.ones(()))
    return metrics
