"""From what a person asks for to a plan: read one, or survey the model and choose widths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.base.digests import hash_of
from secateur.base.errors import SecateurError
from secateur.base.progress import Watcher
from secateur.commands.options import WIDTHS, Options
from secateur.criteria import pattern_units
from secateur.criteria.head_distances import head_distances
from secateur.formats.gguf_architectures import gguf_obstacle
from secateur.model.activations import Rows
from secateur.model.stream import BlockStream
from secateur.model.structure import KINDS, Kind, Width
from secateur.plan.meters import Meter, meter_of, parameter_meter
from secateur.plan.plan import Plan, Wish, check_reach, nearest_uniform, plan, uniform_plans
from secateur.plan.plan_file import read_plan, read_ratios
from secateur.plan.search import smallest_within
from secateur.plan.similar_heads import Similar, check_heads, find, head_plan, nearest_tau, settle, with_heads_settled
from secateur.plan.target import FASTER, Target
from secateur.survey.curves import Survey, load_survey, save_survey
from secateur.survey.survey import survey
from secateur.write.write import Format, obstacle

PROBE_TOKENS = 512
"""Tokens on which the price of errors is measured. All others fit what is probed: after a fit to few tokens, the price
would be that of the fit and not of the cut, and the more so the more inputs a module has."""


SOMETHING = 1e-6
"""A share of the parameters that any cut exceeds."""


@dataclass(frozen=True)
class Request:
    """What `decide` needs, all of it checked against the model and none of it slow."""

    stream: BlockStream
    options: Options
    chosen: range
    format: Format
    """Of the folder; a GGUF file is made from an `hf` one."""
    parameters: Meter
    wish: Wish | None
    """None where the plan is given."""
    given: Plan | None
    possible: tuple[Plan, ...]
    """What can be had without a survey: the given plan, or uniform ones near the target; none for adaptive widths."""
    similar: Similar | None = None
    """What `measured` has found."""
    whole: Wish | None = None
    """The wish about heads and channels, where `wish` is about channels alone, heads being settled."""

    @property
    def weighs(self) -> bool:
        """Whether there is anything for a survey to decide."""
        return len(self.possible) != 1 and not self.options.choice.alone

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What a survey is about."""
        choice = self.options.choice
        return ("channels",) if choice.settles and not choice.alone else self.options.kinds


def request(stream: BlockStream, options: Options, dtype: torch.dtype, watcher: Watcher) -> Request:
    """Check what is asked for against the model.

    Raises:
        SecateurError: a plan that does not belong to the model, a target that no plan can meet, or a format that
            cannot hold what is asked for.
    """
    chosen = options.chosen_blocks(len(stream))
    format: Format = "stock" if options.format == "stock" or _stock_by_default(options) else "hf"

    parameters = parameter_meter(stream, options.adds_biases)
    biases = any(parameters.added)
    if options.adds_biases and not any(block.module(kind).free_bias for block in stream.blocks for kind in KINDS):
        watcher.note("No bias is fitted: this model has a norm behind each module, where none makes up for what goes")

    @cache
    def held(width: Width) -> str | None:
        reason = obstacle(stream, chosen, width, format=format, intercept=biases)
        if reason is None and options.format == "gguf" and not options.gives_widths:
            # Blocks that the plan leaves alone stay dense; otherwise all may come out alike.
            cut = chosen if options.widths == "uniform" else range(chosen.start, chosen.start + 1)
            widths = [width if index in cut else block.width for index, block in enumerate(stream.blocks)]
            reason = gguf_obstacle(stream.checkpoint, widths, options.type, intercept=biases)
        return reason

    wish = Wish(
        blocks=stream.blocks,
        chosen=chosen,
        parameters=parameters,
        goal=options.goal,
        meter=parameters,
        of=options.of,
        kinds=options.kinds,
        multiple=options.multiple,
        obstacle=held,
    )
    if options.choice.similar:
        check_heads(wish)
    given = _given(stream, options, wish)
    if given is not None:
        for width in set(given.widths.values()):
            if (reason := held(width)) is not None:
                raise SecateurError(f"{options.plan or options.widths}: the format cannot hold this: {reason}")
        if format == "stock" and len({given.widths.get(i, block.width) for i, block in enumerate(stream.blocks)}) > 1:
            raise SecateurError(
                f"{options.plan or options.widths}: the stock format holds one width for all blocks; take --format hf, "
                f"or the nearest that fits: {nearest_uniform(given.sparsity)}"
            )
        asked = Request(stream, options, chosen, format, parameters, None, given, (given,))
        _checked(asked, given)
        return asked
    if isinstance(options.goal, Target) and not options.searches:
        if options.format == "gguf" and options.goal.quantity in FASTER:
            watcher.note("Speed is measured with torch's kernels on this machine; llama.cpp's may gain otherwise")
        gguf_type = options.type if options.format == "gguf" else None
        meter = meter_of(
            options.goal,
            stream,
            dtype=dtype,
            gguf_type=gguf_type,
            device=stream.device,
            watcher=watcher,
            biases=options.adds_biases,
        )
        wish = replace(wish, meter=meter)
    return Request(stream, options, chosen, format, parameters, wish, None, _unsurveyed(wish, options))


def _unsurveyed(wish: Wish, options: Options) -> tuple[Plan, ...]:
    """The plans that need no survey; of adaptive widths only that they can meet the target."""
    if options.choice.alone:
        return ()
    # How much a loss of perplexity allows is not known yet, but something must be able to go.
    aim = replace(wish, goal=SOMETHING) if options.searches else wish
    if options.widths == "uniform":
        possible = tuple(uniform_plans(aim))
        return () if options.searches else possible
    check_reach(aim)
    return ()


def _stock_by_default(options: Options) -> bool:
    return options.format is None and options.widths == "uniform" and options.plan is None


def _given(stream: BlockStream, options: Options, wish: Wish) -> Plan | None:
    """The plan that a file spells out."""
    if options.plan is not None:
        widths, keeps = read_plan(Path(options.plan), stream.blocks, stream.checkpoint.fingerprint)
        reached = wish.sparsity(widths)
        return Plan(widths, reached, reached, wish.of, keeps=keeps)
    if options.widths in WIDTHS:
        return None
    widths = read_ratios(Path(options.widths), stream.blocks, options.multiple)
    reached = wish.sparsity(widths)
    return Plan(widths, reached, reached, wish.of)


def measured(asked: Request, text: Tensor, watcher: Watcher) -> Request:
    """The request with the similar heads, where its criterion is about them; as it is otherwise.

    Args:
        asked: the request.
        text: calibration rows (rows x length).
        watcher: told about progress.

    Raises:
        SecateurError: the threshold removes nothing or too much.
    """
    options, wish = asked.options, asked.wish
    if not options.choice.similar or (asked.given is not None and asked.given.keeps is not None):
        return asked
    distances = head_distances(asked.stream, text, blocks=asked.chosen, watcher=watcher)
    tau = options.threshold
    if options.tau == "auto":
        assert wish is not None
        assert options.sparsity is not None
        tau = nearest_tau(wish, distances, options.sparsity)
    if not options.choice.settles:
        found = find(distances, tau)
        watcher.note(found.said().capitalize())
        return replace(asked, similar=found)
    assert wish is not None
    found, widths = settle(wish, distances, tau)
    watcher.note(found.said().capitalize())
    if not options.choice.alone:
        return replace(asked, similar=found, wish=with_heads_settled(wish, widths), whole=wish)
    given = _checked(asked, head_plan(wish, found, widths))
    return replace(asked, similar=found, given=given, possible=(given,))


def surveyed(
    asked: Request, text: Tensor, watcher: Watcher, file: Path | None = None, sigma: Tensor | None = None
) -> Survey | None:
    """The survey of a request, None if it needs none: read from a file where there is one, else written there.

    Args:
        asked: the request.
        text: calibration rows (rows x length); a part of them is used.
        watcher: told about progress.
        file: where the survey is kept.
        sigma: other rows (rows x length) by which units are ordered.

    Raises:
        SecateurError: the file holds a survey of another model, or with other options.
    """
    if not asked.weighs:
        return None
    stream, options = asked.stream, asked.options
    few, probe_rows = survey_rows(text)
    wanted = survey_key(asked, text)
    if file is not None and file.exists():
        return _read_survey(asked, file, wanted)
    found = survey(
        stream,
        few if sigma is None else Rows.of(few).scored_by(Rows.of(sigma)),
        probe_rows=probe_rows,
        blocks=asked.chosen,
        kinds=asked.kinds,
        criterion=options.scores,
        ridge=options.ridge,
        seed=options.seed,
        similar=asked.similar.candidates if asked.similar else None,
        watcher=watcher,
    )
    found = replace(found, asked=wanted)
    if file is not None:
        save_survey(found, file)
    return found


def check_survey(asked: Request, text: Tensor | None, file: Path | None) -> None:
    """See that a survey that is there belongs to the request, and to the rows once they are known; see `surveyed`."""
    if file is not None and file.exists() and asked.weighs:
        _read_survey(asked, file, survey_key(asked, text))


def _read_survey(asked: Request, file: Path, wanted: dict[str, Any]) -> Survey:
    """The survey of a file, which must price every width of every module that is asked for."""
    found = load_survey(file, wanted)
    lengths = {(curve.block, curve.kind, curve.pattern): len(curve.errors) for curve in found.curves}
    whole = {(probe.block, probe.kind) for probe in found.probes if probe.whole}
    for index in asked.chosen:
        for module in map(asked.stream.blocks[index].module, asked.kinds):
            widths = {pattern: 1 if module.locked else pattern_units(module, pattern) for pattern in module.patterns}
            here = {pattern: lengths.get((index, module.kind, pattern)) for pattern in module.patterns}
            if here != widths or (index, module.kind) not in whole:
                raise SecateurError(
                    f"{file}: not all of block {index}'s {module.kind} is in this survey; name another file, or delete "
                    "it to have it made again"
                )
    return found


def survey_rows(text: Tensor) -> tuple[Tensor, Tensor]:
    """The rows for the error curves, and the last few for the probes; the same ones where there is only one."""
    count = min(max(1, PROBE_TOKENS // text.shape[1]), len(text) // 2)
    return (text, text) if not count else (text[:-count], text[-count:])


def survey_key(asked: Request, text: Tensor | None) -> dict[str, Any]:
    """What a survey depends on; without rows, all but these."""
    options, choice = asked.options, asked.options.choice
    key: dict[str, Any] = {
        "fingerprint": asked.stream.checkpoint.fingerprint,
        "blocks": f"{asked.chosen.start}:{asked.chosen.stop}",
        "modules": ",".join(asked.kinds),
        "criterion": options.scores if options.sigma != "random" else f"{options.scores} of random ids",
        "ridge": options.ridge,
    }
    if choice.uses(("random",)) or options.sigma == "random":
        key["seed"] = options.seed
    if choice.similar and not choice.settles:
        # Where tau settles how many heads go, the survey is about channels alone.
        key["tau"] = f"auto for {options.sparsity}" if options.tau == "auto" else options.threshold
    if text is not None:
        key["calibration"] = hash_of(text)
    return key


def decide(asked: Request, found: Survey | None, loss: Callable[[Plan], float] | None = None) -> Plan:
    """The plan.

    Args:
        asked: the request.
        found: the survey, where one is needed.
        loss: perplexity over dense under a plan, as it is measured; for a target of that kind.

    Raises:
        SecateurError: no plan meets the target.
    """
    if asked.given is not None:
        return asked.given
    assert asked.wish is not None
    goal = asked.wish.goal
    if isinstance(goal, Target) and asked.options.searches:
        assert found is not None
        assert loss is not None
        return smallest_within(
            asked.wish, asked.options.widths, found, goal.value, lambda tried: loss(_checked(asked, tried))
        )
    decided = plan(asked.wish, asked.options.widths, found)
    if asked.whole is not None:
        assert asked.similar is not None
        decided = asked.whole.plan(decided.widths)
        decided = replace(decided, note="; ".join(filter(None, (decided.note, asked.similar.said()))))
    return _checked(asked, decided)


def _checked(asked: Request, decided: Plan) -> Plan:
    """Some formats bind blocks to each other: the last word is on the whole plan."""
    if asked.options.format == "gguf":
        widths = [decided.widths.get(i, block.width) for i, block in enumerate(asked.stream.blocks)]
        added = any(asked.parameters.added)
        reason = gguf_obstacle(asked.stream.checkpoint, widths, asked.options.type, intercept=added)
        if reason is not None:
            more = "" if decided.uniform else f"; the nearest that fits: {nearest_uniform(decided.sparsity)}"
            raise SecateurError(f"the GGUF format cannot hold this plan: {reason}{more}")
    return decided
