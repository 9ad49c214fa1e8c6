"""The page: groups that may share a Pareto, frontiers, refusals, and the page itself in a real browser."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from page_case import PLAN, make_point, write_points
from record_factory import make_arrays, make_record

from sinkstream.cli import main
from sinkstream.matrix.record import PointRecord, load_points, point_delta
from sinkstream.records.blocks import Blocks
from sinkstream.show.table import Table
from sinkstream.studies.recall.record import RecallRecord

LIBRARIES = ("altair", "vl_convert", "moocore", "jinja2")
if absent := [name for name in LIBRARIES if importlib.util.find_spec(name) is None]:
    pytest.skip(f"the extra `report` is not installed: {', '.join(absent)}", allow_module_level=True)

from sinkstream.report.answers import speed_tables  # noqa: E402
from sinkstream.report.page import charts  # noqa: E402
from sinkstream.report.page.build import latex, origins, read_evidence, write_page  # noqa: E402
from sinkstream.report.page.groups import Group, frontier, groups_of  # noqa: E402
from sinkstream.report.page.story import sections  # noqa: E402
from sinkstream.report.page.windows import window_pictures  # noqa: E402

RESULTS = Path(__file__).resolve().parents[2] / "results"
WIDTHS = {"laptop": (1366, 768), "phone": (390, 844)}


def points(folder, **more):
    """All rows of the plan as records that were read back."""
    for at in range(len(PLAN)):
        PointRecord.write(make_point(at, **more), folder)
    return load_points(folder)


def test_the_frontier_is_what_nothing_beats():
    """Against the definition, over random points: no other point is as good on both axes and better on one."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 12, (2, 60))
    beaten = [any((a <= x[i]) & (b <= y[i]) & ((a < x[i]) | (b < y[i])) for a, b in zip(x, y)) for i in range(60)]
    found = frontier(x, y)
    assert (found == ~np.array(beaten)).all()
    assert 0 < found.sum() < 60


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": "wikitext"}, "text is 'pg19' and 'wikitext'"),
        ({"model": "neox"}, "model is 'SmolLM2-135M' and 'neox'"),
        ({"cap": 1024}, "cap is 1024 and 512"),
    ],
)
def test_one_pareto_does_not_mix(tmp_path, change, words):
    """Another text, model or cap is refused, and the difference named."""
    PointRecord.write(make_point(0), tmp_path)
    PointRecord.write(make_point(1, **change), tmp_path)
    with pytest.raises(ValueError, match=f"cannot share a Pareto: {re.escape(words)}"):
        Group(tuple(load_points(tmp_path)))


def test_times_of_two_commits_are_in_two_paretos(tmp_path):
    PointRecord.write(make_point(0), tmp_path)
    other = make_point(1)
    other["environment"] = other["environment"] | {"git": {"commit": "b" * 40, "dirty": False, "reason": None}}
    PointRecord.write(other, tmp_path)
    with pytest.raises(ValueError, match=r"cannot share a Pareto: commit is .* and 'bbbbbbbbbb'"):
        Group(tuple(load_points(tmp_path)))


def test_groups_are_by_what_a_pareto_shares(tmp_path):
    """Two texts: two groups, each against its own recompute, each with its own frontier."""
    groups = groups_of(load_points(write_points(tmp_path)))
    assert [len(group.points) for group in groups] == [len(PLAN)] * 2
    values = {value["label"]: value for value in charts.pareto_values(groups[0])}
    here, base = (make_arrays(1280, seed=7 + at, shift=PLAN[at][3])["nll"] for at in (4, 0))
    assert values["lazy R=256"]["y"] == pytest.approx(100 * np.expm1((here - base).mean()), abs=1e-3)
    assert values["lazy R=256"]["low"] < values["lazy R=256"]["y"] < values["lazy R=256"]["high"]
    assert {label for label, value in values.items() if value["outlier"]} == {"recompute", "window-only"}
    far = {value["label"] for value in charts.pareto_values(groups[0], by_time=False) if value["outlier"]}
    assert far == {"window-only"}, "a picture without times hides no slow point"
    fastest, best = min(values.values(), key=lambda v: v["tpot"]), min(values.values(), key=lambda v: v["y"])
    assert fastest["front_tpot"] and best["front_tpot"] and not values["adaptive-entropy"]["front_tpot"]


def test_a_point_is_paired_with_the_recompute_that_scored_its_tokens(tmp_path):
    """Two matrices score recompute at every 2nd and at every 4th token; a policy of each is paired with its own."""
    wanted = {}
    for every, at in ((2, 1), (4, 3)):
        base, tried = make_point(0) | {"id": f"base-{every}"}, make_point(at)
        arrays = [make_arrays(1280, seed=7 + row, shift=PLAN[row][3]) for row in (0, at)]
        chosen = np.arange(1280) % every == 0
        own, sampled = (
            Blocks.of(a["index"], np.where(chosen, a["nll"], np.nan), a["kv_length"]).record() for a in arrays
        )
        base["quality"] = base["quality"] | {"sample_every": every, "blocks": own}
        tried["quality"] = tried["quality"] | {"sampled": {"every": every, "blocks": sampled}}
        wanted[tried["policy"]["label"]] = 100 * np.expm1((arrays[1]["nll"] - arrays[0]["nll"])[chosen].mean())
        for content in (base, tried):
            PointRecord.write(content, tmp_path)
    (group,) = groups_of(load_points(tmp_path))
    dots = group.dots()
    assert dots[0].delta is None and {dot.point.label for dot in dots[1:]} == wanted.keys()
    for dot in dots[1:]:
        assert dot.y == pytest.approx(wanted[dot.point.label], abs=1e-3)
    alone = Group(tuple(p for p in group.points if p.quality["sample_every"] != 4))
    with pytest.raises(ValueError, match="cannot be paired"):
        alone.dots()


def test_every_picture_is_valid_vega_lite(tmp_path):
    """Against the schema, which the page itself does not check; the control is a specification that is none."""
    import altair as alt
    from jsonschema import ValidationError

    pictures = [p for section in sections(read_evidence(write_points(tmp_path))) for p in section.pictures]
    for picture in pictures:
        alt.LayerChart.from_dict(picture.spec)
    assert len(pictures) >= 4
    with pytest.raises(ValidationError):
        alt.LayerChart.from_dict(pictures[0].spec | {"layer": 7})


def test_a_choice_pairs_the_fastest_rule_with_the_one_that_loses_least(tmp_path):
    """Both against recompute have wide intervals; the interval of their own difference is narrow, and shows it."""
    (section,) = (s for s in sections(read_evidence(write_points(tmp_path))) if s.id == "choice")
    (_, table), found = section.tables[0], load_points(tmp_path)
    row = next(row for row in table.rows if row[1].startswith("pg19"))
    best, fast = (next(p for p in found if p.label == row[at].partition(" (")[0]) for at in (3, 4))
    delta = point_delta(fast, best)
    assert delta.low > 0 and row[5] == f"{delta.delta_percent:+.2f} [{delta.low:+.2f}, {delta.high:+.2f}]"


def test_a_control_is_no_choice(tmp_path):
    """A window without sinks is fastest and loses nothing here: it is still a control, and not among the rules."""
    PointRecord.write(make_point(0), tmp_path)
    for at in (1, 3):
        PointRecord.write(make_point(at), tmp_path)
    control = make_point(1) | {"id": "control"}
    control["policy"] = {"name": "window-only", "label": "window-only", "options": {"sink": 0}}
    control["speed"] = control["speed"] | {"tpot_ms": 2.0}
    PointRecord.write(control, tmp_path)
    (section,) = (s for s in sections(read_evidence(tmp_path)) if s.id == "choice")
    assert "window-only" not in str(section.tables[0][1].rows)


def test_the_pictures_of_the_window_need_three_numbers_of_slots_and_of_sinks(tmp_path):
    for cap in (128, 256, 512):
        for at in (0, 1, 8):
            PointRecord.write(make_point(at, cap=cap), tmp_path)
    (slots,) = window_pictures(load_points(tmp_path))
    drawn = {(v["line"], v["slots"]): v["y"] for v in slots[0]["data"]["values"]}
    assert len(drawn) == 6 and drawn["window without sinks", 128] > drawn["strict: sinks and window", 128]
    for sinks in (1, 2):
        content = make_point(1, cap=512) | {"id": f"sinks-{sinks}"}
        content["policy"] = {"name": "strict", "label": f"strict S={sinks}", "options": {"sink": sinks}}
        PointRecord.write(content, tmp_path)
    _, (sinks, said) = window_pictures(load_points(tmp_path))
    assert [value["sinks"] for value in sinks["data"]["values"]] == [1, 2, 4] and "Without sinks: +" in said


def test_recall_on_different_streams_is_in_different_pictures(tmp_path):
    """Perplexities of two texts, and passages of two texts, share no axis."""
    columns = {"ratio": [0.5, 1.0], "distance": [256, 512], "first": [0, 9], "second": [256, 521]}
    columns |= {"nll_unseen": [4.0, 4.0], "nll_again": [1.0, 3.0]}
    layout = {"ratios": [0.5, 1.0], "passages": 1, "passage_tokens": 64}
    for label, text in (("strict", "a"), ("lazy", "a"), ("strict", "b"), ("slack", "b"), ("overlap", "c")):
        content = make_record(f"{label}-{text}", label, cap=512, **layout)
        content["data"], content["policy"]["label"] = content["data"] | {"sha256": text, "name": text}, label
        content["protocol"]["control_sha256"], content["passages"] = text, columns
        RecallRecord.write({name: part for name, part in content.items() if name != "tokens_file"}, tmp_path)
    (section,) = sections(read_evidence(tmp_path))
    drawn = [
        (picture.caption, sorted({value.get("line") or value["label"] for value in picture.spec["data"]["values"]}))
        for picture in section.pictures + section.folded
    ]
    assert [labels for _, labels in drawn] == [["lazy", "strict"]] * 2 + [["slack", "strict"]] * 2
    assert " on a, " in drawn[0][0] and " on b, " in drawn[2][0], "one policy alone is no comparison"


def test_memory_that_holds_what_other_points_left_is_not_shown(tmp_path):
    """Control: the same points with a memory of their own have a section."""
    own, process = (tmp_path / name for name in ("own", "process"))
    own.mkdir()
    for at in range(len(PLAN)):
        content = make_point(at)
        PointRecord.write(content, own)
        content["speed"]["memory_kind"] = "cuda_allocated"
        PointRecord.write(content, process)
    shown = [{s.id for s in sections(read_evidence(folder))} for folder in (own, process)]
    assert "memory" in shown[0] and "memory" not in shown[1]


def test_points_that_are_timed_only_have_a_table_and_no_pareto(tmp_path):
    """A shape with random weights has no quality; its page still opens, with a column a number of slots."""
    for cap in (128, 512):
        for at in (0, 1, 3):
            content = make_point(at, model="shape", cap=cap) | {"quality": None}
            content["configuration"] = content["configuration"] | {"quality": None}
            PointRecord.write(content, tmp_path)
    found = load_points(tmp_path)
    assert groups_of(found) == []
    ((timed, table),) = speed_tables(found)
    assert timed == found
    assert table.header[1:] == [
        *("ms per token (÷ strict), 128 slots", "ms per token (÷ strict), 512 slots", "peak MB, 128", "peak MB, 512")
    ]
    assert list(table.rows[2]) == ["lazy R=64", "2.141 (1.00)", "2.141 (1.00)", "6,007", "6,007"]
    assert sections(read_evidence(tmp_path)) == [], "no picture of quality"
    other = make_point(3, model="shape", cap=128) | {"quality": None, "id": "point-elsewhere"}
    other["configuration"] = other["configuration"] | {"quality": None}
    other["environment"] = other["environment"] | {"gpu": other["environment"]["gpu"] | {"name": "NVIDIA H100"}}
    PointRecord.write(other, tmp_path)
    (_, there), (_, same) = speed_tables(load_points(tmp_path))
    assert same.rows == table.rows and [row[0] for row in there.rows] == ["lazy R=64"], "a table a card"
    assert there.rows[0][1] == "2.141", "and no ratio over the strict of another card"


def test_the_page_is_one_file_below_three_megabytes(tmp_path):
    """Nothing is loaded from anywhere; every picture has its specification and every table its LaTeX."""
    folder = tmp_path / "records"
    folder.mkdir()
    path = tmp_path / "page.html"
    assert write_page(write_points(folder), path) < 3_000_000
    text = path.read_text(encoding="utf-8")
    markup = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"<(?:script|link|img)[^>]+(?:src|href)=[\"'](?!data:)", markup)
    specs = json.loads(re.search(r"const charts = (\{.*\});", text).group(1).replace("<\\/", "</"))
    assert set(specs) == set(re.findall(r'data-chart="([\w-]+)"', text))
    assert text.count("\\begin{tabular}") == sum(len(s.tables) for s in sections(read_evidence(folder)))
    for _, label, *_ in PLAN:
        assert label in text


def test_latex_escapes_what_latex_reads():
    """A cell with marks of LaTeX's own comes out as text."""
    table = Table(["a_b", "Δ %"], [["50 % & {x}", "\\"], ["[1, 2]", "≤ 3 | < 4"]], left=1)
    assert latex(table).splitlines()[2] == r"a\_b & $\Delta$ \% \\"
    assert latex(table).splitlines()[4] == r"50 \% \& \{x\} & \textbackslash{} \\"
    bracket = latex(table).splitlines()[5]  # a line break would read the bracket behind it as its own
    assert bracket == r"{}[1, 2] & $\leq$ 3 \textbar{} \textless{} 4 \\"


def test_latex_of_all_records_has_no_sign_that_latex_does_not_know():
    """Beside ASCII, letters of Latin-1 only; the control is a sign that a table has."""
    tables = [table for section in sections(read_evidence(RESULTS)) for _, table in section.tables]
    signs = {sign for table in tables for sign in latex(table) if ord(sign) > 126}
    assert not {sign for sign in signs if not sign.isalpha() or ord(sign) > 255}
    assert any(ord(sign) > 255 for table in tables for row in table.rows for cell in row for sign in cell)


def test_the_environment_of_a_record_names_what_is_known(tmp_path):
    """A record of another language has no release of torch, and may have no Python."""
    for at in range(2):
        content = make_point(at)
        if at:
            content["environment"] = content["environment"] | {
                "versions": dict.fromkeys(content["environment"]["versions"])
            }
        PointRecord.write(content, tmp_path)
    known, unknown = sorted((origin.title for origin in origins(read_evidence(tmp_path))), key=len, reverse=True)
    assert "; python 3" in known and known.endswith("(1 record)")
    assert "None" not in unknown and ", ;" not in unknown and "; ;" not in unknown and "; commit" in unknown


def test_wrong_folders_are_refused(tmp_path, capsys):
    """No folder, an empty one, one with records of another kind, and options that do not go together."""
    page = str(tmp_path / "page.html")
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder, words in ((tmp_path / "none", "not a folder with records"), (empty, "holds no record to show")):
        assert main(["report", str(folder), "-o", page]) == 2
        assert words in capsys.readouterr().err
    (empty / "other.json").write_text(json.dumps({"schema": "sinkstream.strange/1"}))
    assert main(["report", str(empty), "-o", page]) == 2
    assert "found: sinkstream.strange" in capsys.readouterr().err
    content = make_point(0)
    path = PointRecord.write(content, empty)
    path.write_text(path.read_text().replace("sinkstream.point/1", "sinkstream.point/2"))
    assert main(["report", str(empty), "-o", page]) == 2
    assert "this version reads 'sinkstream.point/1'" in capsys.readouterr().err
    assert main(["report", str(empty)]) == 2
    assert "accepted: with -o PAGE.html" in capsys.readouterr().err
    assert main(["report", str(empty), "-o", page, "--check"]) == 2
    assert not (tmp_path / "page.html").exists()


def _layers_with(spec: dict, *fields: str) -> int:
    encodings = [layer.get("encoding", {}).values() for layer in spec["layer"]]
    named = [{one.get("field") for one in encoding if isinstance(one, dict)} for encoding in encodings]  # tips: a list
    return sum(found >= set(fields) for found in named)


def test_no_layer_is_without_points():
    """Vega warns of an axis of a layer without points: names are one layer, intervals none where there is none."""
    value = {"label": "a", "kind": "strict", "line": "a", "x": 1, "y": 2.0, "text": "2", "front": True}
    known = value | {"low": 1.0, "high": 3.0}
    makers = {
        "lines": lambda v: charts.lines([v], "x", "y"),
        "whiskers": lambda v: charts.whiskers([v], "title"),
        "recall": lambda v: charts.recall_pareto([v], "x", "y"),
    }
    for name, make in makers.items():
        bare, with_interval = make(value), make(known)
        assert (_layers_with(bare, "low", "high"), _layers_with(with_interval, "low")) == (0, 1), name
    marks = [layer["mark"] for layer in charts.recall_pareto([value], "x", "y")["layer"]]
    names = [mark for mark in marks if mark["type"] == "text"]
    assert len(names) == 1 and set(names[0]["align"]) == set(names[0]["dy"]) == {"expr"}


# ---- in a real browser ----

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(
    BROWSER is None or importlib.util.find_spec("playwright") is None, reason="no Chromium, or no playwright"
)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """The page of the plan's points."""
    folder = tmp_path_factory.mktemp("records")
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(write_points(folder), path)
    return path


@pytest.fixture
def browser():
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@needs_browser
@pytest.mark.slow
def test_the_page_works_in_a_browser(page_file, browser):
    """Opens without an error at both widths without a sideways scroll; hover, switch, sort, filter, print."""
    for width, height in WIDTHS.values():
        tab = browser.new_page(viewport={"width": width, "height": height})
        errors = []
        tab.on(
            "console",
            lambda message, errors=errors: (
                errors.append(message.text) if message.type in ("error", "warning") else None
            ),
        )
        tab.on("pageerror", lambda error, errors=errors: errors.append(str(error)))
        tab.on(
            "request",
            lambda request, errors=errors: (
                errors.append(request.url) if "file:" not in request.url and "data:" not in request.url else None
            ),
        )
        tab.goto(page_file.as_uri())
        tab.wait_for_selector("#pareto-1 svg", timeout=120_000)
        assert not errors
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        _hover(tab)
        _switch(tab)
        _sort_and_filter(tab)
        assert len(tab.pdf()) > 20_000
        assert not errors
        tab.close()


@needs_browser
@pytest.mark.slow
def test_a_wide_table_is_not_cut_on_paper(tmp_path, browser):
    """On a screen it scrolls, which paper does not: there its cells, and commands, are broken into lines."""
    tab = browser.new_page()
    write_page(write_points(tmp_path / "records"), tmp_path / "page.html")
    tab.goto((tmp_path / "page.html").as_uri())
    modes = "[...new Set([...document.querySelectorAll('%s')].map(one => getComputedStyle(one).whiteSpace))]"
    figures, commands = modes % "td:not(.left), th:not(.left)", modes % "pre"
    assert (tab.evaluate(figures), tab.evaluate(commands)) == (["nowrap"], ["pre"])
    tab.emulate_media(media="print")
    assert (tab.evaluate(figures), tab.evaluate(commands)) == (["normal"], ["pre-wrap"])
    tab.close()


def _hover(tab):
    """A dot says what it is."""
    dot = tab.locator("#pareto-1 .mark-symbol.role-mark path").first
    dot.scroll_into_view_if_needed()
    dot.hover(force=True)
    tip = tab.locator("#vg-tooltip-element.visible")
    tip.wait_for(timeout=30_000)
    assert "95 % interval" in tip.inner_text() and "P99" in tip.inner_text()


# of the leftmost word, the title of the axis, in its picture
_LEFT = """svg => Math.min(...[...svg.querySelectorAll("text")].map(one => one.getBoundingClientRect().left))
    - svg.getBoundingClientRect().left"""


def _switch(tab):
    """The other axis changes its title, and those that are far off come when asked for."""
    figure = tab.locator("#pareto-1")
    dots = figure.locator(".mark-symbol.role-mark path")
    before, margin = dots.count(), figure.locator("svg").evaluate(_LEFT)
    figure.locator("input[type=checkbox]").check()
    tab.wait_for_timeout(500)
    assert dots.count() == before + 2
    assert abs(figure.locator("svg").evaluate(_LEFT) - margin) < 1, "labels of another width leave no title outside"
    figure.locator("input[type=radio]").nth(1).check()
    tab.wait_for_timeout(500)
    assert "time for the whole text" in figure.locator("svg").text_content()


def _sort_and_filter(tab):
    """A click on a header sorts by number, a second one turns the order round; the filter leaves matching rows."""
    tab.locator("details.tables").first.evaluate("fold => fold.open = true")
    table, rows = tab.locator("#pareto table").first, tab.locator("#pareto table").first.locator("tbody tr")
    button = table.locator("th button").nth(1)
    for direction in (1, -1):
        button.click()
        shown = [float(text) for text in rows.locator("td:nth-child(2)").all_inner_texts()]
        assert shown == sorted(shown)[::direction]
    tab.locator("#pareto .filter").first.fill("lazy 64")
    visible = [row for row in rows.all() if row.is_visible()]
    assert [row.locator("td").first.inner_text() for row in visible] == ["lazy R=64"]
    tab.locator("#pareto .filter").first.fill("")


def test_names_on_a_frontier_do_not_cover_each_other():
    def value(x, y, front=True):
        return {"tpot": x, "y": y, "front_tpot": front}

    values = [value(1.0, 5.0), value(1.1, 1.0), value(1.2, 0.9), value(1.9, 0.8), value(2.0, 9.0, front=False)]
    assert charts._apart(values, "tpot") == [values[3], values[2], values[0]], "1.1 is beside 1.2 and not better"
    assert charts._apart([], "tpot") == []
    wide = [value(1.0, 5.0), value(1.1, 4.5) | {"low": -20.0, "high": 20.0}, value(2.0, 5.0, front=False)]
    assert charts._apart(wide, "tpot") == [wide[1]], "the axis holds intervals, so these two are near each other"


def test_a_name_stands_where_it_covers_fewer_points():
    def value(x, y):
        return {"tpot": x, "y": y}

    crowd = [value(1.0, 0.0), value(1.1, 0.3), value(1.2, 0.2), value(3.0, 9.0)]
    assert charts._fewer_below(crowd[0], crowd, "tpot"), "two stand above it"
    assert not charts._fewer_below(crowd[1], crowd, "tpot") and not charts._fewer_below(crowd[3], crowd, "tpot")
