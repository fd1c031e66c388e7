"""`secateur survey`: its file against what `prune` makes of it, its page against the file and in a real browser."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from command_line import SMALL, TEXT, listing, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from conftest import CheckpointFolder
from models import blocks_of, build, wide
from outputs import Opened, record_of
from secateur import Options, SecateurError
from secateur.base.progress import Silent
from secateur.commands import survey as survey_page
from secateur.commands import survey_model
from secateur.commands.clean import clean
from secateur.commands.survey import survey_page as write_page
from secateur.model.structure import Block
from secateur.plan.problem import Plan
from secateur.report.survey_page import POINTS, UNITS, page_data, render
from secateur.survey.curves import ErrorCurve, Probe, Survey, load_survey
from secateur.survey.width_costs import WidthCosts

FACTS = {"model": "m", "family": "llama", "parameters": 1000, "probe_tokens": 64, "line": "secateur prune m OUT"}
NASTY = '</script><script>window.broken = 1</script><!-- & "quoted" \\ \u2028 é'


def data_of(page: str) -> dict[str, Any]:
    """Return the data of a page: its first script, which ends where a browser ends it."""
    found = re.search("<script[^>]*>(.*?)</script", page, re.DOTALL | re.IGNORECASE)
    return json.loads(found[1] if found else "")


def page_of(folder: Path) -> dict[str, Any]:
    return data_of((folder / "survey.html").read_text(encoding="utf-8"))


def synthetic(channels: int, count: int, *, heads: int = 32) -> tuple[Survey, list[Block]]:
    """Return a survey with smooth error curves and units removed from the last to the first, and its `count` blocks."""
    block = blocks_of(build("llama every head"))[0]

    def enlarged(module: Any, units: int, groups: int) -> Any:
        axes = (replace(module.axes[0], units=units), *module.axes[1:])
        output = replace(module.output_projection, units=units)
        return replace(module, axes=axes, groups=groups, output_projection=output)

    modules = enlarged(block.attention, heads, heads), enlarged(block.feed_forward, channels, 1)
    larger = replace(block, attention=modules[0], feed_forward=modules[1])
    curves, probes = [], []
    for index in range(count):
        for kind, axis, units in (("heads", "kv_groups", heads), ("channels", "channels", channels)):
            errors = tuple(((np.arange(units) / units) ** 2 * 0.5).tolist())
            curves.append(ErrorCurve(index, kind, axis, errors, 0.5, tuple(range(units - 1, 0, -1))))  # type: ignore[arg-type]
            probes += [Probe(index, kind, 0.1, False, 0.02), Probe(index, kind, 0.5, True, 0.7)]  # type: ignore[arg-type]
    return Survey("surgeon", 0.3, 2048, tuple(curves), tuple(probes)), [larger] * count


# What is drawn.


@pytest.mark.parametrize("channels", [1, 2, 72, POINTS, POINTS + 1, 11_008])
def test_curves_are_thinned_but_keep_their_ends(channels):
    survey, blocks = synthetic(channels, 1)
    heads, channel = page_data(survey, blocks, {}, facts=FACTS)["modules"]
    costs = WidthCosts(survey)
    for module, units, errors in ((heads, 32, survey.curves[0].errors), (channel, channels, survey.curves[1].errors)):
        (curve,) = module["curves"]
        left = curve["left"]
        assert len(left) <= POINTS + 1
        assert left == sorted(set(left), reverse=True)
        assert (left[0], left[-1]) == (units, 0)
        assert left[-2] == 1 or units == 1
        assert curve["lost"] == pytest.approx([errors[units - n] / 0.5 if n else 1.0 for n in left], rel=1e-3)
        kind = module["kind"]
        widths = [wide(n, 1 if n else 0, channels) if kind == "heads" else wide(32, 1, n) for n in left]
        wanted = [costs.module_cost(0, blocks[0].module(kind), width) for width in widths]
        assert curve["cost"] == pytest.approx(wanted, rel=1e-3)


def test_units_are_listed_in_order_of_removal():
    survey, blocks = synthetic(500, 1)
    heads, channel = page_data(survey, blocks, {}, facts=FACTS)["modules"]
    assert [score[0] for score in heads["scores"]] == list(range(31, -1, -1))
    assert [score[1] for score in heads["scores"]] == list(range(1, 33))
    # All rises together are the whole output, and the whole cost.
    assert sum(score[2] for score in heads["scores"]) == pytest.approx(1.0, rel=1e-3)
    assert sum(score[3] for score in heads["scores"]) == pytest.approx(0.7, rel=1e-3)
    assert [score[0] for score in channel["scores"]] == [
        *range(499, 499 - UNITS // 2, -1),
        *range(UNITS // 2 - 1, -1, -1),
    ]


def test_heads_removed_together_share_a_rank():
    blocks = blocks_of(build("llama"))[:1]
    curves = (
        ErrorCurve(0, "heads", "kv_groups", (0.0, 0.1, 0.2), 0.5, (2, 0)),
        ErrorCurve(0, "heads", "heads_per_group", (0.0, 0.2), 0.5, (1, 2, 5)),
    )
    (module,) = page_data(Survey("l1", 0.3, 64, curves), blocks, {}, facts=FACTS)["modules"]
    assert [curve["left"] for curve in module["curves"]] == [[3, 2, 1, 0], [2, 1, 0]]
    assert [score[:2] for score in module["scores"]] == [[1, 1], [2, 1], [5, 1], [0, 2], [3, 2], [4, 2]]
    assert [score[2] for score in module["scores"]] == pytest.approx([0.4] * 3 + [0.6] * 3)


def test_a_locked_module_is_removed_whole():
    blocks = blocks_of(build("olmo2"))[:1]
    survey = Survey("l1", 0.3, 64, (ErrorCurve(0, "heads", "kv_groups", (0.0,), 0.5),))
    (module,) = page_data(survey, blocks, {}, facts=FACTS)["modules"]
    assert module["locked"]
    assert module["scores"] == []
    assert [curve["left"] for curve in module["curves"]] == [[3, 0]]


def test_the_page_of_a_large_model_stays_small():
    survey, blocks = synthetic(11_008, 32)
    plans = {share: Plan({}, share, share, 0.1) for share in survey_page.SHARES}
    distances = {index: np.random.default_rng(index).uniform(size=(32, 32)).tolist() for index in range(32)}
    page = render(page_data(survey, blocks, plans, facts=FACTS, distances=distances))
    assert len(page.encode()) < 1_000_000


@given(st.dictionaries(st.text(max_size=8), st.one_of(st.text(), st.floats(allow_nan=False, allow_infinity=False))))
@settings(max_examples=60, deadline=None)
def test_nothing_in_the_data_ends_the_script(found):
    found = {**found, NASTY: NASTY}
    assert data_of(render(found)) == found


# The command.


@pytest.mark.parametrize(
    "options",
    [[], ["--modules", "channels", "--blocks", "1:3"], ["--criterion", "wanda", "--ridge", "0.5", "--seed", "3"]],
)
def test_prune_reads_the_survey_file(options, place, run, calls_of):
    surveys = calls_of(survey_model, "survey")
    result = run("survey", "model", *SMALL, *options)
    assert sorted(file.name for file in (place / "survey").iterdir()) == ["survey.html", "survey.json"]
    data, found = page_of(place / "survey"), load_survey(place / "survey" / "survey.json", {})
    modules = dict.fromkeys((curve.block, curve.kind) for curve in found.curves)
    assert [(module["block"], module["kind"]) for module in data["modules"]] == list(modules)
    line = next(line for line in result.out.splitlines() if line.startswith("Prune from this survey: "))
    assert data["line"] == line.removeprefix("Prune from this survey: ")
    assert run(*data["line"].split()[1:]).code == 0
    assert len(surveys) == 1, "the survey was made again"
    record = record_of(place / "OUT")
    shown = next(one for one in data["plans"] if one["share"] == 0.25)
    axes = [axis["name"] for axis in data["axes"]]
    for block in record["blocks"]:
        assert dict(zip(axes, shown["widths"][block["block"]], strict=True)) == block["width"]
    assert shown["reached"] == pytest.approx(record["sparsity"]["reached"], rel=1e-3)
    kept = sum(tensor.numel() for tensor in load_file(place / "OUT" / "model.safetensors").values())
    assert data["parameters"] - shown["removed"] == kept


def test_curves_hold_the_order_of_removal(place, run, checkpoint_folder):
    assert run("survey", "model", *SMALL, "--criterion", "l1").code == 0
    tensors = load_file(checkpoint_folder("llama") / "model.safetensors")
    for curve in load_survey(place / "survey" / "survey.json", {}).curves:
        together = 3 if curve.axis == "heads_per_group" else 1
        assert len(curve.order) == (len(curve.errors) - 1) * together
        assert len(set(curve.order)) == len(curve.order)
        if curve.kind == "channels":
            mlp = f"model.layers.{curve.block}.mlp"
            up, gate, down = (tensors[f"{mlp}.{name}_proj.weight"].abs() for name in ("up", "gate", "down"))
            assert list(curve.order) == (up.sum(1) + gate.sum(1) + down.sum(0)).argsort().tolist()[:-1]


def test_the_page_omits_sparsities_out_of_reach(place, run):
    only = [*SMALL, "--modules", "heads"]
    assert run("survey", "model", *only).code == 0
    shares = [one["share"] for one in page_of(place / "survey")["plans"]]
    assert shares == [share for share in survey_page.SHARES if share <= max(shares)]
    refused(run("prune", "model", "OUT", *only, "--sparsity", f"{max(shares) + 0.05}"), "is out of reach")


def test_an_error_leaves_no_folder(place, monkeypatch):
    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(survey_page, "save_survey", broken)
    before = listing(place)
    with pytest.raises(KeyboardInterrupt):
        write_page("model", place / "survey", Options(calibration="text.txt", samples=4, length=16), watcher=Silent())
    clean(place / "survey")
    assert listing(place) == before


def test_the_page_is_written_without_similar_heads(place, run, monkeypatch):
    def refuses(*_: Any, **__: Any) -> None:
        raise SecateurError("no attention here")

    monkeypatch.setattr(survey_page, "head_distances", refuses)
    result = run("survey", "model", *SMALL)
    assert result.code == 0
    assert "The page will not show which heads are similar: no attention here" in result.err
    assert page_of(place / "survey")["distances"] is None


# In a browser.


@pytest.fixture(scope="module")
def page_file(checkpoint_folder: CheckpointFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of the tiny Llama, whose name contains HTML."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "text.txt").write_text(TEXT)
    options = Options(calibration=str(folder / "text.txt"), samples=6, length=16)
    write_page(checkpoint_folder("llama"), folder / "survey", options, watcher=Silent())
    file = folder / "survey" / "survey.html"
    file.write_text(render({**page_of(file.parent), "model": NASTY}), encoding="utf-8")
    return file


CUT_OFF = """[...document.querySelectorAll('main *, header *')].filter(node => !node.closest('.scroll, pre, nav')
  && node.getBoundingClientRect().right > document.documentElement.clientWidth + 1).length"""
"""Number of elements that are wider than the screen, outside what scrolls by itself."""


CONTROLS = """[...document.querySelectorAll('a, button, input, select, [tabindex="0"]')]
  .filter(node => node.getClientRects().length).length"""


FOCUS = """(() => { const node = document.activeElement; node.dataset.seen = '1';
  return getComputedStyle(node).outlineStyle; })()"""


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light")])
def test_the_page_fits_the_screen_and_loads_nothing_else(browser, page_file, width, scheme):
    """axe looks, among others, for names of all elements, and landmarks of all parts of the page."""
    with Opened(browser, page_file, width, scheme) as opened:
        page = opened.page
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(CUT_OFF) == 0
        ground, text = page.evaluate("(style => [style.backgroundColor, style.color])(getComputedStyle(document.body))")
        light = sum(map(int, ground[4:-1].split(","))) > sum(map(int, text[4:-1].split(",")))
        assert light == (scheme == "light")
        assert page.locator("section:visible").count() == 4
        assert page.locator("h1").text_content() == NASTY
        assert page.evaluate("window.broken") is None
        assert opened.complaints == []
        assert opened.requests == [page_file.as_uri()]
        assert Axe().run(page).response["violations"] == []


def test_every_control_has_visible_keyboard_focus(browser, page_file):
    with Opened(browser, page_file) as opened:
        page, seen = opened.page, set()
        wanted = page.evaluate(CONTROLS)
        for _ in range(wanted):
            page.keyboard.press("Tab")
            seen.add(page.evaluate(FOCUS))
        assert page.locator("[data-seen]").count() == wanted
        assert seen == {"solid"}


def test_the_slider_shows_the_plans(browser, page_file):
    with Opened(browser, page_file) as opened:
        page = opened.page
        page.focus("#share")
        page.keyboard.press("Home")
        for plan in page_of(page_file.parent)["plans"]:
            figures = page.locator("#figures dd").all_inner_texts()
            assert page.locator("#share-value").inner_text() == f"{100 * plan['share']:g} %"
            assert f"--sparsity {plan['share']} " in page.locator("#line").inner_text()
            assert figures[-3:-1] == [*plan["sizes"].values()]
            assert float(figures[0].removesuffix(" %")) == pytest.approx(100 * plan["reached"], abs=0.0501)
            assert figures[4].split(" / ")[0] == f"{sum(width[2] for width in plan['widths']):,}"
            rows = [row.split()[:4] for row in page.locator("#plan-table tbody tr").all_inner_texts()]
            assert rows == [
                [str(block), f"{groups * each}/6", f"{groups}/3", f"{channels}/72"]
                for block, (each, groups, channels) in enumerate(plan["widths"])
            ]
            page.keyboard.press("ArrowRight")
        assert opened.complaints == []


def test_tables_can_be_sorted_by_keyboard(browser, page_file):
    with Opened(browser, page_file) as opened:
        table = opened.page.locator("#plan-table table")
        heads = table.locator("th")

        def column(index: int) -> list[float]:
            cells = table.locator(f"tbody td:nth-child({index + 1})").all_inner_texts()
            return [float(cell.replace(",", "").replace(" %", "").split("/")[0]) for cell in cells]

        for index in range(heads.count()):
            heads.nth(index).locator("button").focus()
            for _ in range(2):
                opened.page.keyboard.press("Enter")
                orders = [heads.nth(i).get_attribute("aria-sort") for i in range(heads.count())]
                order = orders.pop(index)
                assert set(orders) == {"none"}
                assert column(index) == sorted(column(index), reverse=order == "descending")


def test_choosing_a_block_updates_all_parts(browser, page_file):
    with Opened(browser, page_file) as opened:
        page = opened.page

        def press(place: str, *keys: str) -> None:
            page.locator(place).nth(1 if place == "#tiles button" else 0).focus()
            for key in keys:
                page.keyboard.press(key)

        def shown(place: str) -> str:
            return page.locator(place).inner_text()

        press("#block", "End")
        assert shown("#score-block-value") == "2"
        assert shown("#large-title").startswith("Block 2: ")
        press("#tiles button", "Enter")
        assert shown("#block-value") == "1"
        assert page.locator("#tiles button[aria-pressed=true]").count() == 1
        assert shown("#unit-table caption") == "Block 1, query heads"
        press("#costs-channels svg", "ArrowRight", "Enter")
        assert shown("#block-value") == "2"
        assert page.evaluate("document.activeElement.tagName") == "svg"
        assert shown("#costs-channels .read").startswith("block 2, at least 100 % of the feed-forward channels")
        page.select_option("#score-kind", "channels")
        assert page.locator("#unit-table tbody tr").count() == 72
        assert opened.complaints == []


def test_edges_follow_tau(browser, page_file):
    upper = page_of(page_file.parent)["distances"]
    every = [distance for one in upper.values() for distance in one]
    with Opened(browser, page_file) as opened:
        for tau in (0.0, 0.1, 0.3, 0.69):
            opened.page.locator("#tau").fill(str(tau))
            assert opened.page.locator("#graph line").count() == sum(distance < tau for distance in upper["0"])
            near = sum(distance < tau for distance in every)
            assert opened.page.locator("#tau-count").inner_text().startswith(f"{near} of {len(every)} pairs")


def test_a_page_without_distances_and_plans(browser, tmp_path):
    survey = Survey("l1", 0.3, 64, (ErrorCurve(1, "channels", "channels", (0.0,), 0.5),))
    page = render(page_data(survey, blocks_of(build("llama")), {}, facts=FACTS))
    (tmp_path / "p.html").write_text(page, encoding="utf-8")
    with Opened(browser, tmp_path / "p.html", 360) as opened:
        assert opened.complaints == []
        for hidden in ("#likeness", "nav a[href='#likeness']", "#share"):
            assert not opened.page.locator(hidden).is_visible()
        assert "10 %, is more than the surveyed modules can lose" in opened.page.locator("#reach").inner_text()


def test_every_axis_of_a_mixture_is_drawn(browser, tmp_path):
    blocks = blocks_of(build("mixtral"))[:2]
    experts = blocks[0].feed_forward.units
    curves = (
        ErrorCurve(0, "experts", "experts", tuple(0.1 * number for number in range(experts)), 1.0, (1,)),
        ErrorCurve(0, "experts", "expert_channels", (0.0, 0.2), 1.0),
    )
    plans = {0.25: Plan({0: blocks[0].width | {"experts": experts - 1}}, 0.25, 0.25, 0.1)}
    data = page_data(Survey("l1", 0.3, 64, curves), blocks, plans, facts=FACTS)
    assert [curve["axis"] for curve in data["modules"][0]["curves"]] == ["experts", "expert_channels"]
    (tmp_path / "p.html").write_text(render(data), encoding="utf-8")
    with Opened(browser, tmp_path / "p.html") as opened:
        captions = opened.page.locator("#bars figcaption").all_inner_texts()
        assert {"Experts kept, by block", "Expert channels kept, by block"} <= set(captions)
        keys = opened.page.locator("#key li").all_inner_texts()
        assert keys == ["experts", "channels in each expert", "planned at 25 %"]
        assert opened.complaints == []
