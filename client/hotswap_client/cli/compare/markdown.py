"""The report as Markdown, with its pictures in files beside it."""

from __future__ import annotations

from collections.abc import Sequence

from hotswap_client.cli.compare.plots import Picture
from hotswap_client.cli.compare.recommend import Recommendation
from hotswap_client.cli.compare.results import Comparison
from hotswap_client.cli.compare.tables import Table, all_tables


def markdown(comparison: Comparison, recommendation: Recommendation, pictures: Sequence[Picture]) -> str:
    facts = "\n".join(f"- {heading}: {text}" for heading, text in comparison.facts.items())
    parts = ["# Methods compared", facts]
    overview, *others = map(_table, all_tables(comparison))
    parts += [overview, *(f"![{picture.text}]({picture.name}.png)" for picture in pictures), *others]
    parts += ["## One question", _fenced(comparison.question), f"Right: `{_inline(comparison.answer)}`"]
    answers = [
        ("base", comparison.base),
        *((result.name, result.evaluation) for result in comparison.methods),
    ]
    parts.append("\n".join(f"- {name}: `{_inline(found.sample)}`" for name, found in answers))
    parts += ["## Recommendation", _advice(recommendation)]
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    lines = [table.headings, ("---",) * len(table.headings), *table.rows]
    rows = "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)
    return f"## {table.title}\n\n{rows}\n\n{table.note}"


def _advice(recommendation: Recommendation) -> str:
    chosen = recommendation.method
    path = f" ({recommendation.path})" if recommendation.path == "merged" else ""
    head = f"**{chosen}{path}.**" if chosen else "**None.**"
    lines = [" ".join((head, *recommendation.reasons))]
    lines += [f"- {method} {reason}." for method, reason in recommendation.excluded.items()]
    return "\n\n".join((lines[0], "\n".join(lines[1:]))).strip()


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _inline(text: str) -> str:
    return " ".join(text.split()).replace("`", "'") or " "


def _fenced(text: str) -> str:
    return f"~~~text\n{text}\n~~~"
