"""Blocks run one at a time compute what the whole model computes, and leave no weights, hooks or files behind."""

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import STREAMED, blocks_of, build, layers_of, opened, relative, save, token_rows, wide
from outputs import error_of
from secateur.base.memory import MemoryBudget
from secateur.fit.loop import refit
from secateur.model import rows as rows_module
from secateur.model import stream as module_under_test
from secateur.model.arena import Activations, Arena, FileRows
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.model.structure import PrunableModule
from secateur.model.surgery import assign
from secateur.plan.problem import Plan

TOLERANCE = 1e-5


@pytest.fixture
def stream(checkpoint_folder: Callable[[str], Path]) -> BlockStream:
    return opened(checkpoint_folder("llama biased"))


def rows_of_two_lengths() -> Rows:
    return Rows((token_rows(5, 24), token_rows(3, 17, seed=1)), (1.0, 0.5), batch_tokens=50)


def on_meta(module: nn.Module) -> bool:
    return all(value.is_meta for value in module.parameters())


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
    assert on_meta(stream.model)


@pytest.mark.parametrize("name", STREAMED)
def test_modules_can_be_watched_and_their_outputs_replayed(checkpoint_folder, name):
    """A replay of a module's output changes nothing, one of zero removes the module, and `until` stops the block."""
    stream = opened(checkpoint_folder(name))
    rows, block = Rows.of(token_rows(2)), stream.blocks[1]
    at = next(rows.batches())
    with Arena() as arena:
        embedded = stream.embed(rows, arena)[at].clone()
    seen: dict[str, Tensor] = {}
    watch = {module.output_layer: lambda x, z, kind=module.kind: seen.update({kind: z}) for module in modules(block)}
    with stream.filled(1) as layer:
        plain = stream.run(1, layer, embedded, 0, watch=watch)
        for module in modules(block):
            value = seen[module.kind].view(*embedded.shape[:-1], stream.width)
            replayed = stream.run(1, layer, embedded, 0, replay={module: value})
            assert relative(replayed, plain) < TOLERANCE
            zeroed = stream.run(1, layer, embedded, 0, replay={module: None})
            assert relative(zeroed, plain) > 100 * TOLERANCE
            caught: list[tuple[Tensor, Tensor]] = []
            see = {module.output_layer: lambda x, z, caught=caught: caught.append((x, z))}
            assert stream.run(1, layer, embedded, 0, watch=see, until=module.output_layer) is None
            ((inner, output),) = caught
            assert output.numel() == 0
            assert inner.reshape(-1, module.units * module.size).shape[0] == rows.tokens
            # An output projection of zeros gives zero, also behind a norm.
            for path in filter(None, (module.output_projection.name, module.bias)):
                assign(layer, path, torch.zeros_like(layer.get_parameter(path)))
            assert relative(stream.run(1, layer, embedded, 0), zeroed) < TOLERANCE
            original = stream.stored(1)
            for path in filter(None, (module.output_projection.name, module.bias)):
                assign(layer, path, original[path])


def modules(block: Any) -> tuple[PrunableModule, PrunableModule]:
    return block.attention, block.feed_forward


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "phi3"])
def test_weights_are_released_after_the_block(checkpoint_folder, name):
    stream = opened(checkpoint_folder(name))
    assert on_meta(stream.model)
    stored = stream.stored(2)
    with stream.filled(2) as layer:
        found = dict(layer.named_parameters())
        assert found.keys() == stored.keys()
        assert all(torch.equal(found[path], stored[path]) for path in stored)
        assert on_meta(stream.layers[0])
    assert on_meta(stream.model)
    with Arena() as arena:
        stream.embed(Rows.of(token_rows(2)), arena)
    assert on_meta(stream.model)
    assert stream.blocks == blocks_of(build(name))


def test_weights_are_released_after_an_exception(stream):
    def spoil() -> None:
        with stream.filled(0) as layer:
            assign(layer, "mlp.extra", torch.ones(1))
            assign(layer, "mlp.down_proj.weight", torch.ones(2, 2))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        spoil()
    assert on_meta(stream.layers)
    shapes = {name: tuple(value.shape) for name, value in stream.layers[0].named_parameters()}
    assert shapes == stream.blocks[0].shapes


def test_a_broken_embedding_leaves_the_model_whole(stream):
    layers = stream.layers
    with Arena() as arena:
        assert "IndexError" in error_of(stream.embed, Rows.of(torch.full((2, 8), 100_000)), arena)
    assert stream.model.model.layers is layers
    assert on_meta(stream.model)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_hooks_are_removed_even_after_an_exception(checkpoint_folder, name):
    stream = opened(checkpoint_folder(name))
    rows = Rows.of(token_rows(2))
    at = next(rows.batches())
    with Arena() as arena:
        embedded = stream.embed(rows, arena)[at].clone()

    def broken(*_: Tensor) -> None:
        raise RuntimeError("seen enough")

    def clean(layer: nn.Module) -> bool:
        return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in layer.modules())

    block = stream.blocks[0]
    with stream.filled(0) as layer:
        plain = stream.run(0, layer, embedded, 0)
        paths = (block.attention.input_layer, block.attention.output_layer, block.feed_forward.input_layer)
        ways: list[dict[str, Any]] = [{"watch": {at: broken}, "until": end} for at in paths for end in (None, at)]
        last = block.feed_forward.output_layer
        ways.append({"replay": {block.attention: torch.zeros_like(embedded)}, "watch": {last: broken}})
        for how in ways:
            with pytest.raises(RuntimeError, match="seen enough"):
                stream.run(0, layer, embedded, 0, **how)
            assert clean(layer)
        stream.run(0, layer, embedded, 0, replay={block.attention: None}, watch={last: lambda *_: None}, until=last)
        assert clean(layer)
        assert torch.equal(stream.run(0, layer, embedded, 0), plain)


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


def test_the_next_block_is_fetched_while_this_one_computes(checkpoint_folder, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, offset, size, advice: asked.append((offset, size, advice)))
    stream = opened(checkpoint_folder("llama"))
    tensors = stream.checkpoint.tensors
    for index in range(len(stream)):
        with stream.filled(index):
            wanted = {name for name in tensors if name.startswith(f"model.layers.{index + 1}.")}
            every = {(tensors[name].offset, tensors[name].bytes, os.POSIX_FADV_WILLNEED) for name in wanted}
            assert set(asked) == every
        asked.clear()
    # Systems without posix_fadvise lose nothing but time.
    monkeypatch.delattr(os, "posix_fadvise")
    with stream.filled(0) as layer:
        assert all(not value.is_meta for value in layer.parameters())


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


def test_first_position_rows_are_the_most_frequent_tokens(monkeypatch):
    rows = Rows((torch.tensor([[5, 9, 5], [7, 9, 8]]), torch.tensor([[3], [9]])), (1.0, 2.0))
    opened = rows.with_openings()
    assert opened.groups[:2] == rows.groups
    assert opened.groups[2].tolist() == [[9], [5], [3], [7], [8]]
    assert opened.weights == (1.0, 2.0, rows_module.OPENING_WEIGHT)
    monkeypatch.setattr(rows_module, "LEAST_OPENINGS", 2)
    assert rows.with_openings().groups[2].tolist() == [[9], [5]]


def in_files(values: Activations) -> list[bool]:
    return [isinstance(part, FileRows) for part in values.parts]


def test_the_arena_spills_beyond_its_limit(tmp_path):
    rows = Rows.of(token_rows(4, 10))
    one = 4 * 40 * 8
    with Arena(MemoryBudget(2 * one), tmp_path) as arena:
        kept = [arena.empty(rows, 8) for _ in range(4)]
        assert [in_files(values) for values in kept] == [[False], [False], [True], [True]]
        for number, values in enumerate(kept):
            for at in rows.batches():
                values[at] = torch.full((at.rows.stop - at.rows.start, 10, 8), float(number))
        for number, values in enumerate(kept):
            assert values.parts[0][:].unique().tolist() == [number]
            assert values.parts[0][1].shape == values.parts[0][1:2][0].shape == (10, 8)
        assert arena.budget.used == 2 * one
        files = [part.close for values in kept[2:] for part in values.parts]
        assert [file.alive for file in files] == [True, True]
        arena.release(kept[3])
        assert [file.alive for file in files] == [True, False]
        arena.release(kept[0])
        assert arena.budget.used == one
        # Room that was given back is used again.
        assert in_files(arena.empty(rows, 8)) == [False]
        # The files have no names, so that none can be left behind.
        assert list(tmp_path.iterdir()) == []
    assert not files[0].alive


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
                watch = {stream.blocks[1].feed_forward.output_layer: lambda x, _, seen=seen: seen.append(x.dtype)}
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
