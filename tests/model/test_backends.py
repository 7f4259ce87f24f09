"""Which backend computes attention on which devices, and what is said where one cannot."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as private

from configs import qwen3_4b
from spiral_jax.core.config import ConfigError
from spiral_jax.model.attention import backends
from spiral_jax.model.attention.backends import choose_backend, choose_page_backend
from spiral_jax.planning.shipped_models import planned_model

V5P = SimpleNamespace(platform="tpu")
H100 = SimpleNamespace(platform="gpu", compute_capability="9.0")
A100 = SimpleNamespace(platform="gpu", compute_capability="8.0")


@pytest.mark.parametrize(
    ("device", "dtype", "E", "name"),
    [
        (V5P, jnp.bfloat16, 128, "xla"),  # its kernels have not run on a TPU
        (H100, jnp.bfloat16, 128, "gpu"),
        (H100, jnp.bfloat16, 256, "gpu"),
        (A100, jnp.bfloat16, 256, "xla"),  # wider than cuDNN has there
        (H100, jnp.float32, 128, "xla"),
    ],
)
def test_auto_takes_kernels_where_they_serve(device, dtype, E, name):
    assert choose_backend("auto", device, dtype, E) == name


@pytest.mark.parametrize(
    ("asked", "device", "E", "name"),
    [
        ("auto", V5P, 128, "tpu"),
        ("auto", H100, 128, "gpu"),
        ("auto", H100, 80, "xla"),  # no power of 2
        ("xla", V5P, 128, "xla"),
        ("auto", jax.devices("cpu")[0], 128, "xla"),
    ],
)
def test_pages_are_read_by_the_devices_own_kernels(asked, device, E, name, capsys):
    assert choose_page_backend(asked, device, E) == name
    assert ("heads of 80" in capsys.readouterr().out) == (E == 80)


def test_auto_needs_no_accelerator():
    assert choose_backend("auto", jax.devices("cpu")[0], jnp.bfloat16, 128) == "xla"


@pytest.mark.parametrize("device", [V5P, H100])
def test_loops_serve_everywhere(device):
    assert choose_backend("xla", device, jnp.bfloat16, 128) == "xla"


@pytest.mark.parametrize(
    ("asked", "device", "dtype"),
    [
        ("tpu", H100, jnp.bfloat16),
        ("gpu", V5P, jnp.bfloat16),
        ("gpu", H100, jnp.float32),
        ("tpu", V5P, jnp.float32),  # its kernels do not multiply in float32
    ],
)
def test_what_cannot_serve_is_refused_with_what_can(asked, device, dtype):
    with pytest.raises(ConfigError) as caught:
        choose_backend(asked, device, dtype, 128)
    for part in ("config.model.attention", repr(asked), "xla"):
        assert part in str(caught.value)


def test_an_unknown_name_is_refused_with_those_that_can_serve():
    with pytest.raises(ConfigError) as caught:
        choose_backend("cuda", H100, jnp.bfloat16, 128)
    for part in (
        "config.model.attention = 'cuda'",
        "auto, xla, gpu, tpu",
        "it can be auto, xla, gpu.",
    ):
        assert part in str(caught.value)


def test_a_plan_refuses_what_its_devices_do_not_have():
    c = qwen3_4b.get_config()
    c.model.attention = "gpu"
    with pytest.raises(ConfigError, match="config.model.attention = 'gpu'.*auto, xla, tpu"):
        planned_model(c.model, [V5P])
    assert planned_model(c.model, [H100])[0].attention == "gpu"


def test_a_head_size_that_cudnn_refuses_falls_back_with_one_line(capsys):
    backends._say_once.cache_clear()
    for _ in range(2):
        assert choose_backend("auto", A100, jnp.bfloat16, 256) == "xla"
    (line,) = capsys.readouterr().out.splitlines()
    for part in ("xla and not by gpu", "256", "128", "8.0"):
        assert part in line
    with pytest.raises(ConfigError, match="head sizes .* not 100.* auto, xla"):
        choose_backend("gpu", H100, jnp.bfloat16, 100)


def test_a_gpu_without_cudnn_attends_by_xla_and_a_plan_for_one_needs_none(monkeypatch):
    def not_found():
        raise RuntimeError("cuDNN is not detected.\nmore")

    monkeypatch.setattr(private, "check_cudnn_version", not_found)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert choose_backend("auto", H100, jnp.bfloat16, 128) == "gpu"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert choose_backend("auto", H100, jnp.bfloat16, 128) == "xla"
    with pytest.raises(ConfigError, match=r"\[gpu\]") as caught:
        choose_backend("gpu", H100, jnp.bfloat16, 128)
    assert "cuDNN is not detected." in str(caught.value) and "\n" not in str(caught.value)
