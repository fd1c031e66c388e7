"""Make a pruned model as sure of itself as the dense one: one scale on the norm before the output layer.

Errors add to the spread of the logits, and a refit follows its calibration rows more closely than others: on other text
the logits are too large for how often the model is right. The scale that brings it nearest to the dense model's
distribution, on rows that no refit has seen, costs one pass of the output layer over few tokens and nothing when the
model runs. It is not the scale at which the text itself becomes likeliest: that would also mend what the dense model is
too sure of, and make the pruned one differ from it.
"""

from torch import Tensor

from secateur.model.arena import Activations
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.survey.probes import POSITION_STRIDE

ROUNDING = 1e-6
"""A divergence below it, in nats per token, says that both models are the same."""
SCALES = tuple(0.05 * step for step in range(12, 22))
"""What is tried; the best is refined by a parabola through it and its neighbours."""


def scaled_final_norm(stream: BlockStream, scale: float) -> dict[str, Tensor]:
    """The final norm's tensors with its output multiplied by a scale, in the stored dtype."""
    result = {}
    for name in stream.final_norm:
        stored = stream.read(name)
        # Gemma keeps the gain as its difference from one.
        shift = float(stream.family.norm_offset and name.endswith(".weight"))
        result[name] = ((stored.float() + shift) * scale - shift).to(stored.dtype)
    return result


def final_norm_scale(stream: BlockStream, rows: Rows, group: int, dense: Activations, pruned: Activations) -> float:
    """The scale at which the pruned model's distribution is nearest to the dense model's.

    Args:
        rows: all rows of the run.
        group: the rows that no refit has seen.
        dense: the dense stream behind the last block, of this process's share of the rows.
        pruned: the pruned one.

    Returns:
        The minimiser of KL(dense || pruned); 1 where the model has no norm before its output layer.
    """
    if not stream.final_norm:
        return 1.0
    norms = [scaled_final_norm(stream, scale) for scale in SCALES]
    totals = [0.0] * len(SCALES)
    with stream.head() as head:
        for row in range(len(stream.own(rows).groups[group])):
            wanted, found = (
                streams.parts[group][row][POSITION_STRIDE - 1 :: POSITION_STRIDE] for streams in (dense, pruned)
            )
            logs = head(wanted).log_softmax(-1)
            shares = logs.exp()
            for number, norm in enumerate(norms):
                with stream.replaced(norm):
                    missing = logs - head(found).log_softmax(-1)
                totals[number] += float((shares * missing).sum(-1).mean())
    # The divergence is not symmetric about one, so a parabola through three points would miss it by a little.
    totals = [stream.processes.total(one) for one in totals]
    least = ROUNDING * len(rows.groups[group])
    return 1.0 if totals[SCALES.index(1.0)] < least else _minimum(totals)


def _minimum(totals: list[float]) -> float:
    """Where the values over `SCALES` are least, between the grid's points."""
    best = totals.index(min(totals))
    if best in (0, len(SCALES) - 1):
        return SCALES[best]
    left, middle, right = (totals[best + step] for step in (-1, 0, 1))
    bend = left - 2 * middle + right
    return SCALES[best] + (SCALES[1] - SCALES[0]) * (0.5 * (left - right) / bend if bend > 0 else 0.0)
