"""Feature dashboards: what the page shows is what the functions behind it find, escaped, in one whole file."""

import html
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import interp
from interp.report.feature_dashboard import dashboard
from interp.report.feature_parts import context_line, feature_parts, overview
from interp.report.feature_reading import described, fires_on
from interp.saes.attribution import feature_attribution
from interp.saes.contexts import feature_contexts
from interp.saes.logit_weights import logit_weights
from interp.saes.sae import SAE
from tests.saes.shaken import transcoder, z_sae

VOID = {"meta", "link", "br"}


class Structure(HTMLParser):
    """Checks that tags close in order, and collects the text outside scripts."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.text: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)


def parsed(page: str) -> Structure:
    structure = Structure()
    structure.feed(page)
    structure.close()
    assert structure.open == []
    return structure


@pytest.fixture
def sae(tiny_gpt2: interp.Model) -> SAE:
    return z_sae(tiny_gpt2, 1)


@pytest.fixture
def tokens(tiny_gpt2: interp.Model) -> torch.Tensor:
    texts = ["Mary <b>x</b> & y", "John <i>y</i> & z", "Anna <u>z</u> & x", "Jack <p>zz</p>& x"]
    rows = [tiny_gpt2.to_tokens(text)[0] for text in texts]
    length = min(map(len, rows))
    return torch.stack([row[:length] for row in rows])


def test_the_page_shows_what_the_functions_behind_it_find(tiny_gpt2, sae, tokens, tmp_path) -> None:
    out = tmp_path / "features.html"
    page = dashboard(tiny_gpt2, sae, tokens, [3, 5], out, n_top=3, n_attributions=1)
    assert page.path == out
    assert out.read_text(encoding="utf-8") == page.html
    assert list(tmp_path.iterdir()) == [out]
    structure = parsed(page.html)
    text = "".join(structure.text)
    contexts = feature_contexts(tiny_gpt2, sae, tokens, [3, 5], n_top=3)
    logits = logit_weights(tiny_gpt2, sae, [3, 5])
    for feature in (3, 5):
        one = contexts.sel(feature=feature)
        assert f"On at {int(one['n_active'])} tokens" in text
        assert f"at most {float(one['max']):.3f}" in text
        for weight in logits["weight"].sel(feature=feature).values.ravel():
            assert f"{weight:.3f}".replace("-", "−") in text
        sequence, position = int(one["sequence"][0]), int(one["position"][0])
        sources = feature_attribution(tiny_gpt2, sae, tokens[sequence], feature, positions=position)
        for source, value in enumerate(sources["attribution"].values[0, 0][: position + 1]):
            shown = html.escape(repr(tiny_gpt2.to_str_tokens(tokens[sequence])[source]))
            assert f'title="{shown}: adds {value:+.3f}"' in page.html
        assert f"pre-activation {float(sources['pre_activation'].squeeze()):.2f}" in text


def test_token_text_is_escaped_and_nothing_is_fetched(tiny_gpt2, sae, tokens) -> None:
    page = dashboard(tiny_gpt2, sae, tokens, [3])
    assert page.path is None
    structure = parsed(page.html)
    assert not {"b", "i", "u"} & set(re.findall(r"<(\w+)[ >]", page.html.partition("<main>")[2]))
    assert all(one.startswith(("#", "data:")) for one in structure.sources)
    assert "<" in structure.text  # the token, as text


def test_jupyter_shows_the_page_in_a_frame_of_its_own(tiny_gpt2, sae, tokens) -> None:
    page = dashboard(tiny_gpt2, sae, tokens, 3)
    shown = page._repr_html_()
    assert len(repr(page)) < 200, "the page itself is not printed"
    assert shown.startswith("<iframe srcdoc=")
    framed = html.unescape(shown.split('srcdoc="')[1].split('" title=')[0])
    base = '<base href="about:srcdoc">'
    assert framed.replace(f"\n{base}", "") == page.html
    assert framed.index("<head>") < framed.index(base) < framed.index("<title>")
    assert base not in page.html


def test_features_are_drawn_among_those_that_are_on(tiny_gpt2, sae, tokens) -> None:
    first, again = (dashboard(tiny_gpt2, sae, tokens, seed=4, n_attributions=0) for _ in range(2))
    assert first.features == again.features
    assert len(first.features) == 10
    assert (feature_contexts(tiny_gpt2, sae, tokens, first.features)["n_active"].values > 0).all()
    sae.b_enc.fill_(-1e6)
    with pytest.raises(ValueError, match="no feature is on"):
        dashboard(tiny_gpt2, sae, tokens)
    assert "Never on in this text." in dashboard(tiny_gpt2, sae, tokens, 2).html


def test_an_sae_without_heads_has_neither_head_shares_nor_sources(tiny_gpt2, tokens) -> None:
    page = dashboard(tiny_gpt2, transcoder(tiny_gpt2, 1), tokens, [1, 2])
    text = "".join(parsed(page.html).text)
    assert "Which heads" not in text
    assert "reads" not in "".join(re.findall(r'class="peak">(.*?)<', page.html))
    assert "raises" in text


def test_bad_input_is_refused_before_any_work(tiny_gpt2, sae, tokens, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="feature 24 is out of range"):
        dashboard(tiny_gpt2, sae, tokens, 24)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        dashboard(tiny_gpt2, sae, tokens, 3, tmp_path / "none" / "page.html")


def test_a_feature_that_is_never_on_has_neither_histogram_nor_contexts(tiny_gpt2, sae, tokens) -> None:
    sae.b_enc[7] = -1e6
    found = described_of(tiny_gpt2, sae, tokens, [7])
    parts = "".join(feature_parts(found, 7))
    assert "How strongly it is on" not in parts
    assert "Which heads it lies in" in parts
    assert 'class="context"' not in parts
    assert "–" in overview(found)


def test_the_token_that_strongest_contexts_share_is_named() -> None:
    peaks = np.array([["x", "on"], ["x", "at"], ["x", "at"], ["x", ""], ["x", "on"]], dtype=object)
    contexts = xr.Dataset(
        {
            "token": (("feature", "context", "offset"), np.stack([peaks, peaks])),
            "sequence": (("feature", "context"), [[7, 3, 4, -1, 5], [-1] * 5]),
        },
        coords={
            "feature": [6, 8],
            "offset": [-1, 0],
            "group": ("context", ["top", "top", "top", "top", "interval 1"]),
        },
    )
    assert fires_on(contexts, 6) == ("at", 2, 3)
    assert fires_on(contexts, 8) is None
    assert fires_on(contexts.isel(context=[0, 1]), 6) == ("on", 1, 2)


def test_earlier_sources_are_one_number(tiny_gpt2, sae, tokens, monkeypatch) -> None:
    monkeypatch.setattr("interp.report.feature_reading.SOURCES_SHOWN", 2)
    one = described_of(tiny_gpt2, sae, tokens, [3]).sel(feature=3).isel(attributed=0)
    sequence, position = int(one["sequence"][0]), int(one["position"][0])
    parts = feature_attribution(tiny_gpt2, sae, tokens[sequence], 3, positions=position)["attribution"].values[0, 0]
    shown = min(2, position + 1)
    last = parts[position + 1 - shown : position + 1]
    np.testing.assert_allclose(one["source_attribution"].values[-shown:], last, atol=1e-5)
    assert float(one["source_earlier"]) == pytest.approx(float(parts[: position + 1 - shown].sum()), abs=1e-6)
    total = float(one["source_earlier"]) + float(np.nansum(one["source_attribution"])) + float(one["source_bias"])
    assert total == pytest.approx(float(one["source_pre_activation"]), abs=1e-4)


def test_signs_stand_for_what_cannot_be_seen() -> None:
    line = context_line(["<i>", "\n\r\t\0"], [0.5, 2.0], lead="2.00", hover='"here"', limit=2.0)
    assert ">&lt;i&gt;</span>" in line
    assert "⏎␍⇥␀" in line
    assert 'title="&quot;here&quot;"' in line
    assert line.count('class="marked"') == 1
    assert line.index('class="marked"') > line.index("&lt;i&gt;")


def described_of(model, sae, tokens, features):
    contexts = feature_contexts(model, sae, tokens, features, n_top=4)
    return described(model, sae, tokens, contexts, n_attributions=2, n_logits=3, progress=False)
