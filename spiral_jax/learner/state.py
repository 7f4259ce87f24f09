"""What is trained, and the optimizer: loaded parameters -> the state that a train step updates."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from spiral_jax.core.mesh import path_name, weight_shardings, with_shardings
from spiral_jax.learner.settings import LearnerSettings, OptimizerSettings
from spiral_jax.model.transformer import ModelConfig, init_variables


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
    """The model's collections, from the frozen base (None without one) and what is trained."""
    return {"params": base, "lora": trained} if config.lora_rank else {"params": trained}


def keeps_base(settings: LearnerSettings, config: ModelConfig) -> bool:
    """Whether the train step reads parameters that it does not train.

    It does under adapters, and where a KL penalty needs a reference.
    """
    return config.lora_rank > 0 or settings.kl_coef > 0


def init_state(
    settings: LearnerSettings, config: ModelConfig, mesh: Mesh, base: Any, lora: Any | None = None
) -> tuple[Any, TrainState]:
    """(frozen base, fresh state) from loaded parameters, placed as the sharding table says.

    In full fine-tuning the frozen base is None, or a copy of `base` where a KL penalty needs a
    reference.

    Args:
      lora: adapters to start from; None: fresh ones, which change nothing yet.
    """
    if not config.lora_rank:
        frozen = jax.tree.map(jnp.copy, base) if keeps_base(settings, config) else None
        trained = base
    else:
        frozen = base
        trained = _fresh_lora(config, settings.seed, mesh) if lora is None else lora

    def make(trained: Any) -> TrainState:
        return _fresh(settings.optimizer, trained)

    place = weight_shardings(jax.eval_shape(make, trained), mesh)
    return frozen, jax.jit(make, out_shardings=place)(trained)


def abstract_state(settings: LearnerSettings, config: ModelConfig, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state.

    A checkpoint is restored into it, and memory is planned by it.
    """

    def make() -> TrainState:
        tree = init_variables(config, jax.random.key(0))
        return _fresh(settings.optimizer, tree["lora"] if config.lora_rank else tree["params"])

    shapes = jax.eval_shape(make)
    return with_shardings(shapes, weight_shardings(shapes, mesh))


def make_optimizer(o: OptimizerSettings) -> optax.GradientTransformation:
    """Adam with warm-up and schedule, decoupled weight decay on matrices, optional clipping."""
    clip = optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity()
    decay = optax.identity()
    if o.weight_decay:
        decay = optax.add_decayed_weights(o.weight_decay, _are_matrices)
    return optax.chain(
        clip,
        optax.scale_by_adam(o.b1, o.b2, o.eps),
        decay,
        optax.scale_by_learning_rate(_schedule(o)),
    )


def _schedule(o: OptimizerSettings) -> optax.Schedule:
    steps = max(o.steps - o.warmup_steps, 1)  # behind the warm-up
    if o.schedule == "constant":
        after = optax.constant_schedule(o.lr)
    elif o.schedule == "linear":
        after = optax.linear_schedule(o.lr, 0.0, steps)
    else:
        after = optax.cosine_decay_schedule(o.lr, steps)
    warmup = optax.linear_schedule(o.lr / (o.warmup_steps + 1), o.lr, max(o.warmup_steps, 1))
    return optax.join_schedules([warmup, after], [o.warmup_steps])


def _are_matrices(tree: Any) -> Any:
    """Which leaves are matrices, by name: stacked norms and biases have two axes too."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not path_name(path).endswith(("norm", "bias")), tree
    )


def _fresh(optimizer: OptimizerSettings, trained: Any) -> TrainState:
    return TrainState(
        step=jnp.zeros((), jnp.int32), trained=trained, opt=make_optimizer(optimizer).init(trained)
    )


def _fresh_lora(config: ModelConfig, seed: int, mesh: Mesh) -> Any:
    def make() -> Any:
        return init_variables(config, jax.random.key(seed))["lora"]

    place = weight_shardings(jax.eval_shape(make), mesh)
    return jax.jit(make, out_shardings=place)()
