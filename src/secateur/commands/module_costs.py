"""Costs of the survey and the fit of one module, in a class for each kind of module.

Symbols: n tokens, d residual width, a inputs of an output projection, k channels that are kept, m input projections of
a feed-forward (up, and gate if there is one).
"""

import math

from secateur.base.device import fast_dtype
from secateur.commands.work import Work
from secateur.criteria.experts import MAX_TOKENS, experts_per_round
from secateur.fit.input_projections import PRECONDITIONER_TOKENS
from secateur.model.axes import Width
from secateur.model.stream import BlockStream
from secateur.model.structure import Block, PrunableModule
from secateur.model.units.experts import EXPERT_CHANNELS, EXPERTS

READS_PER_LOOKUP = 8
"""Number of times that an expert's output for a token is read or written for each lookup."""

EXPERT_COPIES = 6
"""Largest number of float32 copies of an expert's weights during its fit: old and new ones, changes and gradients."""
TOKEN_COPIES = 5
"""Largest number of vectors of a token at a mixture: inputs, targets and outputs, some of them twice."""
SAMPLE_COPIES = 20
"""Largest number of vectors of a sampled token in a survey, most of them outputs at several numbers of channels."""


class ModuleCosts:
    """Costs of a module with one output projection, such as an attention."""

    def __init__(self, stream: BlockStream, block: Block, module: PrunableModule):
        self.block, self.module, self.width = block, module, stream.width
        self.value_bytes = fast_dtype(stream.device).itemsize

    @property
    def solved_inputs(self) -> int:
        """Number of inputs of an output projection in one solve: a."""
        return self.module.units * self.module.size

    @property
    def stored_inputs(self) -> int:
        """Inputs of the output projection that are stored for each token."""
        return self.solved_inputs

    @property
    def expert_parameters(self) -> int:
        """Parameters of all experts."""
        return 0

    @property
    def kept_bytes(self) -> int:
        """Bytes of weights that stay in memory if there is room: of experts, dense and fitted."""
        return 0

    def resident_entries(self, tokens: int, input_steps: bool, separate_choice: bool) -> float:
        """Return how many float32 numbers a fit of the module holds in memory, without the weights of the block.

        Args:
            tokens: Number of tokens.
            input_steps: Whether input projections are fitted.
            separate_choice: Whether units are chosen on other rows than the weights are fitted to.
        """
        a, d, m = self.solved_inputs, self.width, len(self.module.channel_projections)
        solve = (2.3 + 1.2 * separate_choice) * a * a + (7 + 2 * separate_choice) * a * d
        steps = m * (2 * a * a + 6 * a * d) * input_steps
        return max(solve, steps)

    def survey(self, tokens: int) -> Work:
        """Return the work of the error curve: a Gram matrix and an elimination."""
        a, d = self.solved_inputs, self.width
        return Work(rounded=gram_flops(a, 0, tokens), float32=solve_flops(a, d))

    def fit(self, tokens: int, width: Width, input_steps: int) -> Work:
        """Return the work of a fit at a width: moments and a solve."""
        a, d = self.solved_inputs, self.width
        return Work(rounded=gram_flops(a, d, tokens), float32=solve_flops(a, d))


class FeedForwardCosts(ModuleCosts):
    """Costs of a dense feed-forward, whose input projections are fitted too."""

    def fit(self, tokens: int, width: Width, input_steps: int) -> Work:
        """Return the work of fitting the output projection and then the input projections.

        The inputs for the second fit of the output projection take one more forward pass of the block. The result
        counts only activations that are stored in addition.
        """
        output, k = super().fit(tokens, width, input_steps), self.module.units_at(width)
        if not (input_steps and k):
            return output
        d, m = self.width, len(self.module.channel_projections)
        steps = step_work(k, d, m, tokens, input_steps)._replace(
            forward=forward_flops(self.block, tokens), activation_bytes=tokens * (d + m * k) * self.value_bytes
        )
        return Work.total([output, steps])


class MixtureCosts(ModuleCosts):
    """Costs of a mixture of experts, each of which has an output projection of its own."""

    def __init__(self, stream: BlockStream, block: Block, module: PrunableModule):
        super().__init__(stream, block, module)
        self._reads_one_by_one = stream.reads_experts_one_by_one
        self._stored_bytes = stream.checkpoint.dtype.itemsize

    @property
    def solved_inputs(self) -> int:
        """Channels of one expert."""
        return self.module.units_inside

    @property
    def stored_inputs(self) -> int:
        """Zero: inputs of experts are computed again whenever they are needed."""
        return 0

    @property
    def expert_parameters(self) -> int:
        """Parameters of all experts."""
        return self._one_expert * self.module.units

    @property
    def kept_bytes(self) -> int:
        """Bytes of the matrices of all experts, dense and fitted, if they are not in memory anyway."""
        return 2 * self._stored_bytes * self.expert_parameters if self._reads_one_by_one else 0

    def resident_entries(self, tokens: int, input_steps: bool, separate_choice: bool) -> float:
        """Return how many float32 numbers a fit of the mixture, or its survey, holds in memory.

        These are the weights of one expert in several copies, or of all experts if they are not read one by one; and
        the inputs, targets and outputs of all tokens, with the outputs of single experts for some of them.
        """
        d, sampled = self.width, min(tokens, MAX_TOKENS)
        experts = (1.2 + (1 if input_steps else 1 / 3)) * self.expert_parameters
        if self._reads_one_by_one:
            experts = EXPERT_COPIES * self._one_expert
        # Outputs of single experts exist twice while room for more of them is made.
        looked_up = 2 * self._outputs_per_token(self.module.min_units)
        rows = d * (TOKEN_COPIES * tokens + (SAMPLE_COPIES + looked_up) * sampled)
        return super().resident_entries(tokens, input_steps, separate_choice) + experts + rows

    def survey(self, tokens: int) -> Work:
        """Return the work of the order of experts, of the error curve of their channels, and of the refit's effect.

        The effect of the refit is measured once with half of the experts, and once with half of the channels of each
        expert. Each time, the experts run again and are refitted.
        """
        module, d = self.module, self.width
        n, solves = min(tokens, MAX_TOKENS), 0.0
        for experts, inputs in ((module.units / 2, module.units_inside), (module.units, module.units_inside / 2)):
            routed = self._routed(n, experts)
            rank = min(routed, inputs)
            solves += experts * (2 * routed * inputs * rank + 2 * rank**3 + 4 * routed * inputs * d)
        forward = 6 * 2.0 * n * module.experts_per_token * self._one_expert
        return Work.total([self._order(tokens, module.min_units), Work(forward=forward, float32=solves)])

    def fit(self, tokens: int, width: Width, input_steps: int) -> Work:
        """Return the work of the order of experts and of the refit of those that remain.

        The output of the mixture is computed before and after the refit, and the inputs of the output projections once.
        Where channels are removed, each expert has an elimination of its own. The input projections of an expert are
        fitted to the tokens that are routed to it.
        """
        module, d, experts, inputs = self.module, self.width, width[EXPERTS], self.module.units_inside
        routed, k = self._routed(tokens, experts), width[EXPERT_CHANNELS]
        solve = solve_flops(inputs, d) if k < inputs else inputs**3 / 3 + 2 * inputs**2 * d
        output = Work(
            forward=2 * 2.0 * tokens * module.experts_per_token * self._one_expert,
            rounded=experts * gram_flops(inputs, d, round(routed)),
            float32=experts * solve,
        )
        parts = [output, self._order(tokens, experts)]
        if input_steps:
            step = step_work(k, d, 2, routed, input_steps)
            # New inputs of the output projections: the up and gate projections, two thirds of an expert.
            inputs_again = 2 / 3 * 2.0 * experts * routed * self._one_expert
            parts.append(Work(forward=inputs_again, rounded=experts * step.rounded, float32=experts * step.float32))
        return Work.total(parts)

    def _order(self, tokens: int, left: int) -> Work:
        """Return the work of ordering the experts by rerouting (`criteria/experts.py`) until some number is left.

        For each expert that may be removed, its tokens are routed again and two outputs of each are looked up, which
        takes most of the time. An output is computed when it is first looked up: the outputs of a token's experts
        at once, and one more for each removed expert.
        """
        module, d = self.module, self.width
        if left >= module.units:
            return Work()
        n, rounds = min(tokens, MAX_TOKENS), range(module.units, left, -experts_per_round(module))
        computed = n * self._outputs_per_token(left)
        return Work(
            forward=2.0 * computed * self._one_expert,
            rounded=2.0 * n * (module.experts_per_token + 1) * d * sum(rounds),
            moved_bytes=READS_PER_LOOKUP * 4.0 * len(rounds) * n * module.experts_per_token * d,
        )

    def _outputs_per_token(self, left: int) -> float:
        """Return how many outputs of single experts are computed for a token until some number of experts is left."""
        return self.module.experts_per_token * (2 + math.log(self.module.units / left))

    def _routed(self, tokens: int, experts: float) -> float:
        """Return the mean number of tokens that are routed to each of some experts."""
        return tokens * min(self.module.experts_per_token, experts) / experts

    @property
    def _one_expert(self) -> int:
        """Parameters of one expert."""
        module, shapes = self.module, self.block.shapes
        names = [
            name for name in self.block.inside(module) if name.rpartition(".")[0] == module.output_projection.layer
        ]
        return sum(math.prod(shapes[name]) for name in names) // module.units


COSTS: dict[str, type[ModuleCosts]] = {
    "heads": ModuleCosts,
    "token_mixers": ModuleCosts,
    "channels": FeedForwardCosts,
    "experts": MixtureCosts,
}
"""Costs of a module by the kind of its units."""


def costs_of(stream: BlockStream, block: Block) -> list[ModuleCosts]:
    """Return the costs of each module of a block."""
    return [COSTS.get(module.kind, ModuleCosts)(stream, block, module) for module in block.modules_left]


def step_work(k: int, d: int, m: int, tokens: float, steps: int) -> Work:
    """Return the work of fitting m input projections of k channels, and the output projection again.

    The Jacobian and its transpose take m + 1 products of 2 n k d operations for each step, once more for the right-hand
    side, and as many for the linearisation.
    """
    sampled = min(tokens, PRECONDITIONER_TOKENS)
    preconditioner = m * (k**3 / 3 + 2 * k**2 * sampled) + d**3 / 3 + 2 * d**2 * sampled + 2 * k**2 * d
    return Work(
        rounded=(m + 1) * 2.0 * tokens * k * d * (2 * steps + 2) + gram_flops(k, d, round(tokens)),
        float32=preconditioner + steps * m * 2 * k * d * (k + d) + k**3 / 3 + 2 * k**2 * d,
    )


def forward_flops(block: Block, tokens: int) -> float:
    """Return the operations of one forward pass of a block: 2 for each token and parameter that is active for it."""
    inactive = sum(
        block.module_parameters(block.width, kind) - block.active_parameters(block.width, kind) for kind in block.kinds
    )
    return 2.0 * tokens * (block.parameters - inactive)


def gram_flops(a: int, d: int, tokens: int) -> float:
    """Return the operations of a Gram matrix, 1.2 n a^2 by panels, and of a cross moment, 2 n a d."""
    return tokens * (1.2 * a**2 + 2 * a * d)


def solve_flops(a: int, d: int) -> float:
    """Return the operations of inverse, elimination and refit: 2 a^3 + 4 a^2 d, or a little less for few units."""
    return 2.0 * a**3 + 4 * a**2 * d
