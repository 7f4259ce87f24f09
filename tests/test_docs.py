"""The docs: generated pages say what the code says, and links lead somewhere."""

import pathlib
import re

from benchmarks import config_page, readme_table

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_the_page_of_the_configuration_is_what_its_comments_say():
    assert config_page.page() == (DOCS / "config.md").read_text(), (
        "run: python -m benchmarks.config_page"
    )


def test_every_field_of_the_configuration_has_a_meaning():
    without = [field.name for field in config_page.fields() if not field.meaning]
    assert without == [name for name in without if "." not in name]  # rooms need none


def test_every_link_leads_somewhere():
    pages = [*ROOT.glob("*.md"), *DOCS.rglob("*.md")]
    lost = []
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                lost.append(f"{page.relative_to(ROOT)} -> {target}")
    assert not lost, "\n".join(lost)


def test_the_readme_is_short_and_its_table_is_the_studies():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 140
    assert readme_table.with_table(text) == text, "run: python -m benchmarks.readme_table"
