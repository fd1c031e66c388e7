"""Survey: one pass over the dense model that measures the error of every module at every width, and the cost of errors.

The cost of each width follows from both (`survey/width_costs.py`), and a plan from the costs.

Errors are measured on the dense stream, where the target of each module is its own dense output. Most criteria then
need no statistic but the Gram matrix of the output projection's input. The error of a token is relative to the norm of
its residual stream. Otherwise all errors would be determined by a few tokens with massive activations, which have ten
thousand times the energy of an ordinary token.

The cost of an error is the divergence of the logits when one module alone is cut (`secateur.survey.probes`). It is
measured on other rows than the errors.
"""

from collections.abc import Sequence
from dataclasses import asdict

from torch import Tensor, nn

from secateur.criteria.registry import Criteria
from secateur.model.arena import Activations
from secateur.model.kinds import KINDS
from secateur.model.pass_checkpoint import PassCheckpoint
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream, FilledModule
from secateur.survey.curve_estimator import CurveEstimator
from secateur.survey.curves import ErrorCurve, Survey
from secateur.survey.gram_estimator import GramEstimator
from secateur.survey.mixture_estimator import MixtureEstimator
from secateur.survey.probes import ProbeStreams


def survey(
    stream: BlockStream,
    rows: Tensor | Rows,
    probe_rows: Tensor,
    *,
    blocks: range | None = None,
    kinds: tuple[str, ...] = KINDS,
    criterion: str | Criteria = "surgeon",
    ridge: float = 0.3,
    seed: int = 0,
    checkpoint: PassCheckpoint | None = None,
) -> Survey:
    """Measure the error of every module at every width.

    Args:
        stream: The dense model.
        rows: Calibration tokens (rows x length). If they are `Rows`, errors are measured with the token weights of
            the fit, and the order of units with the weights of the choice.
        probe_rows: Tokens on which probes are measured (rows x length).
        blocks: Indices of the blocks to measure; by default all.
        kinds: Kinds of units that may be removed.
        criterion: Criteria, or their name: they determine the order in which units are removed.
        ridge: Ridge of the refit that errors assume.
        seed: Seed of random criteria.
        checkpoint: Checkpoint that is saved after each block, and from which the survey resumes.
    """
    blocks = blocks if blocks is not None else range(len(stream))
    checkpoint, criteria = checkpoint or PassCheckpoint(stream.services), Criteria.of(criterion)
    curves: list[ErrorCurve] = []
    curves += [ErrorCurve.of(one) for one in checkpoint.value("curves", lambda: [asdict(one) for one in curves], [])]
    calibration = Rows.of(rows)
    all_rows = calibration.with_held_out(probe_rows)
    rows, probe_group = stream.local_rows(all_rows), len(calibration.groups)
    with stream.arena() as arena, stream.fast_products():
        hidden = stream.embed(rows, arena)
        probes = ProbeStreams(stream, all_rows, probe_group, arena, checkpoint)
        for index in checkpoint.blocks(len(stream), "Survey", lambda: [hidden, *probes.hidden]):
            with stream.filled(index) as layer:
                probes.advance(index, layer)
                if index not in blocks:
                    stream.advance(index, layer, rows, hidden)
                    continue
                modules = [module for module in stream.blocks[index].modules if module.is_prunable(kinds)]
                filled = [FilledModule(stream, index, layer, module) for module in modules]
                estimators = [_estimator(module, criteria, calibration, kinds) for module in filled]
                before = hidden.parts[probe_group][:].clone()
                _run_block(stream, index, layer, rows, hidden, estimators)
                found = [estimator.measure(ridge, seed) for estimator in estimators]
                # All modules are measured before the owner ranks broadcast results, so that no process waits.
                for estimator, own in zip(estimators, found, strict=True):
                    measured, cuts = estimator.broadcast(*own)
                    curves += measured
                    for cut in cuts:
                        probes.begin(layer, before, estimator.probed_output(cut), cut)
        finished = probes.finish(hidden.parts[probe_group][:])
    return Survey(criteria.choice.text, ridge, calibration.tokens, tuple(curves), tuple(finished))


def _run_block(
    stream: BlockStream,
    index: int,
    layer: nn.Module,
    rows: Rows,
    hidden: Activations,
    estimators: Sequence[CurveEstimator],
) -> None:
    """Run a block on all rows, replace `hidden` by its output, and pass its activations to the estimators."""
    watch = {path: record for estimator in estimators for path, record in estimator.watches().items()}
    for batch in rows.batches():
        hidden[batch] = after = stream.run_through(index, layer, hidden[batch], batch.group, watch=watch)
        with stream.rounded_sums():
            for estimator in estimators:
                estimator.update(stream.residual(after), batch)


def _estimator(filled: FilledModule, criteria: Criteria, rows: Rows, kinds: tuple[str, ...]) -> CurveEstimator:
    """Return the estimator of one module."""
    if filled.module.experts_per_token:
        return MixtureEstimator(filled, criteria.choice.experts, rows.tokens, kinds)
    return GramEstimator(filled, criteria, separate_choice=rows.choice_weights is not None)
