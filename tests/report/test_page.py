"""The page: one file that asks the net for nothing, with every token escaped and every section in its place."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from interp.report import figures
from interp.report.head_report import html_page
from interp.report.page import Markup, Section, escaped, joined, page, table, token
from interp.report.page import figures as side_by_side
from tests.report.synthetic import TOKENS, synthetic_study

HOSTILE = "<script>alert(1)</script>"
TITLES = [
    "The behaviour",
    "Where the answer appears",
    "Which heads write the answer",
    "What the top heads do",
    "Where the information is",
    "Which heads matter",
    "What heads move, and where they look",
    "Kinds of attention",
    "What steps in when the top writer is removed",
    "Do the measures agree",
    "All heads",
    "How this was made",
]


class Outline(HTMLParser):
    """What a browser would see: tags with their attributes, headings, ids, and the text that is shown."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.headings, self.shown, self._inside = [], [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        self._inside.pop()

    def handle_data(self, data):
        if "script" not in self._inside and "style" not in self._inside:
            self.shown.append(data)
        if self._inside and self._inside[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def source():
    return html_page(synthetic_study())


@pytest.fixture(scope="module")
def outline(source):
    return Outline(source)


def test_sections_stand_in_the_order_of_the_field(outline):
    assert [re.sub(r"^\d+\. ", "", heading) for heading in outline.headings] == TITLES


def test_contents_lead_to_every_section(outline):
    ids = {attrs["id"] for tag, attrs in outline.tags if tag == "section"}
    links = {attrs["href"].removeprefix("#") for tag, attrs in outline.tags if tag == "a"}
    assert len(ids) == len(TITLES)
    assert links == ids


def test_page_has_title_language_and_viewport(source, outline):
    assert "<title>Which heads of made-up matter for ioi</title>" in source
    assert ("html", {"lang": "en"}) in outline.tags
    assert any(attrs.get("name") == "viewport" for _, attrs in outline.tags)


def test_nothing_is_fetched(source, outline):
    addresses = [
        attrs[name] for _, attrs in outline.tags for name in ("src", "href", "srcset", "data") if name in attrs
    ]
    assert addresses
    assert all(address.startswith(("#", "data:")) for address in addresses)
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_plotly_stands_in_the_file_once(source):
    assert source.count("* plotly.js v") == 1
    assert len(source.encode()) < 8e6


def test_every_figure_has_a_heading_outside_the_plot(source, outline):
    plots = [attrs for _, attrs in outline.tags if attrs.get("class") == "plot"]
    assert len(plots) == source.count('<script type="application/json">') == source.count("<h3>")
    assert all(attrs["aria-label"] for attrs in plots)
    drawn = [json.loads(one) for one in re.findall(r'<script type="application/json">(.*?)</script>', source)]
    # A title inside the plot would be cut on a narrow screen.
    assert all("text" not in one["layout"]["title"] for one in drawn)


def test_markup_in_tokens_is_escaped_everywhere():
    study = synthetic_study(tokens=[*TOKENS[:2], HOSTILE, *TOKENS[3:]])
    study["clean_text"][0] = study["predicted"][0] = HOSTILE
    study["top_writes"][0, 0] = HOSTILE
    study.attrs["top_prompt"] = study.attrs["command"] = study.attrs["model"] = HOSTILE
    source = html_page(study)
    assert HOSTILE not in source
    assert "<script>alert" not in source
    assert "".join(Outline(source).shown).count(HOSTILE) >= 6


def test_text_is_escaped_and_markup_is_not():
    assert escaped("a < b") == "a &lt; b"
    assert escaped(Markup("<b>a</b>")) == "<b>a</b>"
    assert joined(["<", token("<")]) == '&lt; <span class="token">&lt;</span>'


def test_figure_data_cannot_close_its_script_element():
    study = synthetic_study(tokens=["</script><b>", *TOKENS[1:]])
    figure = figures.layer_position_heatmap(study["patch_resid_pre"], title="t", unit="u")
    assert side_by_side([(figure, "")]).count("</script>") == 1


def test_table_of_numbers_keeps_full_values_for_sorting():
    source = table({"head": ["L0H0", "L0H1"], "effect": [-0.12345678, float("nan")]}, sortable=True)
    assert '<td class="number" data-value="-0.12345678">−0.123</td>' in source
    assert '<td class="number" data-value="">–</td>' in source
    assert "<button>effect</button>" in source


def test_section_without_its_numbers_is_left_out():
    study = synthetic_study().drop_vars(["direct_before", "direct_after", "patch_value"])
    headings = "".join(Outline(html_page(study)).headings)
    assert "steps in" not in headings
    assert "heads move" not in headings
    assert "Kinds of attention" in headings


def test_page_of_no_sections_is_still_a_page():
    assert "<h1>empty</h1>" in page("empty", [], [])
    assert Section("Two words", ()).anchor == "two-words"
