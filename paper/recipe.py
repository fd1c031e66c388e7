"""Recipes, read from YAML and checked: runs, models and evaluation of a comparison.

A recipe has one run for every entry of `runs` at every point of `grid`. Options of a run are fields of
`secateur.Options` by name. If several places give an option, the run has priority over the model, and the model over
the shared options.
"""

import itertools
import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from secateur import Options, SecateurError, Training

T = TypeVar("T")
FOLDER = Path(__file__).parent / "recipes"
NO_TEXT = ("random", "self")
"""Values of `calibration` that are no text: they cannot be scored, and `--calibration` does not replace them."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class PaperModel(_Strict):
    """Model that the paper measured."""

    id: str
    """Hub id; the models of this list are the default of the recipe."""
    other_names: list[str] = []
    """Names of further folders and hub ids that hold the same model."""
    options: dict[str, Any] = {}
    """Options for this model, such as the blocks that the paper prunes."""
    published: dict[str, dict[str, float]] = {}
    """Figures of the paper by row and column."""


class Evaluation(_Strict):
    """Measurements of every model."""

    perplexity: list[str] = []
    """Texts, as `source` or `column=source`."""
    length: int | None = None
    """Tokens in a row; by default the length of the calibration rows."""
    tokens: int | None = None
    """Number of tokens of each text; all by default."""
    tasks: list[str] = []
    """Tasks of lm-eval, as `task` or `column=task`."""
    limit: int | None = None
    """Number of items of each task; all by default."""


class Recipe(_Strict):
    """Comparison; the files in `recipes/` are examples."""

    title: str
    kind: Literal["grid", "activations", "graph"] = "grid"
    """Kind of comparison: `grid` prunes and scores; `activations` and `graph` measure dense models by block."""
    models: dict[str, PaperModel] = {}
    options: dict[str, Any] = {}
    """Options of every run."""
    runs: dict[str, dict[str, Any]] = {}
    """Options that distinguish a row, by the name of the row."""
    grid: dict[str, list[Any]] = {}
    """Values of an option, by the name of the option; values of `seed` become the spread of a row."""
    retrain: dict[str, dict[str, Any]] = {}
    """Settings of retraining, fields of `secateur.Training`, by the name of the row; see `Run.training`."""
    evaluation: Evaluation = Evaluation()
    tau: float | None = None
    """Distance in nats below which heads are joined, in a recipe of the kind `graph`."""

    def model_of(self, source: str) -> str | None:
        """Return the name of the model that a folder or hub id names; None if the paper did not measure it."""
        for name, model in self.models.items():
            if _last(source) in map(_last, (model.id, *model.other_names)):
                return name
        return None

    def options_of(self, model: str | None) -> dict[str, Any]:
        """Return the options that all runs on a model have in common; `model` is None for one of the user's own."""
        return self.options | (self.models[model].options if model is not None else {})


@dataclass(frozen=True)
class Run:
    """Run of a recipe, which makes one pruned model."""

    label: str
    axes: Mapping[str, Any]
    """Place in the grid: values by option."""
    options: Options
    training: Training | None = None
    """Retraining of the pruned model; calibration, length and seed come from the run unless the recipe sets them."""

    @property
    def row(self) -> str:
        """Name of the row of the table: label and place in the grid, without the seed."""
        return ", ".join(filter(None, (self.label, *(f"{k} {v}" for k, v in self.axes.items() if k != "seed"))))


def recipe_names() -> list[str]:
    """Return the names of the recipes in `recipes/`, without `.yaml`."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def read_recipe(name: str) -> Recipe:
    """Read a recipe from a YAML file, or the recipe of that name in `recipes/`.

    Raises:
        SecateurError: The recipe does not exist, is not valid, or has a run with wrong options.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        if name not in recipe_names():
            names = ", ".join(recipe_names())
            raise SecateurError(f"recipe '{name}' does not exist; name a .yaml file or one of {names}")
        path = FOLDER / f"{name}.yaml"
    try:
        recipe = Recipe.model_validate(yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader))
        for model in (None, *recipe.models):
            expand(recipe, model)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SecateurError(f"{path}: not valid YAML ({' '.join(str(error).split())}); correct it") from error
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"])) or "recipe"
        raise SecateurError(f"{path}: {place}: {problem['msg'].lower()}; see the recipes in {FOLDER}") from error
    except SecateurError as error:
        raise SecateurError(f"{path}: {error}") from error
    return recipe


def expand(recipe: Recipe, model: str | None) -> list[Run]:
    """Return every run of a recipe on one of its own models, or on any other model if `model` is None.

    Raises:
        SecateurError: An option does not exist or is wrong, or there is nothing to run or to measure.
    """
    places = {"options": recipe.options, "grid": recipe.grid}
    places |= {f"models.{name}.options": one.options for name, one in recipe.models.items()}
    for place, given in (places | {f"runs.{label}": one for label, one in recipe.runs.items()}).items():
        _check_names(Options, given, place)
    if recipe.kind != "grid":
        if recipe.runs or recipe.grid or recipe.retrain:
            raise SecateurError(f"a recipe of the kind {recipe.kind} prunes nothing; leave out runs, grid and retrain")
        if recipe.kind == "graph" and (recipe.tau is None or not 0 < recipe.tau <= math.log(2)):
            raise SecateurError(f"tau is {recipe.tau}; a recipe of the kind graph needs one above 0 and at most ln 2")
        return [Run("", {}, _made(Options, recipe.options_of(model), "options"))]
    if recipe.tau is not None:
        raise SecateurError("tau: only a recipe of the kind graph has it; to prune with it, set it in a run")
    if not (recipe.evaluation.perplexity or recipe.evaluation.tasks):
        raise SecateurError("evaluation: nothing is measured; add perplexity texts, tasks, or both")
    if unknown := set(recipe.retrain) - set(recipe.runs):
        raise SecateurError(f"retrain.{unknown.pop()}: no such run; there are {', '.join(recipe.runs)}")
    if not (recipe.runs or recipe.grid) or not all(recipe.grid.values()):
        raise SecateurError("there is nothing to run; add runs, or values to the grid")
    return [run for label in recipe.runs or [""] for run in _runs_of_row(recipe, model, label)]


def _runs_of_row(recipe: Recipe, model: str | None, label: str) -> Iterator[Run]:
    """Yield the runs of one row at every point of the grid."""
    own = recipe.runs.get(label, {})
    if repeated := set(own) & set(recipe.grid):
        raise SecateurError(f"runs.{label}.{repeated.pop()}: the grid gives it too; leave one of them out")
    for point in itertools.product(*recipe.grid.values()):
        axes = dict(zip(recipe.grid, point, strict=True))
        options = _made(Options, recipe.options_of(model) | own | axes, f"runs.{label}" if label else "grid")
        if options.format not in (None, "hf", "stock"):
            raise SecateurError(f"runs.{label}: transformers scores the runs; use the format hf or stock")
        training = None
        if label in recipe.retrain:
            place = f"retrain.{label}"
            _check_names(Training, recipe.retrain[label], place)
            text = {name: getattr(options, name) for name in ("calibration", "length", "seed")}
            training = _made(Training, text | recipe.retrain[label], place)
        yield Run(label, axes, options, training)


def changed(recipe: Recipe, **changes: Any) -> Recipe:
    """Return the recipe with other texts, sizes and seeds, which replace an option wherever the recipe gives it.

    The calibrations `random` and `self` stay, since they are not texts. `refit_samples` changes only runs that have the
    option, and the number of rows of retraining.

    Args:
        recipe: The recipe.
        changes: New values; None keeps the recipe's. Options are calibration, length and blocks; samples,
            refit_samples and seeds, each a list of numbers; and perplexity, tasks, limit and tokens of the evaluation.

    Raises:
        SecateurError: Several numbers of samples are given, but the recipe has no axis for them.
    """
    raw, changes = recipe.model_dump(), {name: value for name, value in changes.items() if value is not None}
    for field in {"perplexity", "tasks", "limit", "tokens"} & set(changes):
        raw["evaluation"][field] = changes[field] or ([] if field in ("perplexity", "tasks") else None)
    if "length" in changes:
        raw["evaluation"]["length"] = None
    if "refit_samples" in changes:
        for training in raw["retrain"].values():
            length = changes.get("length") or training.get("length") or raw["options"].get("length", Options.length)
            rows = changes["refit_samples"][0]
            batch = max(1, min(rows, training.get("batch", Training.batch)))
            training |= {"tokens": str(rows * length), "batch": batch}
    values: dict[str, list[Any]] = {}
    if "seeds" in changes and recipe.kind == "grid":
        raw["grid"].setdefault("seed", [])
        values["seed"] = changes["seeds"]
    for field in ("samples", "refit_samples", "calibration", "length", "blocks"):
        if field in changes:
            values[field] = changes[field] if isinstance(changes[field], list) else [changes[field]]
        if len(values.get(field, [])) > 1 and field not in recipe.grid:
            several = f"{field.replace('_', '-')} is {', '.join(map(str, values[field]))}"
            raise SecateurError(f"{several}, but the recipe has no axis for it; give one")
    for field, new in values.items():
        if field in raw["grid"]:
            raw["grid"][field] = [*new, *(value for value in raw["grid"][field] if value in NO_TEXT)]
        for training in raw["retrain"].values():
            if field in ("calibration", "length") and field in training:
                training[field] = new[0]
        for place in (raw["options"], *raw["runs"].values(), *(model["options"] for model in raw["models"].values())):
            if field in raw["grid"]:
                place.pop(field, None)
            elif field in place and place[field] not in NO_TEXT:
                place[field] = new[0]
        if field not in raw["grid"] and field != "refit_samples":
            raw["options"].setdefault(field, new[0])
    return Recipe.model_validate(raw)


def columns_of(what: str, given: list[str]) -> dict[str, str]:
    """Return texts or tasks, given as `source` or `column=source`, by the name of their column.

    Raises:
        SecateurError: Two have the same name.
    """
    found: dict[str, str] = {}
    for text in given:
        column, equals, source = text.partition("=")
        if not equals or Path(text).exists():
            column, source = short(text), text
        if column in found:
            raise SecateurError(f"two {what} are called {column}; give them different names, NAME={what[:-1].upper()}")
        found[column] = source
    return found


def short(source: str) -> str:
    """Return the name of a file or folder without the path to it; hub ids and data sets stay as they are."""
    path = Path(source).expanduser()
    return path.absolute().name if path.exists() else source


def _check_names(owner: type, given: Mapping[str, Any], place: str) -> None:
    """Raise `SecateurError` for an option that a data class does not have."""
    names = [field.name for field in fields(owner)]
    for name in given:
        if name not in names:
            raise SecateurError(f"{place}.{name}: no such option; there are {', '.join(names)}")


def _made(owner: type[T], values: Mapping[str, Any], place: str) -> T:
    """Return an object of a data class; an error names the place in the recipe."""
    try:
        return owner(**values)
    except SecateurError as error:
        raise SecateurError(f"{place}: {error}") from error


def _last(source: str) -> str:
    """Return the last part of a path or hub id, in lower case."""
    return Path(source).name.lower()


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys, since the first of two equal runs would be lost silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value]
        if repeated := next((key for key in keys if isinstance(key, str) and keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"'{repeated}' occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)
