"""The report as one HTML file that asks no network: its style and pictures are in it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from hotswap_client.cli.compare.plots import Picture
from hotswap_client.cli.compare.recommend import Recommendation
from hotswap_client.cli.compare.results import Comparison
from hotswap_client.cli.compare.tables import Table, all_tables

_NUMBER = 24  # characters at most
_STYLE = Path(__file__).with_name("data") / "report.css"


def page(comparison: Comparison, recommendation: Recommendation, pictures: Sequence[Picture]) -> str:
    overview, *others = all_tables(comparison)
    verdict = recommendation.method or "none of them"
    merged = ", merged" if recommendation.path == "merged" else ""
    parts = [
        "<header><h1>Methods compared</h1>",
        f'<p class="verdict">Recommended: <a href="#recommendation"><b>{escape(verdict)}</b>{merged}</a></p>',
        "</header>",
        _table(overview),
        '<section class="pictures">',
        *map(_picture, pictures),
        "</section>",
        *map(_table, others),
        _question(comparison),
        _facts(comparison),
        _advice(recommendation),
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Methods compared</title>\n<style>\n{_STYLE.read_text('utf-8')}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _table(table: Table) -> str:
    # A column of words reads from the left, one of numbers lines up at the right.
    words = [any(len(cell) > _NUMBER for cell in column) for column in zip(*table.rows, strict=True)]
    head = "".join(
        f'<th scope="col"{_kind(is_words)}>{escape(heading)}</th>'
        for heading, is_words in zip(table.headings, words, strict=True)
    )
    rows = "\n".join(_row(row, words) for row in table.rows)
    # A box that scrolls sideways can be reached by keyboard too.
    return (
        f"<section>\n<h2>{escape(table.title)}</h2>\n"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>\n"
        f'<p class="note">{escape(table.note)}</p>\n</section>'
    )


def _row(row: Sequence[str], words: Sequence[bool]) -> str:
    first, *others = row
    cells = "".join(
        f"<td{_kind(is_words)}>{escape(cell)}</td>" for cell, is_words in zip(others, words[1:], strict=True)
    )
    kind = ' class="part"' if ", " in first else ' class="base"' if first == "base" else ""
    return f'<tr{kind}><th scope="row">{escape(first)}</th>{cells}</tr>'


def _kind(is_words: bool) -> str:
    return ' class="words"' if is_words else ""


def _picture(picture: Picture) -> str:
    _, _, drawing = picture.svg.partition("<svg")
    label = escape(picture.text, quote=True)
    return (
        f'<figure>\n<figcaption>{escape(picture.title)}</figcaption>\n<svg role="img" aria-label="{label}"'
        f"{drawing}</figure>"
    )


def _question(comparison: Comparison) -> str:
    answers = [
        ("base", comparison.base),
        *((result.name, result.evaluation) for result in comparison.methods),
    ]
    rows = "\n".join(
        f"<dt>{escape(name)}</dt><dd><pre>{escape(found.sample.strip()) or '(nothing)'}</pre></dd>"
        for name, found in answers
    )
    return (
        f"<section>\n<h2>One question</h2>\n<pre>{escape(comparison.question)}</pre>\n<dl>\n"
        f"<dt>right</dt><dd><pre>{escape(comparison.answer.strip())}</pre></dd>\n{rows}\n</dl>\n</section>"
    )


def _facts(comparison: Comparison) -> str:
    rows = "\n".join(
        f"<dt>{escape(heading)}</dt><dd>{escape(text)}</dd>" for heading, text in comparison.facts.items()
    )
    return f"<section>\n<h2>Of what, and where</h2>\n<dl>\n{rows}\n</dl>\n</section>"


def _advice(recommendation: Recommendation) -> str:
    verdict = escape(recommendation.method or "None")
    merged = ", merged" if recommendation.path == "merged" else ""
    reasons = escape(" ".join(recommendation.reasons))
    others = "\n".join(
        f"<li><b>{escape(method)}</b> {escape(reason)}.</li>"
        for method, reason in recommendation.excluded.items()
    )
    return (
        f'<section id="recommendation" class="advice">\n<h2>Recommendation</h2>\n'
        f"<p><b>{verdict}{merged}.</b> {reasons}</p>\n{f'<ul>{others}</ul>' if others else ''}\n</section>"
    )
