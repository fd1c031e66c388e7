"""Final-norm scale: a factor on the norm before the output layer, fitted on held-out rows after pruning.

    scale = argmin_s  mean over tokens of KL(dense model || pruned model with its final norm times s)

Errors of a pruned model add to the spread of the logits, and a refit follows its calibration rows more closely than
other text. On other text the logits are therefore too large for how often the model is right. The scale that brings the
pruned distribution closest to the dense one costs one pass of the output layer over few tokens, and nothing when the
model runs. The scale that makes the text itself most likely would be another one. It would also correct the
overconfidence of the dense model, and so make the pruned model differ from the dense one.

Shapes: n tokens, v vocabulary size.
"""

from torch import Tensor

from secateur.model.arena import Activations
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.survey.probes import POSITION_STRIDE

ROUNDING = 1e-6
"""Divergence in nats per token below which the two models count as equal."""
SCALES = tuple(0.05 * step for step in range(12, 22))
"""Scales that are tried; a parabola through the best one and its neighbours refines it."""


def scaled_final_norm(stream: BlockStream, scale: float) -> dict[str, Tensor]:
    """Return the final norm's tensors with its output multiplied by a scale, by name, in the stored dtype."""
    result = {}
    for name in stream.final_norm:
        stored = stream.read(name)
        # Gemma stores the gain minus one.
        offset = float(stream.family.norm_offset and name.endswith(".weight"))
        result[name] = ((stored.float() + offset) * scale - offset).to(stored.dtype)
    return result


def final_norm_scale(stream: BlockStream, rows: Rows, group: int, dense: Activations, pruned: Activations) -> float:
    """Return the scale of the final norm at which KL(dense || pruned) is least.

    Args:
        stream: The model.
        rows: All rows of the run.
        group: Number of the group of held-out rows.
        dense: The dense stream after the last block, of this process's rows.
        pruned: The pruned stream likewise.

    Returns:
        The scale; 1 if the model has no final norm, or if both models are equal.
    """
    if not stream.final_norm:
        return 1.0
    norms = [scaled_final_norm(stream, scale) for scale in SCALES]
    divergences: list[list[float]] = [[] for _ in SCALES]
    """Divergence of each row, at each scale."""
    positions = slice(POSITION_STRIDE - 1, None, POSITION_STRIDE)
    with stream.head() as head:
        for row in range(len(stream.local_rows(rows).groups[group])):
            dense_nd, pruned_nd = (hidden.parts[group][row][positions] for hidden in (dense, pruned))
            log_nv = head(dense_nd).log_softmax(-1)
            probability_nv = log_nv.exp()
            for number, norm in enumerate(norms):
                with stream.replaced(norm):
                    gap_nv = log_nv - head(pruned_nd).log_softmax(-1)
                divergences[number].append(float((probability_nv * gap_nv).sum(-1).mean()))
    totals = [stream.processes.total(one) for one in divergences]
    # Equal models get a scale of exactly 1, which the parabola would miss by a little.
    rounding = ROUNDING * len(rows.groups[group])
    return 1.0 if totals[SCALES.index(1.0)] < rounding else _minimum(totals)


def _minimum(totals: list[float]) -> float:
    """Return the scale at which the divergence is least, by a parabola between the points of the grid."""
    best = totals.index(min(totals))
    if best in (0, len(SCALES) - 1):
        return SCALES[best]
    left, middle, right = (totals[best + step] for step in (-1, 0, 1))
    bend = left - 2 * middle + right
    return SCALES[best] + (SCALES[1] - SCALES[0]) * (0.5 * (left - right) / bend if bend > 0 else 0.0)
