"""The report on runs of every kind: finished, in progress, pruned, damaged, in a bucket."""

import gzip
import json
import math
import pathlib
import re
import shutil
import subprocess
import sys

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from benchmarks.synthetic_run import write_run
from configs import tiny
from spiral_jax.core.config import ConfigError, defaults, difference, to_plain
from spiral_jax.evaluation.results import ResultsError, read_results
from spiral_jax.reporting import pages
from spiral_jax.reporting.charts import overview_charts
from spiral_jax.reporting.evaluation_charts import evaluation_charts, measure_table
from spiral_jax.reporting.main_page import main_html, write_report
from spiral_jax.reporting.pages import write_pages
from spiral_jax.reporting.read_run import changed_fields, read_run
from spiral_jax.reporting.render import embed, render
from spiral_jax.run.workdir import StepLog, WorkdirError

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = pathlib.Path(__file__).parents[1] / "golden_results.json"


def settings(**changes):
    c = tiny.get_config()
    c.batch.problems, c.trace_log.every = 5, 1
    for field, value in changes.items():
        room, name = field.split("__")
        c[room][name] = value
    return c


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps of five problems, with its report."""
    path = tmp_path_factory.mktemp("finished") / "run"
    write_run(path, settings(train__steps=4), range(4))
    write_report(str(path), str(path))
    return path


@pytest.fixture(scope="module")
def unreported(tmp_path_factory):
    """A run after six of its forty steps."""
    path = tmp_path_factory.mktemp("unreported") / "run"
    write_run(path, settings(), range(6))
    return path


@pytest.fixture
def run(unreported, tmp_path):
    """A copy of `unreported` that a test may change."""
    return pathlib.Path(shutil.copytree(unreported, tmp_path / "run"))


def report(path, **options):
    """Reports a run into its own directory; returns the main file."""
    write_report(str(path), str(path), **options)
    return main_of(path)


def main_of(path):
    return (path / "report.html").read_text(encoding="utf-8")


def embedded(html, name):
    """The data of a page; "sample": a list of the problems in it."""
    wanted = "data-problem" if name == "sample" else f'id="{name}"'
    pattern = rf'<script type="application/json" {wanted}[^>]*>(.*?)</script>'
    contents = [json.loads(text) for text in re.findall(pattern, html, re.DOTALL)]
    return contents if name == "sample" else contents[0]


def logged(path):
    """(step, cursor) -> rows of the problem, from the trace log."""
    problems = {}
    for file in (path / "traces").iterdir():
        with gzip.open(file) as lines:
            for row in map(json.loads, lines):
                problems.setdefault((int(file.name[5:11]), row["cursor"]), []).append(row)
    return problems


def test_the_page_files_hold_every_trace_of_the_log_with_its_text_and_advantage(finished):
    shown = {}
    for file in (finished / "report").iterdir():
        for problem in embedded(file.read_text(encoding="utf-8"), "sample"):
            traces = list(problem["search"])
            for of_set in problem["sets"]:
                traces += of_set["traces"]
            key = problem["step"], problem["cursor"]
            shown[key] = [(t["text"], t["advantage"], t["reward"]) for t in traces]
    expected = {
        key: [(row["text"], row["advantage"], row["reward"]) for row in rows]
        for key, rows in logged(finished).items()
    }
    assert shown == expected and len(shown) == 20


def test_the_main_file_lists_every_problem_and_says_what_it_samples(finished):
    html, rows = main_of(finished), logged(finished)
    index = embedded(html, "index")
    listed = [(page["step"], cursor) for page in index for cursor in page["cursor"]]
    assert listed == sorted(rows)
    for page in index:
        assert (finished / page["href"]).exists()
        for cursor, right, of in zip(page["cursor"], page["right"], page["of"], strict=True):
            of_problem = rows[page["step"], cursor]
            rewards = [row["reward"] for row in of_problem if row["role"] == "aggregation"]
            assert (right, of) == (rewards.count(1.0), len(rewards) - rewards.count(None))
    assert "4 of 4 steps, 400,000 sampled tokens." in html and "in progress or stopped" not in html
    assert "This file holds the traces of all of them." in html
    for text in ("0" * 12, "jax 0.10.2", "2 CPU cores", "train.steps", "250"):
        assert text in html


def test_the_sample_is_spread_over_the_steps_and_stays_within_its_limit(unreported, tmp_path):
    run = read_run(str(unreported))
    for limit, least in ((1, 0), (40_000, 2), (150_000, 8), (10**7, 30)):
        sample = write_pages(run, epath.Path(tmp_path), limit).sample
        assert least <= len(sample) <= 30
        assert sum(len(problem.text) for problem in sample) <= limit
        by_step = {step: [] for step in range(6)}
        for problem in sample:
            step, cursor = map(int, problem.key.split("."))
            by_step[step].append(cursor - 5 * step)
        for cursors in by_step.values():
            assert cursors == list(range(len(cursors)))  # the first, in data order
        sizes = [len(cursors) for cursors in by_step.values()]
        assert max(sizes) - min(sizes) <= 1
    assert len(sample) == 30


def test_the_main_file_says_that_it_holds_a_part_of_the_traces(unreported, tmp_path):
    run = read_run(str(unreported))
    traces = write_pages(run, epath.Path(tmp_path), 150_000)
    html = main_html(run, traces)
    assert len(embedded(html, "sample")) == len(traces.sample)
    assert f"This file itself holds the traces of {len(traces.sample)} of them" in html


def test_large_steps_are_cut_into_page_files_and_an_earlier_reports_files_go(run, tmp_path):
    out = epath.Path(tmp_path / "out")
    write_pages(read_run(str(run)), out, 0, page_bytes=25_000)
    names = sorted(file.name for file in (out / "report").iterdir())
    assert {"step_000000.html", "step_000000_2.html", "step_000001_3.html"} <= set(names)
    held = [len(embedded((out / "report" / name).read_text(), "sample")) for name in names]
    assert sum(held) == 30 and min(held) >= 1
    first = (out / "report" / "step_000000.html").read_text()
    assert 'href="step_000000_2.html">part 2' in first and 'href="step_000001.html">step 1' in first

    (out / "report" / "mine.txt").write_text("kept")
    for step in range(5):
        (run / "traces" / f"step_{step:06d}.jsonl.gz").unlink()
    write_pages(read_run(str(run)), out, 0)
    names = sorted(file.name for file in (out / "report").iterdir())
    assert names == ["mine.txt", "step_000005.html"]


def test_a_large_log_is_worked_on_side_by_side_with_the_same_pages(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "PARALLEL_BYTES", 0)
    write_report(str(finished), str(tmp_path))
    files = [file.relative_to(tmp_path) for file in tmp_path.rglob("*.html")]
    assert len(files) == 5
    for file in files:
        assert (tmp_path / file).read_bytes() == (finished / file).read_bytes()


def test_a_run_in_progress_with_a_torn_line_nulls_and_no_evaluation_is_reported(run):
    (run / "evaluations.jsonl").unlink()
    (run / "starts.jsonl").unlink()
    log = StepLog(run / "metrics.jsonl")
    log.append({"step": 6, "grad_norm": math.nan, "reward/aggregated": None})
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "rew')
    html = report(run)
    assert "7 of 40 steps" in html and "in progress or stopped" in html
    assert "There is no evaluation yet" in html and "Not recorded" in html
    curves = [curve for figure in embedded(html, "figures") for curve in figure["data"]]
    (norm,) = [curve["y"] for curve in curves if curve["name"] == "both"]
    assert len(norm) == 7 and norm[6] is None and None not in norm[:6]


@pytest.mark.parametrize("present", [(), ("metrics.jsonl",)])
def test_a_run_that_has_written_next_to_nothing_is_reported(tmp_path, present):
    path = tmp_path / "run"
    write_run(path, settings(), range(1))
    written = {"metrics.jsonl", "evaluations.jsonl", "traces/step_000000.jsonl.gz"}
    for name in written - set(present):
        (path / name).unlink()
    html = report(path)
    assert "There are no traces" in html
    assert ("No step is finished yet" in html) == (not present)


def test_a_trace_file_that_the_run_deletes_meanwhile_is_said_to_be_gone(run, tmp_path):
    read = read_run(str(run))
    (run / "traces" / "step_000000.jsonl.gz").unlink()
    traces = write_pages(read, epath.Path(tmp_path), 10**6)
    assert traces.gone == [0] and traces.problems == 25
    html = main_html(read, traces)
    assert "Deleted by the run while this report was made: steps 0." in html


def test_a_grpo_run_has_traces_without_sets(tmp_path):
    path = tmp_path / "run"
    write_run(path, settings(loss__estimator="grpo"), range(2))
    html = report(path)
    sample = embedded(html, "sample")
    assert len(sample) == 10 and all(problem["sets"] == [] for problem in sample)
    reasons = [trace["why"] for problem in sample for trace in problem["search"]]
    assert any("standard deviation" in reason for reason in reasons)
    (page, _) = embedded(html, "index")
    assert max(page["of"]) == 8


def test_damage_and_older_logs_are_errors_that_name_the_file(run, tmp_path):
    with pytest.raises(WorkdirError, match="nothing"):
        read_run(str(tmp_path / "nothing"))
    file = run / "traces" / "step_000001.jsonl.gz"
    packed = file.read_bytes()
    file.write_bytes(packed[:-100])
    with pytest.raises(WorkdirError, match=re.escape(file.name)):
        report(run)
    rows = [json.loads(line) for line in gzip.decompress(packed).splitlines()]
    for row in rows:
        row.pop("verdict")
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    with pytest.raises(WorkdirError, match=f"(?s){re.escape(file.name)}.*'verdict'.*Delete"):
        report(run)
    (run / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(WorkdirError, match=r"metrics\.jsonl, line 2"):
        report(run)
    plain = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(plain | {"sead": 3}))
    with pytest.raises(ConfigError, match="sead"):
        report(run)


def test_an_evaluation_is_shown_against_a_baseline_and_only_of_the_same_problems(run, tmp_path):
    path = tmp_path / "evaluation"
    write_run(path, settings(), range(0))
    (path / "results.json").write_bytes(GOLDEN.read_bytes())
    html = report(path, baseline=str(GOLDEN))
    assert "this evaluation, against baseline (tests)" in html
    assert "An evaluation: no training steps." in html
    other = read_results(GOLDEN)
    other["problems"]["fingerprint"] = "other"
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(ResultsError, match="same problems"):
        report(path, baseline=str(tmp_path / "other.json"))
    with pytest.raises(WorkdirError, match="--baseline=.*Give --results"):
        report(run, baseline=str(GOLDEN))


def test_evaluations_during_training_are_shown_last_against_first_with_pass_at_k_over_steps(run):
    for step in (0, 10):
        folder = run / "evaluations" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        (folder / "results.json").write_bytes(GOLDEN.read_bytes())
    read = read_run(str(run))
    assert list(read.results) == ["step 10", "step 0"] and list(read.checkpoints) == [0, 10]
    charts = {chart.title: chart.figure for chart in overview_charts([], [], read.checkpoints)}
    curve = read_results(GOLDEN)["measures"]["pass_at_k"]
    for points in charts["pass@k"]["data"]:
        row = curve[int(points["name"].removeprefix("pass@")) - 1]
        assert list(points["x"]) == [0, 10] and points["y"] == [row["mean"]] * 2
        assert points["error_y"]["array"][0] == pytest.approx(row["high"] - row["mean"])


def test_the_bands_of_the_population_add_up_and_count_the_records_answers():
    results = read_results(GOLDEN)
    charts = {chart.title: chart.figure for chart in evaluation_charts({"one": results})}
    assert len(charts) == 4
    bands = charts["Recursive self-aggregation: what the population answers"]["data"]
    for t in range(results["settings"]["rounds"] + 1):
        assert sum(band["y"][t] for band in bands) == pytest.approx(100)
    (right,) = [band["y"] for band in bands if band["name"] == "right"]
    by_round = zip(*(record["rsa"] for record in results["records"]), strict=True)
    for t, rows in enumerate(by_round, start=1):
        shares = [row["answer"].count(0) / len(row["answer"]) for row in rows]
        assert right[t] == pytest.approx(100 * sum(shares) / len(shares))
    table = dict(measure_table({"one": results}))
    mean = results["measures"]["pass_at_k"][0]["mean"]
    assert table["pass@1"][0].startswith(f"{100 * mean:.1f} [")


def test_a_curve_has_a_gap_where_no_problem_has_as_many_traces():
    results = read_results(GOLDEN)
    undefined = dict.fromkeys(("mean", "low", "high", "standard_error")) | {"count": 0}
    for name in ("pass_at_k", "majority_at_k"):
        results["measures"][name][-1] |= undefined
    charts = {chart.title: chart.figure for chart in evaluation_charts({"one": results})}
    curves = {curve["name"]: curve["y"] for curve in charts["pass@k"]["data"]}
    for name in ("one: pass@k", "one: vote of k"):
        assert curves[name][-1] is None and None not in curves[name][:-1]


def test_metrics_without_values_have_no_chart():
    metrics = [{"step": step, "grad_norm": None, "tokens_per_s": 5.0} for step in range(3)]
    assert [chart.title for chart in overview_charts(metrics, [], {})] == ["Throughput"]


def test_what_was_fitted_has_a_chart_where_it_was_logged():
    metrics = [{"step": step, "advantage/control_c": step / 4} for step in range(3)]
    (chart,) = overview_charts(metrics, [], {})
    (curve,) = chart.figure["data"]
    assert "control variate" in chart.title and list(curve["y"]) == [0.0, 0.25, 0.5]


def test_nothing_of_a_text_can_leave_its_script_element():
    text = embed("</script><!-- <script> ]]> & '\" \u2028 \udc80")
    assert "<" not in text and text.isascii() and json.loads(text).startswith("</script><!--")
    html = render(
        "step.html.j2",
        ["problems.js"],
        run="</title><script>",
        step=0,
        part="",
        count=1,
        links=[],
        flags={},
        definition="",
        index="[]",
        sample=[],
    )
    assert html.count("<script") == 2 and "&lt;/title&gt;&lt;script&gt;" in html


def test_the_difference_to_the_defaults_has_every_changed_field_and_no_other():
    c = settings(optimizer__lr=0.5)
    changed = changed_fields(to_plain(c))
    assert ("optimizer.lr", "2e-05", "0.5") in changed
    lines = difference(to_plain(defaults()), to_plain(c))
    assert len(changed) == len(lines)
    for name, *_ in changed:
        known = any(line.startswith(f"{name}: ") for line in lines)
        assert known or "template_kwargs" in name


class Bucket(MemoryFileSystem):
    """An object store in memory under the address s3://."""

    protocol = "s3"
    store, pseudo_dirs, cachable = {}, [""], False

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("s3://").strip("/")


def test_a_run_in_a_bucket_is_read_and_reported_there(finished, monkeypatch):
    bucket, address = Bucket(), "/bucket/runs/run"
    monkeypatch.setattr(fsspec, "filesystem", lambda protocol: {"s3": bucket}[protocol])
    for file in finished.rglob("*"):
        place = file.relative_to(finished)
        if file.is_file() and "report" not in str(place):
            with bucket.open(f"{address}/{place}", "wb") as copy:
                copy.write(file.read_bytes())
    write_report(f"s3:/{address}", f"s3:/{address}")
    names = {name.removeprefix(f"{address}/") for name in bucket.find(address)}
    assert names >= {"report.html", *(f"report/step_{step:06d}.html" for step in range(4))}
    with bucket.open(f"{address}/report.html", "rb") as file:
        assert file.read().decode() == main_of(finished)
    write_report(f"s3:/{address}", f"s3:/{address}")  # over the earlier one


def test_the_command_writes_where_it_is_told_and_ends_with_a_message_where_it_cannot(
    finished, tmp_path
):
    def run(*arguments):
        command = [sys.executable, "-m", "spiral_jax.report", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    out = tmp_path / "elsewhere"
    done = run(f"--workdir={finished}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert f"{out}/report.html: 20 of 20 problems of 4 steps in 4 page files" in done.stdout
    assert main_of(out) == main_of(finished)
    failed = run(f"--workdir={tmp_path / 'none'}")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr
