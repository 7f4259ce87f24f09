"""What is said of a step's speed, against arithmetic by hand."""

import dataclasses
import types

import jax
import pytest
from small_steps import ARCH, blocks_of, both_roles

from spiral_jax.core.config import defaults
from spiral_jax.core.groups import Role
from spiral_jax.core.metrics import divide
from spiral_jax.learner.blocks import padding
from spiral_jax.model.flops import train_flops
from spiral_jax.run import telemetry
from spiral_jax.run.telemetry import StepProfile, memory_metrics, update_metrics


@dataclasses.dataclass
class Device:
    device_kind: str
    peak: int | None = None

    def memory_stats(self):
        return None if self.peak is None else {"peak_bytes_in_use": self.peak}


def devices(monkeypatch, *fakes):
    monkeypatch.setattr(telemetry.jax, "devices", lambda: list(fakes))
    monkeypatch.setattr(telemetry.jax, "local_devices", lambda: list(fakes))


def test_mfu_is_what_the_groups_need_over_what_the_devices_could(monkeypatch):
    devices(monkeypatch, Device("TPU v5 lite"), Device("TPU v5 lite"))
    trained = [groups for groups, _ in both_roles().values()]
    found = update_metrics(ARCH, 4, trained, seconds=0.5)
    tokens = sum(int(groups.trace_len_UxC.sum()) for groups in trained)
    assert (
        found["tokens_per_s/update"] == tokens / 0.5
        and found["tokens_per_s/update_device"] == tokens
    )
    needed = sum(
        train_flops(ARCH, 4, None, g.requests.prompt_len_U, g.trace_len_UxC) for g in trained
    )
    assert found["mfu"] == pytest.approx(needed / (0.5 * 2 * 197e12))


def test_what_is_not_known_is_not_reported(monkeypatch):
    devices(monkeypatch, Device("cpu"))
    assert "mfu" not in update_metrics(ARCH, 4, [both_roles()[Role.SEARCH][0]], 1.0)
    assert memory_metrics() == {}
    devices(monkeypatch, Device("TPU v4", 5), Device("TPU v4", 7))
    assert memory_metrics() == {"memory/device_peak": 7.0}


def test_padding_is_the_share_of_rows_without_a_token():
    material = both_roles()
    found = divide(padding(blocks_of(material, micro=3, lengths=((6, 5), (6, 8)))))
    for role, (groups, _) in material.items():
        wide = groups.trace_len_UxC.max(axis=1) > 5
        C = groups.requests.traces
        rows = sum(
            -(-n // 3) * 3 * (6 + C * G) for n, G in ((int((~wide).sum()), 5), (int(wide.sum()), 8))
        )
        real = groups.requests.prompt_len_U.sum() + groups.trace_len_UxC.sum()
        assert found[f"padding/{role.label}"] == pytest.approx(1 - real / rows)


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
    c, seen, now = defaults(), [], types.SimpleNamespace(step="end")
    c.profile.steps = chosen
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: seen.append(f"start {now.step}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append(f"stop {now.step}"))
    with StepProfile(c, tmp_path) as profile:
        for now.step in range(first, 5):
            profile.at(now.step)
        now.step = "end"
    assert seen == expected
