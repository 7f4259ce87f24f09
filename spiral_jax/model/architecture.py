"""A checkpoint's architecture: sizes and constants, read from its `config.json`."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import pathlib
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from spiral_jax.core.config import ConfigError

# model_type -> whether queries and keys of each head are normalised. The families differ in nothing
# else that runs.
_QK_NORM = {"qwen3": True, "llama": False}
# Fields that change the computation, each with the values under which it does not.
_NEUTRAL = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "hidden_act": ("silu",),
    "attention_dropout": (0, 0.0, None),
    "quantization_config": (None,),
    "pretraining_tp": (1, None),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1, 1.0, None),
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes and constants of a dense Qwen3 or Llama decoder.

    Attributes:
      V, D, F, L, H, J, E: sizes by their axis letter (see `spiral_jax.core.groups`).
      tied: the head is the embedding.
      qk_norm: queries and keys are normalised per head (Qwen3) or not (Llama).
    """

    V: int
    D: int
    F: int
    L: int
    H: int
    J: int
    E: int
    norm_eps: float
    rope_theta: float
    tied: bool
    qk_norm: bool = True

    @property
    def parameters(self) -> int:
        """Number of base parameters."""
        attention = self.D * self.E * 2 * (self.H + self.J) + (2 * self.E if self.qk_norm else 0)
        layer = attention + 3 * self.D * self.F + 2 * self.D
        return self.L * layer + self.D + self.V * self.D * (1 if self.tied else 2)


def read_architecture(path: pathlib.Path) -> Architecture:
    """Reads `path/config.json`.

    Raises:
      ConfigError: a missing or corrupt file, or what is not supported.
    """
    file = path / "config.json"
    if not file.is_file():
        raise ConfigError(
            f"config.model.hf_path = {str(path)!r}: no config.json there. Give a Hugging Face "
            "directory."
        )
    try:
        fields = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file}: not valid JSON ({error}). Fetch the checkpoint again."
        ) from error
    if not isinstance(fields, dict):
        raise ConfigError(
            f"{file}: not valid JSON of a config (no object at the top). Fetch the checkpoint "
            "again."
        )
    return parse_architecture(fields, str(file))


def parse_architecture(fields: dict[str, Any], where: str) -> Architecture:
    """`fields` of a config.json -> Architecture.

    Rope is understood in the spellings of transformers 4 and 5. Fields that older Llama files leave
    out have the values that their authors' code gave them: see `_complete_llama`.

    Raises:
      ConfigError: begins with `where` and names the field.
    """
    kind = fields.get("model_type")
    if kind not in _QK_NORM:
        raise ConfigError(
            f"{where}: model_type = {kind!r} is not supported; supported: {', '.join(_QK_NORM)}."
        )
    for name, neutral in _NEUTRAL.items():
        if name in fields and fields[name] not in neutral:
            raise ConfigError(
                f"{where}: {name} = {fields[name]!r} is not supported; must be {neutral[0]!r} or "
                "absent."
            )
    windowed = [kind for kind in fields.get("layer_types") or [] if kind != "full_attention"]
    if windowed:
        raise ConfigError(
            f"{where}: layer_types contains {windowed[0]!r}; only 'full_attention' is supported."
        )
    fields = _complete_llama(fields, where) if kind == "llama" else fields
    arch = Architecture(
        V=_positive(fields, "vocab_size", where),
        D=_positive(fields, "hidden_size", where),
        F=_positive(fields, "intermediate_size", where),
        L=_positive(fields, "num_hidden_layers", where),
        H=_positive(fields, "num_attention_heads", where),
        J=_positive(fields, "num_key_value_heads", where),
        E=_positive(fields, "head_dim", where),
        norm_eps=_number(fields, "rms_norm_eps", where),
        rope_theta=_rope_theta(fields, where, unstated=10_000.0 if kind == "llama" else None),
        tied=_boolean(fields, "tie_word_embeddings", where),
        qk_norm=_QK_NORM[kind],
    )
    if arch.H % arch.J:
        raise ConfigError(
            f"{where}: num_key_value_heads = {arch.J}: must divide num_attention_heads = {arch.H}."
        )
    if arch.E % 2:
        raise ConfigError(
            f"{where}: head_dim = {arch.E}: must be even, as rope rotates its halves."
        )
    return arch


def check_mesh(arch: Architecture, mesh: Mesh | AbstractMesh) -> None:
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
                f"config.mesh.{axis} = {mesh.shape[axis]}: must divide the model's {size} {what}; "
                f"with {mesh.size} devices: {', '.join(map(str, allowed))}."
            )


def hf_fields(arch: Architecture, stop_ids: tuple[int, ...]) -> dict[str, Any]:
    """The config.json that `parse_architecture` reads back as `arch`.

    It is in the spelling of the 2507 checkpoints.
    """
    return {
        "architectures": ["Qwen3ForCausalLM" if arch.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if arch.qk_norm else "llama",
        "vocab_size": arch.V,
        "hidden_size": arch.D,
        "intermediate_size": arch.F,
        "num_hidden_layers": arch.L,
        "num_attention_heads": arch.H,
        "num_key_value_heads": arch.J,
        "head_dim": arch.E,
        "rms_norm_eps": arch.norm_eps,
        "rope_theta": arch.rope_theta,
        "tie_word_embeddings": arch.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        **({"use_sliding_window": False} if arch.qk_norm else {"mlp_bias": False}),
        "eos_token_id": list(stop_ids),
        "torch_dtype": "float32",
    }


def _complete_llama(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """`fields` with those of which files from before grouped queries and tying say nothing."""
    heads = _positive(fields, "num_attention_heads", where)
    width = _positive(fields, "hidden_size", where)
    implied = {
        "head_dim": width // heads,
        "num_key_value_heads": heads,
        "tie_word_embeddings": False,
    }
    missing = {name: value for name, value in implied.items() if fields.get(name) is None}
    if "head_dim" in missing and width % heads:
        raise ConfigError(
            f"{where}: head_dim is missing, and num_attention_heads = {heads} does not divide "
            f"hidden_size = {width}."
        )
    return fields | missing


# Fields of a rope type that does not scale, beside rope_theta.
_PLAIN_ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1}


def _rope_theta(fields: dict[str, Any], where: str, unstated: float | None) -> float:
    """Plain rope alone: any other type, or a field that a scaled type would read, is an error."""
    sources = [fields]
    for name in ("rope_parameters", "rope_scaling"):
        rope = fields.get(name) or {}
        if not isinstance(rope, dict):
            raise ConfigError(f"{where}: {name} = {rope!r}: must be an object or absent.")
        for key, value in rope.items():
            plain = _PLAIN_ROPE.get(key)
            if key != "rope_theta" and (plain is None or value != plain):
                need = f"must be {plain!r}" if plain else "only unscaled rope is"
                raise ConfigError(f"{where}: {name}.{key} = {value!r} is not supported; {need}.")
        sources.append(rope)

    stated = set()
    for source in sources:
        if source.get("rope_theta") is not None:
            stated.add(_number(source, "rope_theta", where))
    if not stated and unstated is not None:
        return unstated
    if len(stated) != 1:
        what = f"contradicts itself: {sorted(stated)}" if stated else "is missing"
        raise ConfigError(
            f"{where}: rope_theta {what}. It must be given once, at the top or in rope_parameters."
        )
    return stated.pop()


def _positive(fields: dict[str, Any], name: str, where: str) -> int:
    value = _field(fields, name, where)
    if type(value) is not int or value < 1:  # a bool is an int to isinstance
        raise ConfigError(f"{where}: {name} = {value!r}: must be a positive integer.")
    return value


def _number(fields: dict[str, Any], name: str, where: str) -> float:
    value = _field(fields, name, where)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ConfigError(f"{where}: {name} = {value!r}: must be a positive number.")
    return float(value)


def _boolean(fields: dict[str, Any], name: str, where: str) -> bool:
    value = _field(fields, name, where)
    if type(value) is not bool:
        raise ConfigError(f"{where}: {name} = {value!r}: must be true or false.")
    return value


def _field(fields: dict[str, Any], name: str, where: str) -> Any:
    if fields.get(name) is None:
        near = difflib.get_close_matches(name, fields, 1)
        raise ConfigError(
            f"{where}: {name} is missing{f'; did you mean {near[0]!r}?' if near else '.'}"
        )
    return fields[name]
