"""A mixture of experts from a checkpoint through a run to its exports, by the benchmark's parts."""

import json

import pytest

from benchmarks import experts_run


@pytest.mark.slow
def test_experts_are_loaded_sampled_trained_exported_and_read_again(tmp_path):
    fields = json.loads(experts_run.FIELDS.read_text()) | {
        "vocab_size": 300,
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 16,
        "num_experts_per_tok": 4,
    }
    facts = {part: experts_run.measure(part, tmp_path, fields) for part in experts_run.PARTS}
    assert facts["run"]["grad_norm"] > 0
    # bfloat16: 8 bits of logits of order 1, in sampling and training, and of merged weights
    assert facts["run"]["mismatch/max_abs_log_ratio"] < 0.03
    reading = facts["reading"]
    assert reading["adapter_gap"] == 0
    assert reading["merged_gap"]["largest"] < 0.03
    # without the adapter the merged model would be as far off as training has moved it
    assert reading["moved"]["mean"] > 10 * reading["merged_gap"]["mean"]
