"""The HTML page: whole in itself, escaped, drawn, and readable in a browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest

from rayrm.evaluation import figures
from rayrm.evaluation.drawing import new_axes, save_figure, to_svg
from rayrm.evaluation.preference_report import build_report, measure_set, summary_table
from rayrm.evaluation.preferences import BootstrapConfig, Pairs
from rayrm.evaluation.report import Card, Cards, Report, Section, Table, Text, Tile, format_table, render, write_report

BOOTSTRAP = BootstrapConfig(num_resamples=50)
VOID = {"meta", "link", "br", "hr", "img", "input", "use", "path"}


class Page(HTMLParser):
    """What a page holds: its elements, its addresses and its text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.addresses, self.texts, self.ids, self.open = [], [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "srcset")]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def message(text, role="assistant"):
    return [{"role": role, "content": text}]


def rewarded_rows(num=60):
    rng = np.random.default_rng(0)
    rows = []
    for index in range(num):
        src, tgt = [("en", "de"), ("uk", "en")][index % 2]
        rows.append(
            {
                "id": f"row-{index}",
                "group": f"g{index // 2}",
                "prompt": message("Translate: <script>alert(1)</script>", "user"),
                "chosen": message("Двоє хлопців грають" + "!" * int(rng.integers(0, 9))),
                "rejected": message("Двоє <b>грають</b>" + "!" * int(rng.integers(0, 9))),
                "src_lang": src,
                "tgt_lang": tgt,
                "lang": tgt,
                "subset": "captions",
                "chosen_reward": float(rng.normal(0.8)),
                "rejected_reward": None if index == 7 else float(rng.normal(0.0)),
            }
        )
    return pa.Table.from_pylist(rows)


@pytest.fixture(scope="module")
def html():
    sets = [measure_set(name, rewarded_rows(), BOOTSTRAP) for name in ("preferences", "grammar")]
    return render(build_report(sets, "a model on 60 preferences.", {"model": "some/model"}, BOOTSTRAP, 3))


def test_page_is_whole_in_itself(html):
    page = Page(html)
    assert page.open == []
    assert page.tags.count("svg") == 8
    assert "script" not in page.tags
    assert all(address.startswith(("#", "data:")) for address in page.addresses), page.addresses
    assert not re.search(r"https?://|@import|url\((?!#)", html)


def test_sections_and_numbers_stand_on_the_page(html):
    text = " ".join(" ".join(Page(html).texts).split())
    for title in ("Accuracy", "Figures", "Examples", "Worst misses", "Most confident hits", "grammar"):
        assert title in text
    assert "59" in text
    assert "subset captions" in text
    assert "some/model" in text


def test_text_is_escaped(html):
    assert "&lt;script&gt;alert(1)" in html
    assert "<b>грають" not in html


def test_figures_take_the_page_colour_and_do_not_share_ids(html):
    assert "#010203" not in html
    assert "currentColor" in html
    first, second = (figures.draw_gaps(np.array(gaps)) for gaps in ([1.0, -1.0, 2.0], [3.0, -1.0, 0.5]))
    assert not set(Page(first).ids) & set(Page(second).ids)
    references = set(re.findall(r'(?:url\(#|href="#)([\w-]+)', first))
    assert references and references <= set(Page(first).ids)


def test_a_figure_is_not_blown_up_beyond_its_size():
    figure, _ = new_axes(3.0, 2.0)
    assert to_svg(figure).startswith('<svg style="max-width: 294px"')


def test_figures_are_written_as_files_to_use_elsewhere(tmp_path):
    figure, axes = new_axes(3.0, 2.0)
    axes.set_xlabel("accuracy")
    paths = [tmp_path / "figures" / name for name in ("a.png", "a.svg")]
    assert save_figure(figure, str(tmp_path / "figures" / "a")) == list(map(str, paths))
    before = [path.read_bytes() for path in paths]
    assert before[0].startswith(b"\x89PNG") and b"accuracy" in before[1] and b"currentColor" not in before[1]
    save_figure(figure, str(tmp_path / "figures" / "a"))
    assert [path.read_bytes() for path in paths] == before


def test_wide_tables_are_dense_and_keep_their_first_column_in_sight():
    report = Report("T", "", [], {}, [Section("S", [Table(list("abcdefg"), []), Table(["a"], [])])])
    assert render(report).count('<table class="dense">') == 1


def test_any_report_can_be_built_from_its_parts():
    table = Table(["pair", "n"], [["en-de", "1,000"], ["all", "7"]], caption="rows")
    cards = Cards("Examples", [Card("one", [("said", "a & b", "good", "1.0")])])
    report = Report("T", "lead", [Tile("l", "9")], {}, [Section("S", [Text("words"), table, cards])])
    page = render(report)
    assert "a &amp; b" in page and "<caption>rows</caption>" in page
    assert format_table(table) == "pair       n\n------------\nen-de  1,000\nall        7"


def test_summary_table_has_a_line_for_each_slice():
    rows = rewarded_rows()
    table = summary_table(measure_set("x", rows, BOOTSTRAP).slices, 0.9)
    assert [row[0] for row in table.rows] == ["all", "en-de", "uk-en", "subset captions"]
    assert "90% interval" in table.header
    assert table.rows[0][1] == "59" and table.rows[0][-1] == "1"


def test_bins_keep_equal_values_together():
    found = figures.bins(np.array([0.0, 0, 0, 1, 2, 3]), np.array([1.0, 0, 0, 1, 1, 0]), 3)
    assert [(b.low, b.high, b.num_rows) for b in found] == [(0, 0, 3), (1, 1, 1), (2, 3, 2)]
    assert found[0].accuracy == pytest.approx(1 / 3)
    assert [b.accuracy for b in found[1:]] == [1.0, 0.5]


def test_calibration_of_hand_made_gaps():
    # σ(ln 3) = 0.75: 30 of 40 rows are right, so the model is calibrated; ties are at 0.5 and count half.
    gaps = np.concatenate([np.full(30, np.log(3)), np.full(10, -np.log(3)), np.zeros(40)])
    found = figures.calibration(gaps, num_bins=2)
    assert [(round(b.mean, 6), round(b.accuracy, 6), b.num_rows) for b in found] == [(0.5, 0.5, 40), (0.75, 0.75, 40)]


def test_by_length_splits_shorter_equal_longer():
    extra = np.array([-2.0, -2, 0, 5, 5])
    none = np.zeros(5, dtype=np.int64)
    found = figures.by_length(Pairs(np.array([1.0, -1, 1, 1, 0]), extra, none, none.astype(str), none.astype(str)))
    assert {name: [(b.low, b.accuracy) for b in side] for name, side in found.items()} == {
        "shorter": [(2, 0.5)],
        "equal": [(0, 1.0)],
        "longer": [(5, 0.5)],
    }


def test_wilson_interval():
    # Wilson's interval of 8 in 10, from the closed formula.
    low, high = figures.wilson(0.8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)


def test_page_in_a_browser(html, tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium on this machine")
    path = tmp_path / "report.html"
    path.write_text(html + "<script>document.title = 'width ' + document.documentElement.scrollWidth</script>")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --window-size=600,900 --dump-dom"
    command = [chromium, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    width = int(re.search(r"<title>width (\d+)</title>", dom)[1])
    assert width <= 600, "the page scrolls sideways"
    assert dom.count("<svg") == 8


def test_report_is_written_whole(tmp_path):
    report = Report("T", "Ї", [], {}, [])
    write_report(str(tmp_path / "a" / "report.html"), report)
    assert (tmp_path / "a" / "report.html").read_text(encoding="utf-8") == render(report)
