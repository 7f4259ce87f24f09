"""Which backend computes attention on which devices."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from spiral_jax.core.config import ConfigError
from spiral_jax.model.attention.backends import choose_backend

V5P = SimpleNamespace(platform="tpu")
H100 = SimpleNamespace(platform="gpu", compute_capability="9.0")
A100 = SimpleNamespace(platform="gpu", compute_capability="8.0")


@pytest.mark.parametrize(
    ("device", "dtype", "E", "name"),
    [
        (V5P, jnp.bfloat16, 128, "tpu"),
        (V5P, jnp.float32, 128, "xla"),  # its kernels do not multiply in float32
        (H100, jnp.bfloat16, 128, "gpu"),
        (H100, jnp.bfloat16, 256, "gpu"),
        (A100, jnp.bfloat16, 256, "xla"),  # wider than cuDNN has there
        (H100, jnp.float32, 128, "xla"),
    ],
)
def test_auto_takes_kernels_where_they_serve(device, dtype, E, name):
    assert choose_backend("auto", device, dtype, E) == name


def test_auto_needs_no_accelerator():
    assert choose_backend("auto", jax.devices("cpu")[0], jnp.bfloat16, 128) == "xla"


@pytest.mark.parametrize("device", [V5P, H100])
def test_loops_serve_everywhere(device):
    assert choose_backend("xla", device, jnp.bfloat16, 128) == "xla"


@pytest.mark.parametrize(
    ("asked", "device", "dtype"),
    [("tpu", H100, jnp.bfloat16), ("gpu", V5P, jnp.bfloat16), ("gpu", H100, jnp.float32)],
)
def test_what_cannot_serve_is_refused_with_what_can(asked, device, dtype):
    with pytest.raises(ConfigError) as caught:
        choose_backend(asked, device, dtype, 128)
    for part in ("config.model.attention", repr(asked), "xla"):
        assert part in str(caught.value)
