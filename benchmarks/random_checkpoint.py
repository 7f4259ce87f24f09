"""Checkpoints of random weights that follow from their names."""

from __future__ import annotations

import functools
import json
import pathlib
import zlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from spiral_jax.model import hf
from spiral_jax.model.architecture import hf_fields, parse_architecture
from spiral_jax.model.tensor_files import Output, write_tensors
from spiral_jax.model.transformer import ModelConfig

# of the random weights, by the end of their names
SCALE = {"q_norm": 3.0, "k_norm": 3.0, "norm": 1.0, "layernorm": 1.0, "embed_tokens": 0.06}
SHARD_BYTES = 3 * 10**9


def make_checkpoint(path: pathlib.Path, fields: dict[str, Any]) -> list[pathlib.Path]:
    """Random weights, with peaked attention and logits of order three.

    They follow from their names, so that fewer layers are the first of many.
    """
    path.mkdir(parents=True, exist_ok=True)
    arch = parse_architecture(fields, str(path))
    written = hf_fields(arch, (151645,)) | {"torch_dtype": "bfloat16"}
    (path / "config.json").write_text(json.dumps(written, indent=1))
    shapes = hf.abstract_params(ModelConfig(arch, jnp.bfloat16))
    outputs = [
        Output(
            output.name,
            output.shape,
            output.dtype,
            functools.partial(array, output.name, output.shape),
        )
        for output in hf.outputs_of(shapes, arch)
    ]
    return write_tensors(path, hf.STEM, outputs, SHARD_BYTES)


def array(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The random weights of that name, in bfloat16."""
    rng = np.random.Generator(np.random.SFC64(zlib.crc32(name.encode())))
    kind = next((kind for kind in SCALE if name.endswith(f"{kind}.weight")), None)
    if len(shape) == 1:
        values = SCALE[kind or "layernorm"] * rng.uniform(0.5, 1.5, shape)
    else:
        values = SCALE.get(kind, 0.03) * rng.standard_normal(shape, np.float32)
    return values.astype(jnp.bfloat16)
