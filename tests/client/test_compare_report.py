"""What a comparison's reports show, and which method they recommend."""

import json
import re
from html.parser import HTMLParser

import pytest
from hotswap_client.cli.compare import plots, story, tables, units
from hotswap_client.cli.compare.html import page
from hotswap_client.cli.compare.markdown import markdown
from hotswap_client.cli.compare.options import Limits
from hotswap_client.cli.compare.plots import Point, pareto_front
from hotswap_client.cli.compare.recommend import recommend
from hotswap_client.cli.compare.results import as_json, overhead
from support.comparing import all_methods, comparison, evaluation, latencies, method

VOID = {"meta", "br", "img", "link", "hr", "input"}


@pytest.fixture(scope="module")
def whole():
    return all_methods()


@pytest.fixture(scope="module")
def pictures(whole):
    return plots.pictures(whole)


class Page(HTMLParser):
    """Elements that are open, and addresses that a browser would ask for."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.addresses.append(value)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_html_is_whole_and_asks_no_network(whole, pictures):
    html = page(whole, recommend(whole, Limits()), pictures)
    parsed = Page()
    parsed.feed(html)
    assert parsed.open == []
    assert all(address.startswith("#") for address in parsed.addresses)
    assert "<script" not in html
    assert not re.search(r"@import|url\((?!#)", html)
    assert html.count("<svg") == len(pictures) == 6
    for table in tables.all_tables(whole):
        assert table.title in parsed.text
        for row in table.rows:
            assert all(cell in parsed.text for cell in row)
    for result in whole.methods:
        assert result.evaluation.sample in parsed.text  # escaped, and as it was
    assert "an answer <of>" not in html


def test_the_markdown_has_the_same_numbers_and_the_pictures_beside_it(whole, pictures):
    text = markdown(whole, recommend(whole, Limits()), pictures)
    for table in tables.all_tables(whole):
        for row in table.rows:
            assert f"| {' | '.join(row)} |" in text
    for line in text.splitlines():
        if line.startswith("| base"):
            assert line.count("|") in (8, 11, 13)
    for picture in pictures:
        assert f"]({picture.name}.png)" in text
    assert text.rstrip().splitlines()[-1].startswith("- ")
    assert "## Recommendation" in text


def test_the_json_keeps_what_depends_on_time_apart(whole):
    content = as_json(whole, recommend(whole, Limits()).as_json())
    assert json.loads(json.dumps(content)) == json.loads(json.dumps(content))
    assert [row["method"] for row in content["methods"]] == [result.name for result in whole.methods]
    lora = content["methods"][0]
    assert lora["accuracy"] == 0.92
    assert lora["checkpoint_bytes"] == 19_600_000
    assert lora["forgetting"] == {"text_logprob_change": -0.12, "knowledge_change": 0.0}
    assert lora["times"] == {"training_seconds": 100.0, "peak_memory_bytes": {"host": 1_900_000_000}}
    assert lora["latency"][1]["between_tokens_overhead"]["median"] == 0.19
    assert [entry["path"] for entry in lora["latency_merged"]] == ["merged", "merged"]
    assert content["methods"][1]["latency_merged"] is None


def test_every_row_of_a_table_is_as_long_as_its_head(whole):
    for table in tables.all_tables(whole):
        assert {len(row) for row in table.rows} == {len(table.headings)}
    assert len(tables.overview(whole).rows) == 1 + len(whole.methods) + 1  # the base, and LoRA merged
    assert len(tables.latencies(whole).rows) == 2 * (1 + len(whole.methods) + 1)


def test_reports_are_written_beside_one_another(tmp_path, whole, pictures):
    story.write(tmp_path, whole, recommend(whole, Limits()))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*story.REPORTS, *(f"{picture.name}.png" for picture in pictures)}
    for picture in pictures:
        assert (tmp_path / f"{picture.name}.png").read_bytes() == picture.png  # the same each time


def test_a_folder_that_cannot_be_written_is_named(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(plots, "pictures", lambda _: ())
    with pytest.raises(story.CompareError, match=r"^--output: .*gone"):
        story.write(tmp_path / "gone", whole, recommend(whole, Limits()))


def test_pareto_front_has_what_nothing_beats():
    cheap, good, beaten, equal = (
        Point("cheap", "prefix", 0.0, 0.4),
        Point("good", "lora", 0.2, 0.9),
        Point("beaten", "ia3", 0.3, 0.5),
        Point("equal", "full", 0.25, 0.9),
    )
    assert pareto_front([equal, beaten, good, cheap]) == [cheap, good]


def test_plots_of_one_method_that_costs_nothing_can_be_drawn():
    found = plots.pictures(comparison(method("lora", over=0.0, right=0, gigabytes=1)))
    assert all(picture.svg.rstrip().endswith("</svg>") for picture in found)


def test_the_best_within_the_limits_is_recommended(whole):
    free = recommend(whole, Limits())
    assert free.method in ("lora", "bottleneck")  # as good as one another; the others are worse
    assert set(free.scores) == {"lora", "bottleneck"}
    assert free.scores[free.method] == min(free.scores.values())
    assert free.excluded["prefix"] == "is worse at the task: 36%, not 94%"

    small = recommend(whole, Limits(checkpoint=1_000_000))
    assert small.method == "ia3"
    assert small.excluded["lora"] == "has a checkpoint of 19.6 MB (--max-checkpoint 1 MB)"

    quick = recommend(whole, Limits(latency_overhead=0.04))
    assert (quick.method, quick.path) == ("lora", "merged")
    assert "takes +12% time between tokens (--max-latency-overhead 4%)" in quick.excluded["bottleneck"]
    assert any("merged into the base" in reason for reason in quick.reasons)

    lean = recommend(whole, Limits(memory=1_700_000_000))
    assert lean.method == "qlora"
    assert lean.excluded["full"] == "trains in 3.4 GB (--memory 1.7 GB)"


def test_limits_weigh_among_equals():
    equals = comparison(
        method("lora", over=0.09, megabytes=8),
        method("ia3", over=0.01, megabytes=9),
    )
    assert recommend(equals, Limits(latency_overhead=0.1)).method == "ia3"
    assert recommend(equals, Limits(checkpoint=9_500_000, latency_overhead=10.0)).method == "lora"


def test_forgetting_weighs_among_equals():
    forgetful = method("bottleneck", over=0.1, text=-4.0)
    assert recommend(comparison(forgetful, method("lora", over=0.1)), Limits()).method == "lora"


def test_full_is_said_to_need_a_server_of_its_own():
    found = recommend(comparison(method("full", right=50, megabytes=500), method("ia3", right=5)), Limits())
    assert (found.method, found.path) == ("full", "own")
    assert any("a server of its own" in reason for reason in found.reasons)


@pytest.mark.parametrize(
    ("limits", "methods", "said"),
    [
        (Limits(checkpoint=1), [method("lora")], "loosen the one that is named"),
        (Limits(), [method("lora", right=0, answer=-1.0)], "train for longer"),
    ],
)
def test_nothing_is_recommended_where_nothing_fits(limits, methods, said):
    found = recommend(comparison(*methods), limits)
    assert found.method is None
    assert said in found.reasons[0]
    assert "lora" in found.excluded
    assert "None" in markdown(comparison(*methods), found, ())
    assert "none of them" in page(comparison(*methods), found, ())


def test_likelihood_decides_where_nobody_is_right():
    undecided = comparison(
        method("lora", right=0, answer=-0.5),
        method("prefix", right=0, answer=-0.1),
        base=evaluation(0, answer=-2),
    )
    assert recommend(undecided, Limits()).method == "prefix"


def test_overhead_is_the_largest_and_never_under_nothing():
    assert overhead(latencies(-0.2)) == 0
    assert overhead(latencies(0.1) | {8: latencies(0.3)[8]}) == pytest.approx(0.3)


def test_numbers_as_people_read_them():
    assert [units.bytes_of(size) for size in (12, 1500, 19_632_000, 538e6, 1.92e9)] == [
        "12 B",
        "1.5 kB",
        "19.6 MB",
        "538 MB",
        "1.92 GB",
    ]
    minus = "\N{MINUS SIGN}"
    assert [units.signed_share(value) for value in (0.121, -0.03, 0.001, -0.001)] == [
        "+12%",
        f"{minus}3%",
        "0%",
        "0%",
    ]
    assert [units.signed(value) for value in (0.12, -0.5, -0.0001)] == ["+0.120", f"{minus}0.500", "0.000"]
    assert [units.percent(value) for value in (100.0, 3.5, 0.031)] == ["100%", "3.50%", "0.031%"]
    assert [units.milliseconds(value) for value in (0.0123, 0.4)] == ["12.3", "400"]
    assert units.duration(75.2) == "1 min 15 s"
