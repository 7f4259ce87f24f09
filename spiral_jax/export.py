"""Writes what a run has trained as a Hugging Face directory that transformers and vLLM load.

    python -m spiral_jax.export --workdir=runs/4b --out=models/my-spiral-4b [--step=200] [--adapter]
    [--max_shard_gb=5]

trained arrays + base checkpoint -> merged weights, streamed tensor by tensor in the base's dtypes
-> shards, config, tokenizer; or, with --adapter, a PEFT adapter. The scaffold (prompts, rules,
sizes of the sets) is part of the model, so
it travels along: spiral_scaffold.json, and spiral_infer.py, which runs it on any OpenAI-style
endpoint.
"""

from __future__ import annotations

import functools
import json
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from spiral_jax.core.config import ConfigError, digest, parse_flags, to_plain
from spiral_jax.core.errors import UserError
from spiral_jax.core.mesh import host_mesh, path_name
from spiral_jax.model import hf
from spiral_jax.model.adapter import abstract_lora, save_adapter
from spiral_jax.model.architecture import read_architecture
from spiral_jax.model.tensor_files import (
    Output,
    TensorFiles,
    open_tensors,
    write_tensors,
)
from spiral_jax.model.transformer import ModelConfig
from spiral_jax.prompts import tokenizer as tokenizers
from spiral_jax.prompts.scaffold import CUT_OFF, EMPTY, Scaffold, make_scaffold
from spiral_jax.prompts.settings import PromptSettings
from spiral_jax.run.start import Trained, find_trained

SCAFFOLD = "spiral_scaffold.json"
INFER = pathlib.Path(__file__).parent / "assets" / "spiral_infer.py"
_TOKENIZER_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "LICENSE*", "NOTICE*",
)  # fmt: skip


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "directory of the run", required=True)
    flags.DEFINE_integer("step", None, "step of the checkpoint; default: the newest")
    flags.DEFINE_string(
        "out", None, "directory that is written; must be missing or empty", required=True
    )
    flags.DEFINE_bool("adapter", False, "write the LoRA adapter alone, in PEFT's format")
    flags.DEFINE_float(
        "max_shard_gb", 5.0, "10^9 bytes of weights in a file, at most", lower_bound=1e-6
    )


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    try:
        trained = find_trained(pathlib.Path(given.workdir), given.step)
        files = export(
            trained, pathlib.Path(given.out), given.adapter, int(given.max_shard_gb * 1e9)
        )
    except UserError as error:
        sys.exit(f"error: {error}")
    size = sum(file.stat().st_size for file in files)
    print(
        f"step {trained.step}: {size / 1e9:.2f} GB of weights in {len(files)} files in {given.out}",
        flush=True,
    )


def export(
    trained: Trained, out: pathlib.Path, adapter: bool, max_shard_bytes: int
) -> list[pathlib.Path]:
    """Writes the directory `out`; returns its weight files. config.json comes last: without it
    nothing loads the rest.

    Raises:
      ConfigError: `out` is not empty, the base model is not there, or `adapter` for a run without
      adapters.
      WeightsError, CheckpointError: the base's weights or the checkpoint are not what they should
      be.
    """
    c = trained.c
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"--out={out}: not an empty directory. Give a new one; nothing is overwritten."
        )
    if adapter and not c.model.lora_rank:
        raise ConfigError("--adapter: the run trained all parameters (config.model.lora_rank = 0), so it has no "
                          "adapter. Leave the flag out.")  # fmt: skip
    base = hf.resolve_path(c.model.hf_path)
    model = hf.model_config(read_architecture(base), c.model)
    tokenizer = tokenizers.load_tokenizer(base)
    stop_ids = tokenizers.stop_ids(tokenizer, base, c.prompt.stop)
    scaffold = make_scaffold(tokenizer, PromptSettings.from_config(c.prompt), stop_ids)
    out.mkdir(parents=True, exist_ok=True)
    for pattern in _TOKENIZER_FILES:
        for file in base.glob(pattern):
            shutil.copy(file, out / file.name)
    shutil.copy(INFER, out / INFER.name)
    _write_json(out / SCAFFOLD, scaffold_fields(trained, scaffold, stop_ids))
    mesh = host_mesh()
    if adapter:
        save_adapter(
            out, trained.load(abstract_lora(model), mesh), model, _base_name(c.model.hf_path, base)
        )
        return sorted(out.glob("adapter_model*.safetensors"))
    with open_tensors(base, hf.STEM) as tensors:
        files = write_tensors(
            out, hf.STEM, merged_outputs(trained, tensors, model, mesh), max_shard_bytes
        )
    _write_json(
        out / "generation_config.json", generation_fields(base, c.sampling.temperature, stop_ids)
    )
    shutil.copy(base / "config.json", out / "config.json")
    return files


def merged_outputs(
    trained: Trained, base: TensorFiles, model: ModelConfig, mesh: Mesh
) -> list[Output]:
    """Every tensor of the merged model, in the dtype that the base stores it in; made one by one
    when written.

    An adapter is merged in float32 and rounded once: W + (alpha / rank) (A B)^T.
    """
    expected = hf.abstract_params(model)
    hf.check_tensors(base, expected, model.arch)
    lora = (
        jax.tree.map(np.asarray, trained.load(abstract_lora(model), mesh))
        if model.lora_rank
        else None
    )

    @functools.lru_cache(maxsize=1)  # a stacked parameter is read once for all of its layers
    def full(name: str, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        part = trained.load(unflatten_dict({name: shape}, sep="/"), mesh)
        return np.asarray(jax.tree.leaves(part)[0])

    def reader(
        name: str, leaf: jax.ShapeDtypeStruct, theirs: str, layer: int, transposed: bool
    ) -> Callable[[], Any]:
        def read() -> np.ndarray:
            if lora is None:
                whole = full(name, leaf)
                array = whole[layer] if hf.stored(name, model.arch.L).stacked else whole
                return (array.T if transposed else array).astype(base.dtype(theirs))
            array = base.read(theirs)
            if not name.endswith("/kernel"):
                return array
            room, projection, _ = name.split("/")
            a, b = (lora[room][projection][part] for part in ("a", "b"))
            if room == "layers":
                a, b = a[layer], b[layer]
            update = np.float32(model.lora_alpha / model.lora_rank) * (a @ b).T
            return (array.astype(np.float32) + update).astype(array.dtype)

        return read

    outputs = []
    for at, leaf in jax.tree_util.tree_leaves_with_path(expected):
        name = path_name(at)
        tensors = hf.stored(name, model.arch.L)
        for layer, theirs in enumerate(tensors.names):
            read = reader(name, leaf, theirs, layer, tensors.transposed)
            outputs.append(Output(theirs, base.shape(theirs), base.dtype(theirs), read))
    return outputs


def scaffold_fields(
    trained: Trained, scaffold: Scaffold, stop_ids: tuple[int, ...]
) -> dict[str, Any]:
    """What spiral_infer.py needs to prompt and sample as in training; all of config.prompt, so that
    nothing is lost.
    """
    c = trained.c
    decode = lambda i: scaffold.tokenizer.decode([int(i)], skip_special_tokens=False)  # noqa: E731
    return {
        "format": 1,
        "prompt": to_plain(c.prompt),
        "candidate_texts": {"empty": EMPTY, "cut_off": CUT_OFF},
        "opens_thinking": scaffold.opens_thinking,
        "special_tokens": sorted({decode(i) for i in scaffold.special_ids} - {""}),
        "stop_ids": list(stop_ids),
        "search": c.search.to_dict(),
        "aggregation": c.aggregation.to_dict(),
        "sampling": {"temperature": c.sampling.temperature, "top_p": 1.0},
        "trained": {
            "step": trained.step,
            "estimator": c.loss.estimator,
            "config_digest": digest(c),
        },
    }


def generation_fields(
    base: pathlib.Path, temperature: float, stop_ids: tuple[int, ...]
) -> dict[str, Any]:
    """generation_config.json: the base's special ids, and sampling as it was trained: no top-p, no
    top-k.
    """
    file = base / "generation_config.json"
    theirs = json.loads(file.read_text()) if file.is_file() else {}
    kept = {
        name: theirs[name]
        for name in ("bos_token_id", "pad_token_id")
        if theirs.get(name) is not None
    }
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    return kept | {"eos_token_id": list(stop_ids)} | sampling


def _base_name(hf_path: str, base: pathlib.Path) -> str:
    """What PEFT is told to load the adapter onto: the Hub id, or the directory where it lies here."""
    return (
        hf_path
        if hf_path not in hf.BUNDLED and not pathlib.Path(hf_path).is_dir()
        else str(base.absolute())
    )


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
