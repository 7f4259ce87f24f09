"""Frequencies of every scaling against transformers', and what of a config.json is refused."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from spiral_jax.core.config import ConfigError
from spiral_jax.model.rope import Yarn, read_rope, rope, rope_fields

E, THETA = 32, 5000.0
# Every field off its default, and such that its ramp begins and ends inside the 16 pairs.
SCALED = {
    "linear": {"rope_type": "linear", "factor": 2.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 6.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 9.0,
        "original_max_position_embeddings": 700,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 3.0,
        "original_max_position_embeddings": 900,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "attention_factor": 1.7,
        "truncate": False,
    },
    "yarn by mscale": {
        "rope_type": "yarn",
        "factor": 3.0,
        "original_max_position_embeddings": 900,
        "mscale": 0.9,
        "mscale_all_dim": 0.4,
    },
    "yarn by its defaults": {"rope_type": "yarn", "factor": 3.0},
}
CLOSE = 1e-5  # of a frequency: float32 powers and logarithms of another library


def of_transformers(fields, max_positions=640):
    """(frequencies [E / 2], factor of cosines and sines)."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        head_dim=E,
        max_position_embeddings=max_positions,
        rope_parameters=fields | {"rope_theta": THETA},
    )
    frequency, factor = ROPE_INIT_FUNCTIONS[fields["rope_type"]](config, "cpu")
    return frequency.numpy(), factor


def read(fields, **others):
    others = {"max_position_embeddings": 640} | others
    return read_rope({"rope_theta": THETA, "rope_scaling": fields} | others, "here", None)[1]


def gap(scaling, fields):
    """Largest relative difference of frequencies, or of the factor of cosines and sines."""
    plain = jnp.asarray(THETA ** (-np.arange(E // 2) / (E // 2)), jnp.float32)
    frequency, factor = of_transformers(fields)
    found = np.asarray(scaling.scaled(plain, THETA))
    return max(np.abs(found / frequency - 1).max(), abs(scaling.attention_factor / factor - 1))


@pytest.mark.parametrize("name", SCALED)
def test_frequencies_are_those_of_transformers(name):
    assert gap(read(SCALED[name]), SCALED[name]) <= CLOSE


@pytest.mark.parametrize("name", ["llama3", "yarn"])
def test_the_trained_length_may_stand_at_the_top_of_the_file(name):
    """As transformers 5 takes it; without it the frequencies were those of 640 positions."""
    fields = dict(SCALED[name])
    length = fields.pop("original_max_position_embeddings")
    assert gap(read(fields, original_max_position_embeddings=length), SCALED[name]) <= CLOSE
    assert gap(read(fields), SCALED[name]) > CLOSE
    both = {"original_max_position_embeddings": length}
    assert gap(read(fields | both, **both), SCALED[name]) <= CLOSE
    with pytest.raises(ConfigError, match="original_max_position_embeddings.*contradicts"):
        read(fields | both, original_max_position_embeddings=length + 1)


@pytest.mark.parametrize(
    "name, field",
    [(name, field) for name in ("linear", "llama3", "yarn") for field in SCALED[name]],
)
def test_with_any_field_changed_they_are_others(name, field):
    scaling = read(SCALED[name])
    if field == "rope_type":
        other = read(SCALED["llama3" if name == "linear" else "linear"])
    else:
        value = getattr(scaling, field)
        other = not value if isinstance(value, bool) else type(value)(value * 2)
        other = dataclasses.replace(scaling, **{field: other})
    assert gap(other, SCALED[name]) > 100 * CLOSE


@pytest.mark.parametrize("name", SCALED)
def test_what_we_write_is_read_back_and_understood_by_transformers(name):
    scaling = read(SCALED[name])
    written = json.loads(json.dumps(rope_fields(THETA, scaling)))
    assert read_rope(written, "here", None) == (THETA, scaling)
    assert gap(scaling, written["rope_scaling"]) <= CLOSE


def test_rope_turns_halves_by_the_scaled_angles_and_stretches_them():
    scaling = Yarn(3.0, 900, 1.7, 20.0, 2.0, False)
    x = np.random.default_rng(0).normal(size=(4, 2, E)).astype(np.float32)
    position = np.array([0, 1, 7, 500], np.int32)
    frequency, factor = of_transformers(SCALED["yarn"])
    angle = position[:, None, None].astype(np.float64) * frequency
    turned = (x[..., : E // 2] + 1j * x[..., E // 2 :]) * np.exp(1j * angle) * factor
    found = np.asarray(rope(jnp.asarray(x), jnp.asarray(position), THETA, scaling))
    # at position 500 an angle is rounded by 3e-5
    np.testing.assert_allclose(found[..., : E // 2], turned.real, rtol=0, atol=3e-4)
    np.testing.assert_allclose(found[..., E // 2 :], turned.imag, rtol=0, atol=3e-4)


def test_both_spellings_are_one_scaling_and_nulls_say_nothing():
    scaling = read(SCALED["llama3"])
    new = {"rope_parameters": SCALED["llama3"] | {"rope_theta": THETA, "attention_factor": None}}
    assert read_rope(new, "here", None) == (THETA, scaling)
    old = dict(SCALED["llama3"])
    old["type"] = old.pop("rope_type")
    assert read(old) == scaling
    assert read({"rope_type": "default"}) is None


BAD = [
    ({"rope_type": "dynamic", "factor": 2.0}, "rope_type = 'dynamic'.*default, linear, llama3, ya"),
    ({"rope_type": "longrope"}, "rope_type = 'longrope'"),
    ({"rope_type": ["yarn"]}, "rope_type = .*is not supported"),
    ({"factor": 2.0}, "factor = 2.0 is not supported with rope_type 'default'"),
    (SCALED["linear"] | {"low_freq_factor": 1.0}, "low_freq_factor = 1.0.*'linear'"),
    ({"rope_type": "linear"}, "factor is missing"),
    (SCALED["linear"] | {"factor": -1}, "factor = -1: must be a positive number"),
    (SCALED["linear"] | {"factor": "2"}, "factor = '2'"),
    (SCALED["linear"] | {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    (SCALED["llama3"] | {"high_freq_factor": 1.0}, "high_freq_factor = 1.0.*low_freq_factor = 1.5"),
    (SCALED["yarn"] | {"beta_slow": 30}, "beta_fast = 20.0.*beta_slow = 30.0"),
    (SCALED["yarn"] | {"truncate": 1}, "truncate = 1: must be true or false"),
    (
        SCALED["yarn"] | {"original_max_position_embeddings": 0.5},
        "original_max_position_embeddings",
    ),
    ([2.0], "rope_scaling = .*must be an object"),
]


@pytest.mark.parametrize("fields, message", BAD)
def test_what_is_not_supported_is_an_error_that_names_it(fields, message):
    with pytest.raises(ConfigError, match=f"here: .*{message}"):
        read(fields)


def test_two_spellings_that_disagree_are_an_error_with_both_values():
    with pytest.raises(ConfigError, match="rope_scaling.factor = 2.5 contradicts 3.0"):
        read(SCALED["linear"], rope_parameters={"rope_type": "linear", "factor": 3.0})
