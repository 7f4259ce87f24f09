"""Templates -> HTML that needs nothing else: styles, scripts and data are inside.

A trace is untrusted text. It travels as JSON in a script element of a type that no browser runs,
`<` escaped, and the page's own script shows it as text nodes. A Content-Security-Policy allows
those scripts by their hash, and no address at all to load anything from.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import pathlib
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

_TEMPLATES = pathlib.Path(__file__).parent / "templates"


def embed(value: Any) -> Markup:
    """JSON for a script element: nothing in it can end the element or open a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    # `<` occurs only inside of strings, where it may be an escape
    return Markup(text.replace("<", "\\u003c"))


def render(template: str, scripts: list[str], **values: Any) -> str:
    """The HTML of a template.

    Args:
      scripts: names of files beside the templates, or "plotly"; in this order at the end of the
        page.
      values: variables of the template; text is escaped, what `embed` returns is not.
    """
    sources = [_script(name) for name in scripts]
    named = [(name, Markup(source)) for name, source in zip(scripts, sources, strict=True)]
    hashes = " ".join(f"'sha256-{_sha256(source)}'" for source in sources)
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    shared = {"policy": policy, "style": Markup(_asset("style.css")), "scripts": named}
    return _environment().get_template(template).render(**shared, **values)


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@functools.cache
def _script(name: str) -> str:
    return get_plotlyjs() if name == "plotly" else _asset(name)


@functools.cache
def _asset(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _sha256(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
