"""A base in int8 beside the floats that it stands for, by numpy in float64."""

import jax
import numpy as np


def in_int8(params):
    """The matrices of all layers rounded, which then lie in arrays of their own."""

    def of_layer(tree):
        return {name: _rounded(part) for name, part in tree.items()}

    rounded = params | {"last_layer": of_layer(params["last_layer"])}
    if "layers" in params:
        stacked = jax.device_get(params["layers"])
        before = len(stacked["attention_norm"])
        layers = [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(before)]
        rounded["layers"] = tuple(map(of_layer, layers))
    return rounded


def _rounded(part):
    if not isinstance(part, dict):
        return part
    exact = np.asarray(part["kernel"], np.float64)
    scale = np.abs(exact).max(axis=0).astype(np.float32) / np.float32(127)
    kernel = np.round(exact / np.where(scale > 0, scale, 1)).astype(np.int8)
    return part | {"kernel": kernel, "scale": scale}


def in_floats(params):
    """The float32 matrices that those of `in_int8` stand for, stacked as a float base is."""

    def of_part(part):
        if not isinstance(part, dict):
            return part
        exact = np.asarray(part["kernel"], np.float64) * np.asarray(part["scale"])
        rest = {name: array for name, array in part.items() if name != "scale"}
        return rest | {"kernel": exact.astype(np.float32)}

    def of_layer(tree):
        return {name: of_part(part) for name, part in tree.items()}

    floats = params | {"last_layer": of_layer(params["last_layer"])}
    if "layers" in params:
        floats["layers"] = jax.tree.map(lambda *a: np.stack(a), *map(of_layer, params["layers"]))
    return floats
