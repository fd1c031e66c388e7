"""Recipes of `secateur compare`, read from YAML and checked: runs, models and evaluation of a comparison.

A recipe has one run for every entry of `runs` at every point of `grid`. Options of a run are fields of `Options` by
name. If several places give an option, the run has priority over the model, and the model over the shared options.
"""

import itertools
import math
import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from secateur.base.errors import SecateurError
from secateur.base.files import local_path
from secateur.base.yaml_files import read_yaml
from secateur.commands.options import LARGEST_TAU, Options
from secateur.paper.recipes import FOLDER, recipe_names
from secateur.retraining.options import Training
from secateur.text.sources import RANDOM, SELF

T = TypeVar("T")
_NAMED = re.compile(r"([\w.-]+)=(.+)")
_NO_TEXT = (RANDOM, SELF)
"""Sources that are not text, which `--calibration` does not replace."""
_MOST_RUNS = 10_000
_SPREAD = "seed"
"""Axis of the grid whose values repeat a row instead of making further rows."""


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
    """Comparison that `secateur compare` executes; the files in `recipes/` are examples."""

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
    """Settings of retraining, fields of `Training`, by the name of the row; see `Run.training`."""
    evaluation: Evaluation = Evaluation()
    tau: float | None = None
    """Distance in nats below which heads are joined, in a recipe of the kind `graph`."""

    def model_of(self, source: str) -> tuple[str, PaperModel] | None:
        """Return the name and the entry of the model that a folder or hub id names; None if the paper did not measure
        it."""
        wanted = _last(source)
        for name, model in self.models.items():
            if wanted in {_last(other) for other in (model.id, *model.other_names)}:
                return name, model
        return None


@dataclass(frozen=True)
class Run:
    """Run of a recipe, which makes one pruned model."""

    label: str
    axes: tuple[tuple[str, Any], ...]
    """Place in the grid: pairs of option and value."""
    options: Options
    training: Training | None = None
    """Retraining of the pruned model; calibration, length and seed come from the run unless the recipe sets them."""

    @property
    def row(self) -> str:
        """Name of the row of the table: label and place in the grid, without the seed."""
        return ", ".join(filter(None, (self.label, *(f"{k} {v}" for k, v in self.axes if k != _SPREAD))))

    def place(self, axis: str) -> Any:
        """Return the run's value on an axis of the grid, or None if the grid has no such axis."""
        return dict(self.axes).get(axis)


def read_recipe(name: str) -> Recipe:
    """Read a recipe from a YAML file, or the recipe of that name that comes with the package.

    Raises:
        SecateurError: The recipe does not exist, is not valid, or has a run with wrong options.
    """
    path = local_path(name)
    if not path.is_file():
        if name not in recipe_names():
            raise SecateurError(f"recipe '{name}' does not exist; name a .yaml file or one of {_some(recipe_names())}")
        path = FOLDER / f"{name}.yaml"
    try:
        raw = read_yaml(path, _Loader)
    except UnicodeDecodeError as error:
        raise SecateurError(f"{path}: not UTF-8; a recipe is a YAML file") from error
    if not isinstance(raw, dict):
        raise SecateurError(
            f"{path}: a recipe is a mapping with title, runs, evaluation, ...; see the recipes of secateur"
        )
    try:
        recipe = Recipe.model_validate(raw)
        for entry in (None, *recipe.models):
            expand(recipe, entry)
    except ValidationError as error:
        raise SecateurError(f"{path}: {_first(error)}") from error
    except SecateurError as error:
        raise SecateurError(f"{path}: {error}") from error
    return recipe


def expand(recipe: Recipe, model: str | None) -> list[Run]:
    """Return every run of a recipe on one of its own models, or on any other model if `model` is None.

    Raises:
        SecateurError: An option does not exist or is wrong, the grid is empty, or there is nothing to run.
    """
    shared = recipe.options | (recipe.models[model].options if model is not None else {})
    _values(recipe.options, "options")
    _values(shared, f"models.{model}.options")
    _check_kind(recipe)
    if recipe.kind != "grid":
        return [Run("", (), _options(shared, "options"))]
    _check_grid(recipe)
    return [run for label, values in (recipe.runs or {"": {}}).items() for run in _runs(recipe, shared, label, values)]


def _check_kind(recipe: Recipe) -> None:
    """Raise `SecateurError` if a recipe has fields that its kind does not have, or lacks the threshold of its kind."""
    if recipe.kind != "grid":
        for place in ("runs", "grid", "retrain"):
            if getattr(recipe, place):
                raise SecateurError(f"{place}: a recipe of the kind {recipe.kind} prunes nothing; leave this out")
    if recipe.kind != "graph":
        if recipe.tau is not None:
            raise SecateurError("tau: only a recipe of the kind graph has it; to prune with it, set it in a run")
    elif recipe.tau is None or not 0 < recipe.tau <= LARGEST_TAU:
        raise SecateurError(
            f"tau is {recipe.tau}; a recipe of the kind graph needs one above 0 and at most ln 2 = {LARGEST_TAU:.4f}"
        )


def _check_grid(recipe: Recipe) -> None:
    """Raise `SecateurError` if a recipe of the kind `grid` has no runs or too many, measures nothing, or repeats a
    value."""
    if not (recipe.runs or recipe.grid):
        raise SecateurError("no runs are given; add runs, a grid, or both")
    if not (recipe.evaluation.perplexity or recipe.evaluation.tasks):
        raise SecateurError("evaluation: nothing is measured; add perplexity texts, tasks, or both")
    count = math.prod(map(len, recipe.grid.values())) * max(1, len(recipe.runs))
    if count > _MOST_RUNS:
        raise SecateurError(f"grid: {count:,} runs, and a comparison has {_MOST_RUNS:,} at most; leave values out")
    for axis, values in recipe.grid.items():
        if not values:
            raise SecateurError(f"grid.{axis}: the grid is empty; give at least one value")
        if any(values.count(value) > 1 for value in values):
            raise SecateurError(f"grid.{axis}: a value occurs twice; leave one out")
        for index, value in enumerate(values):
            _values({axis: value}, f"grid.{axis}.{index}")
    for label in recipe.retrain:
        if label not in recipe.runs:
            raise SecateurError(f"retrain.{label}: no such run; there are {_some(recipe.runs)}")


def _runs(recipe: Recipe, shared: Mapping[str, Any], label: str, values: Mapping[str, Any]) -> Iterator[Run]:
    """Yield the runs of one row at every point of the grid.

    Args:
        recipe: The recipe.
        shared: Options of all runs on the model.
        label: Name of the row.
        values: Options of the row.

    Raises:
        SecateurError: An option is wrong, or the row and the grid both have it.
    """
    if repeated := sorted(set(values) & set(recipe.grid)):
        raise SecateurError(f"runs.{label}.{repeated[0]}: the grid gives it too; leave one of them out")
    for point in itertools.product(*recipe.grid.values()):
        axes = tuple(zip(recipe.grid, point, strict=True))
        options = _options({**shared, **values, **dict(axes)}, f"runs.{label}" if label else "grid")
        training = None
        if label in recipe.retrain:
            text = {name: getattr(options, name) for name in ("calibration", "length", "seed")}
            training = _made(Training, text | recipe.retrain[label], f"retrain.{label}")
            if training.time is not None:
                raise SecateurError(f"retrain.{label}.time: is another training on every machine; give tokens")
        yield Run(label, axes, options, training)


def changed(recipe: Recipe, **changes: Any) -> Recipe:
    """Return the recipe with other texts, sizes and seeds, which replace an option wherever the recipe gives it.

    The calibrations `random` and `self` stay, since they are not texts. `refit_samples` changes only runs that have the
    option, and the number of rows of retraining.

    Args:
        recipe: The recipe.
        changes: New values; None keeps the recipe's. Options are calibration, length and blocks; samples,
            refit_samples and seeds, each a tuple of numbers; and perplexity, tasks, limit and tokens of the evaluation.

    Raises:
        SecateurError: Several numbers of samples are given, but the recipe has no axis for them.
    """
    raw, changes = recipe.model_dump(), {name: value for name, value in changes.items() if value is not None}
    values: dict[str, list[Any]] = {}
    if "seeds" in changes and recipe.kind == "grid":
        raw["grid"].setdefault("seed", [])
        values["seed"] = list(changes["seeds"])
    for field in filter(changes.__contains__, ("samples", "refit_samples")):
        values[field] = list(changes[field])
        if len(values[field]) > 1 and field not in recipe.grid:
            name = field.replace("_", "-")
            raise SecateurError(f"{name} is {_some(values[field])}, but the recipe has no axis for it; give one")
    if "refit_samples" in values:
        for training in raw["retrain"].values():
            length = changes.get("length") or training.get("length") or raw["options"].get("length", Options.length)
            rows = values["refit_samples"][0]
            training |= {
                "tokens": str(rows * length),
                "batch": max(1, min(rows, training.get("batch", Training.batch))),
            }
    values |= {field: [changes[field]] for field in ("calibration", "length", "blocks") if field in changes}
    for field, new in values.items():
        if field in raw["grid"]:
            raw["grid"][field] = [*new, *(value for value in raw["grid"][field] if value in _NO_TEXT)]
        for training in raw["retrain"].values():
            if field in ("calibration", "length") and field in training:
                training[field] = new[0]
        for place in (raw["options"], *raw["runs"].values(), *(model["options"] for model in raw["models"].values())):
            if field in raw["grid"]:
                place.pop(field, None)
            elif field in place and place[field] not in _NO_TEXT:
                place[field] = new[0]
        if field not in raw["grid"] and field != "refit_samples":
            raw["options"].setdefault(field, new[0])
    if "length" in changes:
        raw["evaluation"]["length"] = None
    for field in filter(changes.__contains__, ("perplexity", "tasks", "limit", "tokens")):
        value = changes[field]
        raw["evaluation"][field] = list(value) if isinstance(value, tuple) else value or None
    return Recipe.model_validate(raw)


def named(text: str, name: str) -> tuple[str, str]:
    """Split `column=source` into both parts; a source without a column is in the column `name`."""
    match = _NAMED.fullmatch(text)
    return (match[1], match[2]) if match and not Path(text).exists() else (name, text)


def _options(given: Mapping[str, Any], where: str) -> Options:
    """Return options from a recipe, checked like options of the command line."""
    options = _made(Options, given, where)
    if options.output_format.suffix is not None:
        raise SecateurError(f"{where}: transformers scores the runs; use the format hf or stock")
    return options


def _made(owner: type[T], given: Mapping[str, Any], where: str) -> T:
    """Return an object of a data class from the values in a recipe."""
    values = _values(given, where, owner)
    try:
        return owner(**values)
    except SecateurError as error:
        raise SecateurError(f"{where}: {error}") from error


def _values(given: Mapping[str, Any], where: str, owner: type = Options) -> dict[str, Any]:
    """Return the values of options by name, each converted to the type of its field."""
    result, kinds = {}, _adapters(owner)
    for name, value in given.items():
        kind = kinds.get(name)
        place = where if where.startswith("grid.") else f"{where}.{name}"
        if kind is None:
            raise SecateurError(f"{place}: no such option; there are {_some(kinds)}")
        if name == "modules":
            listed = value.split(",") if isinstance(value, str) else value
            value = tuple(listed) if isinstance(listed, list) else listed
        try:
            result[name] = kind.validate_python(value, strict=True)
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise SecateurError(f"{place} is {value!r}: {problem[0].lower()}{problem[1:]}") from error
    return result


@cache
def _adapters(owner: type) -> dict[str, TypeAdapter[Any]]:
    """Return a validator for the type of each option."""
    hints = get_type_hints(owner)
    return {field.name: TypeAdapter(hints[field.name]) for field in fields(owner)}


def _first(error: ValidationError) -> str:
    """Return the first error that pydantic found as one line, with the place in the recipe."""
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"{place}: no such field in a recipe; correct its name or leave it out"
    if problem["type"] == "missing":
        return f"{place}: missing; a recipe needs it"
    return f"{place}: {problem['msg'][0].lower()}{problem['msg'][1:]}, not {problem['input']!r}"


def _last(source: str) -> str:
    """Return the last part of a path or hub id, in lower case."""
    return local_path(source).name.lower()


def _some(values: Any) -> str:
    return ", ".join(str(value) for value in values)


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys, since the first of two equal runs would be lost silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable):
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"'{key}' occurs twice", key_node.start_mark)
                seen.add(key)
        return super().construct_mapping(node, deep)
