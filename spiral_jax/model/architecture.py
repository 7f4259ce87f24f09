"""A checkpoint's architecture: sizes and constants, read from its `config.json`."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from spiral_jax.core.config import ConfigError
from spiral_jax.model.config_fields import boolean, number, positive
from spiral_jax.model.families import FAMILIES, MISSING, Family, Routing
from spiral_jax.model.rope import Scaling, read_rope, rope_fields

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
# The field that says F: of layers without experts, of experts.
_WIDTH = {False: "intermediate_size", True: "moe_intermediate_size"}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Sizes and constants of a decoder.

    Attributes:
      V, D, F, L, H, J, E: sizes by their axis letter (see `spiral_jax.core.groups`).
      tied: the head is the embedding.
      family: what its layers compute.
      rope_scaling: None: rope turns as `rope_theta` says.
      unrotated: layers without rope.
      routing: F is the width of each expert; None: layers have no experts.
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
    family: Family = FAMILIES["qwen3"]
    rope_scaling: Scaling | None = None
    unrotated: tuple[int, ...] = ()
    routing: Routing | None = None

    @property
    def token_F(self) -> int:
        """Feed-forward columns that a token passes: those of its experts."""
        return self.F * (self.routing.chosen if self.routing else 1)

    @property
    def parameters(self) -> int:
        """Number of base parameters."""
        heads, kv = self.H * self.E, self.J * self.E
        columns = {"q": heads, "k": kv, "v": kv, "o": self.D}
        vectors = 2 * self.D + (2 * self.E if self.family.qk_norm else 0)
        vectors += sum(columns[name] for name in self.family.biases)
        mlp = 3 * self.D * self.F
        if self.routing:
            mlp = self.routing.experts * (mlp + self.D)
        layer = 2 * self.D * (heads + kv) + mlp + vectors
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

    Rope is understood in the spellings of transformers 4 and 5. Fields that a family's files may
    leave out have the values that their authors' code gave them: see `_completed`.

    Raises:
      ConfigError: begins with `where` and names the field.
    """
    family = _family(fields, where)
    _refuse_unsupported(fields, family, where)
    fields = _completed(fields, family, where)
    theta, scaling = read_rope(fields, where, dict(family.unstated).get("rope_theta"))
    arch = Architecture(
        V=positive(fields, "vocab_size", where),
        D=positive(fields, "hidden_size", where),
        F=positive(fields, _WIDTH[family.routed], where),
        L=positive(fields, "num_hidden_layers", where),
        H=positive(fields, "num_attention_heads", where),
        J=positive(fields, "num_key_value_heads", where),
        E=positive(fields, "head_dim", where),
        norm_eps=number(fields, "rms_norm_eps", where),
        rope_theta=theta,
        tied=boolean(fields, "tie_word_embeddings", where),
        family=family,
        rope_scaling=scaling,
        unrotated=_unrotated(fields, where) if family.skips_rope else (),
        routing=_routing(fields, where) if family.routed else None,
    )
    if arch.H % arch.J:
        raise ConfigError(
            f"{where}: num_key_value_heads = {arch.J}: must divide num_attention_heads = {arch.H}."
        )
    if arch.E % 2:
        raise ConfigError(
            f"{where}: head_dim = {arch.E}: must be even, as rope rotates its halves."
        )
    if arch.unrotated and scaling and scaling.attention_factor != 1:
        raise ConfigError(
            f"{where}: rope_type 'yarn' is not supported with layers without rope "
            "(no_rope_layers), as its attention_factor would stretch theirs too."
        )
    return arch


def _family(fields: dict[str, Any], where: str) -> Family:
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        lacks = f" It would need: {MISSING[kind]}." if str(kind) in MISSING else ""
        raise ConfigError(
            f"{where}: model_type = {kind!r} is not supported; supported: "
            f"{', '.join(FAMILIES)}.{lacks}"
        )
    return FAMILIES[kind]


def _refuse_unsupported(fields: dict[str, Any], family: Family, where: str) -> None:
    """Refuses fields that change the computation to one that we do not have."""
    neutral = dict(_NEUTRAL)
    for name, value in family.states:
        neutral[name] = (list(value) if isinstance(value, tuple) else value, None)
    for name, values in neutral.items():
        if name in fields and name not in family.ignores and fields[name] not in values:
            raise ConfigError(
                f"{where}: {name} = {fields[name]!r} is not supported for model_type = "
                f"{family.model_type!r}; must be {json.dumps(values[0])}."
            )
    for name in family.must_state:
        if name not in fields:
            raise ConfigError(
                f"{where}: {name} is missing, for which {family.writes} has a default that is not "
                f"supported; must be {json.dumps(dict(family.states)[name])}."
            )
    windowed = [kind for kind in fields.get("layer_types") or [] if kind != "full_attention"]
    if windowed:
        raise ConfigError(
            f"{where}: layer_types contains {windowed[0]!r}; only 'full_attention' is supported."
        )


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
        "architectures": [arch.family.writes],
        "model_type": arch.family.model_type,
        "vocab_size": arch.V,
        "hidden_size": arch.D,
        _WIDTH[arch.family.routed]: arch.F,
        "num_hidden_layers": arch.L,
        "num_attention_heads": arch.H,
        "num_key_value_heads": arch.J,
        "head_dim": arch.E,
        "rms_norm_eps": arch.norm_eps,
        **rope_fields(arch.rope_theta, arch.rope_scaling),
        "tie_word_embeddings": arch.tied,
        "hidden_act": "silu",
        **dict(arch.family.states),
        **_row_fields(arch),
        "eos_token_id": list(stop_ids),
        "torch_dtype": "float32",
    }


def _completed(fields: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    """`fields` with those that the family's files may leave out, but for rope_theta."""
    heads = positive(fields, "num_attention_heads", where)
    width = positive(fields, "hidden_size", where)
    sizes = {"head_dim": width // heads, "num_key_value_heads": heads}
    absent = dict(family.unstated) | {name: sizes[name] for name in family.implied}
    missing = {name: value for name, value in absent.items() if fields.get(name) is None}
    missing.pop("rope_theta", None)  # may be in rope_parameters
    if "head_dim" in missing and width % heads:
        raise ConfigError(
            f"{where}: head_dim is missing, and num_attention_heads = {heads} does not divide "
            f"hidden_size = {width}."
        )
    return fields | missing


def _unrotated(fields: dict[str, Any], where: str) -> tuple[int, ...]:
    """Layers of which no_rope_layers says 0, or each that no_rope_layer_interval counts to."""
    layers = positive(fields, "num_hidden_layers", where)
    has_rope = fields.get("no_rope_layers")
    if has_rope is None:
        interval = positive(fields, "no_rope_layer_interval", where)
        has_rope = [(layer + 1) % interval != 0 for layer in range(layers)]
    elif (
        not isinstance(has_rope, list)
        or len(has_rope) < layers
        or any(flag not in (0, 1) for flag in has_rope)
    ):
        raise ConfigError(
            f"{where}: no_rope_layers = {has_rope!r}: must be a list of 0 (no rope) and 1 (rope), "
            f"one for each of the {layers} layers."
        )
    return tuple(layer for layer in range(layers) if not has_rope[layer])


def _routing(fields: dict[str, Any], where: str) -> Routing:
    # transformers 5 writes the second name
    count = "num_local_experts" if "num_local_experts" in fields else "num_experts"
    routing = Routing(
        experts=positive(fields, count, where),
        chosen=positive(fields, "num_experts_per_tok", where),
        normalised=boolean(fields, "norm_topk_prob", where),
    )
    if routing.chosen > routing.experts:
        raise ConfigError(
            f"{where}: num_experts_per_tok = {routing.chosen}: must be at most num_experts = "
            f"{routing.experts}."
        )
    return routing


def _row_fields(arch: Architecture) -> dict[str, Any]:
    """Fields that one family alone has."""
    fields: dict[str, Any] = {}
    if arch.family.skips_rope:
        fields["no_rope_layers"] = [int(layer not in arch.unrotated) for layer in range(arch.L)]
    if arch.routing:
        fields["num_experts"] = arch.routing.experts
        fields["num_experts_per_tok"] = arch.routing.chosen
        fields["norm_topk_prob"] = arch.routing.normalised
    return fields
