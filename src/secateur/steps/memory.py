"""The limit on the memory of a run, and how much of it remains for activations and for weights that are used again.

Symbols: a inputs of an output projection in one solve, d residual width, m input projections of a feed-forward (up, and
gate if there is one). The factors were measured on blocks of LLaMA-7B's shape.
"""

import math

from secateur.base.errors import SecateurError
from secateur.base.memory import available_bytes, parse_memory, rss_bytes
from secateur.criteria.experts import MAX_TOKENS
from secateur.model.stream import BlockStream
from secateur.model.structure import Block, PrunableModule
from secateur.steps.options import Options

EXPERT_COPIES = 6
"""Largest number of float32 copies of an expert's weights during its fit: old and new ones, changes and gradients."""
TOKEN_COPIES = 5
"""Largest number of vectors of a token at a mixture: inputs, targets and outputs, some of them twice."""
SAMPLE_COPIES = 20
"""Largest number of vectors of a sampled token in a survey, most of them outputs at several numbers of channels."""


def memory_limit(stream: BlockStream, options: Options, allowed: str | None, tokens: int = 0) -> tuple[int, int]:
    """Return the bytes of memory that the process may use, and how many of them remain for activations.

    Args:
        stream: The open model.
        options: Options that decide the result.
        allowed: The value of `--memory`, such as `8GB` or `50%` of the free memory. By default half of the free memory,
            or all of it if the run needs more than half.
        tokens: Number of tokens of one fit.

    Raises:
        SecateurError: `allowed` is not an amount of memory, or is less than the run needs.
    """
    limit = parse_memory(allowed)
    needed = rss_bytes() + resident_bytes(stream, options, tokens)
    if allowed is None:
        limit = max(limit, min(needed, available_bytes()))
    if limit < needed:
        have = f"memory is {allowed}" if allowed else f"{limit / 1e9:,.2f} GB of memory are free"
        raise SecateurError(
            f"{have}, but the largest block of {stream.checkpoint.source} needs {needed / 1e9:,.2f} GB; allow that "
            "much with --memory, or use a machine with more memory"
        )
    return limit, limit - needed


def resident_bytes(stream: BlockStream, options: Options, tokens: int = 0) -> int:
    """Return the bytes that must be in memory while a block is surveyed or pruned, or the embedding or output layer
    runs: the largest of these numbers.

    For a block, these are its weights, the workspace of the module that needs most, and the activations of one batch.

    Args:
        stream: The open model.
        options: Options that decide the result: the fit of input projections takes more memory, and so do separate rows
            for the choice of units. Each of the two sets of rows then has a Gram matrix, of which 0.6 is stored, and a
            cross moment, both in float64.
        tokens: Number of tokens of one fit, all of which are in memory at a mixture of experts.
    """
    input_steps, separate_choice = options.recovery_settings.input_steps > 0, options.separate_choice

    def entries(block: Block) -> float:
        modules, weights = block.modules_left, block.parameters
        workspaces = [_solve_entries(stream, module, input_steps, separate_choice) for module in modules]
        for place, module in enumerate(modules):
            if module.kind_inside is not None:
                one = _expert_parameters(block, module)
                weights -= one * module.units
                workspaces[place] += _mixture_entries(stream, module, one, tokens, input_steps)
        inputs = max(map(_solved_inputs, modules), default=0)
        return 1.2 * weights + max(workspaces, default=0) + stream.batch_tokens * (3 * inputs + 4 * stream.width)

    outside_blocks = stream.checkpoint.entries - sum(block.parameters for block in stream.blocks)
    return round(4.2 * max(outside_blocks, *map(entries, stream.blocks)))


def _solve_entries(stream: BlockStream, module: PrunableModule, input_steps: bool, separate_choice: bool) -> float:
    """Return how many float32 numbers a fit of a module, or of one expert, holds in memory without any weights."""
    a, d, m = _solved_inputs(module), stream.width, len(module.channel_projections)
    solve = (2.3 + 1.2 * separate_choice) * a * a + (7 + 2 * separate_choice) * a * d
    return max(solve, m * (2 * a * a + 6 * a * d) * input_steps)


def _mixture_entries(stream: BlockStream, module: PrunableModule, one: int, tokens: int, input_steps: bool) -> float:
    """Return how many float32 numbers a fit of a mixture, or its survey, holds in memory besides the solve.

    Several copies of the weights of one expert (`one` parameters) are in memory, or of all experts if they are not read
    one by one. So are the inputs, targets and outputs of all tokens, and for some tokens the outputs of single experts.
    """
    copies = EXPERT_COPIES if stream.reads_experts_one_by_one else (2.2 if input_steps else 1.2 + 1 / 3) * module.units
    # Outputs are looked up until the smallest number of experts is left. They exist twice while room is made for more.
    looked_up = 2 * module.experts_per_token * (2 + math.log(module.units / module.min_units))
    return copies * one + stream.width * (TOKEN_COPIES * tokens + (SAMPLE_COPIES + looked_up) * min(tokens, MAX_TOKENS))


def _solved_inputs(module: PrunableModule) -> int:
    """Return the number of inputs of an output projection in one solve: a."""
    return module.units * module.size if module.kind_inside is None else module.units_inside


def _expert_parameters(block: Block, module: PrunableModule) -> int:
    """Return the number of parameters of one expert."""
    layer = module.output_projection.layer
    names = [name for name in block.inside(module) if name.rpartition(".")[0] == layer]
    return sum(math.prod(block.shapes[name]) for name in names) // module.units
