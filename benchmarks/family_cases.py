"""Random small checkpoints of every model family, run here and by transformers and PEFT.

Every field is off its default and attention is peaked, so that a wrong constant shows.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spiral_jax.core import mesh as meshes
from spiral_jax.core.groups import GroupRequests, Groups
from spiral_jax.learner.logprobs import response_hidden
from spiral_jax.model import hf
from spiral_jax.model.adapter import abstract_lora, load_adapter, target_modules
from spiral_jax.model.architecture import Architecture, read_architecture
from spiral_jax.model.transformer import ModelConfig, head_kernel
from spiral_jax.sampling.draw import Draw
from spiral_jax.sampling.engine import Engine
from spiral_jax.sampling.protocol import sample
from spiral_jax.sampling.settings import DecodeSettings, Schedule

FIELDS = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 16,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 777.0},
    "tie_word_embeddings": False,
    "max_position_embeddings": 640,
    "bos_token_id": None,
    "eos_token_id": 5,
    "pad_token_id": None,  # SmolLM3's own would not be in the vocabulary
}
_ORIGINAL = {"rope_theta": 777.0, "factor": 3.0, "original_max_position_embeddings": 40}
# model_type -> fields beside FIELDS. Ramps of scaled rope lie within the positions that are used.
CASES: dict[str, dict[str, Any]] = {
    "qwen3": {
        "num_hidden_layers": 2,
        "rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 777.0},
    },
    "qwen2": {
        "num_hidden_layers": 2,
        "rope_parameters": _ORIGINAL
        | {"rope_type": "yarn", "beta_fast": 4.0, "beta_slow": 0.5, "attention_factor": 1.3},
        "tie_word_embeddings": True,
    },
    "llama": {
        "num_hidden_layers": 2,
        "rope_parameters": _ORIGINAL
        | {"rope_type": "llama3", "low_freq_factor": 0.5, "high_freq_factor": 4.0},
    },
    "mistral": {"num_hidden_layers": 2, "sliding_window": None},
    # a stacked layer without rope, and the last one
    "smollm3": {"no_rope_layers": [1, 0, 0], "pretraining_tp": 2, "tie_word_embeddings": True},
    "qwen3_moe": {
        "num_key_value_heads": 2,  # so that two devices can share heads
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
}
RANK, ALPHA = 4, 6
U, C, P, G = 4, 2, 9, 5
PROMPT_LEN = np.array([9, 6, 1, 4], np.int32)
GREEDY_TOKENS = 12
# For one run on a CPU, machine code without LLVM's optimisations takes half the time.
QUICK = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}


def randomise(model: Any) -> Any:
    """Peaks attention: with transformers' own values a wrong rope theta would go unnoticed."""
    import torch

    torch.manual_seed(0)
    normed = any("q_norm" in name for name, _ in model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                parameter.uniform_(0, 6)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif not normed and ("q_proj" in name or "k_proj" in name):
                parameter.normal_(0, 0.25)  # scores of order three without any norm
            else:  # logits and activations of order one
                parameter.normal_(0, 0.1)
    return model.eval()


class Ids(NamedTuple):
    """Random groups whose padding is arbitrary ids, not zeros."""

    prompt_UxP: np.ndarray
    prompt_len_U: np.ndarray
    trace_UxCxG: np.ndarray


def random_ids() -> tuple[Ids, np.ndarray]:
    """Groups, and weights [U, C, G] of their tokens' log-probs."""
    rng = np.random.default_rng(0)
    prompt, trace = (rng.integers(0, 97, shape, np.int32) for shape in ((U, P), (U, C, G)))
    return Ids(prompt, PROMPT_LEN, trace), rng.normal(size=(U, C, G)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Case:
    """A checkpoint on disk, its adapter in `directory`/adapter, and both as a torch model."""

    model_type: str
    directory: pathlib.Path
    model: Any

    @functools.cached_property
    def config(self) -> ModelConfig:
        arch = read_architecture(self.directory)
        # What is computed again is compiled again: once, for what only one family has.
        remat = "layer" if arch.routing else "none"
        return ModelConfig(
            arch,
            lora_rank=RANK,
            lora_alpha=ALPHA,
            lora_experts=arch.routing is not None,
            attention_block=4,
            remat=remat,
        )

    def variables(self, mesh: Mesh) -> dict[str, Any]:
        """What our files' readers make of it."""
        return {
            "params": hf.load_params(self.directory, self.config, mesh),
            "lora": load_adapter(self.directory / "adapter", self.config, mesh),
        }


def make_case(model_type: str, directory: pathlib.Path) -> Case:
    """Writes the checkpoint with transformers and an adapter of all that we adapt with PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **(FIELDS | CASES[model_type]))
    model = randomise(AutoModelForCausalLM.from_config(config))
    model.save_pretrained(directory)
    case = Case(model_type, directory, None)
    targets = target_modules(case.config)
    adapted = get_peft_model(
        model,
        LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
            if "experts.base_layer.lora_B" in name:
                _part_gate_and_up(parameter)
    adapted.save_pretrained(directory / "adapter")
    return dataclasses.replace(case, model=adapted.eval())


def _part_gate_and_up(b: Any) -> None:
    """Makes B [2 F, 2 RANK * X] of `gate_up_proj`, sorted by rank, that of two adapters apart."""
    gate, up = b.view(2, -1, 2, RANK, CASES["qwen3_moe"]["num_experts"])
    gate[:, 1], up[:, 0] = 0, 0


class Outcome(NamedTuple):
    """Of the groups of `random_ids`.

    Attributes:
      logits: [U, C, G, V] that predict the traces' tokens.
      gradient: of the weighted sum of log-probs, by the names of our parameters and adapters.
    """

    logits: np.ndarray
    gradient: dict[str, np.ndarray]


def of_torch(case: Case) -> Outcome:
    """Each row, a prompt and a trace, runs alone and unpadded."""
    import torch

    ids, weight = random_ids()
    logits = np.empty((U, C, G, FIELDS["vocab_size"]), np.float32)
    case.model.zero_grad()
    for parameter in case.model.parameters():
        parameter.requires_grad_(True)
    for u, c in np.ndindex(U, C):
        row = np.concatenate([ids.prompt_UxP[u, : PROMPT_LEN[u]], ids.trace_UxCxG[u, c]])
        row = torch.tensor(row, dtype=torch.long)
        out = case.model(row[None]).logits[0, -1 - G : -1]
        logprob = out.log_softmax(-1)[torch.arange(G), row[-G:]]
        (logprob * torch.tensor(weight[u, c])).sum().backward()
        logits[u, c] = out.detach().numpy()
    return Outcome(logits, _our_names(case))


def _our_names(case: Case) -> dict[str, np.ndarray]:
    """torch's gradients under the names and in the layout of ours."""
    theirs = {}
    for name, parameter in case.model.named_parameters():
        name, grad = name.replace(".default", ""), parameter.grad.numpy()
        if ".experts." in name and "lora_" in name:
            theirs |= _experts_adapters(name, grad)
            continue
        name = name.replace(".base_layer", "")
        name = name if "lora_" in name else name.removeprefix("base_model.model.")
        theirs |= _as_stored(name, grad)
    shapes = {"params": hf.abstract_params(case.config), "lora": abstract_lora(case.config)}
    gradient = {}
    for at, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        ours = meshes.path_name(at)
        stored = hf.stored(ours.partition("/")[2], case.config.arch)
        tensors = [theirs.pop(name) for name, _ in stored.tensors()]
        tensors = [tensor.T if stored.transposed else tensor for tensor in tensors]
        gradient[ours] = np.stack(tensors).reshape(leaf.shape)
    assert not theirs, f"parameters that we do not have: {sorted(theirs)}"
    return gradient


def _as_stored(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """Experts, one array in torch, by the names that their tensors have in files."""
    room, _, part = name.rpartition(".")
    if part == "gate_up_proj":
        gate, up = np.split(array, 2, axis=1)
        return _as_stored(f"{room}.gate_proj", gate) | _as_stored(f"{room}.up_proj", up)
    if not room.endswith(".experts"):
        return {name: array}
    return {f"{room}.{expert}.{part}.weight": each for expert, each in enumerate(array)}


def _experts_adapters(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """What PEFT has of all experts' adapters, by the names of an adapter of each projection."""
    room, _, side = name.removesuffix(".weight").rpartition(".")
    names = ["gate_proj", "up_proj"] if room.endswith(".base_layer") else ["down_proj"]
    X, n, is_b = CASES["qwen3_moe"]["num_experts"], len(names), side.endswith("B")
    if is_b:  # [features, ranks, X]
        array = array.reshape(-1, n * RANK, X).transpose(2, 1, 0)
    by_rank = array.reshape(X, n, RANK, -1)
    found = {}
    for i, projection in enumerate(names):
        for expert, own in enumerate(by_rank[:, i]):
            part = np.split(own.T, n)[i] if is_b else own
            module = f"{room.removesuffix('.base_layer')}.{expert}.{projection}"
            found[f"{module}.{side}.weight"] = part
    return found


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _run(config: ModelConfig, variables: Any, ids: Ids, weight: jax.Array) -> Any:
    def loss(variables: Any) -> tuple[jax.Array, jax.Array]:
        logits = logits_of(config, variables, ids)
        logprob = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(logprob, ids.trace_UxCxG[..., None], -1)[..., 0]
        return jnp.sum(weight * chosen), logits

    return jax.grad(loss, has_aux=True)(variables)


def logits_of(config: ModelConfig, variables: Any, ids: Ids) -> jax.Array:
    """[U, C, G, V] by our training forward pass."""
    return response_hidden(config, variables, *ids) @ head_kernel(config, variables["params"])


def of_ours(config: ModelConfig, variables: Any, mesh: Mesh) -> Outcome:
    """The same of our one program for a group."""
    with jax.set_mesh(mesh):
        placed = jax.device_put(random_ids(), meshes.group_sharding(mesh))
        gradient, logits = _run(config, variables, *placed)
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    return Outcome(
        np.asarray(logits), {meshes.path_name(at): np.asarray(leaf) for at, leaf in leaves}
    )


def logit_gap(ours: np.ndarray, theirs: Outcome) -> float:
    """Largest difference of logits."""
    return float(np.abs(ours - theirs.logits).max())


def gradient_gaps(ours: Outcome, theirs: Outcome) -> dict[str, float]:
    """Of each parameter: norm of the difference over the norm of torch's gradient."""
    assert ours.gradient.keys() == theirs.gradient.keys()
    return {
        name: float(np.linalg.norm(ours.gradient[name] - grad) / np.linalg.norm(grad))
        for name, grad in theirs.gradient.items()
    }


def draw(
    config: ModelConfig, variables: Any, mesh: Mesh, temperature: float, seed: int = 0
) -> Groups:
    """A trace of GREEDY_TOKENS for each prompt by our engine: prefill, pages, decoding."""
    settings = DecodeSettings(
        config, config.compute_dtype, Draw(temperature=temperature), seed, (), 8, mesh
    )
    schedule = Schedule(
        page=4,
        pages=33,
        rows=(U,),
        width=1,
        together=1,
        prompts=(16,),
        trace=GREEDY_TOKENS,
        chunk=GREEDY_TOKENS,
        prefill_tokens=64,
    )
    engine = Engine(settings, schedule)
    id_Ux6 = np.zeros((U, 6), np.int32)
    id_Ux6[:, 2] = np.arange(U)
    requests = GroupRequests(random_ids()[0].prompt_UxP, PROMPT_LEN, id_Ux6, 1, GREEDY_TOKENS)
    return sample(engine, engine.prepare(variables), requests)


def greedy(config: ModelConfig, variables: Any, mesh: Mesh) -> np.ndarray:
    """[U, GREEDY_TOKENS], the most likely ones."""
    return draw(config, variables, mesh, temperature=0).trace_UxCxG[:, 0]


def not_greedy(case: Case, tokens_UxG: np.ndarray) -> list[float]:
    """Of tokens that torch would not have taken: how far their logit is behind the best."""
    import torch

    behind = []
    for u, tokens in enumerate(tokens_UxG):
        row = np.concatenate([random_ids()[0].prompt_UxP[u, : PROMPT_LEN[u]], tokens])
        with torch.no_grad():
            out = case.model(torch.tensor(row, dtype=torch.long)[None]).logits[0]
        out = out[-1 - len(tokens) : -1].numpy()
        gap_G = out.max(-1) - out[np.arange(len(tokens)), tokens]
        behind += gap_G[gap_G > 0].tolist()
    return behind


def with_arch(config: ModelConfig, **fields: Any) -> ModelConfig:
    """`config` of another architecture; `family` as the fields of its row that differ."""
    arch: Architecture = config.arch
    if "family" in fields:
        fields["family"] = dataclasses.replace(arch.family, **fields["family"])
    return dataclasses.replace(config, arch=dataclasses.replace(arch, **fields))
