"""The report in a real browser, from the disk: it opens, filters, and runs no trace's script.

Skipped, with the reason, where there is no Chromium: `apt-get install chromium`, or `playwright
install chromium`.
"""

import pathlib
import re
import shutil

import pytest

from benchmarks.synthetic_run import write_run
from configs import tiny
from spiral_jax.reporting import main_page
from spiral_jax.reporting.logged_problem import split_problems
from spiral_jax.reporting.main_page import write_report
from spiral_jax.reporting.problem_page import FLAGS, PageSettings, problem_page
from spiral_jax.reporting.read_run import read_run
from spiral_jax.run.trace_log import read_traces

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect
WAIT_MS = 180_000  # a busy machine is no failure, but nothing waits for ever
expect.set_options(timeout=WAIT_MS)

MARKUP = (
    "<script>hacked = 1</script></textarea></script><!-- <img src=x onerror=hacked=1> <b>&amp;</b>"
)
HOSTILE = f"needle{{}}x {MARKUP} \u202e\u2028 {{{{{{{{ 7 * 7 }}}}}}}} "


@pytest.fixture(scope="module")
def browser():
    path = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    with sync_api.sync_playwright() as playwright:
        if path is None and not pathlib.Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium: apt-get install chromium, or playwright install chromium")
        with playwright.chromium.launch(executable_path=path, args=["--no-sandbox"]) as opened:
            yield opened


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose every trace is hostile, reported with a sample of about half of it."""
    c = tiny.get_config()
    c.loss.estimator, c.batch.problems, c.trace_log.every = "with_without", 6, 1
    path = tmp_path_factory.mktemp("run") / "a <b>run"
    write_run(
        path, c, range(3), text=lambda text, number: HOSTILE.format(number) + text, failing=0.05
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main_page, "SAMPLE_BYTES", 180_000)
        write_report(str(path), str(path))
    return path


@pytest.fixture(scope="module")
def expected(run):
    """The page of every problem, as Python has it, in the order of the list."""
    read = read_run(str(run))
    settings = PageSettings.from_plain(read.config)
    pages = []
    for step, file in read.traces.items():
        pages += [problem_page(step, rows, settings) for rows in split_problems(read_traces(file))]
    return sorted(pages, key=lambda page: (page["step"], page["cursor"]))


def open_watched(context, path, fragment=""):
    """A page, and what there was to complain of: errors, and requests of more than report files."""
    page, complaints = context.new_page(), []

    def on_request(request):
        if not (request.url.startswith("file:///") and request.is_navigation_request()):
            complaints.append(f"asked for {request.url[:200]}")

    page.set_default_timeout(WAIT_MS)
    page.on("console", lambda message: complaints.append(f"console {message.type}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    page.on("request", on_request)
    page.goto(path.as_uri() + fragment)
    return page, complaints


@pytest.fixture
def open_page(browser):
    """Opens a file of its own for a test."""
    contexts, all_complaints = [], []

    def open_file(path, fragment=""):
        contexts.append(browser.new_context())
        page, complaints = open_watched(contexts[-1], path, fragment)
        all_complaints.append(complaints)
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert not any(all_complaints)


@pytest.fixture(scope="module")
def loaded(browser, run):
    with browser.new_context() as context:
        yield open_watched(context, run / "report.html")


@pytest.fixture
def main(loaded):
    """The main file without filters, at its first problem: one page for several tests."""
    page, complaints = loaded
    page.evaluate("""() => {
        const filters = document.getElementById("filters");
        filters.reset();
        filters.dispatchEvent(new Event("change"));
        location.hash = "";
        location.hash = "#0.0";
    }""")
    expect(page.locator("#list a[aria-current] .id")).to_have_text("train:0")
    yield page
    assert not complaints


def count(page):
    return int(re.match(r"[\d,]+", page.inner_text("#matches"))[0].replace(",", ""))


def current(page):
    return page.inner_text("#list a[aria-current] .id")


def test_it_opens_with_every_problem_listed_and_charts_drawn_as_they_come_near(run, expected, main):
    page = main
    assert page.inner_text("h1") == "a <b>run"
    assert count(page) == len(expected) == 18
    held = int(re.search(r"(\d+) of them with their traces", page.inner_text("#matches"))[1])
    assert 3 <= held < 18
    assert page.locator("#list .away").count() == 18 - held
    page.locator(
        ".chart >> nth=0"
    ).scroll_into_view_if_needed()  # the fixture may have jumped past it
    page.wait_for_selector(".chart >> nth=0 >> svg.main-svg >> nth=0", state="attached")
    before = page.locator(".chart .plot-container").count()
    page.locator(".chart >> nth=-1").scroll_into_view_if_needed()
    page.wait_for_selector(".chart >> nth=-1 >> svg.main-svg >> nth=0", state="attached")
    assert 0 < before <= page.locator(".chart .plot-container").count()


def test_each_filter_and_each_pair_leave_the_problems_that_have_them(run, expected, main):
    page = main
    boxes = page.locator("#filters [name=flag]")
    for i, flag in enumerate(FLAGS):
        boxes.nth(i).check()
        wanted = [problem["id"] for problem in expected if flag in problem["flags"]]
        assert page.locator("#list .id").all_inner_texts() == wanted, flag
        other = (i + 1) % len(FLAGS)
        boxes.nth(other).check()
        both = {flag, list(FLAGS)[other]}
        assert count(page) == sum(both <= set(problem["flags"]) for problem in expected)
        boxes.nth(i).uncheck()
        boxes.nth(other).uncheck()
    page.select_option("#step", "1")
    assert count(page) == 6
    assert len({len([p for p in expected if flag in p["flags"]]) for flag in FLAGS}) > 2, (
        "a test that tells them apart"
    )


def test_text_search_reads_ids_and_the_traces_in_the_file(run, expected, main):
    page = main
    first = expected[0]
    word = re.search(r"needle\d+x", first["sets"][1]["traces"][2]["text"])[0]
    page.fill("#search", word.upper())
    expect(page.locator("#list a")).to_have_count(1)
    assert current(page) == first["id"]
    page.fill("#search", "train:17")
    expect(page.locator("#list .id").first).to_have_text("train:17")
    page.fill("#search", "in no trace at all")
    expect(page.locator("#list a")).to_have_count(0)
    assert "No problem matches" in page.inner_text("#problem")


def test_a_click_leads_to_the_problem_its_set_and_an_aggregation_with_its_reason(
    run, expected, main
):
    page = main
    page.click("#list a >> nth=1")
    problem = expected[1]
    assert problem["id"] in page.inner_text("#problem h3")
    rows = page.locator("#problem .grid tbody tr")
    assert rows.count() == 8
    for i, trace in enumerate(problem["search"]):
        cells = rows.nth(i).locator("td").all_inner_texts()
        inside = [k for k, text in enumerate(cells[4:]) if text != "·"]
        assert inside == trace["sets"]
        assert float(cells[3].replace("−", "-")) == pytest.approx(trace["advantage"], abs=5.01e-4)
    page.click("#problem .grid thead button >> nth=2")
    page.click("#aggregation-2-3 summary")
    trace = problem["sets"][2]["traces"][3]
    shown = page.locator("#aggregation-2-3")
    assert shown.locator(".why").first.inner_text().endswith(trace["why"])
    assert shown.locator("pre").evaluate("element => element.textContent") == trace["text"]
    for quote in trace["quotes"]:
        assert f"trace {quote['name']} (" in shown.inner_text()
    page.click("#problem .grid tbody button >> nth=4")
    assert page.locator("#trace-4 pre").is_visible()


def test_keys_go_to_the_next_problem_and_back_and_to_the_search(run, expected, main):
    page = main
    assert current(page) == expected[0]["id"]
    for key, place in (("j", 1), ("j", 2), ("k", 1), ("k", 0), ("k", 0)):
        page.keyboard.press(key)
        assert current(page) == expected[place]["id"]
        assert page.evaluate("location.hash") == f"#0.{place}"
    page.keyboard.press("/")
    page.keyboard.type("jj")  # in the field these are letters
    assert page.input_value("#search") == "jj"
    page.fill("#search", "")
    page.keyboard.press("Escape")
    expect(page.locator("#list a")).to_have_count(18)
    for _ in range(30):
        page.keyboard.press("j")
    assert current(page) == expected[-1]["id"]
    page.keyboard.press("Control+k")
    assert current(page) == expected[-1]["id"]


def test_what_is_not_in_the_file_is_one_plain_link_away(run, expected, open_page):
    page = open_page(run / "report.html")
    away = page.locator("#list a:has(.away)").first
    name = away.locator(".id").inner_text()
    away.click()
    page.click("#problem a.button")
    page.wait_for_url("**/report/step_*.html*")
    assert current(page) == name and name in page.inner_text("#problem h3")
    assert count(page) == 6
    page.click("nav a >> nth=0")
    page.wait_for_url("**/report.html")


def test_a_link_to_a_problem_opens_it(run, expected, open_page):
    page = open_page(run / "report" / "step_000002.html", "#2.15")
    assert current(page) == "train:15"
    assert (
        open_page(run / "report.html", "#0.1").inner_text("#list a[aria-current] .id") == "train:1"
    )


@pytest.mark.parametrize("file", ["report.html", "report/step_000001.html"])
def test_a_hostile_trace_stays_text(run, expected, open_page, file):
    page = open_page(run / file)
    page.evaluate(
        "document.querySelectorAll('details').forEach(element => { element.open = true; })"
    )
    shown = page.locator("#problem pre").first.evaluate(
        "element => element.ownerDocument.body.innerText"
    )
    assert MARKUP in shown and "{{ 7 * 7 }}" in shown
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.locator("#problem").locator("script, img, textarea, b:text('&')").count() == 0


def test_the_pages_policy_stops_a_script_that_is_not_its_own(run, browser):
    context = browser.new_context()
    page = context.new_page()
    page.goto((run / "report.html").as_uri())
    page.evaluate("""() => {
        const script = document.createElement("script");
        script.textContent = "hacked = 1";
        document.body.append(script);
        const image = document.createElement("img");
        image.setAttribute("onerror", "hacked = 1");
        image.src = "x";
        document.body.append(image);
    }""")
    page.wait_for_timeout(200)
    assert page.evaluate("typeof hacked") == "undefined"
    context.close()


def test_it_fits_from_a_phone_to_a_wide_screen_and_follows_dark_and_light(run, open_page):
    page = open_page(run / "report.html")
    page.wait_for_selector(".chart .xtitle", state="attached")
    for width in (400, 800, 1600):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    for scheme in ("light", "dark", "light"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_timeout(300)
        paper = red_of(page, "body", "backgroundColor")
        ink = red_of(page, ".chart .xtitle", "fill")
        assert (paper > 200, ink > 200) == (scheme == "light", scheme == "dark")


def red_of(page, element, style):
    """The red part, 0 to 255, of a colour that an element has."""
    color = page.evaluate(f"getComputedStyle(document.querySelector('{element}')).{style}")
    return int(re.search(r"rgb\((\d+)", color)[1])


def test_a_keyboard_alone_reaches_a_trace(run, expected, main):
    page = main
    page.focus("#list a >> nth=0")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "problem"
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.tagName") == "SUMMARY":
            break
    page.keyboard.press("Enter")
    assert page.locator("#problem details[open] pre").first.is_visible()
