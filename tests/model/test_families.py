"""Every family against transformers, PEFT and torch: files, logits, gradients, greedy tokens.

Checkpoints are random, small and have every field off its default; qwen3 and llama without scaled
rope are in test_parity.py too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks import family_cases as cases
from spiral_jax.core import mesh as meshes
from spiral_jax.model import hf
from spiral_jax.model.adapter import save_adapter
from spiral_jax.model.architecture import read_architecture
from spiral_jax.model.families import FAMILIES, Routing

LOGITS = 1e-4  # float32 against float32 in another order of sums, logits up to about 4
GRADIENT = 1e-4  # relative; sums over 60 tokens of products of such
TIE = 1e-4  # two best logits nearer than this may change places


# What experts do depends on the mesh.
ON_MESHES = {"qwen3_moe": pytest.mark.devices8}
# Dense qwen3 is what most other tests of the model and of the engine run.
PARAMS = [
    pytest.param(name, marks=ON_MESHES.get(name, ())) for name in cases.CASES if name != "qwen3"
]


@pytest.fixture(scope="module", params=PARAMS)
def case(request, tmp_path_factory):
    return cases.make_case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def expected(case):
    return cases.of_torch(case)


@pytest.fixture(scope="module")
def variables(case, mesh):
    return case.variables(mesh)


def test_every_family_has_a_case():
    assert cases.CASES.keys() == FAMILIES.keys()


def test_logits_and_gradients_are_those_of_torch(case, expected, variables, mesh):
    found = cases.of_ours(case.config, variables, mesh)
    assert cases.logit_gap(found.logits, expected) <= LOGITS
    gaps = cases.gradient_gaps(found, expected)
    assert max(gaps.values()) <= GRADIENT, sorted(gaps.items(), key=lambda item: -item[1])[:5]


def test_greedy_tokens_of_the_engine_are_those_of_torch(case, variables, mesh):
    tokens = cases.greedy(case.config, variables, mesh)
    assert len({tuple(row) for row in tokens}) == cases.U
    assert all(behind <= TIE for behind in cases.not_greedy(case, tokens))


def test_what_we_write_transformers_and_peft_read(case, variables, tmp_path):
    hf.save_params(tmp_path, variables["params"], case.config, (5, 6))
    assert read_architecture(tmp_path) == case.config.arch
    (tmp_path / "adapter").mkdir()
    save_adapter(tmp_path / "adapter", variables["lora"], case.config, str(tmp_path))
    files = ["model.safetensors"]
    if not case.config.lora_experts:  # PEFT has other tensors of these
        files.append("adapter/adapter_model.safetensors")
    for file in files:
        saved, source = load_file(tmp_path / file), load_file(case.directory / file)
        assert saved.keys() == source.keys()
        assert all((saved[name] == source[name]).all() for name in source)

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    row = torch.arange(20)[None]
    with torch.no_grad():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(path, pad_token_id=None).eval()
            for path in (tmp_path, case.directory)
        )
        np.testing.assert_array_equal(ours(row).logits.numpy(), theirs(row).logits.numpy())
        adapted = PeftModel.from_pretrained(ours, tmp_path / "adapter").eval()
        np.testing.assert_array_equal(
            adapted(row).logits.numpy(), case.model(row).logits.detach().numpy()
        )


# What would go unnoticed if parity did not see it


def of_leaf(name, change):
    """Changes a leaf of the stacked layers and of the last one."""

    def changed(variables):
        params = dict(variables["params"])
        for room in ("layers", "last_layer"):
            params[room] = jax.tree_util.tree_map_with_path(
                lambda at, leaf: change(leaf) if meshes.path_name(at) == name else leaf,
                params[room],
            )
        return variables | {"params": params}

    return changed


# family -> name -> other fields of the architecture; rope's own fields are in test_rope.py, and the
# norm of queries and keys is in test_parity.py
FIELDS = {
    "qwen2": {"biases": {"family": {"biases": ()}}},
    "llama": {"rope_scaling": {"rope_scaling": None}},
    "smollm3": {
        "rope in a stacked layer": {"unrotated": (2,)},
        "rope in the last layer": {"unrotated": (1,)},
    },
    "qwen3_moe": {"normalised": {"routing": Routing(5, 2, False)}},
}
# family -> name -> change of the arrays
ARRAYS = {
    "qwen2": {f"no bias of {name}": of_leaf(f"{name}/bias", jnp.zeros_like) for name in "qkv"},
    "qwen3_moe": {"other experts": of_leaf("experts/router", lambda leaf: leaf[..., ::-1])},
}
_logits = jax.jit(cases.logits_of, static_argnums=0)


def test_with_any_field_of_the_row_changed_logits_are_others(case, expected, variables, mesh):
    logits = {}
    for name, fields in FIELDS.get(case.model_type, {}).items():
        with jax.set_mesh(mesh):
            ids = jax.device_put(cases.random_ids()[0], meshes.group_sharding(mesh))
            logits[name] = _logits(cases.with_arch(case.config, **fields), variables, ids)
    for name, change in ARRAYS.get(case.model_type, {}).items():
        logits[name] = cases.of_ours(case.config, change(variables), mesh).logits
    gaps = {name: cases.logit_gap(np.asarray(found), expected) for name, found in logits.items()}
    assert all(gap > 10 * LOGITS for gap in gaps.values()), gaps
