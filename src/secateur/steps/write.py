"""Write a pruned model as an ordinary checkpoint, block by block as blocks come, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.families import head_dim
from secateur.formats.stock import stock_config, stock_obstacle
from secateur.formats.writer import OutputFolder, ShardWriter, header_room
from secateur.steps.plan import Plan
from secateur.stream import BlockStream
from secateur.structure import Width


def obstacle(stream: BlockStream, blocks: range, width: Width, *, intercept: bool = False) -> str | None:
    """Why a model with these blocks at this width cannot be written, or None; costs nothing."""
    config, dense = stream.checkpoint.config, stream.blocks[0].width
    if len(blocks) < len(stream) and width != dense:
        return (
            f"a stock class has one width for all {len(stream)} blocks, and only {blocks.start}:{blocks.stop} are "
            "to be pruned; leave the block range out"
        )
    reason = stock_obstacle(config, width, dense)
    if reason is None and intercept:
        biased = all(m.bias for m in (stream.blocks[0].attention, stream.blocks[0].feed_forward))
        if not biased:
            return (
                f"--intercept rules out the stock format here, as the stock class of {config.model_type} has "
                "no level-2 biases; leave the intercept out"
            )
    return reason


def output_folder(
    stream: BlockStream, out: str | Path, plan: Plan | None, *, overwrite: bool, dtype: torch.dtype
) -> OutputFolder:
    """The folder to be; `check` on it finds what would go wrong."""
    checkpoint = stream.checkpoint
    removed = sum(
        stream.blocks[i].parameters - stream.blocks[i].kept_parameters(width)
        for i, width in (plan.widths if plan else {}).items()
    )
    expected = checkpoint.bytes * dtype.itemsize // checkpoint.dtype.itemsize - removed * dtype.itemsize
    return OutputFolder(out, overwrite=overwrite, source=checkpoint.path, expected_bytes=expected)


def write(
    stream: BlockStream,
    out: str | Path,
    plan: Plan,
    blocks: Iterable[tuple[int, dict[str, Tensor]]],
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    records: dict[str, Any] | None = None,
) -> int:
    """Write a checkpoint that stock transformers loads.

    Args:
        stream: the open dense model; all that is not in a pruned block is copied from it.
        out: the folder.
        plan: one width for every block.
        blocks: pruned blocks' tensors by their names inside the block, in order; consumed one by one.
        dtype: of the weights; the checkpoint's by default.
        overwrite: replace a model folder that is there.
        records: JSON files to add, name to contents; contents may be callables, called once the blocks are done.

    Returns:
        Bytes of the weights.

    Raises:
        SecateurError: the format cannot hold the plan, or the folder cannot be written.
    """
    checkpoint = stream.checkpoint
    dtype = dtype or checkpoint.dtype
    widths = set(plan.widths.values())
    if len(widths) != 1:
        raise SecateurError("the stock format needs one width for all blocks")
    width = widths.pop()
    chosen = range(min(plan.widths), max(plan.widths) + 1)
    reason = obstacle(stream, chosen, width)
    if reason is not None:
        raise SecateurError(reason)
    inside = {stream.stored_name(i, name) for i, block in enumerate(stream.blocks) for name in block.shapes}
    config = stock_config(
        checkpoint.raw_config,
        checkpoint.config,
        width=width,
        head_dim=head_dim(checkpoint.config),
        dtype=dtype,
    )
    with output_folder(stream, out, plan, overwrite=overwrite, dtype=dtype) as folder:
        writer = ShardWriter(folder, header_bytes=header_room([*checkpoint.tensors, *inside]))
        for name, info in checkpoint.tensors.items():
            if name not in inside and name not in checkpoint.ignorable:
                tensor = checkpoint.read(name)
                writer.add(name, tensor.to(dtype) if info.dtype.is_floating_point else tensor)
        for index, tensors in blocks:
            for name, tensor in tensors.items():
                writer.add(stream.stored_name(index, name), tensor)
        writer.close()
        _write_json(folder / "config.json", config)
        for file in checkpoint.files:
            copy = shutil.copytree if file.is_dir() else shutil.copyfile
            copy(file, folder / file.name)
        for file_name, record in (records or {}).items():
            _write_json(folder / file_name, record() if callable(record) else record)
        return writer.total_bytes


def _write_json(path: Path, contents: Any) -> None:
    path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
