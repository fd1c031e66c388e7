"""One pass over the dense model: the error of every module at every width, and what errors cost at the output.

A plan is made from the two (`survey/width_costs.py`). Errors are measured on the dense stream, where each module's
target is its own dense output, so that the Gram matrix of the level-2 input is all that most criteria need.
Each token's error counts relative to its own residual stream: otherwise the few tokens with massive activations,
ten thousand times the energy of the rest, would be all that a curve sees. The cost is the divergence of the logits
where a module alone is cut to a few widths (`secateur.survey.probes`), on rows that the errors were not measured on.
"""

from dataclasses import asdict

from torch import Tensor, nn

from secateur.criteria.registry import Criteria
from secateur.model.kinds import KINDS
from secateur.model.pass_checkpoint import PassCheckpoint
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.model.structure import PrunableModule
from secateur.survey.collector import Collector
from secateur.survey.curve_estimator import CurveEstimator
from secateur.survey.curves import ErrorCurve, Survey
from secateur.survey.gram_estimator import GramEstimator
from secateur.survey.mixture_estimator import MixtureEstimator
from secateur.survey.probes import ProbeStreams


def survey(
    stream: BlockStream,
    rows: Tensor | Rows,
    *,
    probe_rows: Tensor | None = None,
    blocks: range | None = None,
    kinds: tuple[str, ...] = KINDS,
    criterion: str | Criteria = "surgeon",
    ridge: float = 0.3,
    seed: int = 0,
    checkpoint: PassCheckpoint | None = None,
) -> Survey:
    """Measure every module's error at every width.

    Args:
        rows: calibration tokens (rows x length); of `Rows`, errors are measured by weight, and units ordered by score.
        probe_rows: other tokens (rows x length) to measure on what errors cost; without them no probes are made.
        criterion: the order in which units leave: criteria by name, or made ready.
        ridge: of the refit that the error assumes.
        checkpoint: saves the survey behind each block, and resumes behind the last one that was saved.
    """
    blocks = blocks if blocks is not None else range(len(stream))
    checkpoint, criteria = checkpoint or PassCheckpoint(stream.services), Criteria.of(criterion)
    curves: list[ErrorCurve] = []
    curves += [ErrorCurve.of(one) for one in checkpoint.value("curves", lambda: [asdict(one) for one in curves], [])]
    fitted = Rows.of(rows)
    every = fitted if probe_rows is None else fitted.along(probe_rows)
    rows, probed = stream.own(every), len(fitted.groups)
    with stream.arena() as arena, stream.quick():
        hidden = stream.embed(rows, arena)
        probes = None if probe_rows is None else ProbeStreams(stream, every, probed, arena, checkpoint)
        stop = blocks.stop if probes is None else len(stream)
        for index in checkpoint.blocks(stop, "Survey", lambda: [hidden, *(probes.hidden if probes else [])]):
            with stream.filled(index) as layer:
                if probes is not None:
                    probes.advance(index, layer)
                if index not in blocks:
                    stream.advance(index, layer, rows, hidden)
                    continue
                wanted = [module for module in stream.blocks[index].modules if module.is_prunable(kinds)]
                samples = [_sample(stream, index, layer, module, criteria, fitted, kinds) for module in wanted]
                collectors = [Collector(stream, layer, sample) for sample in samples]
                before = None if probes is None else hidden.parts[probed][:].clone()
                for at in rows.batches():
                    watch = {path: see for c in collectors for path, see in c.watches().items()}
                    hidden[at] = after = stream.run_through(index, layer, hidden[at], at.group, watch=watch)
                    with stream.rounded():
                        for collector in collectors:
                            collector.update(stream.residual(after), at)
                for collector in collectors:
                    collector.measure(ridge, seed)
                # Each module's owner is through before any of them tells what it has found.
                for collector in collectors:
                    found, cuts = collector.told()
                    curves += found
                    if probes is not None and before is not None:
                        for cut in cuts:
                            probes.begin(layer, before, collector.output(cut), cut)
        prices = () if probes is None else tuple(probes.finish(hidden.parts[probed][:]))
    return Survey(criteria.choice.text, ridge, fitted.tokens, tuple(curves), prices)


def _sample(
    stream: BlockStream,
    index: int,
    layer: nn.Module,
    module: PrunableModule,
    criteria: Criteria,
    rows: Rows,
    kinds: tuple[str, ...],
) -> CurveEstimator:
    """Return an empty sample of one module of a block."""
    if module.kind == "experts":
        return MixtureEstimator(stream, index, layer, module, criteria.choice.experts, rows.tokens, kinds)
    return GramEstimator(stream, index, layer, module, criteria, apart=rows.scores is not None)
