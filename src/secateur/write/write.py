"""Cut fitted blocks and write them as a checkpoint that transformers loads, whole or not at all."""

import json
import shutil
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.base.files import Output
from secateur.base.quiet import first_line
from secateur.families.registry import twin_of
from secateur.fit.average import FittedBlock
from secateur.formats.per_layer import (
    MODELING_FILE,
    around_per_layer,
    per_layer_config,
    per_layer_obstacle,
)
from secateur.formats.stock import stock_config, stock_obstacle
from secateur.model.axes import Width, alike
from secateur.model.config_file import TEXT
from secateur.model.facts import head_dim
from secateur.model.journal import Journal
from secateur.model.stream import BlockStream
from secateur.model.structure import Keep, levelled
from secateur.model.surgery import slice_block, width_of
from secateur.model.units.channels import CHANNELS
from secateur.model.units.experts import EXPERTS_MULTIPLE
from secateur.plan.problem import Plan
from secateur.plan.widths import head_widths
from secateur.write.opened import check_written, planned_misfit
from secateur.write.shards import ShardWriter, header_room

Format = Literal["stock", "hf"]
"""The stock class with one width for all blocks, or a width for each block and a modeling file beside the weights."""
INSTEAD: dict[Format, str] = {"stock": "take --format hf", "hf": "report it as a fault of secateur"}
"""What to do where a folder of a format does not open."""


def format_obstacle(
    stream: BlockStream, blocks: range, width: Width, *, format: Format = "stock", biases: bool = False
) -> str | None:
    """Why a model with these blocks at this width cannot be written, or None; costs nothing.

    In the format `hf` blocks do not bind each other: ask for every width on its own.
    """
    config = stream.checkpoint.config
    dense = next(block.width for block in stream.blocks if block.width.kinds == width.kinds or not width.fed)
    if width.experts and width.channels not in (dense.channels, *range(0, dense.channels, EXPERTS_MULTIPLE)):
        return f"kernels of experts take channels that {EXPERTS_MULTIPLE} divides, not {width.channels}"
    if (twin := twin_of(config)) and twin.inputs_first and 2 * width.channels == config.hidden_size:
        return f"transformers cannot tell which way {width.channels} channels of experts lie; take another size"
    if format == "hf":
        # One whose heads can go speaks for those where another kind of layer has its place.
        free = next((index for index in blocks if not stream.blocks[index].attention.locked), blocks.start)
        return per_layer_obstacle(config, stream.blocks[free], width)
    if len(blocks) < len(stream) and width != dense:
        return (
            f"a stock class has one width for all {len(stream)} blocks, and only {blocks.start}:{blocks.stop} are "
            "to be pruned; leave the block range out, or take --format hf"
        )
    reason = stock_obstacle(config, width, dense)
    if reason is None and biases and any(m.free_bias and not m.bias for b in stream.blocks for m in b.modules):
        return (
            f"the stock class of {config.model_type} has no level-2 biases, which --recovery bias adds; leave it "
            "out, or take --format hf"
        )
    return reason


def check_entry(stream: BlockStream, blocks: range, format: Format, dtype: torch.dtype) -> None:
    """See that a family's entries fit its class: a config of ours, with narrower blocks, must make just such blocks.

    Raises:
        SecateurError: it makes none, or others; with the first tensor that differs.
    """
    checkpoint = stream.checkpoint
    # What only some blocks have, the config must give to the others as well.
    cut = blocks if format == "stock" else blocks[::2]
    keeps = {index: keep for index in cut if (keep := _narrower(stream, index, blocks, format))}
    if not keeps or checkpoint.around is not None:
        return
    plan = Plan({index: width_of(stream.blocks[index], keep) for index, keep in keeps.items()}, 0, 0)
    kind, biases = checkpoint.config.model_type, dict.fromkeys(keeps, (False, False))
    try:
        why = planned_misfit(stream, keeps, _config(stream, plan, format, biases, dtype))
    except Exception as error:
        why = first_line(error).removeprefix(f"{checkpoint.source}: ")
    if why is not None:
        raise SecateurError(
            f"{checkpoint.source}: the entry for {kind} does not fit its class ({why}); correct the entry"
        )


def _narrower(stream: BlockStream, index: int, blocks: range, format: Format) -> Keep | None:
    """The first units of a block, as few heads as a format holds and half of the channels; None where it holds none."""
    block, dense = stream.blocks[index], stream.blocks[index].width
    channels = dense.channels if dense.experts else -(-dense.channels // 2)
    for heads_kept in reversed(head_widths(block)):
        width = heads_kept | ({} if dense.experts else {CHANNELS: channels})
        groups, each = width.groups, width.per_group
        if format_obstacle(stream, blocks, width, format=format) is None:
            heads = tuple(group * dense.per_group + head for group in range(groups) for head in range(each))
            fed = {"experts": tuple(range(dense.experts))} if dense.experts else {"channels": tuple(range(channels))}
            return Keep(heads, **fed)
    return None


def model_output(
    stream: BlockStream, out: str | Path, plan: Plan | None, *, overwrite: bool, dtype: torch.dtype
) -> Output:
    """The folder of a model to be; its `check` finds what would go wrong."""
    checkpoint = stream.checkpoint
    cut = [(stream.blocks[index], width) for index, width in (plan.widths if plan else {}).items()]
    removed = sum(block.parameters - block.kept_parameters(width) for block, width in cut)
    expected = checkpoint.bytes * dtype.itemsize // checkpoint.dtype.itemsize - removed * dtype.itemsize
    return Output(Path(out), overwrite=overwrite, source=checkpoint.path, expected_bytes=expected)


def write(
    stream: BlockStream,
    out: str | Path,
    plan: Plan,
    blocks: Iterable[tuple[int, dict[str, Tensor]]],
    *,
    format: Format = "stock",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    records: dict[str, Any] | None = None,
    late: Callable[[], Mapping[str, Tensor]] | None = None,
    journal: Journal | None = None,
    at: Path | None = None,
) -> int:
    """Write a checkpoint that transformers loads; what is in no pruned block is copied from the dense model.

    Args:
        plan: widths of the pruned blocks; for the stock format one for every block.
        blocks: pruned blocks' tensors by their names inside the block, in order; consumed one by one.
        format: of the folder.
        dtype: of the weights; the checkpoint's by default.
        overwrite: replace a model folder that is there.
        records: files to add, name to contents: text, or what is to be JSON, or a function that gives either once the
            blocks are done.
        late: other values for the final norm, by their names in the model; asked for once the blocks are done.
        journal: of the pass that the blocks come from, which begins behind those that an earlier run has written.
        at: where the folder grows, to be gone on with after a stop.

    Returns:
        Bytes of the weights.

    Raises:
        SecateurError: the format cannot hold the plan, the folder cannot be written, or nothing would open it.
    """
    checkpoint = stream.checkpoint
    dtype = dtype or checkpoint.dtype
    _check(stream, plan, format)
    journal = journal or Journal()
    inside = {
        stored for i in plan.widths for name in stream.blocks[i].shapes for stored in stream.stored_names(i, name)
    }
    last = {str(checkpoint.resolve(name)): name for name in stream.final_norm}
    # A refit may add biases to the output layers.
    modules = [(index, module) for index in plan.widths for module in stream.blocks[index].modules]
    possible = {_stored_name(stream, index, module.bias_name) for index, module in modules if module.free_bias}
    with replace(model_output(stream, out, plan, overwrite=overwrite, dtype=dtype), at=at) as folder:
        writer = ShardWriter(folder, header_bytes=header_room([*checkpoint.tensors, *inside, *possible]))
        if "shards" in journal.found:
            writer.resume(journal.found["shards"])
        journal.beside["shards"] = writer.settle
        for name, info in checkpoint.weights.items():
            if name not in inside and name not in last and name not in writer:
                tensor = checkpoint.read(name)
                writer.add(name, info.as_stored(tensor.to(dtype) if info.dtype.is_floating_point else tensor))
        for index, tensors in blocks:
            _add(writer, stream, index, tensors)
            # The next one is made behind this line.
            del tensors
        changed = late() if late else {}
        for stored, name in last.items():
            writer.add(stored, changed.get(name, checkpoint.read(stored)).to(dtype))
        writer.close()
        biases = {index: _gained(stream, index, writer) for index in plan.widths}
        write_json(folder / "config.json", _config(stream, plan, format, biases, dtype))
        if format == "hf":
            copy_into(folder, MODELING_FILE)
        for file in checkpoint.files:
            copy_into(folder, file)
        for file_name, record in (records or {}).items():
            write_record(folder / file_name, record)
        check_written(folder, Path(out), INSTEAD[format])
        return writer.total_bytes


def write_record(path: Path, record: Any) -> None:
    """A file of text, or of what is to be JSON; a function gives either."""
    contents = record() if callable(record) else record
    if isinstance(contents, str):
        path.write_text(contents, encoding="utf-8", errors="backslashreplace")
    else:
        write_json(path, contents)


def write_json(path: Path, contents: Any) -> None:
    """A JSON file as people read it; half a surrogate pair stays the escape that it came as."""
    text = json.dumps(contents, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def copy_into(folder: Path, file: Path) -> None:
    """A file, or a folder with all that is in it."""
    if file.is_dir():
        shutil.copytree(file, folder / file.name, dirs_exist_ok=True)
    else:
        shutil.copyfile(file, folder / file.name)


def slice(stream: BlockStream, block: FittedBlock, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All tensors of a block as they will be written, by their names inside the block.

    Args:
        stream: the open model; the block's tensors are read again.
        block: the choice of units and the refitted weights.
        dtype: of the result; the checkpoint's by default.
    """
    dtype = dtype or stream.checkpoint.dtype
    tensors = stream.stored(block.index, without=block.changed) | block.changed
    # What is finer than the other weights stays so: an expert's part in the choice of experts.
    exact = {name for name, _ in stream.layers.get_submodule(str(block.index)).named_buffers()}
    rounded = {name: tensor if name in exact else tensor.to(dtype) for name, tensor in tensors.items()}
    for name in block.changed:
        if not bool(torch.isfinite(rounded[name]).all()):
            raise SecateurError(
                f"block {block.index}: the refitted {name} is more than {str(dtype).removeprefix('torch.')} holds; "
                "take bfloat16 or float32"
            )
    return slice_block(stream.blocks[block.index], rounded, block.keep)


def _add(writer: ShardWriter, stream: BlockStream, index: int, tensors: Mapping[str, Tensor]) -> None:
    """Write a block's tensors."""
    for name, tensor in tensors.items():
        for stored, part in _as_stored(stream, index, name, tensor).items():
            writer.add(stored, part)


def _check(stream: BlockStream, plan: Plan, format: Format) -> None:
    """Refuse what the format cannot hold."""
    every = range(min(plan.widths), max(plan.widths) + 1)
    if format == "stock" and (not alike(levelled(stream.blocks, plan.widths)) or len(plan.widths) < len(every)):
        raise SecateurError("the stock format needs one width for all blocks; take --format hf")
    for index, width in plan.widths.items():
        blocks = every if format == "stock" else range(index, index + 1)
        reason = format_obstacle(stream, blocks, width, format=format)
        if reason is not None:
            raise SecateurError(reason)


def _config(
    stream: BlockStream, plan: Plan, format: Format, biases: dict[int, tuple[bool, bool]], dtype: torch.dtype
) -> dict[str, Any]:
    """The contents of config.json."""
    raw, config = stream.checkpoint.raw_config, stream.checkpoint.config
    dim = head_dim(config)
    if format == "stock":
        every = levelled(stream.blocks, plan.widths)
        width = next((width for width in every if width.experts), every[0])
        channels = next((other.channels for other in every if not other.experts), None)
        own = stock_config(raw, config, width=width, head_dim=dim, dtype=dtype, channels=channels)
    else:
        dense = [block.width for block in stream.blocks]
        how: dict[str, Any] = {"widths": plan.widths, "dense": dense, "biases": biases, "head_dim": dim, "dtype": dtype}
        own = per_layer_config(raw, config, **how)
    if (around := stream.checkpoint.around) is None:
        return own
    whole = around | {TEXT: own} if format == "stock" else around_per_layer(around, own)
    return whole | {"dtype": own["dtype"], "torch_dtype": own["torch_dtype"]}


def _gained(stream: BlockStream, index: int, written: Container[str]) -> tuple[bool, bool]:
    """Whether each of a block's modules has a level-2 bias that the stock class lacks."""
    attention, feed_forward = (
        module.free_bias and not module.bias and _stored_name(stream, index, module.bias_name) in written
        for module in stream.blocks[index].modules
    )
    return attention, feed_forward


def _as_stored(stream: BlockStream, index: int, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A block's tensor as the output holds it, in as many pieces as the checkpoint does."""
    if name in stream.blocks[index].shapes:
        return stream.as_stored(index, name, tensor)
    return {_stored_name(stream, index, name): tensor}


def _stored_name(stream: BlockStream, index: int, name: str) -> str:
    """What the output calls a block's tensor; one that the checkpoint lacks is named after its weight."""
    if name in stream.blocks[index].shapes:
        return stream.stored_name(index, name)
    return stream.stored_name(index, name.removesuffix("bias") + "weight").removesuffix("weight") + "bias"
