"""What is said of a step's speed, against arithmetic by hand."""

import dataclasses
import types

import jax
import pytest
from small_steps import ARCH, blocks_of, both_roles

from spiral_jax.core.groups import Role
from spiral_jax.core.metrics import divide
from spiral_jax.learner.blocks import padding
from spiral_jax.model.flops import train_flops
from spiral_jax.model.transformer import ModelConfig
from spiral_jax.run.telemetry import StepProfile, memory_metrics, sampling_metrics, update_metrics

LORA = ModelConfig(ARCH, lora_rank=4)


@dataclasses.dataclass
class Device:
    device_kind: str
    peak: int | None = None

    def memory_stats(self):
        return None if self.peak is None else {"peak_bytes_in_use": self.peak}


def devices(monkeypatch, *fakes):
    monkeypatch.setattr(jax, "devices", lambda: list(fakes))
    monkeypatch.setattr(jax, "local_devices", lambda: list(fakes))


def test_mfu_is_what_the_groups_need_over_what_the_devices_could(monkeypatch):
    devices(monkeypatch, Device("TPU v5 lite"), Device("TPU v5 lite"))
    trained = [groups for groups, _ in both_roles().values()]
    metrics = update_metrics(LORA, trained, seconds=0.5)
    tokens = sum(int(groups.trace_len_UxC.sum()) for groups in trained)
    assert metrics["tokens_per_s/update"] == tokens / 0.5
    assert metrics["tokens_per_s/update_device"] == tokens
    needed = sum(
        train_flops(ARCH, 4, None, g.requests.prompt_len_U, g.trace_len_UxC) for g in trained
    )
    assert metrics["mfu"] == pytest.approx(needed / (0.5 * 2 * 197e12))
    assert metrics["tflop/update"] == pytest.approx(needed / 1e12)


def test_sampling_multiplies_each_token_with_every_weight_and_drawn_ones_with_the_head():
    counted = {"sampling/prefilled_tokens": 30.0, "sampling/generated_tokens": 7.0}
    D, F, heads, kv = ARCH.D, ARCH.F, ARCH.H * ARCH.E, ARCH.J * ARCH.E
    shapes = [(D, heads), (D, kv), (D, kv), (heads, D), (D, F), (D, F), (F, D)]
    weights = sum(a * b + LORA.lora_rank * (a + b) for a, b in shapes)
    operations = 2 * (37 * ARCH.L * weights + 7 * D * ARCH.V)
    assert sampling_metrics(LORA, counted)["tflop/sampling"] == pytest.approx(operations / 1e12)


def test_what_is_not_known_is_not_reported(monkeypatch):
    devices(monkeypatch, Device("cpu"))
    assert "mfu" not in update_metrics(LORA, [both_roles()[Role.SEARCH][0]], 1.0)
    assert memory_metrics() == {}
    devices(monkeypatch, Device("TPU v4", 5), Device("TPU v4", 7))
    assert memory_metrics() == {"memory/device_peak": 7.0}


def test_padding_is_the_share_of_rows_without_a_token():
    roles, lengths = both_roles(), ((6, 5), (6, 8))
    metrics = divide(padding(blocks_of(roles, micro=3, lengths=lengths)))
    for role, (groups, _) in roles.items():
        is_long = groups.trace_len_UxC.max(axis=1) > 5
        rows = 0
        for (P, G), count in zip(lengths, (int((~is_long).sum()), int(is_long.sum())), strict=True):
            filled = -(-count // 3) * 3  # whole micro-batches
            rows += filled * (P + groups.requests.traces * G)
        real = groups.requests.prompt_len_U.sum() + groups.trace_len_UxC.sum()
        assert metrics[f"padding/{role.label}"] == pytest.approx(1 - real / rows)


@pytest.mark.parametrize(
    ("chosen", "first", "expected"),
    [
        ((), 0, []),
        ((1, 3), 0, ["start 1", "stop 3"]),
        ((0, 9), 0, ["start 0", "stop end"]),
        ((1, 3), 2, ["start 2", "stop 3"]),  # resumed inside
    ],
)
def test_the_profiler_runs_from_the_first_chosen_step_to_the_last(
    monkeypatch, tmp_path, chosen, first, expected
):
    seen, now = [], types.SimpleNamespace(step="end")
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: seen.append(f"start {now.step}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append(f"stop {now.step}"))
    with StepProfile(chosen, tmp_path) as profile:
        for now.step in range(first, 5):
            profile.begin(now.step)
        now.step = "end"
    assert seen == expected
