"""One jitted, sharded train step for both kinds of trace.

    state, blocks -> for each block a loop over its micro-batches (gradients added in float32) ->
    one Adam step -> state

Gradients of the two roles are accumulated apart, so that their norms can be read; they are added
before the update.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from ml_collections import ConfigDict

from spiral_jax.core import mesh as meshes
from spiral_jax.core.groups import Role
from spiral_jax.core.metrics import Max, Mean, empty, merge
from spiral_jax.learner.blocks import Block
from spiral_jax.learner.logprobs import group_logprobs, length_mask
from spiral_jax.learner.loss import Objective, policy_loss, reference_kl
from spiral_jax.model.transformer import ModelConfig, with_matmul_precision, init_variables

Metrics = dict[str, Mean | Max]


def block_scope(role: Role) -> str:
    """Scope of a role's micro-batches: a plan finds their loop in a compiled program by it."""
    return f"{role.label}_block"


@struct.dataclass
class TrainState:
    """Everything that changes during a run, beside the cursor.

    Attributes:
      step: int32, optimizer steps done; those that were skipped are not among them.
      trained: what the optimizer sees: the `lora` collection, or all `params` when there are no
      adapters.
      opt: optimizer state, float32.
    """

    step: jax.Array
    trained: Any
    opt: Any


def variables(config: ModelConfig, base: Any, trained: Any) -> dict[str, Any]:
    """The model's collections from the frozen base (None in full fine-tuning) and what is trained."""
    return {"params": base, "lora": trained} if config.lora_rank else {"params": trained}


def make_optimizer(c: ConfigDict) -> optax.GradientTransformation:
    """Adam with warm-up and schedule, decoupled weight decay on matrices, optional clipping of the
    global norm.
    """
    o = c.optimizer
    after = {
        "constant": lambda steps: optax.constant_schedule(o.lr),
        "linear": lambda steps: optax.linear_schedule(o.lr, 0.0, steps),
        "cosine": lambda steps: optax.cosine_decay_schedule(o.lr, steps),
    }[o.schedule](max(c.train.steps - o.warmup_steps, 1))
    warmup = optax.linear_schedule(o.lr / (o.warmup_steps + 1), o.lr, max(o.warmup_steps, 1))
    schedule = optax.join_schedules([warmup, after], [o.warmup_steps])
    is_matrix = lambda path, _: (
        not meshes.path_name(path).endswith("norm")
    )  # stacked norms have two axes too  # noqa: E731
    matrices = lambda tree: jax.tree_util.tree_map_with_path(is_matrix, tree)  # noqa: E731
    return optax.chain(
        optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity(),
        optax.scale_by_adam(o.b1, o.b2, o.eps),
        optax.add_decayed_weights(o.weight_decay, matrices) if o.weight_decay else optax.identity(),
        optax.scale_by_learning_rate(schedule),
    )


def init_state(
    c: ConfigDict, config: ModelConfig, base: Any, mesh: Mesh, lora: Any | None = None
) -> tuple[Any, TrainState]:
    """(frozen base, fresh state) from loaded base parameters; arrays lie as the sharding table
    says.

    In full fine-tuning the frozen base is None, or a copy of `base` where a KL penalty needs a
    reference.
    `lora`: adapters to start from; None: fresh ones, which change nothing yet.
    """
    if lora is not None:
        trained, frozen = lora, base
    elif config.lora_rank:
        make_lora = lambda: init_variables(config, jax.random.key(c.seed))["lora"]  # noqa: E731
        place = meshes.weight_shardings(jax.eval_shape(make_lora), mesh)
        trained, frozen = jax.jit(make_lora, out_shardings=place)(), base
    else:
        trained, frozen = base, jax.tree.map(jnp.copy, base) if keeps_base(c, config) else None
    make = lambda trained: _fresh(c, trained)  # noqa: E731
    place = meshes.weight_shardings(jax.eval_shape(make, trained), mesh)
    return frozen, jax.jit(make, out_shardings=place)(trained)


def keeps_base(c: ConfigDict, config: ModelConfig) -> bool:
    """Whether the train step reads parameters that it does not train: under adapters, or as the
    reference of KL.
    """
    return config.lora_rank > 0 or c.loss.kl_coef > 0


def _fresh(c: ConfigDict, trained: Any) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32), trained=trained, opt=make_optimizer(c).init(trained)
    )


def abstract_state(c: ConfigDict, config: ModelConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state: what a checkpoint is restored into, and what
    memory is planned by.
    """

    def make() -> TrainState:
        tree = init_variables(config, jax.random.key(0))
        return _fresh(c, tree["lora"] if config.lora_rank else tree["params"])

    shapes = jax.eval_shape(make)
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        shapes,
        meshes.weight_shardings(shapes, mesh),
    )


def make_train_step(
    c: ConfigDict, config: ModelConfig
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Builds `train_step(state, base, blocks) -> (state, metrics)`, jitted; `state` is donated.

    The loss is `objective/loss.py`'s policy loss, and loss.kl_coef times the mean reference KL of
    the role's tokens. Where loss or gradient is not finite the state stays as it is, its count of
    steps too, and `skipped_update` is 1. Metrics are (sum, count) pairs by name: those of
    `objective/loss.py`, loss and gradient norm of each role, and the norm of the whole gradient
    before clipping.
    """
    optimizer = make_optimizer(c)
    objective = Objective(*(c.loss[field.name] for field in dataclasses.fields(Objective)))
    reference = dataclasses.replace(config, lora_rank=0)

    def logprobs(
        of: ModelConfig, tree: dict[str, Any], micro: dict[str, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return group_logprobs(
            of, tree, micro["prompt_UxP"], micro["prompt_len_U"], micro["trace_UxCxG"],
            c.sampling.temperature, c.loss.logprob_chunk, micro["trace_len_UxC"],
        )  # fmt: skip

    def loss(
        trained: Any, base: Any, micro: dict[str, jax.Array], tokens: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        logprob, entropy = logprobs(config, variables(config, base, trained), micro)
        mask = length_mask(micro["trace_len_UxC"], logprob.shape[-1])
        value, metrics = policy_loss(
            logprob, entropy, micro["logprob_UxCxG"], micro["weight_UxC"], mask, objective
        )  # fmt: skip
        if c.loss.kl_coef:
            with jax.named_scope("reference"):
                kl = reference_kl(logprob, logprobs(reference, {"params": base}, micro)[0], mask)
            value += c.loss.kl_coef * kl.total / jnp.maximum(tokens, 1)
            metrics["reference_kl"] = jax.lax.stop_gradient(kl)
        return value, metrics

    def update(state: TrainState, gradient: Any) -> TrainState:
        updates, opt = optimizer.update(gradient, state.opt, state.trained)
        return TrainState(
            step=state.step + 1, trained=optax.apply_updates(state.trained, updates), opt=opt
        )

    def train_step(state: TrainState, base: Any, blocks: list[Block]) -> tuple[TrainState, Metrics]:
        gradients, losses, metrics = {}, {}, {}
        for block in blocks:
            role = block.role
            with jax.named_scope(block_scope(role)):
                tokens = sum(other.tokens() for other in blocks if other.role is role)
                gradient, value, found = _accumulate(
                    functools.partial(loss, tokens=tokens), state.trained, base, block
                )
            gradients[role] = (
                gradient
                if role not in gradients
                else jax.tree.map(jnp.add, gradients[role], gradient)
            )
            losses[role] = losses.get(role, 0.0) + value
            for name in {"entropy", "reference_kl"} & found.keys():
                found[f"{name}/{role.label}"] = found.pop(name)
            metrics = merge(metrics, found)
        total = jax.tree.map(lambda *parts: sum(parts), *gradients.values())
        with jax.named_scope("optimizer"):
            finite = jnp.isfinite(sum(losses.values())) & jnp.isfinite(optax.tree.norm(total))
            new = jax.lax.cond(
                finite, update, lambda state, _: state, state, total
            )  # a `where` would copy the moments
        for role in gradients:
            metrics[f"loss/{role.label}"] = Mean(losses[role], jnp.ones(()))
            metrics[f"grad_norm/{role.label}"] = Mean(
                optax.tree.norm(gradients[role]), jnp.ones(())
            )
        metrics["grad_norm"] = Mean(optax.tree.norm(total), jnp.ones(()))
        metrics["skipped_update"] = Mean(1.0 - finite, jnp.ones(()))
        return new, metrics

    return jax.jit(with_matmul_precision(config, train_step), donate_argnums=0)


def _accumulate(
    loss: Callable[..., Any], trained: Any, base: Any, block: Block
) -> tuple[Any, jax.Array, Metrics]:
    """Sums gradient (float32), loss and metrics over the block's micro-batches."""

    def one(a: jax.Array) -> tuple[Any, jax.Array, Metrics]:
        micro = jax.tree.map(meshes.constrain_groups, block.micro_batch(a))
        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(trained, base, micro)
        return jax.tree.map(lambda g: g.astype(jnp.float32), gradient), value, metrics

    def body(a: jax.Array, total: Any) -> Any:
        gradient, value, metrics = one(a)
        return jax.tree.map(jnp.add, total[0], gradient), total[1] + value, merge(total[2], metrics)

    gradient, value, metrics = jax.eval_shape(one, jnp.zeros((), jnp.int32))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (gradient, value))
    nothing = (*zeros, empty(metrics))
    if (
        len(block.prompt_len_AxU) == 1
    ):  # nothing to add up, so no room for a sum beside the gradient
        return jax.lax.cond(block.count > 0, one, lambda _: nothing, 0)
    return jax.lax.fori_loop(0, block.count, body, nothing)
