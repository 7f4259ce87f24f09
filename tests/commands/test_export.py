"""Exported runs: transformers and PEFT give our logits and tokens, and what is exported can be
trained further.
"""

import json
import os
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_model import forward, on_mesh, random_ids, rows_of
from small_runs import make_run
from small_steps import QUICK, blocks_of, place, search_alone

from configs import tiny
from spiral_jax.core.config import ConfigError, to_plain
from spiral_jax.core.metrics import divide
from spiral_jax.export import export, merged_outputs
from spiral_jax.learner.step import init_state, make_train_step
from spiral_jax.model import hf
from spiral_jax.model.architecture import read_architecture
from spiral_jax.model.tensor_files import WeightsError, open_tensors
from spiral_jax.prompts.tokenizer import load_tokenizer, stop_ids
from spiral_jax.run.start import find_trained

ROOT = pathlib.Path(__file__).parents[2]
PARITY = 1e-4  # float32 against float32 in another order of sums, logits up to about 3
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
KINDS = {
    "qwen3 lora": ("qwen3", 4, False),
    "llama lora": ("llama", 4, True),
    "llama full": ("llama", 0, False),
}


def with_tokenizer(directory):
    """The bundled tokenizer beside a random model of at least as many ids."""
    for name in TOKENIZER:
        (directory / name).write_bytes((hf.BUNDLED["bundled:tiny"] / name).read_bytes())
    return directory


@pytest.fixture
def checkpoint(qwen3_checkpoint, llama_checkpoint):
    """(family, tied) -> directory of a random model with a tokenizer."""
    makers = {"qwen3": qwen3_checkpoint, "llama": llama_checkpoint}
    return lambda family, tied: with_tokenizer(
        makers[family](
            shard="100KB", vocab_size=384, num_key_value_heads=3, tie_word_embeddings=tied
        )[0]
    )


def config(path, rank):
    c = tiny.get_config()
    c.model.update(
        {"hf_path": str(path), "lora_rank": rank, "lora_alpha": 6.0, "param_dtype": "float32"}
    )
    return c


@pytest.fixture
def run_of(checkpoint, mesh, tmp_path):
    """(kind) -> (config, model, trained weights, the run as `export` finds it)."""

    def make(kind):
        family, rank, tied = KINDS[kind]
        c = config(checkpoint(family, tied), rank)
        model = hf.model_config(read_architecture(pathlib.Path(c.model.hf_path)), c.model)
        trained = make_run(tmp_path / "run", c, model, mesh, steps=(3, 5))
        return c, model, trained[5], find_trained(tmp_path / "run", None)

    return make


def our_logits(c, model, trained, mesh, ids):
    variables = {"params": trained}
    if model.lora_rank:
        variables = {
            "params": hf.load_params(pathlib.Path(c.model.hf_path), model, mesh),
            "lora": trained,
        }
    return np.asarray(on_mesh(forward, mesh, model, variables, ids)[1])


def gap(logits, ids, model):
    """Largest difference to the logits of a torch model, from the prompt's last token on, in some
    groups.
    """
    import torch

    worst = 0.0
    for u, c in ((0, 0), (1, 1), (3, 0)):
        row = np.concatenate([ids.prompt[u, : ids.prompt_len[u]], ids.trace[u, c]])
        theirs = model(torch.tensor(row, dtype=torch.long)[None]).logits[0].detach().numpy()
        worst = max(
            worst, np.abs(theirs[ids.prompt_len[u] - 1 :] - rows_of(logits, ids, u, c)).max()
        )
    return worst


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_our_logits_for_the_merged_model(run_of, mesh, tmp_path, kind):
    from transformers import AutoModelForCausalLM

    c, model, trained, found = run_of(kind)
    assert found.step == 5
    files = export(found, tmp_path / "out", adapter=False, max_shard_bytes=100_000)
    assert (
        len(files) > 2 and sum(file.stat().st_size > 120_000 for file in files) <= 2
    )  # embedding and head
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    ids = random_ids()
    logits = our_logits(c, model, trained, mesh, ids)
    assert gap(logits, ids, loaded.eval()) <= PARITY
    if model.lora_rank:
        base = AutoModelForCausalLM.from_pretrained(c.model.hf_path).eval()
        assert gap(logits, ids, base) > 10 * PARITY  # the adapter is there to be seen


def test_transformers_decodes_our_greedy_tokens(run_of, mesh, tmp_path):
    """Teacher forced: each token that it generated is our most likely one, given those before it."""
    import torch
    from transformers import AutoModelForCausalLM

    c, model, trained, found = run_of("qwen3 lora")
    export(found, tmp_path / "out", adapter=False, max_shard_bytes=10**9)
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), random_ids()
    G = ids.trace.shape[2]
    for u, n in enumerate(ids.prompt_len):
        prompt = torch.tensor(ids.prompt[u, :n], dtype=torch.long)[None]
        out = loaded.generate(
            prompt, do_sample=False, min_new_tokens=G, max_new_tokens=G, eos_token_id=None
        )
        ids.trace[u, :] = out[0, n:].numpy()
    logits = our_logits(c, model, trained, mesh, ids)
    for u in range(len(ids.prompt)):
        np.testing.assert_array_equal(
            rows_of(logits, ids, u, 0)[:G].argmax(axis=-1), ids.trace[u, 0]
        )


def test_merging_is_float32_and_rounds_once_to_the_dtype_of_the_base(run_of, mesh, tmp_path):
    c, model, trained, found = run_of("qwen3 lora")
    base, narrow = pathlib.Path(c.model.hf_path), tmp_path / "narrow"
    narrow.mkdir()
    with open_tensors(base, "model") as tensors:
        stored = {name: tensors.read(name).astype(ml_dtypes.bfloat16) for name in tensors.names}
    save_file(stored, narrow / "model.safetensors")
    with open_tensors(narrow, "model") as tensors:
        merged = {
            output.name: output.read() for output in merged_outputs(found, tensors, model, mesh)
        }
    assert merged.keys() == stored.keys()
    lora = jax.tree.map(lambda a: np.asarray(a, np.float64), trained["layers"])
    for name, array in merged.items():
        assert array.dtype == ml_dtypes.bfloat16
        part = name.split(".")
        if not part[-2].endswith("_proj"):
            np.testing.assert_array_equal(array, stored[name])
            continue
        a, b = (lora[part[-2].removesuffix("_proj")][side][int(part[2])] for side in "ab")
        exact = stored[name].astype(np.float64) + 6.0 / 4 * (a @ b).T
        # half a unit in the last place of bfloat16, and what float32 adds to it
        assert (
            np.abs(array.astype(np.float64) - exact) <= np.abs(exact) * 2.0**-8 * 1.001 + 1e-7
        ).all(), name


def test_peft_gives_our_logits_for_the_exported_adapter(run_of, mesh, tmp_path):
    from peft import AutoPeftModelForCausalLM

    c, model, trained, found = run_of("llama lora")
    files = export(found, tmp_path / "out", adapter=True, max_shard_bytes=10**9)
    assert [file.name for file in files] == ["adapter_model.safetensors"]
    ids = random_ids()
    loaded = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "out"
    ).eval()  # finds its base by itself
    assert gap(our_logits(c, model, trained, mesh, ids), ids, loaded) <= PARITY


def test_tokenizer_stop_ids_sampling_and_scaffold_travel_along(run_of, tmp_path):
    c, _, _, found = run_of("llama full")
    out = tmp_path / "out"
    export(found, out, adapter=False, max_shard_bytes=10**9)
    names = {path.name for path in out.iterdir()}
    assert names == {*TOKENIZER, "config.json", "generation_config.json", "model.safetensors", "spiral_infer.py",
                     "spiral_scaffold.json"}  # fmt: skip
    ours, theirs = load_tokenizer(out), load_tokenizer(c.model.hf_path)
    turns = [{"role": "user", "content": "12+3"}]
    assert (
        ours.apply_chat_template(turns)["input_ids"]
        == theirs.apply_chat_template(turns)["input_ids"]
    )
    assert stop_ids(ours, out) == stop_ids(theirs, c.model.hf_path)
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["do_sample"] and [
        generation[name] for name in ("temperature", "top_p", "top_k")
    ] == [1, 1, 0]
    scaffold = json.loads((out / "spiral_scaffold.json").read_text())
    assert scaffold["prompt"] == to_plain(c.prompt)
    assert (scaffold["search"]["traces"], scaffold["aggregation"]["subsets"]) == (8, 4)
    assert scaffold["trained"]["step"] == 5 and "<|end|>" in scaffold["special_tokens"]


def test_an_earlier_step_can_be_exported(run_of, mesh, tmp_path):
    _, model, _, found = run_of("llama full")
    export(find_trained(found.workdir, 3), tmp_path / "out", adapter=False, max_shard_bytes=10**9)
    expected = make_run(tmp_path / "again", found.c, model, mesh, steps=(3,))[3]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(stored["lm_head.weight"].T, np.asarray(expected["head"]))


def test_what_cannot_be_exported_is_an_error_that_names_it(run_of, tmp_path):
    _, _, _, found = run_of("llama full")
    full = tmp_path / "out"
    with pytest.raises(ConfigError, match="--adapter: .*lora_rank = 0"):
        export(found, full, adapter=True, max_shard_bytes=10**9)
    assert not full.exists()
    full.mkdir()
    (full / "something").touch()
    with pytest.raises(ConfigError, match=f"--out={full}: not an empty directory"):
        export(found, full, adapter=False, max_shard_bytes=10**9)
    assert [path.name for path in full.iterdir()] == ["something"]


def test_a_base_that_has_changed_is_an_error_that_names_the_tensor(run_of, mesh, tmp_path):
    c, model, _, found = run_of("qwen3 lora")
    with open_tensors(pathlib.Path(c.model.hf_path), "model") as tensors:
        stored = {name: tensors.read(name) for name in tensors.names if name != "model.norm.weight"}
    save_file(stored, tmp_path / "model.safetensors")
    with (
        open_tensors(tmp_path, "model") as tensors,
        pytest.raises(WeightsError, match="model.norm.weight is missing"),
    ):
        merged_outputs(found, tensors, model, mesh)


def test_what_was_exported_is_trained_further(run_of, mesh, tmp_path):
    """One step on the merged model as the frozen base of fresh adapters."""
    c, _, trained, found = run_of("llama lora")
    export(found, tmp_path / "out", adapter=False, max_shard_bytes=100_000)
    further = config(tmp_path / "out", 2)
    model = hf.model_config(read_architecture(tmp_path / "out"), further.model)
    base = hf.load_params(tmp_path / "out", model, mesh)
    a, b = (np.asarray(trained["layers"]["q"][side], np.float64) for side in "ab")
    before = hf.load_params(pathlib.Path(c.model.hf_path), model, mesh)["layers"]["q"]["kernel"]
    np.testing.assert_allclose(
        base["layers"]["q"]["kernel"], before + 1.5 * a @ b, rtol=0, atol=1e-6
    )
    frozen, state = init_state(further, model, base, mesh)
    step = jax.jit(make_train_step(further, model), compiler_options=QUICK)
    with jax.set_mesh(mesh):
        after, metrics = step(state, frozen, place(blocks_of(search_alone()), mesh))
    assert int(after.step) == 1 and divide(jax.device_get(metrics))["grad_norm"] > 0
    assert not np.array_equal(after.trained["layers"]["q"]["b"], state.trained["layers"]["q"]["b"])


@pytest.mark.slow
def test_the_command_writes_once_and_refuses_the_second_time(mesh, tmp_path):
    c = config("bundled:tiny", 4)
    model = hf.model_config(read_architecture(hf.BUNDLED["bundled:tiny"]), c.model)
    make_run(tmp_path / "run", c, model, mesh)
    words = [
        sys.executable,
        "-m",
        "spiral_jax.export",
        f"--workdir={tmp_path / 'run'}",
        f"--out={tmp_path / 'out'}",
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = lambda: subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )  # noqa: E731
    done, again = run(), run()
    assert done.returncode == 0 and "step 1: 0.00 GB of weights in 1 files" in done.stdout, (
        done.stderr[-2000:]
    )
    assert (
        again.returncode == 1
        and "not an empty directory" in again.stderr
        and "Traceback" not in again.stderr
    )
