"""From a configuration to the objects of a run, every check on the way; nothing is written, nothing
is sampled.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from spiral_jax.core import mesh as meshes
from spiral_jax.core.config import ConfigError, eval_subset_size, groups_of_step, uses_aggregation
from spiral_jax.core.config_checks import validate, validate_evaluation
from spiral_jax.core.groups import Role
from spiral_jax.learner import blocks as batching
from spiral_jax.learner.step import abstract_state, keeps_base, make_train_step
from spiral_jax.model import hf
from spiral_jax.model.architecture import Architecture, read_architecture
from spiral_jax.model.transformer import ModelConfig
from spiral_jax.prompts import prompts
from spiral_jax.prompts.prompts import Scaffold
from spiral_jax.rollout.requests import load_strategy
from spiral_jax.run import start as initial
from spiral_jax.run.metric_writers import check_installed
from spiral_jax.run.watchdog import deadline
from spiral_jax.sampling.engine import Engine, make_samplers
from spiral_jax.sampling.settings import check_sampling
from spiral_jax.tasks.load import load_task
from spiral_jax.tasks.problem import Task
from spiral_jax.verifier.rewards import MATH, load_reward

if TYPE_CHECKING:  # takes seconds to import
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run is made of, before any weight is loaded.

    `reward` is that of config.task.reward, or the task's own. `eval_sampler` is `sampler` unless
    config.eval draws in another way.
    """

    c: ConfigDict
    path: pathlib.Path  # of the checkpoint that config.model.hf_path names
    mesh: Mesh
    task: Task
    reward: str
    model: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    scaffold: Scaffold
    sampler: Engine
    eval_sampler: Engine

    def load_base(self) -> Any:
        """The checkpoint's parameters, placed on the mesh."""
        return hf.load_params(self.path, self.model, self.mesh)

    def load_start(self) -> tuple[Any, Any | None]:
        """What a run starts from: (parameters, adapters or None); see `initial.load_start`."""
        return initial.load_start(self.c, self.path, self.model, self.mesh)

    def load_policies(self) -> tuple[dict, dict | None]:
        """What is evaluated: collections of the model, and of another that searches; see
        `initial.load_policies`.
        """
        return initial.load_policies(self.c, self.path, self.model, self.mesh)


def keep_compiled_programs() -> None:
    """Turns on JAX's persistent compilation cache, so that a restart compiles nothing: in
    ~/.cache/spiral_jax.

    JAX_COMPILATION_CACHE_DIR names another place. Off on CPUs unless it is set: their programs fit
    one kind of machine.
    """
    if jax.config.jax_compilation_cache_dir is None and jax.default_backend() != "cpu":
        jax.config.update(
            "jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache" / "spiral_jax")
        )


def set_up(c: ConfigDict, training: bool = True) -> Setup:
    """Validates `c` and builds everything that it names. Raises `ConfigError` or the data's own
    errors.

    Args:
      training: False: for `spiral_jax.evaluate`, `c` as `config.for_evaluation` returns it.
    """
    validate(c) if training else validate_evaluation(c)
    check_sampling(c)
    check_installed(c.metrics.writers if training else ())
    mesh = meshes.make_mesh(c.mesh)
    with deadline(
        "the problems that config.task names to be read (config.train.wait_s)", c.train.wait_s
    ):
        task = load_task(c)
    if c.eval.problems > task.held_out_size:
        raise ConfigError(
            f"config.eval.problems = {c.eval.problems}: the task has {task.held_out_size} held-out problems."
        )
    reward = c.task.reward or task.reward
    if reward != MATH:
        load_reward(reward)
    load_strategy(c, task)
    path = hf.resolve_path(c.model.hf_path)
    model = hf.model_config(read_architecture(path), c.model)
    if not (
        training or c.model.adapter_path or c.model.init_from or c.eval.searcher not in ("", "base")
    ):
        model = dataclasses.replace(
            model, lora_rank=0
        )  # the checkpoint as it is; a frozen base keeps its dtype
    tokenizer = prompts.load_tokenizer(path)
    if len(tokenizer) > model.arch.V:
        raise ConfigError(
            f"{path}: the tokenizer has {len(tokenizer)} ids, its vocab_size is {model.arch.V}."
        )
    stop_ids = prompts.stop_ids(tokenizer, path, c.prompt.stop)
    scaffold = prompts.make_scaffold(tokenizer, c.prompt, stop_ids)
    _check_prompt_lengths(c, scaffold, training)
    check_mesh(model.arch, mesh)
    if training:
        check_micro_batches(c, mesh)
    sampler, eval_sampler = make_samplers(c, model, mesh, stop_ids)
    return Setup(c, path, mesh, task, reward, model, tokenizer, scaffold, sampler, eval_sampler)


def check_shapes(setup: Setup) -> None:
    """Traces the whole train step on shapes alone: what it would reject, it rejects here, without
    any array.
    """
    c, model = setup.c, setup.model
    initial.check_start(c, setup.path, model)
    base = hf.abstract_params(model) if keeps_base(c, model) else None
    with jax.set_mesh(setup.mesh):
        jax.eval_shape(
            make_train_step(c, model),
            abstract_state(c, model, setup.mesh),
            base,
            abstract_blocks(c),
        )


def abstract_blocks(c: ConfigDict) -> list[batching.Block]:
    """Shapes of the blocks of one step."""
    most = groups_of_step(c)
    return [
        batching.abstract_block(
            role, most[role.label], c.batch[f"{role.label}_groups"], c[role.label].traces, P, G
        )
        for role in Role
        if role.label in most
        for P, G in c.batch[f"{role.label}_lengths"]
    ]


def _check_prompt_lengths(c: ConfigDict, scaffold: Scaffold, training: bool) -> None:
    """The longest possible prompt of each role fits into the sampler's and the trainer's shapes."""
    slots = "sampling.classes"
    longest = [(Role.SEARCH, slots, c.prompt.max_problem_tokens)]
    if training:
        longest.append((Role.SEARCH, "batch.search_lengths", c.prompt.max_problem_tokens))
    if not training or uses_aggregation(c):
        length = prompts.max_aggregation_prompt(scaffold, _largest_sets(c, training))
        longest.append((Role.AGGREGATION, slots, length))
    if training and uses_aggregation(c):
        length = prompts.max_aggregation_prompt(
            scaffold, _longest_candidates(c) if c.aggregation.rounds > 1 else c
        )
        longest.append((Role.AGGREGATION, "batch.aggregation_lengths", length))
    for role, field, length in longest:
        room, name = field.split(".")
        if field == slots:
            widest = max(
                (P for _, _, P, G in c.sampling.classes if c[role.label].max_tokens <= G), default=0
            )
        else:
            widest = c[room][name][-1][0]
        if widest < length:
            raise ConfigError(
                f"config.{field}: its widest prompt with traces of {c[role.label].max_tokens} tokens is {widest}, but "
                f"{role.label} prompts may have up to {length}. Widen it, or lower prompt.max_problem_tokens or "
                "prompt.keep_tail_tokens."
            )


def _largest_sets(c: ConfigDict, training: bool) -> ConfigDict:
    """`c` with the largest sets and the longest candidates that are aggregated, those of evaluation
    included.
    """
    sizes = [c.aggregation.subset_size, eval_subset_size(c)]
    rsa = not training or c.eval.rounds_in_training
    if rsa:
        sizes.append(c.eval.set_size)
    c = (
        _longest_candidates(c)
        if rsa or c.aggregation.rounds > 1
        else c.copy_and_resolve_references()
    )
    c.aggregation.subset_size = max(sizes)
    return c


def _longest_candidates(c: ConfigDict) -> ConfigDict:
    """`c` with the longest candidates of rounds that read aggregation traces."""
    c = c.copy_and_resolve_references()
    c.search.max_tokens = max(c.search.max_tokens, c.aggregation.max_tokens)
    return c


def check_mesh(arch: Architecture, mesh: Mesh) -> None:
    """Checks that the axes of the mesh divide what they cut of the model.

    Raises:
      ConfigError: one does not; each of its devices would hold, and compute, the whole.
    """
    cut = (
        ("tensor", arch.H, "attention heads"),
        ("tensor", arch.J, "key/value heads"),
        ("tensor", arch.F, "feed-forward columns"),
        ("fsdp", arch.D, "model dimensions"),
    )
    for axis, size, what in cut:
        if size % mesh.shape[axis]:
            allowed = [n for n in range(1, size + 1) if size % n == 0 and mesh.size % n == 0]
            raise ConfigError(
                f"config.mesh.{axis} = {mesh.shape[axis]}: must divide the model's {size} {what}; with {mesh.size} "
                f"devices: {', '.join(map(str, allowed))}."
            )


def check_micro_batches(c: ConfigDict, mesh: Mesh) -> None:
    multiple = meshes.group_count_multiple(mesh)
    for field in ("search_groups", "aggregation_groups"):
        if c.batch[field] % multiple:
            raise ConfigError(
                f"config.batch.{field} = {c.batch[field]}: must be a multiple of the mesh's data * fsdp = {multiple}."
            )
