"""The report command on runs of every kind: finished, in progress, pruned, damaged, unevaluated, in
a bucket.
"""

import gzip
import json
import math
import pathlib
import re
import subprocess
import sys

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from benchmarks.synthetic_run import write_run
from configs import tiny
from spiral_jax import report
from spiral_jax.core.config import ConfigError, defaults, difference, to_plain
from spiral_jax.evaluation.results import ResultsError, read_results
from spiral_jax.reporting import main_page, pages
from spiral_jax.reporting.charts import overview_charts, running_mean
from spiral_jax.reporting.evaluation_charts import evaluation_charts, measure_table
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
    path = tmp_path_factory.mktemp("finished") / "run"
    write_run(path, settings(train__steps=4), range(4))
    report.report(str(path), str(path))
    return path


def embedded(html, name):
    """The data of a page; "sample": a list of the problems in it."""
    wanted = "data-problem" if name == "sample" else f'id="{name}"'
    found = re.findall(
        rf'<script type="application/json" {wanted}[^>]*>(.*?)</script>', html, re.DOTALL
    )
    return list(map(json.loads, found)) if name == "sample" else json.loads(found[0])


def main_of(path):
    return (path / "report.html").read_text(encoding="utf-8")


def logged(path):
    """(step, cursor) -> rows of the problem, from the trace log."""
    found = {}
    for file in (path / "traces").iterdir():
        with gzip.open(file) as lines:
            for row in map(json.loads, lines):
                found.setdefault((int(file.name[5:11]), row["cursor"]), []).append(row)
    return found


def test_the_page_files_hold_every_trace_of_the_log_with_its_text_and_advantage(finished):
    rows = logged(finished)
    shown = {}
    for file in (finished / "report").iterdir():
        for problem in embedded(file.read_text(encoding="utf-8"), "sample"):
            traces = [
                *problem["search"],
                *(trace for of in problem["sets"] for trace in of["traces"]),
            ]
            shown[problem["step"], problem["cursor"]] = [
                (t["text"], t["advantage"], t["reward"]) for t in traces
            ]
    assert shown == {
        key: [(r["text"], r["advantage"], r["reward"]) for r in of] for key, of in rows.items()
    }
    assert len(shown) == 20


def test_the_main_file_lists_every_problem_and_says_what_it_samples(finished):
    html = main_of(finished)
    index = embedded(html, "index")
    assert [(page["step"], cursor) for page in index for cursor in page["cursor"]] == sorted(
        logged(finished)
    )
    assert all((finished / page["href"]).exists() for page in index)
    for page in index:
        for cursor, right, of in zip(page["cursor"], page["right"], page["of"], strict=True):
            rewards = [
                r["reward"]
                for r in logged(finished)[page["step"], cursor]
                if r["role"] == "aggregation"
            ]
            assert (right, of) == (rewards.count(1.0), len(rewards) - rewards.count(None))
    assert "4 of 4 steps, 400,000 sampled tokens." in html and "in progress or stopped" not in html
    assert "This file holds the traces of all of them." in html
    for text in ("0" * 12, "jax 0.10.2", "2 CPU cores", "train.steps", "250"):
        assert text in html


def test_the_sample_is_spread_over_the_steps_and_stays_within_its_limit(tmp_path, monkeypatch):
    path = tmp_path / "run"
    write_run(path, settings(), range(6))
    for limit, least in ((1, 0), (40_000, 2), (150_000, 8), (10**7, 30)):
        monkeypatch.setattr(main_page, "SAMPLE_BYTES", limit)
        report.report(str(path), str(path))
        sample = embedded(main_of(path), "sample")
        assert least <= len(sample) <= 30
        assert sum(len(json.dumps(problem, separators=(",", ":"))) for problem in sample) <= limit
        by_step = {
            step: [p["cursor"] - 5 * step for p in sample if p["step"] == step] for step in range(6)
        }
        assert all(
            cursors == list(range(len(cursors))) for cursors in by_step.values()
        )  # the first, in data order
        sizes = [len(cursors) for cursors in by_step.values()]
        assert max(sizes) - min(sizes) <= 1
    assert len(sample) == 30


def test_large_steps_are_cut_into_page_files_and_an_earlier_reports_files_go(tmp_path, monkeypatch):
    path = tmp_path / "run"
    write_run(path, settings(), range(2))
    monkeypatch.setattr(pages, "_PAGE_BYTES", 25_000)
    report.report(str(path), str(path))
    names = sorted(file.name for file in (path / "report").iterdir())
    assert {"step_000000.html", "step_000000_2.html", "step_000001_3.html"} <= set(names)
    held = [len(embedded((path / "report" / name).read_text(), "sample")) for name in names]
    assert sum(held) == 10 and min(held) >= 1
    first = (path / "report" / "step_000000.html").read_text()
    assert 'href="step_000000_2.html">part 2' in first and 'href="step_000001.html">step 1' in first
    (path / "report" / "mine.txt").write_text("kept")
    (path / "traces" / "step_000000.jsonl.gz").unlink()
    monkeypatch.setattr(pages, "_PAGE_BYTES", 10**7)
    report.report(str(path), str(path))
    assert sorted(file.name for file in (path / "report").iterdir()) == [
        "mine.txt",
        "step_000001.html",
    ]


def test_a_large_log_is_worked_on_side_by_side_with_the_same_pages(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "_PARALLEL_BYTES", 0)
    report.report(str(finished), str(tmp_path))
    files = [file.relative_to(tmp_path) for file in tmp_path.rglob("*.html")]
    assert len(files) == 5 and all(
        (tmp_path / f).read_bytes() == (finished / f).read_bytes() for f in files
    )


def test_a_run_in_progress_with_a_torn_line_nulls_and_no_evaluation_is_reported(tmp_path):
    path = tmp_path / "run"
    write_run(path, settings(), range(3))
    (path / "evaluations.jsonl").unlink()
    (path / "starts.jsonl").unlink()
    log = StepLog(path / "metrics.jsonl")
    log.append({"step": 3, "grad_norm": math.nan, "reward/aggregated": None})
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rew')
    report.report(str(path), str(path))
    html = main_of(path)
    assert "4 of 40 steps" in html and "in progress or stopped" in html
    assert "There is no evaluation yet" in html and "Not recorded" in html
    (norm,) = [
        trace["y"]
        for figure in embedded(html, "figures")
        for trace in figure["data"]
        if trace["name"] == "both"
    ]
    assert len(norm) == 4 and norm[3] is None and None not in norm[:3]


@pytest.mark.parametrize("present", [(), ("metrics.jsonl",)])
def test_a_run_that_has_written_next_to_nothing_is_reported(tmp_path, present):
    path = tmp_path / "run"
    write_run(path, settings(), range(1))
    for name in {"metrics.jsonl", "evaluations.jsonl", "traces/step_000000.jsonl.gz"} - set(
        present
    ):
        (path / name).unlink()
    report.report(str(path), str(path))
    assert "There are no traces" in main_of(path)
    assert ("No step is finished yet" in main_of(path)) == (not present)


def test_a_trace_file_that_the_run_deletes_meanwhile_is_said_to_be_gone(tmp_path, monkeypatch):
    path = tmp_path / "run"
    write_run(path, settings(), range(3))
    read = report.read_run

    def then_deleted(*arguments):
        found = read(*arguments)
        (path / "traces" / "step_000000.jsonl.gz").unlink()
        return found

    monkeypatch.setattr(report, "read_run", then_deleted)
    report.report(str(path), str(path))
    assert "Deleted by the run while this report was made: steps 0." in main_of(path)


def test_a_grpo_run_has_traces_without_sets(tmp_path):
    path = tmp_path / "run"
    write_run(path, settings(loss__estimator="grpo"), range(2))
    report.report(str(path), str(path))
    sample = embedded(main_of(path), "sample")
    assert len(sample) == 10 and all(problem["sets"] == [] for problem in sample)
    assert any(
        "standard deviation" in trace["why"] for problem in sample for trace in problem["search"]
    )
    (page, _) = embedded(main_of(path), "index")
    assert max(page["of"]) == 8


def test_damage_and_older_logs_are_errors_that_name_the_file(tmp_path, finished):
    with pytest.raises(WorkdirError, match="holds no run"):
        read_run(str(tmp_path / "nothing"))
    path = tmp_path / "run"
    write_run(path, settings(), range(2))
    file = path / "traces" / "step_000001.jsonl.gz"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(WorkdirError, match=r"step_000001\.jsonl\.gz: damaged"):
        report.report(str(path), str(path))
    rows = [json.loads(line) for line in gzip.decompress(whole).splitlines()]
    for row in rows:
        row.pop("verdict")
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    with pytest.raises(WorkdirError, match="no field 'verdict', as an older version"):
        report.report(str(path), str(path))
    (path / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(WorkdirError, match=r"metrics\.jsonl, line 2"):
        report.report(str(path), str(path))
    plain = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(plain | {"sead": 3}))
    with pytest.raises(ConfigError, match="another version"):
        report.report(str(path), str(path))


def test_an_evaluation_is_shown_against_a_baseline_and_only_of_the_same_problems(tmp_path):
    path = tmp_path / "evaluation"
    write_run(path, settings(), range(0))
    (path / "results.json").write_bytes(GOLDEN.read_bytes())
    report.report(str(path), str(path), baseline=str(GOLDEN))
    html = main_of(path)
    assert (
        "this evaluation, against baseline (tests)" in html
        and "An evaluation: no training steps." in html
    )
    other = read_results(GOLDEN)
    other["problems"]["fingerprint"] = "other"
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(ResultsError, match="not of the same problems"):
        report.report(str(path), str(path), baseline=str(tmp_path / "other.json"))
    with pytest.raises(WorkdirError, match="Give --results too"):
        write_run(tmp_path / "run", settings(), range(1))
        report.report(str(tmp_path / "run"), str(tmp_path / "run"), baseline=str(GOLDEN))


def test_evaluations_during_training_are_shown_last_against_first_with_pass_at_k_over_steps(
    tmp_path,
):
    path = tmp_path / "run"
    write_run(path, settings(), range(2))
    for step in (0, 10):
        (path / "evaluations" / f"step_{step:06d}").mkdir(parents=True)
        (path / "evaluations" / f"step_{step:06d}" / "results.json").write_bytes(
            GOLDEN.read_bytes()
        )
    run = read_run(str(path))
    assert list(run.results) == ["step 10", "step 0"] and list(run.checkpoints) == [0, 10]
    (chart,) = [
        chart for chart in overview_charts([], [], run.checkpoints) if chart["title"] == "pass@k"
    ]
    curve = read_results(GOLDEN)["measures"]["pass_at_k"]
    for trace in chart["figure"]["data"]:
        k = int(trace["name"].removeprefix("pass@"))
        assert list(trace["x"]) == [0, 10] and trace["y"] == [curve[k - 1]["mean"]] * 2
        assert trace["error_y"]["array"][0] == pytest.approx(
            curve[k - 1]["high"] - curve[k - 1]["mean"]
        )


def test_the_bands_of_the_population_add_up_and_count_the_records_answers():
    found = read_results(GOLDEN)
    charts = {chart["title"]: chart["figure"] for chart in evaluation_charts({"one": found})}
    assert len(charts) == 4
    bands = charts["Recursive self-aggregation: what the population answers"]["data"]
    for t in range(found["settings"]["rounds"] + 1):
        assert sum(band["y"][t] for band in bands) == pytest.approx(100)
    right = {band["name"]: band["y"] for band in bands}["right"]
    for t, rows in enumerate(
        zip(*(record["rsa"] for record in found["records"]), strict=True), start=1
    ):
        shares = [row["answer"].count(0) / len(row["answer"]) for row in rows]
        assert right[t] == pytest.approx(100 * sum(shares) / len(shares))
    table = dict(measure_table({"one": found}))
    assert table["pass@1"][0].startswith(f"{100 * found['measures']['pass_at_k'][0]['mean']:.1f} [")


def test_running_means_leave_gaps_out_and_metrics_without_values_have_no_chart():
    assert running_mean([1.0, None, 3.0, None, None], 2) == [1.0, 1.0, 3.0, 3.0, None]
    charts = overview_charts(
        [{"step": s, "grad_norm": None, "tokens_per_s": 5.0} for s in range(3)], [], {}
    )
    assert [chart["title"] for chart in charts] == ["Throughput"]


def test_nothing_of_a_text_can_leave_its_script_element():
    text = embed("</script><!-- <script> ]]> & '\" \u2028 \udc80")
    assert "<" not in text and text.isascii() and json.loads(text).startswith("</script><!--")
    html = render("step.html.j2", ["problems.js"], run="</title><script>", step=0, part="", count=1, links=[], flags={},
                  definition="", index="[]", sample=[])  # fmt: skip
    assert html.count("<script") == 2 and "&lt;/title&gt;&lt;script&gt;" in html


def test_the_difference_to_the_defaults_has_every_changed_field_and_no_other():
    c = settings(optimizer__lr=0.5)
    changed = changed_fields(to_plain(c))
    assert ("optimizer.lr", "2e-05", "0.5") in changed
    lines = difference(to_plain(defaults()), to_plain(c))
    assert [name for name, *_ in changed if "template_kwargs" not in name] == [
        name for name, *_ in changed if any(line.startswith(f"{name}: ") for line in lines)
    ]
    assert len(changed) == len(lines)


class Bucket(MemoryFileSystem):
    """An object store in memory under the address s3://."""

    protocol = "s3"
    store, pseudo_dirs, cachable = {}, [""], False

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("s3://").strip("/")


def test_a_run_in_a_bucket_is_read_and_reported_there(finished, monkeypatch):
    bucket = Bucket()
    monkeypatch.setattr(fsspec, "filesystem", lambda protocol: {"s3": bucket}[protocol])
    for file in finished.rglob("*"):
        if file.is_file() and "report" not in str(file.relative_to(finished)):
            with bucket.open(f"/bucket/runs/run/{file.relative_to(finished)}", "wb") as copy:
                copy.write(file.read_bytes())
    report.report("s3://bucket/runs/run", "s3://bucket/runs/run")
    names = {name.removeprefix("/bucket/runs/run/") for name in bucket.find("/bucket/runs/run")}
    assert names >= {"report.html", *(f"report/step_{step:06d}.html" for step in range(4))}
    with bucket.open("/bucket/runs/run/report.html", "rb") as file:
        assert file.read().decode() == main_of(finished)
    report.report("s3://bucket/runs/run", "s3://bucket/runs/run")  # over the earlier one


def test_the_command_writes_where_it_is_told_and_ends_with_a_message_where_it_cannot(
    finished, tmp_path
):
    def run(*arguments):
        command = [sys.executable, "-m", "spiral_jax.report", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)

    done = run(f"--workdir={finished}", f"--out={tmp_path / 'elsewhere'}")
    assert done.returncode == 0, done.stderr
    assert (
        f"{tmp_path}/elsewhere/report.html: 20 of 20 problems of 4 steps in 4 page files"
        in done.stdout
    )
    assert main_of(tmp_path / "elsewhere") == main_of(finished)
    failed = run(f"--workdir={tmp_path / 'none'}")
    assert (
        failed.returncode == 1
        and failed.stderr.startswith("error: ")
        and "Traceback" not in failed.stderr
    )
