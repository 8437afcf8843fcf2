"""The page that verify writes: a table and a picture for each model."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from norm_plugin import document
from norm_plugin.verify.comparison import Difference
from norm_plugin.verify.verdict import PROMPT_HEADINGS, Verdict, heading, number, prompt_rows, remarks, summary

STYLE = """
.pass { color: #1a7f37 } .fail { color: #cf222e; font-weight: 600 } .untested { color: #9a6700 }
svg { max-width: 100%; height: auto } svg text { font: 12px system-ui, sans-serif; fill: #57575f }
.floor { fill: #8c8c96 } .patched { fill: #d4620b } .line { stroke: #e4e4e8 }
figure { margin: 1rem 0 } figcaption { color: #57575f; font-size: .9rem }
code { overflow-wrap: anywhere }
"""

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 760, 280, 76, 52, 24

CAPTION = (
    "Each point is one position of one answer. Grey: stock beside stock with the requests in another order, which is "
    "how much the engine changes by itself. Orange: stock beside patched. Patched is as good as stock where orange "
    "lies no higher than grey, or on 0."
)


def page(verdicts: list[Verdict], about: dict[str, Any]) -> str:
    title = heading(verdicts, about)
    flags = ", ".join(f"{flag}={value}" for flag, value in about["flags"].items())
    smaller = ", in smaller batches" if about["floor"] == "batches" else ""
    head = (
        f"<p>{about['prompts']} prompts, {about['max_tokens']} tokens each. "
        f"Flags of the patched run: <code>{escape(flags)}</code>.</p>"
        f"<p><strong>{escape(summary(verdicts))}.</strong> The floor is stock against stock with the requests in "
        f"another order{smaller}. Differences are of logprobs, up to the first token that differs. "
        "For KL, the tokens that only one run names count as one token.</p>"
    )
    body = "".join(section(verdict, about) for verdict in verdicts)
    return document.document(title, f"{head}\n{body}", provenance(about), STYLE)


def provenance(about: dict[str, Any]) -> str:
    """The command, the date and the versions, which a colleague asks for first."""
    versions = {about["engine"]: about["version"], **about["versions"]}
    return (
        f"<p><code>{escape(about['command'])}</code></p>"
        f"<p>{escape(about['date'])}, {about['seconds']:.0f} s</p>{document.about(versions.items())}"
    )


def section(verdict: Verdict, about: dict[str, Any]) -> str:
    colour = "pass" if verdict.passed else "fail" if verdict.differs else "untested"
    total = len(verdict.taken) + len(verdict.others)
    how = f", on {', '.join(verdict.backends)}, with numerics {', '.join(verdict.numerics)}" if verdict.taken else ""
    facts = f"{len(verdict.taken)} of {total} norm layers patched{how}."
    listed = "".join(f"<li>{escape(note)}</li>" for note in remarks(verdict, about))
    return (
        f'<section><h2>{escape(verdict.model)}: <span class="{colour}">{escape(verdict.verdict)}</span></h2>'
        f"<p>{escape(facts)}</p>{f'<ul>{listed}</ul>' if listed else ''}"
        f"{picture(verdict.floor, verdict.patched)}{table(verdict)}</section>\n"
    )


def table(verdict: Verdict) -> str:
    """The table with a row for each prompt, and one for all."""
    rows = [*prompt_rows(verdict)]
    all_of = verdict.patched
    sums = [number(x) for x in (all_of.max, all_of.mean, all_of.kl, verdict.floor.max)]
    rows.append(("all", "", "", f"in {all_of.diverged}", f"{all_of.agreement:.1%}", *sums))
    cells = "".join("<tr>" + "".join(f"<td>{value}</td>" for value in row) + "</tr>" for row in rows)
    headings = "".join(f"<th>{heading}</th>" for heading in PROMPT_HEADINGS)
    return f'<div class="wide"><table><tr>{headings}</tr>{cells}</table></div>'


def picture(floor: Difference, patched: Difference) -> str:
    """The largest difference at each position of each prompt, on a logarithmic scale with a place for 0."""
    longest = max((len(p.deltas) for d in (floor, patched) for p in d.prompts), default=1)
    values = [delta for d in (floor, patched) for p in d.prompts for delta in p.deltas if delta > 0]
    low = math.floor(math.log10(min(values))) if values else -3
    high = max(low + 1, math.ceil(math.log10(max(values)))) if values else 0
    floor_of_axis = HEIGHT - BOTTOM

    def x(position: int) -> float:
        return LEFT + (position + 0.5) * (WIDTH - LEFT - 8) / longest

    def y(delta: float) -> float:
        if delta == 0:
            return floor_of_axis
        return floor_of_axis - 24 - (math.log10(delta) - low) / (high - low) * (floor_of_axis - 24 - TOP)

    lines = [(0.0, "0"), *((10.0**power, f"1e{power}") for power in range(low, high + 1))]
    parts = [
        f'<line class="line" x1="{LEFT}" x2="{WIDTH - 8}" y1="{y(at):.1f}" y2="{y(at):.1f}"/>'
        f'<text x="{LEFT - 8}" y="{y(at) + 4:.1f}" text-anchor="end">{label}</text>'
        for at, label in lines
    ]
    step, legend = max(1, longest // 16), ""
    parts += [
        f'<text x="{x(i):.1f}" y="{HEIGHT - 32}" text-anchor="middle">{i + 1}</text>' for i in range(0, longest, step)
    ]
    for kind, words, at, shift, difference in (
        ("floor", "stock against stock", LEFT + 8, -4, floor),
        ("patched", "stock against patched", LEFT + 168, 4, patched),
    ):
        legend += f'<circle class="{kind}" cx="{at}" cy="10" r="4"/><text x="{at + 9}" y="14">{words}</text>'
        for prompt in difference.prompts:
            parts += [
                f'<circle class="{kind}" cx="{x(i) + shift:.1f}" cy="{y(delta):.1f}" r="3" fill-opacity=".6"/>'
                for i, delta in enumerate(prompt.deltas)
            ]
    label = "The largest difference of a logprob at each position of each answer"
    middle = (TOP + floor_of_axis) / 2
    titles = (
        f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 10}" text-anchor="middle">'
        "position in the answer, in tokens</text>"
        f'<text transform="rotate(-90 14 {middle})" x="14" y="{middle}" text-anchor="middle">largest |Δ logprob|</text>'
    )
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="{label}">'
        f"<title>{label}</title>{''.join(parts)}{titles}{legend}</svg><figcaption>{CAPTION}</figcaption></figure>"
    )
