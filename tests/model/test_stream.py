"""Blocks run one at a time compute what the whole model computes, and leave no weights in memory."""

import gc

import pytest
import torch
from torch import Tensor

from models import STREAMED, build, layers_of, opened, relative, save, token_rows, wide
from secateur.fit.loop import refit
from secateur.model import stream as module_under_test
from secateur.model.arena import Arena
from secateur.model.rows import Rows
from secateur.plan.problem import Plan

TOLERANCE = 1e-5


def rows_of_two_lengths() -> Rows:
    return Rows((token_rows(5, 24), token_rows(3, 17, seed=1)), (1.0, 0.5), batch_tokens=50)


@pytest.mark.parametrize("name", STREAMED)
def test_blocks_alone_equal_the_model(checkpoint_folder, name):
    model, rows = build(name), rows_of_two_lengths()
    last: list[Tensor] = []
    layers_of(model)[-1].register_forward_hook(lambda _, __, output: last.append(output))
    with torch.no_grad():
        wanted = [model(ids, use_cache=False, output_hidden_states=True) for ids in rows.groups]
    stream = opened(checkpoint_folder(name))
    with Arena() as arena:
        hidden = stream.embed(rows, arena)
        for index in range(len(stream)):
            for group, output in enumerate(wanted):
                found = stream.residual(hidden.parts[group])
                assert relative(found, output.hidden_states[index]) < TOLERANCE, (index, group)
            with stream.filled(index) as layer:
                stream.advance(index, layer, rows, hidden)
        # The last of the hidden states has been through the final norm, so the block's own output is taken.
        for group, output in enumerate(last):
            found = stream.residual(hidden.parts[group])
            assert relative(found, output) < TOLERANCE
            assert relative(found, wanted[group].hidden_states[-2]) > 100 * TOLERANCE
        some = torch.tensor([5, 90, 5, 17])
        with stream.head() as head:
            for part, output in zip(hidden.parts, wanted, strict=True):
                assert relative(head(part.flatten(0, 1)), output.logits.flatten(0, 1)) < TOLERANCE
            with stream.fewer_logits(some):
                assert relative(head(hidden.parts[0][1]), wanted[0].logits[1][:, some]) < TOLERANCE
            assert relative(head(hidden.parts[0][1]), wanted[0].logits[1]) < TOLERANCE
    assert all(value.is_meta for value in stream.model.parameters())


def live_bytes() -> int:
    """Return the bytes of all tensors in memory, shared storage counted once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        # By type and not by isinstance, which would wake every lazy object there is.
        if issubclass(type(thing), Tensor) and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_memory_does_not_grow_with_depth(checkpoint_folder):
    """The activations and the new weights of the last block are all that is in memory between two blocks."""
    stream = opened(checkpoint_folder("llama"))
    rows = token_rows(4, 12)
    one_block = 4 * stream.blocks[0].parameters
    plan = Plan(dict.fromkeys(range(3), wide(2, 2, 40)), 0.3, 0.3)
    before, sizes = live_bytes(), []
    for block in refit(stream, plan, rows):
        new = sum(value.untyped_storage().nbytes() for value in block.changed.values())
        sizes.append(live_bytes() - before - new)
    block = new = None
    assert live_bytes() - before < 0.05 * one_block
    streams = 2 * 4 * rows.numel() * 48
    assert max(sizes) < streams + 0.25 * one_block
    assert sizes[2] <= sizes[1] + 0.05 * one_block


def test_batches_cover_every_row_once():
    rows = rows_of_two_lengths()
    covered = [torch.zeros(len(group)) for group in rows.groups]
    for at in rows.batches():
        assert rows.ids(at).numel() <= 50
        assert at.weight == rows.weights[at.group]
        covered[at.group][at.rows] += 1
    assert all(bool((count == 1).all()) for count in covered)
    assert rows.tokens == 5 * 24 + 3 * 17
    long = Rows((token_rows(2, 60),), (1.0,), batch_tokens=50)
    assert [at.rows for at in long.batches()] == [slice(0, 1), slice(1, 2)]
    assert Rows.of(rows) is rows


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_quick_products_are_in_bfloat16(name, tmp_path, monkeypatch):
    """Blocks multiply in bfloat16 only for a bfloat16 checkpoint on a device that is faster in bfloat16."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        folder = tmp_path / str(dtype)
        save(name, folder, dtype)
        stream, rows = opened(folder), Rows.of(token_rows(4, 24))
        for fast in (torch.float32, torch.bfloat16):
            monkeypatch.setattr(module_under_test, "fast_dtype", lambda _, fast=fast: fast)
            with Arena() as arena:
                hidden, seen = stream.embed(rows, arena), []
                watch = {stream.blocks[1].modules[-1].output_layer: lambda x, _, seen=seen: seen.append(x.dtype)}
                with stream.fast_products():
                    for index in range(2):
                        with stream.filled(index) as layer:
                            stream.advance(index, layer, rows, hidden)
                            if index == 1:
                                at = next(rows.batches())
                                stream.run(index, layer, hidden[at], at.group, watch=watch)
                assert stream.products_dtype == torch.float32, "only inside"
                found[dtype, fast] = hidden.parts[0].clone(), seen[0]
    exact, half = torch.float32, torch.bfloat16
    assert torch.equal(found[exact, exact][0], found[exact, half][0])
    plain, quick = found[half, exact][0], found[half, half][0]
    assert 1e-5 < relative(quick, plain) < 2e-2
    assert [dtype for _, dtype in found.values()] == [exact, exact, exact, half]
