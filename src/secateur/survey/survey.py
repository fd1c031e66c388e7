"""One pass over the dense model: the error of every module at every width, and what errors cost at the output.

A plan is made from the two (`survey/prices.py`). Errors are measured on the dense stream, where each module's target
is its own dense output, so that the Gram matrix of the level-2 input is the only statistic that most criteria need.
Each token's error counts relative to its own residual stream: otherwise the few tokens with massive activations,
ten thousand times the energy of the rest, would be all that a curve sees. The cost is the divergence of the logits
where a module alone is cut to a few widths (`secateur.survey.probes`), on rows that the errors were not measured on.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from secateur.base.progress import Silent, Watcher
from secateur.criteria.order import error_curve, survivors
from secateur.criteria.registry import Criteria, Criterion
from secateur.criteria.statistics import Statistics
from secateur.model.journal import Journal
from secateur.model.post_norm import PostNorm
from secateur.model.rows import Batch, Rows
from secateur.model.stream import BlockStream
from secateur.model.structure import Kind
from secateur.model.surgery import inner_entries, inner_weight
from secateur.numerics.moments import Moments
from secateur.survey.curves import Curve, Survey
from secateur.survey.probes import Cut, Probes

PROBED = (0.5,)
"""Shares of a module's units whose removal is probed, beside the removal of all."""


def survey(
    stream: BlockStream,
    rows: Tensor | Rows,
    *,
    probe_rows: Tensor | None = None,
    blocks: range | None = None,
    kinds: tuple[Kind, ...] = ("heads", "channels"),
    criterion: str | Criteria = "surgeon",
    ridge: float = 0.3,
    seed: int = 0,
    watcher: Watcher | None = None,
    journal: Journal | None = None,
) -> Survey:
    """Measure every module's error at every width.

    Args:
        rows: calibration tokens (rows x length); of `Rows`, errors are measured by weight, and units ordered by score.
        probe_rows: other tokens (rows x length) to measure on what errors cost; without them no probes are made.
        criterion: the order in which units leave: criteria by name, or made ready.
        ridge: of the refit that the error assumes.
        journal: behind whose last block to go on.
    """
    blocks = blocks if blocks is not None else range(len(stream))
    watcher, journal, criteria = watcher or Silent(), journal or Journal(), Criteria.of(criterion)
    curves = [Curve.of(one) for one in journal.found.get("curves", [])]
    fitted = Rows.of(rows)
    rows = fitted if probe_rows is None else fitted.along(probe_rows)
    probed = len(fitted.groups)
    with stream.arena() as arena, stream.quick():
        hidden = stream.embed(rows, arena)
        probes = None if probe_rows is None else Probes(stream, rows, probed, arena, journal.found.get("probes", []))
        journal.restore([hidden, *(probes.hidden if probes else [])])
        stop = blocks.stop if probes is None else len(stream)
        for index in watcher.track(range(journal.done, stop), "Survey", journal.done):
            with stream.filled(index) as layer:
                if probes is not None:
                    probes.advance(index, layer)
                if index not in blocks:
                    stream.advance(index, layer, rows, hidden)
                    continue
                tensors = dict(layer.named_parameters())
                collectors = [
                    _Collector(
                        stream,
                        index,
                        layer,
                        kind,
                        inputs=kind == "channels" and criteria.named(kind).inputs,
                        apart=rows.scores is not None,
                    )
                    for kind in kinds
                ]
                before = None if probes is None else hidden.parts[probed][:].clone()
                for at in rows.batches():
                    watch = {path: see for c in collectors for path, see in c.watches().items()}
                    hidden[at] = after = stream.run_through(index, layer, hidden[at], at.group, watch=watch)
                    with stream.rounded():
                        for collector in collectors:
                            collector.update(after, at)
                for collector in collectors:
                    module = collector.module
                    stats = Statistics(
                        module=module,
                        tensors=tensors,
                        weight_ao=collector.norm.scale(inner_weight(module, tensors)),
                        moments=collector.moments,
                        inputs=collector.inputs,
                        ridge=ridge,
                        own_target=True,
                        seed=module_seed(seed, index, module.kind),
                    )
                    apart = None if collector.scored is None else replace(stats, moments=collector.scored)
                    found, cuts = _measure(index, criteria.module(index, module.kind), stats, apart)
                    curves += found
                    if probes is not None and before is not None:
                        x = torch.cat(collector.seen)
                        for cut in cuts:
                            probes.begin(layer, before, collector.output(x, cut, tensors), cut)
            journal.keep(
                index + 1,
                [hidden, *(probes.hidden if probes else [])],
                curves=[asdict(curve) for curve in curves],
                probes=[asdict(probe) for probe in probes.begun] if probes else [],
            )
        prices = () if probes is None else tuple(probes.finish(hidden.parts[probed][:], watcher))
    return Survey(criteria.choice.text, ridge, fitted.tokens, tuple(curves), prices)


def _measure(
    index: int, criterion: Criterion, stats: Statistics, choice: Statistics | None
) -> tuple[list[Curve], list[Cut]]:
    """One module's curves, one for each way in which its units may leave together, and the cuts to be probed.

    `choice` has the statistics that decide the order in which units leave, where those are others.
    """
    module, count = stats.module, stats.moments.count
    curves: list[Curve] = []
    cuts: list[Cut] = []
    none = torch.empty(0, dtype=torch.long, device=stats.weight_ao.device)
    energy = stats.normal.energy / count
    everything = Cut(index, module, energy, none, stats.weight_ao[none])
    if module.locked:
        # All or nothing.
        curves = [Curve(index, module.kind, pattern, (0.0,), energy) for pattern in module.patterns]
        return curves, [everything]
    for pattern in module.patterns:
        together, units = module.groups if pattern == "heads" else 1, module.steps(pattern)
        # One way is enough: what an error costs depends little on which units made it.
        probed = {round(units * share) for share in PROBED} - {0, units} if pattern == module.patterns[-1] else set()
        found = error_curve(criterion, stats, pattern, 1, choice, [gone * together for gone in probed])
        errors = (found.errors[::together] / count).tolist()
        curves.append(Curve(index, module.kind, pattern, tuple(errors), energy, tuple(found.order.tolist())))
        for gone in sorted(probed):
            kept = inner_entries(module, survivors(module, pattern, found.order[: gone * together]))
            weight = found.weights[gone * together]
            cuts.append(Cut(index, module, errors[gone] - errors[0], kept.to(weight.device), weight))
    return curves, [*cuts, everything]


def module_seed(seed: int, index: int, kind: Kind) -> int:
    """A seed of its own for each module."""
    return (seed * 1_000_003 + index) * 2 + (kind == "channels")


class _Collector:
    """Sums one module's moments while the dense block runs."""

    def __init__(
        self, stream: BlockStream, index: int, layer: torch.nn.Module, kind: Kind, *, inputs: bool, apart: bool
    ):
        self.module = stream.blocks[index].module(kind)
        self.norm = PostNorm(stream, index, layer, self.module)
        self.moments = Moments(self.module.units * self.module.size, device=stream.device)
        self.scored = Moments(self.module.units * self.module.size, device=stream.device) if apart else None
        """Of the rows that decide the order, where those are others."""
        self.inputs = Moments(stream.width, device=stream.device) if inputs else None
        self.sink = self.source = torch.empty(0)
        self.scale: Tensor | None = None
        self.seen: list[Tensor] = []
        """Level-2 inputs of the rows to be probed (b x t x a)."""

    def watches(self) -> dict[str, Any]:
        """What to watch, by layer path."""
        result: dict[str, Any] = {self.module.sink: self._sink}
        if self.inputs is not None:
            result[self.module.source] = self._source
        return result

    def _sink(self, x: Tensor, z: Tensor) -> None:
        self.sink, self.scale = x, self.norm.inverse_rms(z)

    def _source(self, x: Tensor, _: Tensor) -> None:
        self.source = x

    def update(self, after: Tensor, at: Batch) -> None:
        """Add what the last run has shown; `after` is the residual stream after the block (b, t, d)."""
        if not (at.weight or at.score):
            self.seen.append(self.sink.reshape(*after.shape[:-1], -1))
            return
        norms = torch.linalg.vector_norm(self.norm.read(after).reshape(-1, after.shape[-1]), dim=1, keepdim=True)
        rows = (self.sink if self.scale is None else self.sink * self.scale).reshape(len(norms), -1)
        rows = rows / norms.clamp_min(1e-6)
        if at.weight:
            self.moments.update(rows, weight=at.weight)
        if at.score and self.scored is not None:
            self.scored.update(rows, weight=at.score)
        if at.score and self.inputs is not None:
            self.inputs.update(self.source.reshape(-1, after.shape[-1]), weight=at.score)

    def output(self, x: Tensor, cut: Cut, tensors: Mapping[str, Tensor]) -> Tensor:
        """What level 2 yields at a cut, from the level-2 inputs x (b x t x a)."""
        z = x[..., cut.kept].float() @ self.norm.unscale(cut.weight_ao)
        return z + tensors[self.module.bias] if self.module.bias else z
