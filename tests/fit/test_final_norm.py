"""Final-norm scale: the scale at which the pruned distribution is closest to the dense one."""

import pytest
import torch
from torch import Tensor

from models import build, token_rows
from secateur.checkpoints.checkpoint import open_checkpoint
from secateur.fit.final_norm import SCALES, _minimum, final_norm_scale
from secateur.model.arena import Activations
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream

LENGTH = 9
ROWS = Rows.of(token_rows(4, LENGTH, seed=0)).with_held_out(token_rows(3, LENGTH, seed=1))


def divergences(name: str, stream: BlockStream, dense: Tensor, pruned: Tensor, scales: list[float]) -> list[float]:
    """KL(dense || pruned) of the model's own final norm and output layer, the norm's output times each scale."""
    model = build(name)
    norm, head = model.get_submodule(stream.family.final_norm), model.get_output_embeddings()
    with torch.no_grad():
        wanted, normed = head(norm(dense)).log_softmax(-1), norm(pruned)
        found = (head(scale * normed).log_softmax(-1) for scale in scales)
        return [float((wanted.exp() * (wanted - one)).sum(-1).mean()) for one in found]


def streams(width: int, noise: float) -> tuple[Tensor, Tensor]:
    """Streams of the unseen rows that differ by noise at every second position, and by far more between these."""
    dice = torch.Generator().manual_seed(0)
    dense, other = torch.randn(2, len(ROWS.groups[1]), LENGTH, width, generator=dice)
    pruned = dense + noise * other
    pruned[:, ::2] = 5 * other[:, ::2]
    return dense, pruned


@pytest.mark.parametrize(("name", "noise"), [("llama", 0.3), ("llama", 0.6), ("gemma3_text", 0.1), ("gpt2", 0.6)])
def test_no_other_scale_has_a_smaller_divergence(checkpoint_folder, name, noise):
    stream = BlockStream(open_checkpoint(checkpoint_folder(name)))
    dense, pruned = streams(stream.width, noise)
    none = torch.empty(0)
    scale = final_norm_scale(stream, ROWS, 1, Activations([none, dense]), Activations([none, pruned]))
    tried = [step / 200 for step in range(120, 211)]
    seen = divergences(name, stream, dense[:, 1::2], pruned[:, 1::2], tried)
    best = tried[seen.index(min(seen))]
    assert (best in (tried[0], tried[-1])) == (name == "gpt2"), "no scale that is tried is small enough for it"
    assert scale == pytest.approx(best, abs=5e-3)


def test_the_scale_stays_inside_the_grid():
    assert [_minimum(totals) for totals in (list(SCALES), list(SCALES)[::-1])] == pytest.approx([0.6, 1.05])
