"""Progress display, curves and table: what they show is what they were given."""

import io
import json
import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from spiral_jax.core import progress
from spiral_jax.core.progress import Progress
from spiral_jax.reporting.training_figures import draw_curves

KEYS = ["reward/aggregated", "reward/search", "length/search", "length/aggregation", "verifier/parse_rate_search",
        "verifier/parse_rate_aggregation", "grad_norm", "mismatch/kl"]  # fmt: skip
PANELS = {"reward", "tokens", "% of traces", "L2 norm", "KL (nats per token)"}


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told."""

    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

    fake = Clock()
    monkeypatch.setattr(progress, "time", fake)
    return fake


def plain(**options):
    return Console(file=io.StringIO(), width=80, **options)


def test_phases_add_up_and_are_taken_once(clock):
    bar = Progress(3, 0, plain())
    with bar:
        for seconds in (2.0, 3.0):
            with bar.phase("sampling search"):
                clock.now += seconds
            with bar.phase("updating"):
                clock.now += 0.5
        assert bar.take_times() == {"time/sampling_search": 5.0, "time/updating": 1.0}
        assert bar.take_times() == {}


def test_a_phase_is_timed_inside_another_and_when_it_fails(clock):
    bar = Progress(3, 0, plain())
    with pytest.raises(RuntimeError, match="worker"), bar, bar.phase("evaluating"):
        clock.now += 1.0
        with bar.phase("verifying"):
            clock.now += 2.0
            raise RuntimeError("worker")
    assert bar.take_times() == {"time/evaluating": 3.0, "time/verifying": 2.0}


def test_without_a_terminal_each_step_is_one_plain_line():
    console = plain()
    with Progress(1000, 997, console) as bar:
        for step in (998, 999, 1000):
            with bar.phase("sampling aggregation"):
                pass
            bar.step_done(step, 0.25, 123_456_000, 1000.0)
    lines = console.file.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "step 998 of 1000",
        "step 999 of 1000",
        "step 1000 of 1000",
    ]
    assert all("reward 0.250" in line and "123,456 tokens/s" in line for line in lines)
    assert "\x1b" not in console.file.getvalue()


def test_reward_and_time_left_are_means_of_the_last_ten_steps():
    console = plain()
    rewards, seconds = np.linspace(0, 1, 25), np.arange(1.0, 26.0)
    with Progress(40, 0, console) as bar:
        for step in range(1, 26):
            bar.step_done(step, rewards[step - 1], 10, seconds[step - 1])
    last = console.file.getvalue().splitlines()[-1]
    assert f"reward {rewards[-10:].mean():.3f}" in last
    minutes, rest = divmod(round(15 * seconds[-10:].mean()), 60)
    assert f"left 0:{minutes:02d}:{rest:02d}" in last


def test_a_step_without_reward_is_shown_without_nan():
    console = plain()
    with Progress(4, 0, console) as bar:
        bar.step_done(1, None, 0, 0.0)
        bar.step_done(2, 0.5, 10, 1.0)
        bar.step_done(3, math.nan, 10, 1.0)
    lines = console.file.getvalue().splitlines()
    assert "reward -  - tokens/s" in lines[0]
    assert "reward 0.500" in lines[2]
    assert "nan" not in console.file.getvalue().lower()


def test_a_terminal_shows_phase_step_speed_reward_and_time_left_and_no_plain_lines():
    console = plain(force_terminal=True, color_system=None)
    with Progress(250, 119, console) as bar:
        bar.step_done(120, 0.4, 819_200, 120.0)
        with bar.phase("sampling aggregation"):
            bar._bar.refresh()  # drawn ten times a second otherwise
    screen = console.file.getvalue()
    shown = "step 120/250 reward 0.400  6,827 tokens/s  left 4:20:00 sampling aggregation"
    assert shown in screen
    assert "step 120 of 250" not in screen


def estimate(mean, count=400):
    error = math.sqrt(mean * (1 - mean) / count)
    return {"mean": mean, "low": mean - 1.96 * error, "high": mean + 1.96 * error, "standard_error": error,
            "count": count}  # fmt: skip


def evaluation(step, rng, aggregation=True):
    names = ["single", "pass_at_n"] + (["majority", "aggregated"] if aggregation else [])
    result = {"step": step, "parse_rate_search": rng.random()} | {
        name: estimate(rng.random()) for name in names
    }
    return result | ({"parse_rate_aggregation": rng.random()} if aggregation else {})


def write_metrics(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def random_records(rng, steps, keys=KEYS):
    return [{"step": step} | {key: rng.random() for key in keys} for step in range(1, steps + 1)]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, besides saving them."""
    figures, save = [], Figure.savefig

    def spy(self, *args, **kwargs):
        figures.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    return figures


def panels(figure):
    return {axes.get_ylabel(): axes for axes in figure.axes}


def curves(axes):
    """Every drawn line as (x, y)."""
    return [tuple(np.asarray(data, float) for data in line.get_data()) for line in axes.get_lines()]


def has_curve(axes, x, y):
    def same(a, b):
        return np.shape(a) == np.shape(b) and np.allclose(
            a, b, rtol=0, atol=1e-12, equal_nan=True
        )  # percent and back

    return any(same(u, x) and same(v, y) for u, v in curves(axes))


def test_png_is_a_picture_with_ink_in_it(tmp_path):
    rng = np.random.default_rng(0)
    path = write_metrics(tmp_path / "metrics.jsonl", random_records(rng, 60))
    draw_curves(path, [evaluation(0, rng), evaluation(60, rng)], tmp_path / "curves.png")
    image = imread(tmp_path / "curves.png")
    assert image.shape[:2] == (840, 1680)
    for quarter in (image[:420, :840], image[420:, :840], image[:420, 840:], image[420:, 840:]):
        assert 0.005 < (quarter[..., :3].min(axis=-1) < 0.9).mean() < 0.5


def test_every_metric_is_drawn_raw_and_averaged_in_a_labelled_panel(tmp_path, drawn):
    rng = np.random.default_rng(1)
    records = random_records(rng, 60)
    draw_curves(write_metrics(tmp_path / "m.jsonl", records), [], str(tmp_path / "c.png"))
    shown = panels(drawn[0])
    assert shown.keys() == PANELS
    places = dict(zip(KEYS, ["reward", None, "tokens", "tokens", "% of traces", "% of traces", "L2 norm",
                             "KL (nats per token)"], strict=True))  # fmt: skip
    steps = np.arange(1, 61)
    for key, place in places.items():
        if place is None:
            continue
        values = np.array([record[key] for record in records]) * (
            100 if place == "% of traces" else 1
        )
        mean = [values[max(0, i - 2) : i + 1].mean() for i in range(60)]  # 60 steps: a window of 3
        assert has_curve(shown[place], steps, values), key
        assert has_curve(shown[place], steps, mean), key
    assert all(
        axes.get_xlabel() == "optimizer step" and axes.get_title() for axes in shown.values()
    )


def test_held_out_points_have_their_means_and_95_percent_bars(tmp_path, drawn):
    rng = np.random.default_rng(2)
    evaluations = [evaluation(step, rng) for step in (0, 50, 100)]
    path = write_metrics(tmp_path / "m.jsonl", random_records(rng, 100))
    draw_curves(path, evaluations[::-1], tmp_path / "c.png")  # any order
    containers = {bars.get_label(): bars for bars in panels(drawn[0])["reward"].containers}
    labels = {"single": "held-out, single trace", "majority": "held-out, majority vote",
              "aggregated": "held-out, aggregated"}  # fmt: skip
    assert containers.keys() == set(labels.values())
    for name, label in labels.items():
        points, _, (bars,) = containers[label]
        x, y = np.asarray(points.get_data(), float)
        np.testing.assert_allclose(x, [0, 50, 100], atol=1)  # moved aside by 0.8 % of the axis
        np.testing.assert_array_equal(y, [e[name]["mean"] for e in evaluations])
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        np.testing.assert_allclose(
            ends, [[e[name]["low"], e[name]["high"]] for e in evaluations], atol=1e-12
        )


def test_without_aggregation_the_search_reward_is_drawn_and_nothing_of_aggregation(tmp_path, drawn):
    rng = np.random.default_rng(3)
    records = random_records(rng, 10, [key for key in KEYS if "aggregat" not in key])
    path = write_metrics(tmp_path / "m.jsonl", records)
    draw_curves(path, [evaluation(0, rng, aggregation=False)], tmp_path / "c.png")
    shown = panels(drawn[0])
    assert shown.keys() == PANELS
    assert has_curve(
        shown["reward"], np.arange(1, 11), [record["reward/search"] for record in records]
    )
    legends = [axes.get_legend() for axes in shown.values() if axes.get_legend()]
    texts = [text.get_text() for legend in legends for text in legend.get_texts()]
    assert texts
    assert not any("aggregat" in text for text in texts)


@pytest.mark.parametrize("missing", ["absent", None, math.nan])
def test_a_panel_without_values_is_left_out(tmp_path, drawn, missing):
    rng = np.random.default_rng(4)
    records = random_records(rng, 5)
    for record in records:
        for key in (
            "grad_norm",
            "length/search",
            "length/aggregation",
            "verifier/parse_rate_search",
        ):
            record.pop(key) if missing == "absent" else record.update({key: missing})
    draw_curves(write_metrics(tmp_path / "m.jsonl", records), [], tmp_path / "c.png")
    assert panels(drawn[0]).keys() == PANELS - {"tokens", "L2 norm"}
    (label,) = [
        text.get_text() for text in panels(drawn[0])["% of traces"].get_legend().get_texts()
    ]
    assert label == "aggregation"


@pytest.mark.parametrize("steps", [20, 60])
def test_single_steps_without_a_value_are_gaps_and_do_not_spoil_the_mean(tmp_path, drawn, steps):
    rng = np.random.default_rng(5)
    records = random_records(rng, steps)
    records[3]["grad_norm"], records[4]["grad_norm"] = None, math.nan
    del records[10]["grad_norm"]
    draw_curves(write_metrics(tmp_path / "m.jsonl", records), [], tmp_path / "c.png")
    expected = np.array([record.get("grad_norm") or math.nan for record in records])
    axes = panels(drawn[0])["L2 norm"]
    assert has_curve(axes, np.arange(1, steps + 1), expected)
    if steps == 60:
        assert has_curve(
            axes, np.arange(1, 61), [np.nanmean(expected[max(0, i - 2) : i + 1]) for i in range(60)]
        )


@pytest.mark.parametrize(
    "keys", [["grad_norm"], ["reward/aggregated"], ["grad_norm", "mismatch/kl", "length/search"]]
)
def test_any_number_of_panels_can_be_drawn(tmp_path, drawn, keys):
    draw_curves(write_metrics(tmp_path / "m.jsonl", random_records(np.random.default_rng(6), 1, keys)), [],
                tmp_path / "c.png")  # fmt: skip
    assert len(drawn[0].axes) == len(keys)


def test_evaluations_alone_are_drawn_also_with_one_problem(tmp_path, drawn):
    lone = {"mean": 0.5, "low": None, "high": None, "standard_error": None, "count": 1}
    none = {"mean": None, "low": None, "high": None, "standard_error": None, "count": 0}
    path = write_metrics(tmp_path / "m.jsonl", [])
    draw_curves(path, [{"step": 0, "single": lone, "majority": none}], tmp_path / "c.png")
    assert [bars.get_label() for bars in drawn[0].axes[0].containers] == ["held-out, single trace"]


def test_nothing_to_draw_and_broken_metrics_are_errors(tmp_path):
    with pytest.raises(ValueError, match="none of its metrics"):
        draw_curves(
            write_metrics(tmp_path / "m.jsonl", [{"step": 1, "loss/total": 2.0}]),
            [],
            tmp_path / "c.png",
        )
    for line in ('{"step": 2, "gra', '{"grad_norm": 1.0}', "[1]", "{}"):
        (tmp_path / "m.jsonl").write_text('{"step": 1}\n' + line + "\n")
        with pytest.raises(ValueError, match="line 2"):
            draw_curves(tmp_path / "m.jsonl", [], tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()
