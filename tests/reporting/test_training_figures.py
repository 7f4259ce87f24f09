"""A run's curves: what is plotted is what was given."""

import math
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from spiral_jax.reporting.series import running_mean
from spiral_jax.reporting.training_figures import plot_training

PANEL_OF = {  # metric: label of the panel that shows it
    "reward/aggregated": "reward",
    "reward/search": None,  # left out where there are aggregated ones
    "length/search": "tokens",
    "length/aggregation": "tokens",
    "length/cut_off_search": "% cut off",
    "length/cut_off_aggregation": "% cut off",
    "verifier/parse_rate_search": "% of traces",
    "verifier/parse_rate_aggregation": "% of traces",
    "grad_norm": "L2 norm",
    "mismatch/kl": "KL (nats per token)",
}
CUT_OFF = ("length/cut_off_search", "length/cut_off_aggregation")
PANELS = {panel for panel in PANEL_OF.values() if panel}
HELD_OUT = {
    "single": "held-out, single trace",
    "majority": "held-out, majority vote",
    "aggregated": "held-out, aggregated",
}
UNDEFINED = {"mean": None, "low": None, "high": None, "standard_error": None, "count": 0}


def estimate(mean, count=400):
    error = math.sqrt(mean * (1 - mean) / count)
    return {
        "mean": mean,
        "low": mean - 1.96 * error,
        "high": mean + 1.96 * error,
        "standard_error": error,
        "count": count,
    }


def evaluation(step, rng, aggregation=True):
    names = ["single", "pass_at_n"] + (["majority", "aggregated"] if aggregation else [])
    return {"step": step} | {name: estimate(rng.random()) for name in names}


def random_metrics(rng, steps, keys=PANEL_OF):
    return [{"step": step} | {key: rng.random() for key in keys} for step in range(1, steps + 1)]


@pytest.fixture
def plotted(monkeypatch, tmp_path):
    """Plots without rendering; returns the figure."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))

    def plot(metrics, evaluations):
        plot_training(metrics, evaluations, tmp_path / "curves.png")
        return figures[-1]

    return plot


def panels(figure):
    return {axes.get_ylabel(): axes for axes in figure.axes}


def has_curve(axes, x, y):
    """Whether some line of the axes is this one; values may have gone to percent and back."""
    for line in axes.get_lines():
        shown_x, shown_y = (np.asarray(data, float) for data in line.get_data())
        same_x = np.array_equal(shown_x, x) and np.shape(shown_y) == np.shape(y)
        if same_x and np.allclose(shown_y, y, rtol=0, atol=1e-12, equal_nan=True):
            return True
    return False


def test_png_is_a_picture_with_ink_in_it(tmp_path):
    rng = np.random.default_rng(0)
    evaluations = [evaluation(0, rng), evaluation(60, rng)]
    plot_training(random_metrics(rng, 60), evaluations, str(tmp_path / "curves.png"))
    image = imread(tmp_path / "curves.png")
    assert image.shape[:2] == (840, 1680)
    assert ElementTree.parse(tmp_path / "curves.svg").getroot().tag.endswith("}svg")
    for quarter in (image[:420, :840], image[420:, :840], image[:420, 840:], image[420:, 840:]):
        assert 0.005 < (quarter[..., :3].min(axis=-1) < 0.9).mean() < 0.5


def test_every_metric_is_shown_raw_and_averaged_in_a_labelled_panel(plotted):
    metrics = random_metrics(np.random.default_rng(1), 60)
    shown = panels(plotted(metrics, []))
    assert shown.keys() == PANELS
    steps = np.arange(1, 61)
    for key, panel in PANEL_OF.items():
        if panel is None:
            continue
        scale = 100 if "%" in panel else 1
        values = scale * np.array([row[key] for row in metrics])
        mean = [values[max(0, i - 2) : i + 1].mean() for i in range(60)]  # 60 steps: a window of 3
        assert has_curve(shown[panel], steps, values), key
        assert has_curve(shown[panel], steps, mean), key
    for axes in shown.values():
        assert axes.get_xlabel() == "optimizer step" and axes.get_title()


def test_held_out_points_have_their_means_and_95_percent_bars(plotted):
    rng = np.random.default_rng(2)
    evaluations = [evaluation(step, rng) for step in (0, 50, 100)]
    figure = plotted(random_metrics(rng, 100), evaluations[::-1])  # any order
    containers = {bars.get_label(): bars for bars in panels(figure)["reward"].containers}
    assert containers.keys() == set(HELD_OUT.values())
    for name, label in HELD_OUT.items():
        points, _, (bars,) = containers[label]
        x, y = np.asarray(points.get_data(), float)
        np.testing.assert_allclose(x, [0, 50, 100], atol=1)  # moved aside by 0.8 % of the axis
        np.testing.assert_array_equal(y, [row[name]["mean"] for row in evaluations])
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        expected = [[row[name]["low"], row[name]["high"]] for row in evaluations]
        np.testing.assert_allclose(ends, expected, atol=1e-12)


def test_without_aggregation_the_search_reward_is_shown_and_nothing_of_aggregation(plotted):
    rng = np.random.default_rng(3)
    metrics = random_metrics(rng, 10, [key for key in PANEL_OF if "aggregat" not in key])
    shown = panels(plotted(metrics, [evaluation(0, rng, aggregation=False)]))
    assert shown.keys() == PANELS
    rewards = [row["reward/search"] for row in metrics]
    assert has_curve(shown["reward"], np.arange(1, 11), rewards)
    legends = [axes.get_legend() for axes in shown.values() if axes.get_legend()]
    texts = [text.get_text() for legend in legends for text in legend.get_texts()]
    assert texts and not any("aggregat" in text for text in texts)


@pytest.mark.parametrize("missing", ["absent", None, math.nan])
def test_a_panel_without_values_is_left_out(plotted, missing):
    metrics = random_metrics(np.random.default_rng(4), 5)
    for row in metrics:
        for key in ("grad_norm", "length/search", "length/aggregation", *CUT_OFF):
            row[key] = missing
        row["verifier/parse_rate_search"] = missing
    if missing == "absent":
        metrics = [{k: v for k, v in row.items() if v != "absent"} for row in metrics]
    shown = panels(plotted(metrics, []))
    assert shown.keys() == PANELS - {"tokens", "% cut off", "L2 norm"}
    (label,) = [text.get_text() for text in shown["% of traces"].get_legend().get_texts()]
    assert label == "aggregation"


@pytest.mark.parametrize("steps", [20, 60])
def test_single_steps_without_a_value_are_gaps_and_do_not_spoil_the_mean(plotted, steps):
    metrics = random_metrics(np.random.default_rng(5), steps)
    metrics[3]["grad_norm"], metrics[4]["grad_norm"] = None, math.nan
    del metrics[10]["grad_norm"]
    axes = panels(plotted(metrics, []))["L2 norm"]
    expected = np.array([row.get("grad_norm") or math.nan for row in metrics])
    assert has_curve(axes, np.arange(1, steps + 1), expected)
    if steps == 60:
        mean = [np.nanmean(expected[max(0, i - 2) : i + 1]) for i in range(60)]
        assert has_curve(axes, np.arange(1, 61), mean)


def test_running_means_leave_gaps_out():
    values = [1.0, math.nan, 3.0, math.nan, math.nan]
    np.testing.assert_equal(running_mean(values, before=1), [1.0, 1.0, 3.0, 3.0, math.nan])
    np.testing.assert_equal(running_mean(values, before=1, after=1), [1.0, 2.0, 3.0, 3.0, math.nan])


@pytest.mark.parametrize(
    "keys", [["grad_norm"], ["reward/aggregated"], ["grad_norm", "mismatch/kl", "length/search"]]
)
def test_any_number_of_panels_can_be_plotted(plotted, keys):
    figure = plotted(random_metrics(np.random.default_rng(6), 1, keys), [])
    assert len(figure.axes) == len(keys)


def test_a_spike_hides_nothing(plotted):
    metrics = [{"step": step, "grad_norm": 1.0, "mismatch/kl": 1.0} for step in range(9)]
    metrics[4]["grad_norm"] = 31.0
    shown = panels(plotted(metrics, []))
    assert shown["L2 norm"].get_yscale() == "log"
    assert shown["KL (nats per token)"].get_yscale() == "linear"


def test_evaluations_alone_are_plotted_also_with_one_problem(plotted):
    lone = UNDEFINED | {"mean": 0.5, "count": 1}
    figure = plotted([], [{"step": 0, "single": lone, "majority": UNDEFINED}])
    assert [bars.get_label() for bars in figure.axes[0].containers] == [HELD_OUT["single"]]


def test_nothing_to_plot_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"curves\.png"):
        plot_training([{"step": 1, "loss/total": 2.0}], [], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
