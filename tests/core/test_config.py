"""Configurations: locked, typed, compared by value, and read from runs of earlier versions."""

import copy

import pytest
from ml_collections import ConfigDict

from configs import tiny
from spiral_jax.core.config import (
    ConfigError,
    as_current,
    difference,
    digest,
    digest_of,
    from_plain,
    require_whole,
    to_plain,
)


def test_an_unknown_field_is_an_error_that_names_the_nearest_one():
    c = tiny.get_config()
    with pytest.raises(AttributeError, match="learning_rate"):
        c.optimizer.learning_rate = 1.0
    with pytest.raises(AttributeError, match='Did you mean "subsets"'):
        c.aggregation.subset = 3


def test_a_value_of_another_type_is_an_error():
    with pytest.raises(TypeError):
        tiny.get_config().train.steps = "many"


def test_a_configuration_without_a_section_or_with_none_is_refused_by_name():
    whole, without, none = (tiny.get_config() for _ in range(3))
    require_whole(whole)
    with without.unlocked():
        del without["mesh"]
    none.eval.problems = None
    for c, field in ((without, "mesh"), (none, "eval.problems"), (ConfigDict(), "aggregation")):
        with pytest.raises(ConfigError, match=rf"config\.{field} is missing, or None.*defaults"):
            require_whole(c)


def test_difference_lists_each_changed_field_once():
    a, b = tiny.get_config(), tiny.get_config()
    b.optimizer.lr, b.seed = 0.5, 3
    assert difference(to_plain(a), to_plain(b)) == [
        f"optimizer.lr: {a.optimizer.lr} -> 0.5",
        "seed: 0 -> 3",
    ]
    assert difference(to_plain(a), to_plain(a)) == []


def test_digest_is_that_of_the_values_alone():
    assert digest(tiny.get_config()) == digest(ConfigDict(to_plain(tiny.get_config())))
    changed = tiny.get_config()
    changed.seed = 1
    assert digest(changed) != digest(tiny.get_config())


# --- configurations that earlier versions wrote ---------------------------------------------------

INERT = {
    "loss.clip_low": 0.0,
    "loss.clip_high": 0.0,
    "loss.dual_clip": 0.0,
    "sampling.verdict_delay": 2,
}


def plain_with(fields):
    """The quickstart's configuration as plain JSON, with more fields."""
    plain = to_plain(tiny.get_config())
    for field, value in fields.items():
        section, name = field.split(".")
        plain[section][name] = value
    return plain


def test_retired_fields_that_mean_nothing_are_left_out_and_nothing_else_changes():
    old, new = plain_with(INERT), plain_with({})
    given = copy.deepcopy(old)
    assert as_current(old) == new and old == given
    assert digest_of(as_current(old)) == digest_of(new) != digest_of(old)
    assert as_current(new) == new
    assert to_plain(from_plain(as_current(old))) == new


def test_a_temperature_of_both_roles_becomes_one_of_each():
    old = plain_with({"sampling.temperature": 0.6, "eval.temperature": 0.0})
    for section, name in (("search", "temperature"), ("aggregation", "temperature")):
        del old[section][name]
    del old["eval"]["search_temperature"], old["eval"]["aggregation_temperature"]
    c = from_plain(as_current(old))
    assert (c.search.temperature, c.aggregation.temperature) == (0.6, 0.6)
    assert (c.eval.search_temperature, c.eval.aggregation_temperature) == (0.0, 0.0)
    assert as_current(to_plain(c)) == to_plain(c)


def test_a_section_that_an_earlier_version_did_not_have_gets_its_defaults():
    new = plain_with({})
    old = {room: fields for room, fields in new.items() if room != "replay"}
    assert as_current(old) == new and "replay" not in old


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("loss.clip_low", 0.2),
        ("loss.clip_high", 0.28),
        ("loss.dual_clip", 3.0),
        ("sampling.verdict_delay", 0),
    ],
)
def test_a_retired_field_that_meant_something_is_refused_with_its_value(field, value):
    with pytest.raises(ConfigError) as refusal:
        as_current(plain_with(INERT | {field: value}))
    for part in (field, repr(value), "no longer", "version"):
        assert part in str(refusal.value)


def test_a_configuration_of_a_later_version_is_refused_with_the_field_that_is_unknown():
    with pytest.raises(ConfigError, match=r"another version.*clairvoyance"):
        from_plain(plain_with({"search.clairvoyance": 1}))
    with pytest.raises(ConfigError, match="another version"):
        from_plain(plain_with({"search.traces": "many"}))


def test_a_field_that_did_not_exist_then_has_its_default():
    plain = plain_with({"eval.every": 5})
    del plain["metrics"], plain["train"]["spike"]
    c = from_plain(plain)
    assert (c.eval.every, c.metrics.writers, c.train.spike) == (5, (), 12.0)
