"""Exported runs: transformers and PEFT give our logits and tokens, and what is exported can be
trained further.
"""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import types
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_model import forward, on_mesh, random_ids, rows_of
from small_runs import make_run
from small_tokenizer import chatml_tokenizer, scaffold_of

from benchmarks import family_cases
from configs import tiny
from spiral_jax.core.config import ConfigError, to_plain
from spiral_jax.export import add_response_template, export, merged_outputs, model_card
from spiral_jax.model import hf
from spiral_jax.model.architecture import read_architecture
from spiral_jax.model.tensor_files import WeightsError, open_tensors
from spiral_jax.model.transformer import ModelConfig
from spiral_jax.model.trees import unstack_layers
from spiral_jax.prompts.tokenizer import load_tokenizer, stop_ids
from spiral_jax.run.start import Trained, find_trained

ROOT = pathlib.Path(__file__).parents[2]
PARITY = 1e-4  # float32 against float32 in another order of sums, logits up to about 3
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
KINDS = {  # family, rank of the adapters (0: all parameters are trained), tied
    "qwen3 lora": ("qwen3", 4, False),
    "llama lora": ("llama", 4, True),
    "llama full": ("llama", 0, False),
    "experts lora": ("qwen3_moe", 4, False),
}
SHARD = 100_000  # bytes: cuts every exported model into several files


@dataclasses.dataclass(frozen=True)
class SmallRun:
    """A run of random weights with checkpoints of steps 3 and 5.

    Attributes:
      c, model: its configuration, and that of its model.
      weights: what it has trained, by step.
      trained: the newest checkpoint, as `export` finds it.
    """

    c: Any
    model: ModelConfig
    weights: dict[int, Any]
    trained: Trained

    @property
    def base(self) -> pathlib.Path:
        return pathlib.Path(self.c.model.hf_path)


def config(path, rank, on_experts=False):
    c = tiny.get_config()
    c.model.update(
        {"hf_path": str(path), "lora_rank": rank, "lora_alpha": 6.0, "param_dtype": "float32"}
    )
    c.model.lora_experts = on_experts
    return c


@pytest.fixture(scope="module")
def checkpoint(qwen3_checkpoint, llama_checkpoint, tmp_path_factory):
    """(family, tied) -> directory of a random model with the bundled tokenizer beside it."""

    def experts_checkpoint(shard, **fields):
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        fields = family_cases.FIELDS | family_cases.CASES["qwen3_moe"] | fields
        model = family_cases.randomise(Qwen3MoeForCausalLM(Qwen3MoeConfig(**fields)))
        directory = tmp_path_factory.mktemp("qwen3_moe")
        model.save_pretrained(directory, max_shard_size=shard)
        return directory, model

    makers = {"qwen3": qwen3_checkpoint, "llama": llama_checkpoint, "qwen3_moe": experts_checkpoint}

    def make(family, tied):
        fields = {"vocab_size": 384, "num_key_value_heads": 3, "tie_word_embeddings": tied}
        directory, _ = makers[family](shard="100KB", **fields)
        for name in TOKENIZER:
            (directory / name).write_bytes((hf.BUNDLED["bundled:tiny"] / name).read_bytes())
        return directory

    return make


@pytest.fixture(scope="module")
def run_of(checkpoint, mesh, tmp_path_factory):
    """(kind) -> its run; each is made once."""

    @functools.cache
    def make(kind):
        family, rank, tied = KINDS[kind]
        c = config(checkpoint(family, tied), rank, on_experts=kind == "experts lora")
        model = hf.model_config(read_architecture(pathlib.Path(c.model.hf_path)), c.model)
        workdir = tmp_path_factory.mktemp("run")
        weights = make_run(workdir, c, model, mesh, steps=(3, 5))
        return SmallRun(c, model, weights, find_trained(workdir, None))

    return make


@pytest.fixture(scope="module")
def merged_of(run_of, tmp_path_factory):
    """(kind) -> directory of its merged model; each is written once."""

    @functools.cache
    def make(kind):
        out = tmp_path_factory.mktemp("merged") / "out"
        files = export(run_of(kind).trained, out, adapter=False, max_shard_bytes=SHARD)
        assert files == sorted(out.glob("*.safetensors"))
        return out

    return make


def our_logits(run, mesh, ids):
    variables = {"params": run.weights[5]}
    if run.model.lora_rank:
        params = hf.load_params(run.base, run.model, mesh)
        variables = {"params": params, "lora": run.weights[5]}
    return np.asarray(on_mesh(forward, mesh, run.model, variables, ids)[1])


def gap(logits, ids, model):
    """Largest difference to the logits of a torch model, in some groups' traces."""
    import torch

    worst = 0.0
    for u, c in ((0, 0), (1, 1), (3, 0)):
        row = np.concatenate([ids.prompt[u, : ids.prompt_len[u]], ids.trace[u, c]])
        theirs = model(torch.tensor(row, dtype=torch.long)[None]).logits[0].detach().numpy()
        ours = rows_of(logits, ids, u, c)
        worst = max(worst, np.abs(theirs[ids.prompt_len[u] - 1 :] - ours).max())
    return worst


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_our_logits_for_the_merged_model(kind, run_of, merged_of, mesh):
    from transformers import AutoModelForCausalLM

    run, out = run_of(kind), merged_of(kind)
    assert run.trained.step == 5
    sizes = [file.stat().st_size for file in out.glob("*.safetensors")]
    assert len(sizes) > 2 and sum(size > 1.2 * SHARD for size in sizes) <= 2  # embedding and head
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    ids = random_ids()
    logits = our_logits(run, mesh, ids)
    assert gap(logits, ids, loaded.eval()) <= PARITY
    if run.model.lora_rank:
        base = AutoModelForCausalLM.from_pretrained(run.base).eval()
        assert gap(logits, ids, base) > 10 * PARITY  # the adapter is there to be seen


def test_transformers_decodes_our_greedy_tokens(run_of, merged_of, mesh):
    """Teacher forced: each token that it generated is our most likely one, given those before."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(merged_of("qwen3 lora")).eval()
    ids = random_ids()
    G = ids.trace.shape[2]
    length = {"min_new_tokens": G, "max_new_tokens": G, "eos_token_id": None}
    for u, n in enumerate(ids.prompt_len):
        prompt = torch.tensor(ids.prompt[u, :n], dtype=torch.long)[None]
        out = loaded.generate(prompt, do_sample=False, **length)
        ids.trace[u, :] = out[0, n:].numpy()
    logits = our_logits(run_of("qwen3 lora"), mesh, ids)
    for u in range(len(ids.prompt)):
        most_likely = rows_of(logits, ids, u, 0)[:G].argmax(axis=-1)
        np.testing.assert_array_equal(most_likely, ids.trace[u, 0])


def test_merging_is_float32_and_rounds_once_to_the_dtype_of_the_base(run_of, mesh, tmp_path):
    run = run_of("qwen3 lora")
    with open_tensors(run.base, "model") as tensors:
        stored = {name: tensors.read(name).astype(ml_dtypes.bfloat16) for name in tensors.names}
    save_file(stored, tmp_path / "model.safetensors")
    with open_tensors(tmp_path, "model") as tensors:
        outputs = merged_outputs(run.trained, tensors, run.model, mesh)
        merged = {output.name: output.read() for output in outputs}
    assert merged.keys() == stored.keys()
    lora = jax.tree.map(lambda a: np.asarray(a, np.float64), run.weights[5])
    layers = [layer["lora"] for layer in unstack_layers({"lora": lora}, run.model.arch.L)]
    for name, array in merged.items():
        assert array.dtype == ml_dtypes.bfloat16
        part = name.split(".")
        if not part[-2].endswith("_proj"):
            np.testing.assert_array_equal(array, stored[name])
            continue
        a, b = (layers[int(part[2])][part[-2].removesuffix("_proj")][side] for side in "ab")
        exact = stored[name].astype(np.float64) + 6.0 / 4 * (a @ b).T
        # half a unit in the last place of bfloat16, and what float32 adds to it
        allowed = np.abs(exact) * 2.0**-8 * 1.001 + 1e-7
        assert (np.abs(array.astype(np.float64) - exact) <= allowed).all(), name


def test_peft_gives_our_logits_for_the_exported_adapter(run_of, mesh, tmp_path):
    from peft import AutoPeftModelForCausalLM

    run, out = run_of("llama lora"), tmp_path / "out"
    files = export(run.trained, out, adapter=True, max_shard_bytes=10**9)
    assert [file.name for file in files] == ["adapter_model.safetensors"]
    ids = random_ids()
    loaded = AutoPeftModelForCausalLM.from_pretrained(out).eval()  # finds its base by itself
    assert gap(our_logits(run, mesh, ids), ids, loaded) <= PARITY


def test_a_model_card_says_how_to_serve_and_aggregate(run_of):
    c = run_of("llama lora").c
    merged, adapter = (
        model_card(run_of("llama lora").trained, "mine", below) for below in ("", "/models/base")
    )
    for card in (merged, adapter):
        assert "step 5" in card and c.model.hf_path in card
        assert "spiral_infer.py --base_url=http://localhost:8000/v1 --model=mine" in card
    assert "vllm serve . --served-model-name=mine" in merged
    assert "transformers serve ." in merged and "transformers serve" not in adapter
    assert c.model.lora_rank == 4  # the least that vLLM takes is 8
    assert "vllm serve /models/base --enable-lora --max-lora-rank=8" in adapter


def test_tokenizer_stop_ids_sampling_and_scaffold_travel_along(run_of, merged_of):
    run, out = run_of("llama full"), merged_of("llama full")
    names = {path.name for path in out.iterdir() if path.suffix != ".safetensors"}
    expected = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    expected |= {*TOKENIZER, "spiral_infer.py", "spiral_scaffold.json", "README.md"}
    assert names == expected

    ours, theirs = load_tokenizer(out), load_tokenizer(run.base)
    turns = [{"role": "user", "content": "12+3"}]
    ours_ids, theirs_ids = (
        tokenizer.apply_chat_template(turns)["input_ids"] for tokenizer in (ours, theirs)
    )
    assert ours_ids == theirs_ids
    assert stop_ids(ours, out) == stop_ids(theirs, run.base)

    generation = json.loads((out / "generation_config.json").read_text())
    sampling = {"do_sample": True, "temperature": 1, "top_p": 1, "top_k": 0}
    assert generation.items() >= sampling.items()
    scaffold = json.loads((out / "spiral_scaffold.json").read_text())
    assert scaffold["prompt"] == to_plain(run.c.prompt)
    assert (scaffold["search"]["traces"], scaffold["aggregation"]["subsets"]) == (8, 4)
    assert scaffold["trained"]["step"] == 5 and "<|end|>" in scaffold["special_tokens"]


@pytest.mark.parametrize("ended", [True, False])
def test_a_chat_server_finds_the_answer_alone(merged_of, ended):
    """By the function that `transformers serve` calls for its chats."""
    from transformers.cli.serving.utils import parse_assistant_message

    tokenizer, answer = load_tokenizer(merged_of("qwen3 lora")), " left:3, \\boxed{38}\n"
    turns = [{"role": "user", "content": "left=4*7+5 right=6*3+8"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    ids += [tokenizer.eos_token_id] * ended
    model = types.SimpleNamespace(config=types.SimpleNamespace(model_type="qwen3"))
    content, thought, calls = parse_assistant_message(tokenizer, model, ids, input_ids=prompt)
    assert content == answer and thought is None and calls is None


def test_what_an_answer_is_is_said_only_where_it_must_be(tmp_path):
    tokenizer, file = chatml_tokenizer(), tmp_path / "tokenizer_config.json"
    scaffolds = {name: scaffold_of(tokenizer, template=name) for name in ("chat", "plain")}
    add_response_template(file, scaffolds["chat"], (1,))
    assert not file.exists()

    def after(fields, scaffold):
        file.write_text(json.dumps(fields))
        add_response_template(file, scaffold, (1,))
        return json.loads(file.read_text())

    assert after({}, scaffolds["chat"]) == {}  # ChatML, which servers know
    other = scaffold_of(
        chatml_tokenizer(template=chatml_tokenizer().chat_template.replace("im_", ""))
    )
    assert after({"a": 1}, other).keys() == {"a", "response_template"}
    assert after({"response_template": {}}, other) == {"response_template": {}}
    assert after({}, scaffolds["plain"]) == {}


def test_an_earlier_step_can_be_exported(run_of, tmp_path):
    run, out = run_of("llama full"), tmp_path / "out"
    earlier = find_trained(run.trained.workdir, 3)
    (file,) = export(earlier, out, adapter=False, max_shard_bytes=10**9)
    assert file.name == "model.safetensors"
    head = load_file(file)["lm_head.weight"].T
    np.testing.assert_array_equal(head, np.asarray(run.weights[3]["head"]))
    assert not np.array_equal(head, np.asarray(run.weights[5]["head"]))


def test_what_cannot_be_exported_is_an_error_that_names_it(run_of, tmp_path):
    trained, out = run_of("llama full").trained, tmp_path / "out"
    with pytest.raises(ConfigError, match="--adapter: .*lora_rank = 0"):
        export(trained, out, adapter=True, max_shard_bytes=10**9)
    assert not out.exists()
    out.mkdir()
    (out / "something").touch()
    with pytest.raises(ConfigError, match=f"--out={out}: .*empty"):
        export(trained, out, adapter=False, max_shard_bytes=10**9)
    assert [path.name for path in out.iterdir()] == ["something"]


def test_a_base_that_has_changed_is_an_error_that_names_the_tensor(run_of, mesh, tmp_path):
    run = run_of("qwen3 lora")
    with open_tensors(run.base, "model") as tensors:
        stored = {name: tensors.read(name) for name in tensors.names if name != "model.norm.weight"}
    save_file(stored, tmp_path / "model.safetensors")
    with open_tensors(tmp_path, "model") as tensors, pytest.raises(WeightsError) as error:
        merged_outputs(run.trained, tensors, run.model, mesh)
    assert "model.norm.weight is missing" in str(error.value)


def test_a_run_beside_a_base_in_int8_is_merged_into_the_weights_that_were_rounded(run_of, mesh):
    run = run_of("qwen3 lora")
    rounded = dataclasses.replace(run.model, param_dtype=np.dtype(np.int8))
    with open_tensors(run.base, "model") as tensors:
        found, expected = (
            {output.name: output.read() for output in merged_outputs(run.trained, tensors, m, mesh)}
            for m in (rounded, run.model)
        )
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_what_was_exported_is_a_base_that_can_be_trained_further(run_of, merged_of, mesh):
    """It is what the run trained, and lies on the devices as any base of its shape does."""
    run, out = run_of("llama lora"), merged_of("llama lora")
    further = config(out, rank=2)
    model = hf.model_config(read_architecture(out), further.model)
    before, base = (hf.load_params(path, model, mesh) for path in (run.base, out))
    for room, adapters in run.weights[5].items():
        for name, adapter in adapters.items():
            a, b = (np.asarray(adapter[side], np.float64) for side in "ab")
            expected = np.asarray(before[room][name]["kernel"]) + 1.5 * a @ b
            np.testing.assert_allclose(base[room][name]["kernel"], expected, rtol=0, atol=1e-6)

    def layout(params):
        return jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), params)

    assert layout(base) == layout(before)


@pytest.mark.cpu_bits("it runs in processes of its own, on CPUs")
@pytest.mark.slow
def test_the_command_writes_once_and_refuses_the_second_time(mesh, tmp_path):
    c = config("bundled:tiny", 4)
    model = hf.model_config(read_architecture(hf.BUNDLED["bundled:tiny"]), c.model)
    make_run(tmp_path / "run", c, model, mesh)
    paths = [f"--workdir={tmp_path / 'run'}", f"--out={tmp_path / 'out'}"]

    def run():
        return subprocess.run(
            [sys.executable, "-m", "spiral_jax.export", *paths],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=300,
        )

    done, again = run(), run()
    assert done.returncode == 0, done.stderr[-2000:]
    assert "step 1: 0.00 GB of weights in 1 files" in done.stdout
    assert again.returncode == 1
    assert "not an empty directory" in again.stderr and "Traceback" not in again.stderr
