"""What each step of `prune` computes and holds: floating-point operations, and bytes in memory or in files.

n tokens, p parameters of a block's matrices, d residual width, a inputs of a level-2 layer, k channels, m level-1
matrices of a feed-forward module; of a mixture, each expert has a level 2 of its own. Left out are the products inside
the attention, which depend on the rows' length, and whatever takes no matrix product.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from secateur.base.device import fast_dtype
from secateur.criteria.experts import MAX_TOKENS, experts_per_round
from secateur.fit.input_projections import PRECONDITIONER_TOKENS
from secateur.model.axes import Width
from secateur.model.rows import Rows
from secateur.model.stream import BlockStream
from secateur.model.structure import Block, PrunableModule

LOOKED_UP = 8
"""Times that what an expert gives to a token is read or written for each look."""


class Work(NamedTuple):
    """Operations, apart by what sets their speed, and the most that is held."""

    forward: float = 0.0
    """In forwards of blocks."""
    quick: float = 0.0
    """In products that need not be float32."""
    exact: float = 0.0
    """In float32: products, factorisations, solves."""
    written: float = 0.0
    """In writing text token by token."""
    moved: float = 0.0
    """Bytes, where these set the time and not the operations."""
    resident: int = 0
    """Bytes that must be in memory, above what Python and its libraries take."""
    streams: int = 0
    """Bytes of activations, which may be in files."""

    @classmethod
    def of(cls, parts: Iterable["Work"]) -> "Work":
        """The work of steps one after the other."""
        *summed, resident, streams = zip(cls(), *parts, strict=True)
        forward, quick, exact, written, moved = map(sum, summed)
        return cls(forward, quick, exact, written, moved, max(resident), max(streams))


def survey_work(stream: BlockStream, tokens: int, probed: int, probes: int) -> Work:
    """One forward, each module's Gram matrix and elimination, and from each module on `probes` streams of `probed`.

    An upper bound where only some blocks are chosen: fewer streams begin then. The output layer is left out.
    """
    blocks, width, columns, kept = stream.blocks, stream.width, stream.columns, stream.beside.kept
    streams = sum(probes * (number + 0.5) * forward_flops(block, probed) for number, block in enumerate(blocks))
    orders = [order_work(block, width, tokens, block.feed_forward.min_units) for block in blocks]
    return Work.of(
        [
            Work(
                forward=sum(forward_flops(block, tokens + probed) for block in blocks) + streams,
                quick=sum(gram_flops(a, 0, tokens) for a in _output_projection_inputs(blocks)),
                exact=sum(solve_flops(a, width) for a in _output_projection_inputs(blocks)),
                resident=resident_bytes(stream),
                streams=4 * (columns * (tokens + probed * (1 + probes * len(blocks))) + kept * (tokens + probed)),
            ),
            *orders,
            *(expert_survey_work(block, width, tokens) for block in blocks),
        ]
    )


def resampling_work(stream: BlockStream, tokens: int) -> Work:
    """One forward, and every logit."""
    logits = 2.0 * tokens * stream.width * stream.checkpoint.config.vocab_size
    return Work(
        forward=sum(forward_flops(block, tokens) for block in stream.blocks),
        quick=logits,
        resident=resident_bytes(stream),
        streams=4 * tokens * (stream.columns + stream.beside.kept),
    )


def fit_work(stream: BlockStream, rows: Rows, widths: Mapping[int, Width], input_steps: int) -> Work:
    """All fits: the dense stream once, a pruned one each, statistics and solves; level 1 by so many steps.

    `widths` are those of the pruned blocks.
    """
    blocks, width, columns = [stream.blocks[index] for index in widths], stream.width, stream.columns
    beside = rows.counted(False).tokens
    first, *others = (part.tokens for part in rows.fits())
    each = [first, *others]
    streams = rows.tokens + beside + sum(each)
    resting, apart = sum(others) + beside, rows.scores is not None
    fitted = [
        (stream.blocks[i], now.channels)
        for i, now in widths.items()
        if input_steps and now.channels and not now.experts
    ]
    parts = [input_step_work(stream, block, kept, tokens, input_steps) for tokens in each for block, kept in fitted]
    mixed = [(stream.blocks[index], now) for index, now in widths.items() if now.experts]
    parts += [mixture_work(block, width, tokens, now, input_steps) for tokens in each for block, now in mixed]
    return Work.of(
        [
            Work(
                forward=sum(forward_flops(block, streams) for block in stream.blocks),
                quick=sum(gram_flops(a, width, tokens) for tokens in each for a in _output_projection_inputs(blocks)),
                exact=len(each) * sum(solve_flops(a, width) for a in _output_projection_inputs(blocks)),
                resident=resident_bytes(
                    stream, input_steps=bool(fitted) or (input_steps > 0 and bool(mixed)), separate_choice=apart
                ),
                # Of all fits but the one under way both streams are there, and nothing else.
                streams=4
                * (first * (4 * width + 2 * columns + max(_output_projection_inputs(blocks))) + resting * 2 * columns)
                + 4 * (first + resting) * stream.beside.kept
                + max((part.streams for part in parts), default=0),
            ),
            *(part._replace(streams=0) for part in parts),
        ]
    )


def input_step_work(stream: BlockStream, block: Block, kept: int, tokens: int, steps: int) -> Work:
    """Level 1 of the feed-forward fitted along, k channels kept; held is what it stores on top of the rest.

    The new inputs are one more run of the block.
    """
    d, m = stream.width, len(block.feed_forward.channel_projections)
    return step_work(kept, d, m, tokens, steps)._replace(
        forward=forward_flops(block, tokens), streams=tokens * (d + m * kept) * fast_dtype(stream.device).itemsize
    )


def step_work(k: int, d: int, m: int, tokens: float, steps: int) -> Work:
    """Level 1 of k channels fitted along, and level 2 anew.

    J and its transpose take m + 1 products of 2 n k d each, one of the two for the right-hand side, and as many what is
    linearised.
    """
    sampled = min(tokens, PRECONDITIONER_TOKENS)
    preconditioner = m * (k**3 / 3 + 2 * k**2 * sampled) + d**3 / 3 + 2 * d**2 * sampled + 2 * k**2 * d
    return Work(
        quick=(m + 1) * 2.0 * tokens * k * d * (2 * steps + 2) + gram_flops(k, d, round(tokens)),
        exact=preconditioner + steps * m * 2 * k * d * (k + d) + k**3 / 3 + 2 * k**2 * d,
    )


def mixture_work(block: Block, width: int, tokens: int, now: Width, input_steps: int) -> Work:
    """The order of a mixture's experts and the refit of those that are left: statistics and a solve of each.

    Its output is made before and behind the refit, and the inputs of level 2 once. Where channels go, each expert has
    an elimination of its own. The input projections are fitted along in each, for the tokens that are routed to it.
    """
    module, left, inner = block.feed_forward, now.experts, block.feed_forward.units_inside
    met = tokens * min(module.experts_per_token, left) / left
    cut = now.channels < inner
    work = Work(
        forward=2.0 * 2.0 * tokens * module.experts_per_token * _expert(block),
        quick=left * gram_flops(inner, width, round(met)),
        exact=left * (solve_flops(inner, width) if cut else inner**3 / 3 + 2 * inner**2 * width),
    )
    parts = [work, order_work(block, width, tokens, left)]
    if input_steps:
        step = step_work(now.channels, width, 2, met, input_steps)
        # New inputs of the output projections; what is linearised is part of the step.
        runs = 2 / 3 * 2.0 * left * met * _expert(block)
        parts.append(Work(forward=runs, quick=left * step.quick, exact=left * step.exact))
    return Work.of(parts)


def order_work(block: Block, width: int, tokens: int, left: int) -> Work:
    """The order in which experts leave, by rerouting (`criteria/experts.py`); nothing without experts.

    For each expert that may leave, its tokens are routed again and two outputs of each looked up, which is what takes
    the time. An output is made when it is first asked for: k of a token's at once, and one more for each that leaves.
    """
    module = block.feed_forward
    if module.kind != "experts" or left >= module.units:
        return Work()
    n, rounds = min(tokens, MAX_TOKENS), range(module.units, left, -experts_per_round(module))
    steps, routed = len(rounds), 2.0 * n * (module.experts_per_token + 1) * width * sum(rounds)
    made = n * module.experts_per_token * (2 + math.log(module.units / left))
    return Work(
        forward=2.0 * made * _expert(block),
        quick=routed,
        moved=LOOKED_UP * 4.0 * steps * n * module.experts_per_token * width,
    )


def expert_survey_work(block: Block, width: int, tokens: int) -> Work:
    """The curve of experts' channels and what the refit leaves of it and of the experts' own; nothing without experts.

    Experts are run again for each, and solved with half of them there, and with half of their channels.
    """
    module = block.feed_forward
    if module.kind != "experts":
        return Work()
    n, solves = min(tokens, MAX_TOKENS), 0.0
    for alive, inputs in ((module.units / 2, module.units_inside), (module.units, module.units_inside / 2)):
        met = n * min(module.experts_per_token, alive) / alive
        less = min(met, inputs)
        solves += alive * (2 * met * inputs * less + 2 * less**3 + 4 * met * inputs * width)
    return Work(forward=6 * 2.0 * n * module.experts_per_token * _expert(block), exact=solves)


def gradient_work(stream: BlockStream, tokens: int) -> Work:
    """The backward pass ahead of some criteria: two forwards, and twice one for the gradients.

    In memory are a block, its gradients and their squares, and every block's input.
    """
    block = max(stream.blocks, key=lambda b: b.parameters)
    return Work(
        exact=sum(4 * forward_flops(block, tokens) for block in stream.blocks),
        resident=4 * 3 * block.parameters,
        streams=4 * tokens * (stream.columns * (len(stream.blocks) + 1) + stream.beside.kept),
    )


def forward_flops(block: Block, tokens: int) -> float:
    """One forward of a block: 2 n p, p being what a token meets."""
    unmet = sum(
        block.module_parameters(block.width, kind) - block.active_parameters(block.width, kind) for kind in block.kinds
    )
    return 2.0 * tokens * (block.parameters - unmet)


def gram_flops(inputs: int, width: int, tokens: int) -> float:
    """Gram matrix by panels, 1.2 n a^2, and cross moment, 2 n a d."""
    return tokens * (1.2 * inputs**2 + 2 * inputs * width)


def solve_flops(inputs: int, width: int) -> float:
    """Inverse, elimination and refit: 2 a^3 + 4 a^2 d, a little less where few units go."""
    return 2.0 * inputs**3 + 4 * inputs**2 * width


def resident_bytes(stream: BlockStream, *, input_steps: bool = False, separate_choice: bool = False) -> int:
    """What must be in memory while the largest block is at work, or the embedding and the output layer are.

    Beside the block, these are a module's solve or the step of level 1, whichever takes more, and
    what a batch passes through. Where the rows that choose units stand `apart` from those that are fitted to, each has
    a Gram matrix and a cross moment. What these steps hold was measured on blocks of LLaMA-7B's shape.
    """
    block, d = max(stream.blocks, key=lambda b: b.parameters), stream.width
    a, m = max(_output_projection_inputs([block])), len(block.feed_forward.channel_projections)
    a = max(a, block.feed_forward.units_inside)
    solve = (2.3 + separate_choice) * a * a + (7 + separate_choice) * a * d
    step = m * (2 * a * a + 6 * a * d) if input_steps else 0.0
    batch = stream.batch_tokens * (3 * a + 4 * d)
    stored = sum(info.entries for info in stream.checkpoint.weights.values())
    ends = stored - sum(block.parameters for block in stream.blocks)
    experts = _expert(block) * block.feed_forward.units if block.feed_forward.units_inside else 0
    # Of experts, what gets new values is there twice.
    copied = (1.2 + (1 if input_steps else 1 / 3)) * experts * stream.expert_bytes / 4
    return round(4.2 * max(1.2 * (block.parameters - experts) + copied + max(solve, step) + batch, ends))


def _output_projection_inputs(blocks: Iterable[Block]) -> list[int]:
    """How many inputs each module's level-2 layer has; mixtures aside."""
    modules: list[PrunableModule] = [module for block in blocks for module in block.modules if module.kind != "experts"]
    return [module.units * module.size for module in modules]


def _expert(block: Block) -> int:
    """Parameters of each of a mixture's experts."""
    module = block.feed_forward
    names = [name for name in block.inside(module) if name.rpartition(".")[0] == module.output_projection.layer]
    return sum(math.prod(block.shapes[name]) for name in names) // module.units
