"""Generated pages of the docs say what the code says."""

import pathlib

from benchmarks import config_page

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def test_the_page_of_the_configuration_is_what_its_comments_say():
    assert config_page.page() == (DOCS / "config.md").read_text(), (
        "run: python -m benchmarks.config_page"
    )


def test_every_field_of_the_configuration_has_a_meaning():
    without = [field.name for field in config_page.fields() if not field.meaning]
    assert without == [name for name in without if "." not in name]  # rooms need none
