"""Writes what a run has trained as a Hugging Face directory that transformers and vLLM load.

    python -m spiral_jax.export --workdir=runs/4b --out=models/my-spiral-4b
        [--step=200] [--adapter] [--max_shard_gb=5]

trained arrays + base checkpoint -> merged weights, streamed tensor by tensor in the base's dtypes
-> shards, config, tokenizer; or, with --adapter, a PEFT adapter. The scaffold (prompts, rules,
sizes of the sets) is part of the model, so it travels along: spiral_scaffold.json, and
spiral_infer.py, which runs it on any OpenAI-style endpoint; README.md says how.
"""

from __future__ import annotations

import functools
import json
import pathlib
import shutil
import string
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags, logging
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from spiral_jax import __version__
from spiral_jax.core.command import refuse_arguments, run_command
from spiral_jax.core.config import ConfigError, digest, to_plain
from spiral_jax.core.errors import UserError
from spiral_jax.core.mesh import host_mesh, path_name
from spiral_jax.model import hf
from spiral_jax.model.adapter import abstract_lora, save_adapter
from spiral_jax.model.architecture import Architecture, read_architecture
from spiral_jax.model.tensor_files import Output, TensorFiles, open_tensors, write_tensors
from spiral_jax.model.transformer import ModelConfig
from spiral_jax.prompts import tokenizer as tokenizers
from spiral_jax.prompts.scaffold import CUT_OFF, EMPTY, Scaffold, make_scaffold
from spiral_jax.prompts.settings import PromptSettings
from spiral_jax.run.start import Trained, find_trained
from spiral_jax.verifier.rewards import WITHOUT_ANSWERS

SCAFFOLD = "spiral_scaffold.json"
INFER = pathlib.Path(__file__).parent / "assets" / "spiral_infer.py"
CARD = pathlib.Path(__file__).parent / "assets" / "model_card.md"
_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank
_COPIED_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
)


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
    refuse_arguments(argv)
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
    """Writes the directory `out`; returns its weight files.

    config.json comes last: without it nothing loads the rest.

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
        raise ConfigError(
            "--adapter: the run trained all parameters (config.model.lora_rank = 0), so it has no "
            "adapter. Leave the flag out."
        )

    base = hf.resolve_path(c.model.hf_path)
    model = hf.model_config(read_architecture(base), c.model)
    tokenizer = tokenizers.load_tokenizer(base)
    stop_ids = tokenizers.stop_ids(tokenizer, base, c.prompt.stop)
    scaffold = make_scaffold(tokenizer, PromptSettings.from_config(c.prompt), stop_ids)

    out.mkdir(parents=True, exist_ok=True)
    for pattern in _COPIED_FILES:
        for file in base.glob(pattern):
            shutil.copy(file, out / file.name)
    add_response_template(out / "tokenizer_config.json", scaffold, stop_ids)
    shutil.copy(INFER, out / INFER.name)
    _write_json(out / SCAFFOLD, scaffold_fields(trained, scaffold, stop_ids))
    below = _base_name(c.model.hf_path, base) if adapter else ""
    (out / "README.md").write_text(model_card(trained, out.name, below))

    mesh = host_mesh()
    if adapter:
        lora = trained.load(abstract_lora(model), mesh)
        save_adapter(out, lora, model, below)
        return sorted(out.glob("adapter_model*.safetensors"))
    with open_tensors(base, hf.STEM) as tensors:
        outputs = merged_outputs(trained, tensors, model, mesh)
        files = write_tensors(out, hf.STEM, outputs, max_shard_bytes)
    sampling = generation_fields(base, c.search.temperature, stop_ids)
    _write_json(out / "generation_config.json", sampling)
    shutil.copy(base / "config.json", out / "config.json")
    return files


# Weights


class Place(NamedTuple):
    """Where a tensor of the base checkpoint stands among our parameters.

    Attributes:
      theirs: its name in the checkpoint.
      ours: path of the parameter that holds it.
      index: which part of it, by layer and expert; () if it is all of it.
      transposed: whether theirs is transposed.
    """

    theirs: str
    ours: str
    index: tuple[int, ...]
    transposed: bool


def merged_outputs(
    trained: Trained, base: TensorFiles, model: ModelConfig, mesh: Mesh
) -> list[Output]:
    """Every tensor of the merged model, in the dtype of the base; made one by one when written."""
    expected = hf.stored_params(model)
    hf.check_tensors(base, expected, model.arch)
    if model.lora_rank:
        lora = jax.tree.map(np.asarray, trained.load(abstract_lora(model), mesh))
        lora = flatten_dict(lora, sep="/")
        make = functools.partial(_merge_adapter, base, lora, model.lora_alpha / model.lora_rank)
    else:
        make = _TrainedParameters(trained, base, expected, mesh).read

    def output(place: Place) -> Output:
        shape, dtype = base.shape(place.theirs), base.dtype(place.theirs)
        return Output(place.theirs, shape, dtype, functools.partial(make, place))

    return [output(place) for place in _places(expected, model.arch)]


def _places(expected: Any, arch: Architecture) -> Iterator[Place]:
    """The places of all tensors, parameter by parameter."""
    for path, _ in jax.tree_util.tree_leaves_with_path(expected):
        ours = path_name(path)
        stored = hf.stored(ours, arch)
        for theirs, index in stored.tensors():
            yield Place(theirs, ours, index, stored.transposed)


def _merge_adapter(
    base: TensorFiles, lora: dict[str, np.ndarray], scale: float, place: Place
) -> np.ndarray:
    """W + scale (A B)^T, in float32 and rounded once; a tensor without an adapter as it is."""
    array = base.read(place.theirs)
    a, b = (lora.get(name) for name in _adapter_of(place.ours))
    if a is None:
        return array
    update = np.float32(scale) * (a[place.index] @ b[place.index]).T
    return (array.astype(np.float32) + update).astype(array.dtype)


def _adapter_of(ours: str) -> tuple[str, str]:
    """Paths of A and B of a parameter, if it has an adapter."""
    if "/experts/" in ours:
        return f"{ours}_a", f"{ours}_b"
    linear = ours.rpartition("/")[0]
    return (f"{linear}/a", f"{linear}/b") if ours.endswith("/kernel") else ("", "")


class _TrainedParameters:
    """Parameters of a run that trained them all, read one at a time.

    A stack of layers is read once for all of its layers and held until another parameter is asked
    for, so tensors must be read parameter by parameter.
    """

    def __init__(self, trained: Trained, base: TensorFiles, expected: Any, mesh: Mesh):
        self._trained, self._base, self._mesh = trained, base, mesh
        self._leaves = flatten_dict(expected, sep="/")
        self._held_name: str | None = None
        self._held: np.ndarray | None = None

    def read(self, place: Place) -> np.ndarray:
        array = self._load(place.ours)[place.index]
        return (array.T if place.transposed else array).astype(self._base.dtype(place.theirs))

    def _load(self, ours: str) -> np.ndarray:
        if self._held_name != ours:
            self._held_name, self._held = None, None  # gives its memory back first
            part = unflatten_dict({ours: self._leaves[ours]}, sep="/")
            (array,) = jax.tree.leaves(self._trained.load(part, self._mesh))
            self._held_name, self._held = ours, np.asarray(array)
        return self._held


# What travels beside the weights


def add_response_template(
    file: pathlib.Path, scaffold: Scaffold, stop_ids: tuple[int, ...]
) -> None:
    """Says in tokenizer_config.json, where it must be said, which text of a chat is the answer.

    transformers' `serve` reads it there as `response_template`. Where it is missing, `serve` takes
    every Qwen model's chats for ChatML, and gives those in another format back with the prompt in
    front of the answer. ChatML is left to it, which knows its tool calls, and what the base says
    itself stays as it is.
    """
    if scaffold.settings.template == "plain" or not file.is_file():
        return
    fields = json.loads(file.read_text())
    decode = functools.partial(scaffold.tokenizer.decode, skip_special_tokens=False)
    around = "".join(decode(piece) for piece in scaffold.search if not isinstance(piece, str))
    if "response_template" in fields or "<|im_start|>assistant\n" in around:
        return
    content = {
        "close": [decode([stop_id]) for stop_id in stop_ids],
        "content": "text",
        "content_args": {"strip": False},
    }
    # the answer begins where the prompt ends
    template = {"start_anchor_pattern": r"\Z", "fields": {"content": content}}
    _write_json(file, fields | {"response_template": template})


def scaffold_fields(
    trained: Trained, scaffold: Scaffold, stop_ids: tuple[int, ...]
) -> dict[str, Any]:
    """What spiral_infer.py needs to prompt and sample as in training, with all of config.prompt."""

    def token(i: int) -> str:
        return scaffold.tokenizer.decode([int(i)], skip_special_tokens=False)

    c = trained.c
    return {
        "format": 1,
        "prompt": to_plain(c.prompt),
        "candidate_texts": {"empty": EMPTY, "cut_off": CUT_OFF},
        "opens_thinking": scaffold.opens_thinking,
        "fenced": c.prompt.fence == "always"
        or (c.prompt.fence == "auto" and c.task.reward in WITHOUT_ANSWERS),
        "special_tokens": sorted({token(i) for i in scaffold.special_ids} - {""}),
        "stop_ids": list(stop_ids),
        "search": c.search.to_dict(),
        "aggregation": c.aggregation.to_dict(),
        "sampling": {"top_p": 1.0},
        "trained": {
            "step": trained.step,
            "estimator": c.loss.estimator,
            "config_digest": digest(c),
        },
    }


def model_card(trained: Trained, name: str, below: str) -> str:
    """What the directory holds, how it is served and how its model aggregates, in Markdown.

    Args:
      below: the base that an adapter is loaded onto; "": the directory holds whole weights.
    """
    c = trained.c
    servers = [
        f"vllm serve . --served-model-name={name}",
        "transformers serve .    # pip install 'transformers[serving]'; its --model below is .",
    ]
    if below:
        # of a rank above these vLLM says itself that it does not take it
        rank = next((r for r in _VLLM_RANKS if r >= c.model.lora_rank), c.model.lora_rank)
        lora = f"--enable-lora --max-lora-rank={rank} --lora-modules {name}=."
        servers = [f"vllm serve {below} {lora}"]
    return string.Template(CARD.read_text()).substitute(
        name=name,
        what="LoRA adapter" if below else "Weights",
        base=c.model.hf_path,
        version=__version__,
        estimator=c.loss.estimator,
        step=trained.step,
        task=c.task.name,
        digest=digest(c)[:12],
        traces=c.search.traces,
        subsets=c.aggregation.subsets,
        size=c.aggregation.subset_size,
        aggregations=c.aggregation.traces,
        rounds=c.aggregation.rounds,
        temperatures=f"{c.search.temperature:g} and {c.aggregation.temperature:g}",
        servers="\n".join(f"    {server}" for server in servers),
    )


def generation_fields(
    base: pathlib.Path, temperature: float, stop_ids: tuple[int, ...]
) -> dict[str, Any]:
    """generation_config.json: the base's special ids, and sampling as it was trained."""
    file = base / "generation_config.json"
    theirs = json.loads(file.read_text()) if file.is_file() else {}
    fields = {}
    for name in ("bos_token_id", "pad_token_id"):
        if theirs.get(name) is not None:
            fields[name] = theirs[name]
    fields["eos_token_id"] = list(stop_ids)
    return fields | {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}


def _base_name(hf_path: str, base: pathlib.Path) -> str:
    """What PEFT loads the adapter onto: the Hub id, or the directory where it lies here."""
    is_local = hf_path in hf.BUNDLED or pathlib.Path(hf_path).is_dir()
    return str(base.absolute()) if is_local else hf_path


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    define_flags()
    run_command(main)
