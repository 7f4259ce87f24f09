"""Trees of a model's variables: stacked as training scans over them, or a layer at a time."""

from __future__ import annotations

import operator
from typing import Any

import jax

from spiral_jax.model import int8
from spiral_jax.model.linear import join_linears

QKV, GATE_UP = ("q", "k", "v"), ("gate", "up")  # projections that read the same input


def unstack_layers(variables: dict[str, Any], L: int) -> tuple[dict[str, Any], ...]:
    """The variables of each of the L layers, first to last, as `DecoderLayer.apply` takes them."""

    def one(layers: Any, i: int) -> Any:
        if isinstance(layers, tuple):  # of a base in int8
            return layers[i]
        return jax.tree.map(operator.itemgetter(i), layers)

    layers = [
        {name: one(tree["layers"], i) for name, tree in variables.items()} for i in range(L - 1)
    ]
    last = {name: tree["last_layer"] for name, tree in variables.items()}
    return *layers, last


def join_projections(layer: dict[str, Any], blocks: int) -> dict[str, Any]:
    """The variables of one layer as `DecoderLayer` takes them where `config.joined` = `blocks`."""
    params, lora = dict(layer["params"]), dict(layer.get("lora", {}))

    def join(names: tuple[str, ...]) -> dict[str, jax.Array]:
        linears = [{**params.pop(name), **lora.pop(name, {})} for name in names]
        return join_linears(linears, blocks)

    params["qkv"] = join(QKV)
    if "gate" in params:  # else there are experts
        params["gate_up"] = join(GATE_UP)
    return {"params": params, **({"lora": lora} if lora else {})}


def zeros_in_int8(params: dict[str, Any], L: int) -> dict[str, Any]:
    """The tree that `params` have as a base in int8: separate layers, whose matrices are zeros."""

    def layer(of_layer: dict[str, Any]) -> dict[str, Any]:
        return {
            name: int8.zeros_for(part) if isinstance(part, dict) else part
            for name, part in of_layer["params"].items()
        }

    *layers, last = map(layer, unstack_layers({"params": params}, L))
    return params | {"last_layer": last} | ({"layers": tuple(layers)} if layers else {})
