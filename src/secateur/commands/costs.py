"""Costs of each step of `prune`: floating-point operations, and bytes in memory or in files.

Left out are the products inside the attention, which depend on the length of the rows, and everything that is not a
matrix product. `module_costs.py` has the costs of single modules.
"""

from collections.abc import Mapping

from secateur.commands.module_costs import costs_of, forward_flops
from secateur.commands.work import Work
from secateur.model.axes import Width
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.model.structure import Block


def survey_work(stream: BlockStream, surveyed: range, tokens: int, probe_tokens: int, probes: int) -> Work:
    """Return the work of a survey, without the output layer.

    The dense model runs once, each module has its error curve measured, and from each surveyed block on the streams of
    its probes run to the last block.

    Args:
        stream: The open model.
        surveyed: Indices of the blocks that may be pruned.
        tokens: Number of tokens for the error curves.
        probe_tokens: Number of tokens of each probe.
        probes: Number of probes in each surveyed block.
    """
    blocks, kept = stream.blocks, stream.side_inputs.token_entries
    # In its own block, a probe runs through one of two modules.
    begun = [min(max(index + 0.5 - surveyed.start, 0), len(surveyed)) for index in range(len(blocks))]
    probed = sum(
        probes * count * forward_flops(block, probe_tokens) for count, block in zip(begun, blocks, strict=True)
    )
    streams = tokens + probe_tokens * (1 + probes * len(surveyed))
    passes = Work(
        forward=sum(forward_flops(block, tokens + probe_tokens) for block in blocks) + probed,
        resident_bytes=resident_bytes(stream, tokens=tokens),
        activation_bytes=4 * (stream.columns * streams + kept * (tokens + probe_tokens)),
    )
    modules = (module for index in surveyed for module in costs_of(stream, blocks[index]))
    return Work.total([passes, *(module.survey(tokens) for module in modules)])


def resampling_work(stream: BlockStream, tokens: int) -> Work:
    """Return the work of resampling rows: one forward pass, and the logits of all tokens."""
    return Work(
        forward=sum(forward_flops(block, tokens) for block in stream.blocks),
        rounded=2.0 * tokens * stream.width * stream.checkpoint.config.vocab_size,
        resident_bytes=resident_bytes(stream),
        activation_bytes=4 * tokens * (stream.columns + stream.side_inputs.token_entries),
    )


def fit_work(stream: BlockStream, rows: Rows, widths: Mapping[int, Width], input_steps: int) -> Work:
    """Return the work of all fits: the dense stream once, a pruned stream for each fit, and the fits of all modules.

    Args:
        stream: The open model.
        rows: The calibration rows.
        widths: The widths of the pruned blocks.
        input_steps: Gauss-Newton steps of the input projections.
    """
    held_out = rows.weighted(False).tokens
    first, *others = fits = [part.tokens for part in rows.fits()]
    costs = {index: costs_of(stream, stream.blocks[index]) for index in widths}
    modules = [
        module.fit(tokens, width, input_steps)
        for tokens in fits
        for index, width in widths.items()
        for module in costs[index]
    ]
    inputs = max(module.stored_inputs for block in costs.values() for module in block)
    # Fits that wait for their turn keep only their two streams.
    waiting = sum(others) + held_out
    activations = first * (4 * stream.width + 2 * stream.columns + inputs) + waiting * 2 * stream.columns
    activations += (first + waiting) * stream.side_inputs.token_entries
    passes = Work(
        forward=sum(
            # After the last pruned block, only the held-out rows run on.
            forward_flops(block, 2 * held_out if index > max(widths) else rows.tokens + held_out + sum(fits))
            for index, block in enumerate(stream.blocks)
        ),
        resident_bytes=resident_bytes(
            stream,
            tokens=first,
            input_steps=input_steps > 0
            and any(stream.blocks[index].feed_forward.units_at(width) for index, width in widths.items()),
            separate_choice=rows.choice_weights is not None,
        ),
        activation_bytes=4 * activations
        + max(module.activation_bytes for module in modules)
        + max(module.kept_bytes for block in costs.values() for module in block),
    )
    return Work.total([passes, *(module._replace(activation_bytes=0) for module in modules)])


def gradient_work(stream: BlockStream, tokens: int) -> Work:
    """Return the work of the backward pass that some criteria need: two forward passes, and two more for the gradients.

    In memory are a block, its gradients and their squares, summed in float64; the inputs of all blocks are activations.
    """
    block = max(stream.blocks, key=lambda block: block.parameters)
    return Work(
        float32=sum(4 * forward_flops(block, tokens) for block in stream.blocks),
        resident_bytes=4 * 7 * block.parameters,
        activation_bytes=4 * tokens * (stream.columns * (len(stream.blocks) + 1) + stream.side_inputs.token_entries),
    )


def resident_bytes(
    stream: BlockStream, *, tokens: int = 0, input_steps: bool = False, separate_choice: bool = False
) -> int:
    """Return the bytes that must be in memory while a block is surveyed or pruned, or the embedding or output layer
    runs: the largest of these numbers.

    For a block, these are its weights, the workspace of the module that needs most, and the activations of one batch.
    The factors were measured on blocks of LLaMA-7B's shape.

    Args:
        stream: The open model.
        tokens: Number of tokens of one fit, all of which are in memory at a mixture of experts.
        input_steps: Whether input projections are fitted.
        separate_choice: Whether units are chosen on other rows than the weights are fitted to. Each of the two then has
            a Gram matrix, of which 0.6 is stored, and a cross moment, both in float64.
    """

    def entries(block: Block) -> float:
        costs, d = costs_of(stream, block), stream.width
        workspaces = (module.resident_entries(tokens, input_steps, separate_choice) for module in costs)
        inputs = max((module.solved_inputs for module in costs), default=0)
        weights = 1.2 * (block.parameters - sum(module.expert_parameters for module in costs))
        return weights + max(workspaces, default=0) + stream.batch_tokens * (3 * inputs + 4 * d)

    outside_blocks = stream.checkpoint.entries - sum(block.parameters for block in stream.blocks)
    return round(4.2 * max(outside_blocks, *map(entries, stream.blocks)))
