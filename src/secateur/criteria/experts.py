"""The order in which the experts of a mixture leave, and what the layer's output loses by each.

`reroute`, the default, takes out greedily whichever expert costs least once its tokens are routed again among those
that are left: the squared error of the layer's output, by the model's own router. `reap` has the mean of the gate
times the norm of the expert's output over the tokens routed to it (Lasby et al., ICLR 2026); `frequency` the number
of these tokens; `random` is for comparison.

Shapes: n tokens, d residual width, k experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from secateur.base.processes import Processes
from secateur.model.mixture import Mixture, Routes
from secateur.model.structure import PrunableModule

MAX_TOKENS = 4096
"""Of the calibration text, spaced evenly, on which orders are found: each is given to many experts."""
STEP = 16
"""One in so many of all experts leaves at a time."""
_EVEN = 1e-5
"""Ratios of gates that differ by less are one."""


@dataclass
class RoutedTokens:
    """What an order is found from: some tokens at a mixture."""

    mixture: Mixture
    x_nd: Tensor
    """Inputs of the mixture."""
    target_nd: Tensor
    """What the mixture is to give, in the units in which errors count; then what its routed experts are."""
    weight_n: Tensor
    """Token weights."""
    unit: Callable[[Tensor, Tensor], Tensor]
    """What experts give to some tokens (m x d; m) in these units."""
    processes: Processes
    _place: Tensor = field(init=False)
    """Where an expert's output for a token lies (n x experts); -1 where it was not asked for yet."""
    _given: Tensor = field(init=False)
    _count: int = field(init=False)

    def __post_init__(self) -> None:
        if (shared := self.mixture.shared_output(self.x_nd)) is not None:
            self.target_nd = self.target_nd - self.unit(shared, self.everyone)
        shape = (len(self.x_nd), self.mixture.module.units)
        self._place = torch.full(shape, -1, dtype=torch.int64, device=self.x_nd.device)
        self._given, self._count = self.target_nd.new_empty(0, self.target_nd.shape[1]), 0

    @property
    def everyone(self) -> Tensor:
        """All tokens (n)."""
        return torch.arange(len(self.x_nd), device=self.x_nd.device)

    def given(self, tokens: Tensor, routes: Routes) -> Tensor:
        """Return the output of some tokens on their routes (m x d)."""
        return (routes.gates[:, None] @ self._of(tokens, routes.experts))[:, 0]

    def losses(self, tokens: Tensor, given_md: Tensor) -> Tensor:
        """Return the squared errors of the output of some tokens (m)."""
        return (self.target_nd[tokens] - given_md).square().sum(1) * self.weight_n[tokens]

    def rerouted(self, tokens: Tensor, before: Routes, given_md: Tensor, after: Routes) -> Tensor:
        """Return the output of some tokens on other routes (m x d), from the output on their routes before.

        Where one expert takes the place of another and the gates of the rest keep their ratios, only these two are
        looked up: k of them for each token and each expert that may leave are most of what an order costs.
        """
        if before.experts.shape != after.experts.shape:
            return self.given(tokens, after)
        same = before.experts[:, :, None] == after.experts[:, None, :]
        gone, new = ~same.any(2), ~same.any(1)
        now = (same * after.gates[:, None, :]).sum(2)
        ratio = now.sum(1) / (before.gates * ~gone).sum(1).clamp_min(torch.finfo(torch.float32).tiny)
        kept = ((now - ratio[:, None] * before.gates) * ~gone).abs().amax(1) <= _EVEN * after.gates.abs().amax(1)
        simple = (gone.sum(1) == 1) & (new.sum(1) == 1) & kept
        result = torch.empty_like(given_md)
        if not bool(simple.all()):
            hard = ~simple
            result[hard] = self.given(tokens[hard], Routes(after.experts[hard], after.gates[hard]))
        which, away, come = tokens[simple], gone & simple[:, None], new & simple[:, None]
        less = self._of(which, before.experts[away][:, None])[:, 0] * before.gates[away][:, None]
        more = self._of(which, after.experts[come][:, None])[:, 0] * after.gates[come][:, None]
        result[simple] = (given_md[simple] - less) * ratio[simple, None] + more
        return result

    def outputs(self, expert: int, tokens: Tensor) -> Tensor:
        """Return one expert's output for some tokens, with a gate of one (m x d)."""
        return self._of(tokens, torch.full((len(tokens), 1), expert, device=tokens.device))[:, 0]

    def _of(self, tokens: Tensor, experts: Tensor) -> Tensor:
        """Return the outputs of experts (m x k) for tokens (m): m x k x d."""
        self.ask(tokens, experts)
        return self._given[self._place[tokens[:, None], experts]]

    def ask(self, tokens: Tensor, experts: Tensor) -> None:
        """Run experts (m x k) on the tokens (m) for which they were not run yet: the more together, the faster."""
        lacking, everyone = self._place[tokens[:, None], experts] < 0, len(self.x_nd)
        # By expert, each pair once.
        pairs = (experts * everyone + tokens[:, None])[lacking].unique()
        found, counts = (pairs // everyone).unique_consecutive(return_counts=True)
        for expert, own in zip(found.tolist(), (pairs % everyone).split(counts.tolist()), strict=True):
            first, self._count = self._count, self._count + len(own)
            if self._count > len(self._given):
                room = self._given.new_empty(max(self._count, 3 * len(self._given) // 2), self._given.shape[1])
                room[:first] = self._given[:first]
                self._given = room
            self._given[first : self._count] = self.unit(self.mixture.given(expert, self.x_nd[own]), own)
            self._place[own, expert] = torch.arange(first, self._count, device=own.device)


class ExpertOrder(NamedTuple):
    """How experts leave."""

    order: tuple[int, ...]
    errors: tuple[float, ...]
    """Summed squared errors of the output, weights unchanged, once 0, 1, 2, ... of them have gone."""


def experts_per_round(module: PrunableModule) -> int:
    """Return how many experts leave in a round; as many of every group, where there are groups."""
    return max(module.groups, module.units // STEP // module.groups * module.groups)


def expert_order(name: str, routed: RoutedTokens, stop: int, seed: int = 0) -> ExpertOrder:
    """Find the order in which experts leave until `stop` are left; as many of every group, where there are groups."""
    processes, mixture = routed.processes, routed.mixture
    groups, alive = mixture.module.groups, mixture.every
    scores = None if name == "reroute" else SCORES[name](routed, mixture.route(routed.x_nd, alive), seed)
    order: list[int] = []
    counts, errors = [], []
    while True:
        routes = mixture.route(routed.x_nd, alive)
        given = routed.given(routed.everyone, routes)
        losses = routed.losses(routed.everyone, given)
        counts.append(len(order))
        errors.append(processes.total(float(losses.sum(dtype=torch.float64))))
        left = len(alive) - stop
        if left <= 0:
            break
        costs = _rises(routed, alive, routes, given, losses) if scores is None else scores[alive]
        step = max(groups, min(left, experts_per_round(mixture.module)) // groups * groups)
        chosen = _cheapest(costs, alive, step // groups, groups, mixture.module.units)
        order += alive[chosen].tolist()
        alive = alive[torch.isin(torch.arange(len(alive), device=alive.device), chosen, invert=True)]
    every = np.interp(np.arange(len(order) + 1), counts, errors)
    return ExpertOrder(tuple(order), tuple(every.tolist()))


def _rises(routed: RoutedTokens, alive: Tensor, routes: Routes, given_nd: Tensor, losses: Tensor) -> Tensor:
    """Return the rise of the error if each of the experts went on its own (alive), float64."""
    rises = torch.zeros(len(alive), dtype=torch.float64, device=alive.device)
    groups, size = routed.mixture.module.groups, routed.mixture.module.per_group
    # Groups must stay equally long: with an expert of one of them the rarest of each other one goes.
    met = _frequency(routed, routes, 0)
    least = [alive[alive // size == group][met[alive[alive // size == group]].argmin()] for group in range(groups)]
    cases: list[tuple[int, Tensor, Routes]] = []
    for place, expert in enumerate(alive.tolist()):
        tokens, _ = routes.of(expert)
        if len(tokens):
            gone = torch.stack([one if group != expert // size else alive[place] for group, one in enumerate(least)])
            others = routed.mixture.route(routed.x_nd[tokens], alive[torch.isin(alive, gone, invert=True)])
            cases.append((place, tokens, others))
    if cases:
        routed.ask(torch.cat([tokens for _, tokens, _ in cases]), torch.cat([others.experts for *_, others in cases]))
    for place, tokens, others in cases:
        before = Routes(routes.experts[tokens], routes.gates[tokens])
        found = routed.rerouted(tokens, before, given_nd[tokens], others)
        rises[place] = (routed.losses(tokens, found) - losses[tokens]).sum(dtype=torch.float64)
    routed.processes.all_reduce(rises)
    return rises


def _cheapest(costs: Tensor, alive: Tensor, step: int, groups: int, units: int) -> Tensor:
    """Return the places of the cheapest experts of each group, the cheapest first."""
    owner = alive // (units // groups)
    found = [costs.masked_fill(owner != group, float("inf")).argsort(stable=True)[:step] for group in range(groups)]
    return torch.stack(found, 1).reshape(-1)


def _reap(routed: RoutedTokens, routes: Routes, _: int) -> Tensor:
    sums = torch.zeros(2, routed.mixture.module.units, dtype=torch.float64, device=routed.x_nd.device)
    for expert in routes.experts.unique().tolist():
        tokens, gates = routes.of(expert)
        weight = routed.weight_n[tokens]
        sums[0, expert] = (weight * gates * torch.linalg.vector_norm(routed.outputs(expert, tokens), dim=1)).sum()
        sums[1, expert] = weight.sum()
    routed.processes.all_reduce(sums)
    return sums[0] / sums[1].clamp_min(torch.finfo(torch.float64).tiny)


def _frequency(routed: RoutedTokens, routes: Routes, _: int) -> Tensor:
    weights = routed.weight_n.double()[:, None].expand(routes.experts.shape)
    found = torch.zeros(routed.mixture.module.units, dtype=torch.float64, device=routed.x_nd.device)
    found.index_add_(0, routes.experts.reshape(-1), weights.reshape(-1))
    routed.processes.all_reduce(found)
    return found


def _random(routed: RoutedTokens, _: Routes, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(routed.mixture.module.units, dtype=torch.float64, generator=generator).to(routed.x_nd.device)


SCORES: dict[str, Callable[[RoutedTokens, Routes, int], Tensor]] = {
    "reap": _reap,
    "frequency": _frequency,
    "random": _random,
}
"""Of each expert, higher for those that should stay."""
