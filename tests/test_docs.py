"""The docs: generated pages say what the code says, links lead somewhere, commands exist.

The guides' commands are run in commands/test_guides.py.
"""

import json
import os
import pathlib
import re

import pytest

from benchmarks import config_page, doc_tables, readme_table
from spiral_jax.core.config import defaults
from spiral_jax.objective.estimators import ESTIMATORS

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]


def test_the_page_of_the_configuration_is_what_its_comments_say():
    assert config_page.page() == (DOCS / "config.md").read_text(), (
        "run: python -m benchmarks.config_page"
    )


def test_every_field_of_the_configuration_has_a_meaning():
    without = [field.name for field in config_page.fields() if not field.meaning]
    assert without == [name for name in without if "." not in name]  # rooms need none


def links_of(page):
    """Paths that a page, or a notebook's texts, link to."""
    text = page.read_text()
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    return [page.parent / target for target in targets if "://" not in target]


def test_every_link_leads_somewhere():
    pages = [*PAGES, *DOCS.glob("*.ipynb")]
    lost = [
        f"{page.relative_to(ROOT)} -> {os.path.relpath(target, page.parent)}"
        for page in pages
        for target in links_of(page)
        if not target.exists()
    ]
    assert not lost, "\n".join(lost)


def test_every_picture_says_what_it_shows():
    for page in PAGES:
        for words in re.findall(r"!\[([^\]]*)\]\(", page.read_text()):
            assert len(words.split()) > 3, f"{page.relative_to(ROOT)}: {words}"


def test_every_section_that_is_linked_exists():
    lost = []
    for page in PAGES:
        for target, section in re.findall(r"\]\(([^)#\s]*\.md)#([^)\s]+)\)", page.read_text()):
            if "://" not in target and section not in sections_of(page.parent / target):
                lost.append(f"{page.relative_to(ROOT)} -> {target}#{section}")
    assert not lost, "\n".join(lost)


def sections_of(page):
    """The anchors that a forge gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_command_of_the_docs_names_what_exists():
    lost = []
    for page in PAGES:
        text = page.read_text()
        files = [
            *(f"{name.replace('.', '/')}.py" for name in re.findall(r"python -m ([\w.]+\w)", text)),
            *re.findall(r"bash ((?:launch|benchmarks)/[\w./]+\w)", text),
            *re.findall(r"--config=(configs/\w+\.py)", text),
        ]
        ours = set(files) - {"pytest.py", "spiral_jax.py"}  # it is spiral_jax/__main__.py
        lost += [f"{page.relative_to(ROOT)}: {file}" for file in ours if not (ROOT / file).exists()]
    assert not lost, "\n".join(lost)


def test_every_field_that_a_flag_sets_exists():
    """But for results and the log, which say what was given at their commit."""
    c, lost = defaults(), []
    for page in [page for page in PAGES if page.parent.name != "results" and page.name != "log.md"]:
        for section, name in re.findall(r"--config\.([a-z_]+)\.(\w+)", page.read_text()):
            if section not in c or name not in c[section]:
                lost.append(f"{page.relative_to(ROOT)}: {section}.{name}")
    assert not lost, "\n".join(lost)


def test_every_field_that_a_guide_names_exists():
    c, lost = defaults(), []
    for page in [page for page in PAGES if page.parent.name == "docs" and page.name != "log.md"]:
        for section, name in re.findall(r"`([a-z_]+)\.([a-z_]+)`", page.read_text()):
            if section in c and name not in c[section] and name not in ("py", "jsonl"):
                lost.append(f"{page.relative_to(ROOT)}: {section}.{name}")
    assert not lost, "\n".join(lost)


@pytest.mark.parametrize(
    "aim, pages, said",
    [
        ("own data, own reward", 2, ("train.jsonl", "my_reward:reward", "--workdir=runs/mine")),
        ("own checkpoint, evaluated", 2, ("spiral_jax.evaluate", "--config.model.hf_path=")),
        ("a changed estimator", 2, ("ESTIMATORS", "advantage=lambda", "informative=")),
        ("the plan of a pod", 2, ("spiral_jax.plan", "--topology=v5e:8x8")),
    ],
)
def test_few_pages_lead_from_the_readme_to(aim, pages, said):
    """The README counts as the first."""
    reached = [ROOT / "README.md"]
    for _ in range(pages - 1):
        linked = [target for page in reached for target in links_of(page)]
        reached += [target for target in linked if target.suffix == ".md"]
    texts = [page.read_text() for page in reached if page.exists()]
    assert any(all(words in text for words in said) for text in texts), aim


def test_every_estimator_has_its_section_in_the_same_parts():
    page = (DOCS / "estimators.md").read_text()
    _, *sections = re.split(r"^## `", page, flags=re.MULTILINE)
    assert [section.partition("`")[0] for section in sections] == list(ESTIMATORS)
    parts = ["In words", "Formula", "Flags", "Paper, and where we differ", "Measured"]
    for section in sections:
        assert re.findall(r"^\*\*(.*)\.\*\*", section, re.MULTILINE) == parts, section[:30]


@pytest.mark.parametrize("name", ["estimators", "reproduce"])
def test_numbers_of_studies_are_those_of_their_json(name):
    text = (DOCS / f"{name}.md").read_text()
    assert doc_tables.with_numbers(text) == text, "run: python -m benchmarks.doc_tables"


def test_every_result_is_in_the_index():
    index = links_of(DOCS / "results" / "README.md")
    pages = set((DOCS / "results").glob("*.md")) - {DOCS / "results" / "README.md"}
    assert pages <= set(index)


def test_the_readme_is_short_and_its_table_is_the_studies():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 140
    assert readme_table.with_table(text) == text, "run: python -m benchmarks.readme_table"
