"""`secateur survey`: its file against what `prune` makes of it, its page against the file and in a real browser."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from command_line import SMALL, TEXT
from safetensors.torch import load_file

from conftest import CheckpointFolder
from models import blocks_of, build
from outputs import Opened, record_of
from secateur import Options, RunOptions
from secateur.base.progress import Silent
from secateur.commands import survey
from secateur.commands.survey import survey_page as write_page
from secateur.plan.problem import Plan
from secateur.report.survey_page import page_data, render
from secateur.steps import survey_model
from secateur.survey.curves import ErrorCurve, Survey, load_survey

FACTS = {"model": "m", "family": "llama", "parameters": 1000, "probe_tokens": 64, "line": "secateur prune m OUT"}
NASTY = '</script><script>window.broken = 1</script><!-- & "quoted" \\ \u2028 é'


def data_of(page: str) -> dict[str, Any]:
    """Return the data of a page: its first script, which ends where a browser ends it."""
    found = re.search("<script[^>]*>(.*?)</script", page, re.DOTALL | re.IGNORECASE)
    return json.loads(found[1] if found else "")


def page_of(folder: Path) -> dict[str, Any]:
    return data_of((folder / "survey.html").read_text(encoding="utf-8"))


# The command.


def test_the_command_names_the_options_that_a_model_needs():
    needed = RunOptions(family=Path("mine.yaml"), revision="v1", trust_remote_code=True)
    run: Any = SimpleNamespace(options=Options(seed=3), run_options=needed)
    words = "secateur prune o/m OUT --sparsity 0.25 --survey s.json --seed 3 --revision v1 --family mine.yaml"
    assert survey._prune_command(run, "o/m", 0.25, Path("s.json")) == f"{words} --trust-remote-code"


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
    assert f"Open {Path('survey', 'survey.html')} in a browser to choose a size; it needs no network." in result.out
    assert 10 < len(data["plans"]) <= 20
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


def test_equal_plans_are_one_row_and_the_page_says_how_much_can_be_removed(place, run):
    result = run("survey", "model", *SMALL, "--modules", "heads")
    rows, data = [line for line in result.out.splitlines() if "│" in line], page_of(place / "survey")
    assert 5 < len(rows) == len(set(rows)) < len(data["plans"])
    assert data["unreached"] == pytest.approx(data["plans"][-1]["share"] + 0.025)
    # The unit is in the value.
    assert data["plans"][0]["sizes"].keys() == {"weights", "KV cache"}
    assert run("survey", "model", *SMALL, "--out", "all").code == 0
    assert page_of(place / "all")["unreached"] is None


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


def test_every_axis_of_a_mixture_is_drawn(browser, tmp_path):
    blocks = blocks_of(build("mixtral"))[:2]
    experts = blocks[0].modules[-1].units
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
