"""How a logged problem's sets are called."""

from spiral_jax.reporting.logged_problem import set_name


def test_sets_have_letters_and_then_numbers_too_and_a_stroke_for_each_later_round():
    assert [set_name(k) for k in (0, 25, 26, 52)] == ["A", "Z", "A1", "A2"]
    assert [set_name(k, round=3) for k in (1, 26)] == ["B''", "A1''"]
