"""Recipes: which runs they name, what the command line changes, and one line for every mistake."""

from typing import Any

import pytest
import yaml

from outputs import error_of
from paper.recipe import Recipe, changed, expand, read_recipe, recipe_names
from paper.tables import AVERAGE
from secateur import Options

SMALL: dict[str, Any] = {
    "title": "small",
    "models": {"Big": {"id": "owner/Big-7B", "other_names": ["big"], "options": {"blocks": "1:3", "ridge": 1}}},
    "options": {"sparsity": 0.25, "ridge": 0.5, "samples": 4},
    "runs": {"a": {"criterion": "wanda"}, "b": {"criterion": "l2", "ridge": 0.1, "calibration": "random"}},
    "grid": {"length": [8, 16], "seed": [0, 1]},
    "evaluation": {"perplexity": ["text.txt"]},
}


def small(**fields: Any) -> Recipe:
    return Recipe.model_validate(SMALL | fields)


def test_runs_are_every_entry_at_every_point_and_win_over_the_model():
    on_paper, on_other = expand(small(), "Big"), expand(small(), None)
    assert [(run.row, run.axes["seed"]) for run in on_other] == [
        (f"{label}, length {length}", seed) for label in "ab" for length in (8, 16) for seed in (0, 1)
    ]
    common: dict[str, Any] = {"sparsity": 0.25, "samples": 4, "criterion": "wanda", "length": 8, "seed": 0}
    assert on_other[0].options == Options(ridge=0.5, **common)
    assert on_paper[0].options == Options(ridge=1, blocks="1:3", **common)
    assert on_paper[-1].options.ridge == on_other[-1].options.ridge == 0.1


@pytest.mark.parametrize(
    ("source", "known"),
    [("owner/Big-7B", True), ("somewhere/big-7b", True), ("./BIG/", True), ("big-70b", False), ("owner", False)],
)
def test_the_papers_model_is_known_by_the_last_part_of_its_name(source, known):
    assert small().model_of(source) == ("Big" if known else None)


def test_changes_replace_an_option_wherever_it_stands():
    wanted: dict[str, Any] = {"calibration": "mine.txt", "samples": [2], "length": 12, "blocks": "0:2"}
    for model in (None, "Big"):
        found = expand(changed(small(), seeds=[7, 8, 9], **wanted), model)
        assert {run.options.length for run in found} == {12}
        assert {run.options.samples for run in found} == {2}
        assert {run.options.seed for run in found} == {7, 8, 9}
        assert {run.options.blocks for run in found} == {"0:2"}
        # What is no text stays what it is.
        assert [run.options.calibration for run in found] == ["mine.txt"] * 3 + ["random"] * 3
    assert changed(small()) == small()


def test_changes_of_an_axis_and_of_the_evaluation():
    recipe = small(grid={"samples": [8, 16], "calibration": ["wikitext2", "random"]})
    found = expand(changed(recipe.model_copy(update={"runs": {}}), samples=[2, 3], calibration="x.txt"), None)
    axes = [(samples, text) for samples in (2, 3) for text in ("x.txt", "random")]
    assert [(run.options.samples, run.options.calibration) for run in found] == axes
    judged = changed(recipe, perplexity=["a.txt"], tasks=["t"], limit=5, tokens=0).evaluation
    assert (judged.perplexity, judged.tasks, judged.limit, judged.tokens) == (["a.txt"], ["t"], 5, None)
    assert "samples is 2, 3, but the recipe has no axis for it; give one" in error_of(changed, small(), samples=[2, 3])


PAPER = [*(f"table{number}" for number in range(1, 7)), "figure3", "figure4a", "figure4b", "figure5"]


@pytest.mark.parametrize("name", sorted({*PAPER, *recipe_names()}))
def test_recipes_of_the_package_are_valid(name):
    recipe = read_recipe(name)
    judged = {*recipe.evaluation.perplexity, *recipe.evaluation.tasks, AVERAGE}
    for label, model in recipe.models.items():
        rows = [run.row for run in expand(recipe, label)]
        assert recipe.model_of(model.id) == label
        for row, figures in model.published.items():
            assert set(figures) <= judged, row
        if model.published:
            assert "dense" in model.published
            assert set(rows) & set(model.published)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"evaluation": {"perplexty": ["a"]}}, "evaluation.perplexty: extra inputs are not permitted"),
    ({"evaluation": {}}, "evaluation: nothing is measured; add perplexity texts, tasks, or both"),
    ({"kind": "graph of heads"}, "kind: input should be"),
    ({"runs": {}, "grid": {}}, "there is nothing to run; add runs, or values to the grid"),
    ({"grid": {"seed": []}}, "there is nothing to run; add runs, or values to the grid"),
    ({"grid": {"sparsity": [0.2, 2]}}, "runs.a: sparsity is 2; it must lie between 0 and 1"),
    ({"grid": {"criterion": ["l1"]}}, "runs.a.criterion: the grid gives it too; leave one of them out"),
    ({"runs": {"c": {"criterion": "best"}}}, "runs.c: criterion is 'best'; it must be one of surgeon, flap-wifv,"),
    ({"runs": {"c": {"critrion": "l1"}}}, "runs.c.critrion: no such option; there are sparsity, target, plan, widths"),
    ({"runs": {"c": {"format": "gguf"}}}, "runs.c: transformers scores the runs; use the format hf"),
    ({"options": {"samples": "many"}}, "runs.a: samples is 'many'; it must be a whole number"),
    ({"models": {"Big": {"id": "x", "options": {"lenght": 8}}}}, "models.Big.options.lenght: no such option"),
    ({"retrain": {"c": {}}}, "retrain.c: no such run; there are a, b"),
    ({"retrain": {"a": {"rnk": 4}}}, "retrain.a.rnk: no such option; there are calibration, length, seed, tokens"),
    ({"runs": {"c": {"calibration": "self"}}, "retrain": {"c": {}}}, "retrain.c: calibration is 'self', but"),
    ({"tau": 0.2}, "tau: only a recipe of the kind graph has it; to prune with it, set it in a run"),
    ({"kind": "graph", "runs": {}, "grid": {}}, "tau is None; a recipe of the kind graph needs one above 0"),
    ({"kind": "graph", "tau": 0.2}, "a recipe of the kind graph prunes nothing; leave out runs, grid and retrain"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=[message for _, message in WRONG])
def test_a_wrong_recipe(fields, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(SMALL | fields, sort_keys=False))
    assert f"{path}: {message}" in error_of(read_recipe, str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "recipe: input should be a valid dictionary"),
        (b"title: [", "not valid YAML"),
        (b"title: a\nruns:\n  x: {}\n  x: {}\n", "not valid YAML ('x' occurs twice"),
        (b"title: !!python/object/apply:os.getcwd []", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe(text, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text)
    assert message in error_of(read_recipe, str(path))
