"""The frame of the pages of `verify` and `report`: a single file, its style, and a list of facts."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1f; background: #fff; max-width: 60rem;
       margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2.5rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .8rem 0 }
th, td { text-align: right; padding: .2rem .7rem; border-bottom: 1px solid #ddd } th { font-weight: 600 }
th:first-child, td:first-child { text-align: left }
.wide { overflow-x: auto }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 0 }
dt { color: #57575f } dd { margin: 0; overflow-wrap: anywhere }
footer { color: #57575f; margin-top: 3rem; border-top: 1px solid #ddd; padding-top: .5rem }
"""


def document(title: str, body: str, footer: str, style: str = "") -> str:
    """The page. `title` is text; `body` and `footer` are HTML."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
        f"<style>{STYLE}{style}</style></head>\n<body><h1>{escape(title)}</h1>\n{body}\n"
        f"<footer>{footer}</footer></body></html>\n"
    )


def about(facts: Iterable[tuple[str, str]]) -> str:
    """A list of facts by name, without empty ones."""
    return "<dl>" + "".join(f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in facts if b) + "</dl>"
