"""What is written about runs: report.md, report.html and compare, from config.yaml and metrics.jsonl alone."""

import html.parser
import json
import math
import re
import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import browser
import pytest
from played_runs import BATCH, config, entry, lines, write_run

from sae_engine import cli
from sae_engine.reports import figures, run
from sae_engine.reports.compare import compare
from sae_engine.reports.figures import Axis, Point, Series, curves, frontier, shares, short
from sae_engine.reports.page import Code, Figures, Folded, Heading, Legend, Page, Table, Text, Tiles
from sae_engine.reports.reading import distinct, read_run

SWEEP = [entry(k, layer=layer) for layer in (2, 3) for k in (16, 32, 64)]
VOID = {"meta", "br", "hr", "img", "link"}


class Wellformed(html.parser.HTMLParser):
    """Every element is closed; what it holds is kept."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def reported(folder):
    md, page = (path.read_text(encoding="utf-8") for path in run.write(folder))
    return md, page


def svgs(page):
    return [ElementTree.fromstring(text) for text in re.findall(r"<figure>(<svg.*?</svg>)</figure>", page)]


def titled(page, title):
    """The figure that is called so."""
    (found,) = [svg for svg in svgs(page) if svg.get("aria-label") == title]
    return found


def elements(svg, tag):
    return svg.findall(f".//{{http://www.w3.org/2000/svg}}{tag}")


# --------------------------------------------------------------------------------------------- of one run


def test_a_report_says_what_was_trained_and_how_it_ended(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "gpt2", SWEEP)
    assert [path.name for path in run.write(folder)] == ["report.md", "report.html"]
    md, page = reported(folder)
    found = Wellformed(page)
    last = lines(SWEEP)[-1]
    for sae in SWEEP:
        numbers = [f"{last[sae['name'] + '/evaluation/' + key]:.4f}" for key in ("fvu", "ce_recovered", "ce_spliced")]
        (row,) = [line for line in md.splitlines() if line.startswith(f"| {sae['name']} ")]
        cells = [cell.strip() for cell in row.split("|")][1:-1]
        assert cells[:6] == [sae["name"], sae["hook_name"], f"topk, k {sae['k']}", "2,048", f"{sae['k']}.0", numbers[0]]
        assert cells[6:8] == numbers[1:]
        assert set(cells) <= set(found.words)  # the page has the same
    assert "The run is finished." in md
    assert "Without an autoencoder the cross-entropy is 3.1000, with zeros 9.4000." in md
    code = md.partition("```python\n")[2].partition("```")[0]
    compile(code, "report.md", "exec")
    assert 'se.SparseAutoencoder.from_pretrained(f"runs/gpt2/sae/{n}")' in code
    assert all(f'"{sae["name"]}",' in code for sae in SWEEP)
    shell = md.partition("```console\n")[2].partition("```")[0].splitlines()
    taken = []
    for command in (cli.evaluate, cli.push):
        monkeypatch.setattr(command, "run", lambda args: taken.append(args.sae) or 0)
    assert [cli.main(shlex.split(line)[1:]) for line in shell] == [0, 0]  # the command line takes what it says to type
    assert taken == [[f"runs/gpt2/sae/{SWEEP[0]['name']}"]] * 2
    assert "*In the HTML page: FVU against L0; Cross-entropy recovered against L0.*" in md
    assert {"tokens given to the language model", "264,000", "left out: norm too large", "180"} <= set(found.words)
    assert (folder / "report.html").read_text() == page  # written again, the bits are the same


def test_a_report_holds_everything_and_runs_nothing(tmp_path):
    """No script, nothing from elsewhere, and a policy that would refuse both."""
    _, page = reported(write_run(tmp_path / "run", SWEEP))
    found = Wellformed(page)
    tags = {tag for tag, _ in found.seen}
    assert not tags & {"script", "link", "img", "iframe", "object", "image", "use"}
    attributes = {name for _, some in found.seen for name in some}
    assert not [name for name in attributes if name in ("src", "href") or name.startswith("on")]
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)\S+|@import|url\(", page) == []
    policy = [a["content"] for tag, a in found.seen if tag == "meta" and "http-equiv" in a]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_frontiers_lie_where_the_numbers_are(tmp_path):
    _, page = reported(write_run(tmp_path / "run", SWEEP))
    last = lines(SWEEP)[-1]
    for title, key in (("FVU against L0", "fvu"), ("Cross-entropy recovered against L0", "ce_recovered")):
        svg = titled(page, title)
        dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in elements(svg, "circle")]
        values = [last[f"{sae['name']}/evaluation/{key}"] for sae in SWEEP]
        assert len(dots) == 6
        order = sorted(range(6), key=lambda n: -dots[n][1])  # y grows downwards
        assert order == sorted(range(6), key=values.__getitem__)
        ks = [sae["k"] for sae in SWEEP]
        assert sorted(range(6), key=lambda n: (dots[n][0], n)) == sorted(range(6), key=lambda n: (ks[n], n))
        assert len(elements(svg, "path")) == 2  # one a layer
        texts = [text.text for text in elements(svg, "text")]
        assert {"2 k16", "3 k64"} <= set(texts)


def test_one_autoencoder_has_keys_without_its_name(tmp_path):
    folder = write_run(tmp_path / "one", [entry(32)])
    md, page = reported(folder)
    value = lines([entry(32)])[-1]["evaluation/fvu"]
    assert f"{value:.4f}" in md
    titles = [svg.get("aria-label") for svg in svgs(page)]
    assert titles[:6] == ["FVU against L0", "Cross-entropy recovered against L0", "FVU, held-out text",
                          "Cross-entropy recovered, held-out text", "Loss", "Squared error"]  # fmt: skip
    named = [{f"{entry(32)['name']}/{key}" if "/" in key else key: value for key, value in line.items()}
             for line in lines([entry(32)], timed=False)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in named))
    assert f"{value:.4f}" in reported(folder)[0]  # nor does it matter if they have it
    assert titled(reported(folder)[1], "Squared error") is not None


def test_a_killed_run_has_a_report(tmp_path):
    """A torn last line, tokens that are missing, the way on."""
    folder = write_run(tmp_path / "run", SWEEP, count=25)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 26, "tok')
    md, page = reported(folder)
    Wellformed(page)
    assert "The run ends at 102.4k of 245.8k tokens (42%): it was stopped, or is still going on." in md
    assert "`sae-engine train --resume runs/run`" in md
    assert "once the run has ended" in md


def test_before_the_first_evaluation_numbers_of_training_stand_in(tmp_path):
    folder = write_run(tmp_path / "run", SWEEP, count=3)
    md, page = reported(folder)
    assert "There has been no evaluation yet" in md
    value = 1 - lines(SWEEP, count=3)[-1][f"{SWEEP[0]['name']}/metrics/explained_variance"]
    assert f"{value:.4f}" in md
    assert "against L0" not in page
    (folder / "metrics.jsonl").write_text("")
    md, page = reported(folder)
    assert "Nothing has been logged yet." in md
    assert svgs(page) == []


def test_numbers_that_are_none_leave_gaps(tmp_path):
    folder = write_run(tmp_path / "run", [entry(8)])
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in found[20:30]:
        line["losses/mse_loss"] = None
    found[-1]["evaluation/ce_recovered"] = None
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    md, page = reported(folder)
    assert len(elements(titled(page, "Squared error"), "path")) == 2
    assert "nan" not in page.lower().replace("nan-", "")
    assert re.search(r"\| +– \|", md)


def test_whatever_a_name_is_it_is_text(tmp_path):
    evil = '<script>alert("1")</script>&`|'
    saes = [{**entry(8), "name": evil}, entry(16)]
    made = config(saes)
    made["model"]["model_from_pretrained_kwargs"] = {"token": "hf_secret", "revision": evil}
    folder = write_run(tmp_path / "run", saes, made=made)
    md, page = reported(folder)
    found = Wellformed(page)
    assert "script" not in {tag for tag, _ in found.seen}
    assert any(evil.replace("`", "") in words or evil in words for words in found.words)
    assert "hf_secret" not in md + page


def test_every_number_of_the_last_lines_is_there(tmp_path):
    folder = write_run(tmp_path / "run", [entry(8)])
    with (folder / "metrics.jsonl").open("a") as file:
        line = {"step": 61, "tokens": 61 * BATCH, "details/skipped": 7, "losses/orthogonality": 0.125}
        file.write(json.dumps(line) + "\n")
    md, page = reported(folder)
    for word in ("details/skipped", "losses/orthogonality", "0.125"):
        assert word in md
        assert word in page


def test_where_the_time_went(tmp_path):
    md, page = reported(write_run(tmp_path / "run", [entry(8)]))
    found = lines([entry(8)])
    parts = {key: math.fsum(line[key] for line in found) for key in found[0] if "/seconds/" in key}
    total = math.fsum(parts.values())
    widths = [float(bar.get("width")) for bar in elements(titled(page, "Where the time went"), "rect")]
    expected = sorted((1000 * value / total for value in parts.values()), reverse=True)
    assert widths == pytest.approx(expected, abs=0.01)  # as they are written, with two decimal places
    assert f"language model {100 * parts['performance/seconds/language_model'] / total:.1f} %" in page
    assert "The step waited for activations in 4.0 % of the time." in md


@pytest.mark.parametrize(("file", "content", "match"), [
    ("config.yaml", None, r"is no run folder: it has no config\.yaml"),
    ("metrics.jsonl", None, r"is no run folder: it has no metrics\.jsonl"),
    ("config.yaml", "saes: [", r"config\.yaml"),
    ("config.yaml", "- 1", r"config\.yaml: no configuration of a run"),
    ("config.yaml", "saes: []", r"'saes' must be a list of autoencoders"),
    ("metrics.jsonl", "damage\n", r"metrics\.jsonl, line 1"),
])  # fmt: skip
def test_what_is_no_run_is_refused(tmp_path, file, content, match):
    folder = write_run(tmp_path / "run", [entry(8)])
    (folder / file).unlink() if content is None else (folder / file).write_text(content)
    with pytest.raises(ValueError, match=match):
        run.write(folder)
    with pytest.raises(FileNotFoundError, match="no run folder at"):
        run.write(tmp_path / "nowhere")


@pytest.mark.skipif(browser.CHROMIUM is None, reason=browser.WHY_NOT)
def test_a_browser_shows_it(tmp_path):
    folder = write_run(tmp_path / "run", SWEEP)
    _, page = reported(folder)
    seen = browser.look(folder / "report.html")
    assert seen.console == []
    assert browser.rows_seen(seen.png) > 300
    words = Wellformed(seen.dom).words  # every element of the figures is where it was written
    assert [w for w in words if w.strip()] == [w for w in Wellformed(page).words if w.strip()]


# ------------------------------------------------------------------------------------------------- several


def test_runs_are_compared(tmp_path, capsys):
    first = write_run(tmp_path / "first", [entry(16), entry(64)])
    second = write_run(tmp_path / "second", [entry(32)], count=30)
    assert cli.main(["compare", str(first), str(second), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")][1:-1] for line in printed.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows] == ["run", "first", "first", "second"]
    assert [row[5] for row in rows[1:]] == ["245.8k", "245.8k", "122.9k so far"]
    last = lines([entry(32)], count=30)[-1]
    assert rows[3][7:9] == [f"{last['evaluation/fvu']:.4f}", f"{last['evaluation/ce_recovered']:.4f}"]
    assert "Compare with care: these have different numbers of tokens trained on" in printed
    assert printed.splitlines()[-2:] == [str(tmp_path / "out" / name) for name in ("compare.md", "compare.html")]
    page = (tmp_path / "out" / "compare.html").read_text()
    Wellformed(page)
    svg = titled(page, "FVU against L0")
    assert {"first k16", "first k64", "second k32"} <= {text.text for text in elements(svg, "text")}
    assert len({dot.get("fill") for dot in elements(svg, "circle")}) == 2  # a colour a run


def test_what_does_not_compare_is_said(tmp_path):
    same = write_run(tmp_path / "a", [entry(16)])
    assert "with care" not in str(compare([same]))
    other = write_run(tmp_path / "b", [entry(16, layer=3)], made=config([entry(16, layer=3)], dataset_path="fineweb"))
    text = str(compare([same, other]))
    assert "different texts (stdlib, fineweb) and different sites (blocks.2.hook_resid_pre, blocks.3" in text


def test_an_autoencoder_without_an_evaluation_is_left_out_and_named(tmp_path):
    folder = write_run(tmp_path / "run", [entry(16), entry(64)])
    found = [{key: value for key, value in line.items() if not key.startswith(f"{entry(64)['name']}/evaluation/")}
             for line in lines([entry(16), entry(64)])]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    comparison = compare([folder])
    assert [row.trained.name for row in comparison.rows] == [entry(16)["name"]]
    assert f"left out: run/{entry(64)['name']}" in str(comparison)


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    folders = [write_run(tmp_path / part / "run", [entry(16)]) for part in "ab"]
    assert [row.label for row in compare(folders).rows] == list(map(str, folders))


def test_compare_refuses(tmp_path, capsys):
    folder, early = write_run(tmp_path / "run", [entry(8)]), write_run(tmp_path / "early", [entry(8)], count=3)
    for given, said in [
        ([folder, tmp_path / "run" / ".." / "run"], "the same run was given twice"),
        ([tmp_path / "no"], "no run folder at"),
        ([tmp_path], "is no run folder: it has no config.yaml and no metrics.jsonl"),
        ([folder, early], "early: the run has not been evaluated yet"),
    ]:  # fmt: skip
        assert cli.main(["compare", *map(str, given)]) == 1
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    with pytest.raises(ValueError, match="at least one run"):
        compare([])
    with pytest.raises(TypeError, match="folders must be a sequence"):
        compare(str(folder))


# ------------------------------------------------------------------------------------------ figures, pages


def test_ticks_are_round_and_inside():
    for low, high in ((0, 1), (0.0895, 0.2466), (0.9724, 0.9737), (20, 200), (3, 3), (-5, 1e6), (1e-9, 2e-9), (0, 0),
                      (-2e-4, -1e-4)):  # fmt: skip
        axis = Axis([low, high], 0, 100)
        places = [axis(tick) for tick in axis.ticks]
        assert 3 <= len(places) <= 8, (low, high)
        assert places == sorted(places)
        assert all(-1e-6 <= place <= 100 + 1e-6 for place in places)
        assert 0 <= axis(low) <= axis(high) <= 100
        assert len(set(axis.written())) == len(axis.ticks)
        assert all(re.fullmatch(r"-?\d+(\.\d+)?(e-\d+|[kMGT])?", text) for text in axis.written()), axis.written()
    for low, high in ((1, 1000), (16, 128), (1e-5, 1e5), (95, 105), (7, 7)):
        axis = Axis([low, high], 0, 100, log=True)
        assert 2 <= len(axis.ticks) <= 8, (low, high)
        assert all(-1e-6 <= axis(tick) <= 100 + 1e-6 for tick in axis.ticks)
    assert axis(7) == pytest.approx(50)


def test_logarithms_are_for_what_spans_much():
    def ticks(ys):
        svg = ElementTree.fromstring(curves("c", [Series("a", range(len(ys)), ys, "#000")], x_label="x"))
        return {text.text for text in elements(svg, "text")}

    assert {"0.1", "1", "10", "100"} <= ticks([0.1, 100.0])
    assert "100" not in ticks([10.0, 20.0])
    assert ticks([0.0, 100.0]) >= {"0", "50", "100"} or ticks([0.0, 100.0]) >= {"0", "20", "100"}


def test_long_curves_keep_their_spikes():
    ys = [1.0] * 100_000
    ys[31_415], ys[92_653] = 9.0, -9.0
    svg = ElementTree.fromstring(curves("c", [Series("a", range(len(ys)), ys, "#000")], x_label="x"))
    (path,) = elements(svg, "path")
    points = [tuple(map(float, pair.split())) for pair in path.get("d")[1:].split("L")]
    assert len(points) <= figures.MOST_POINTS + 2
    heights = sorted({y for _, y in points})
    assert len(heights) == 3  # both spikes
    assert [x for x, _ in points] == sorted(x for x, _ in points)


def test_nothing_to_show_is_no_figure():
    assert curves("c", [Series("a", [1, 2], [math.nan, math.inf], "#000")], x_label="x") is None
    assert frontier("f", [Point("a", 1.0, math.nan, "#000", "")], x_label="x", y_label="y") is None
    assert ElementTree.fromstring(shares("s", [("a", 0.0, "#000")])) is not None


def test_labels_cover_nothing():
    points = [Point(f"label {n}", 1 + n / 50, n / 50, "#000", "") for n in range(10)]
    svg = ElementTree.fromstring(frontier("f", points, x_label="x", y_label="y"))
    boxes = []
    for text in elements(svg, "text"):
        if (text.text or "").startswith("label"):
            x, y = float(text.get("x")), float(text.get("y"))
            boxes.append((x, y - 10, x + figures.CHARACTER * len(text.text), y + 2))
    assert len(boxes) >= 3
    for n, a in enumerate(boxes):
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:n])


@pytest.mark.parametrize(("number", "text"), [
    (0, "0"), (5, "5"), (1500, "1.5k"), (999_960, "1M"), (1e6, "1M"), (4e-4, "4e-4"), (-0.25, "-0.25"),
    (123456, "123.5k"), (0.1 + 0.2, "0.3"), (2.5e9, "2.5G"),
])  # fmt: skip
def test_numbers_are_short(number, text):
    assert short(number) == text


@pytest.mark.parametrize(("names", "short"), [
    (["a-k16", "a-k32"], ["k16", "k32"]), (["x.2.pre-k8", "x.3.pre-k8"], ["2", "3"]),
    (["x.2-k8", "x.3-k16"], ["2 k8", "3 k16"]), (["one"], ["one"]), (["a", "a"], ["a", "a"]),
    (["m-topk-k8", "m-gated"], ["topk-k8", "gated"]), (["run", "run-2"], ["run", "run-2"]),
    (["a b", "a-b"], ["a b", "a-b"]),
])  # fmt: skip
def test_names_are_told_apart(names, short):
    assert distinct(names) == short


def test_a_page_is_the_same_in_both_forms():
    page = Page("Title", "It runs `code`.", [
        Heading("Part"), Text("Words with `code` & <signs>."), Tiles([("share", "12 %")]),
        Table(["name", "n"], [["a|b", "1"], ["c", "22"]], "lr", [("#000", ""), ("#111", "2 3")]),
        Legend([("curve", ("#000", ""))]), Figures(["<svg></svg>"]), Code("x < 1", "python"),
        Folded("More", [Text("inside")]),
    ])  # fmt: skip
    assert page.markdown() == (
        "# Title\n\nIt runs `code`.\n\n## Part\n\nWords with `code` & <signs>.\n\n"
        "- share: **12 %**\n\n"
        "| name |   n |\n|------|----:|\n| a\\|b |   1 |\n| c    |  22 |\n\n"
        "```python\nx < 1\n```\n\n### More\n\ninside\n"
    )
    found = Wellformed(page.html())
    words = {"Title", "Part", "code", "12 %", "share", "a|b", "22", "curve", "x < 1", "More", "inside"}
    assert words <= set(found.words)
    assert " & <signs>." in "".join(found.words)


def test_a_run_is_read_as_it_was_written(tmp_path):
    saes = [{**entry(16), "hook_name_out": "blocks.2.hook_mlp_out"}, {**entry(8), "architecture": "jumprelu"}]
    record = read_run(write_run(tmp_path / "run", saes))
    first, second = record.trained
    assert first.site == "blocks.2.hook_resid_pre → blocks.2.hook_mlp_out"
    assert (first.settings, first.d_sae) == ("k 16", 2048)
    assert second.architecture == "jumprelu"
    assert record.total_tokens == 60 * BATCH
    assert Path(record.folder) == tmp_path / "run"
