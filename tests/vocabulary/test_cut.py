"""A checkpoint with fewer tokens is an ordinary checkpoint whose logits are those of the kept tokens."""

import pytest
import torch

from models import MIXTURES, ROWS, SIMILAR, logits_of, relative
from secateur import open_checkpoint
from secateur.measure.loading import load
from secateur.vocabulary.cut import cut_as_before, runs_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", [*ROWS, *SIMILAR, *MIXTURES])
def test_logits_of_the_kept_tokens_are_the_original_ones(name, letters_folder):
    whole = open_checkpoint(letters_folder(name))
    kept = [token for token in range(whole.config.vocab_size) if token % 3 or token > 110]
    cut = cut_as_before(whole, kept)
    new = torch.arange(0, len(kept), 5)[None, :12]
    before = logits_of(load(whole, torch.float32, CPU), torch.tensor(kept)[new])[..., kept]
    assert relative(logits_of(load(cut, torch.float32, CPU), new), before) < 1e-6
    assert cut.config.vocab_size == len(kept)
    assert cut.cut_entries > 0
    assert cut.fingerprint == whole.fingerprint


def test_runs_cover_the_ids():
    ids = [0, 1, 4, 6, 7, 8]
    assert [one for first, stop in runs_of(ids) for one in range(first, stop)] == ids
    assert runs_of([3]) == ((3, 4),)
