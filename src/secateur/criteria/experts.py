"""The order in which the experts of a mixture are removed, and the error of the mixture's output after each removal.

| criterion | removed first |
|---|---|
| `reroute`, the default | the expert whose removal raises the error least, with its tokens routed among the others |
| `reap` | the lowest mean, over the tokens routed to it, of gate * ||expert output|| (Lasby et al., ICLR 2026) |
| `frequency` | the expert to which the fewest tokens are routed |
| `random` | a random expert, for comparison |

Weights are not refitted here, and the model's own router chooses the routes. If experts are in groups, every group
loses the same number.

Shapes: n tokens, m of them, e experts that are left, d residual width.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from secateur.criteria.routed_tokens import RoutedTokens
from secateur.model.mixture import Routes

MAX_TOKENS = 4096
"""Number of calibration tokens, at least, from which an order is computed if there are as many; fewer than twice as
many. Each of these tokens runs through many experts."""
ROUNDS = 16
"""Number of rounds in which all experts would be removed, if their number is a multiple of it."""


class ExpertOrder(NamedTuple):
    """Experts in the order of their removal."""

    order: tuple[int, ...]
    errors: tuple[float, ...]
    """Summed squared error of the output without the first 0, 1, 2, ... experts of the order."""


def expert_order(name: str, routed: RoutedTokens, stop: int, seed: int = 0) -> ExpertOrder:
    """Remove experts by a criterion until `stop` are left.

    Errors are measured after each round, and interpolated within a round.

    Args:
        name: The criterion.
        routed: Tokens on which costs and errors are measured.
        stop: Number of experts that are left.
        seed: Seed of the criterion `random`.
    """
    mixture = routed.mixture
    groups, alive = mixture.module.groups, mixture.all_routed
    scores = None if name == "reroute" else SCORES[name](routed, mixture.route(routed.x_nd, alive), seed)
    order: list[int] = []
    counts, errors = [], []
    while True:
        routes = mixture.route(routed.x_nd, alive)
        output = routed.output(routed.all_tokens, routes)
        losses = routed.losses(routed.all_tokens, output)
        counts.append(len(order))
        errors.append(float(losses.sum(dtype=torch.float64)))
        left = len(alive) - stop
        if left <= 0:
            break
        costs = _error_increases(routed, alive, routes, output, losses) if scores is None else scores[alive]
        # Every group loses the same number.
        of_each_group = max(1, min(left, mixture.module.units // ROUNDS) // groups)
        removed = _cheapest(costs, alive, of_each_group, groups, mixture.module.units)
        order += alive[removed].tolist()
        alive = alive[torch.isin(torch.arange(len(alive), device=alive.device), removed, invert=True)]
    every = np.interp(np.arange(len(order) + 1), counts, errors)
    return ExpertOrder(tuple(order), tuple(every.tolist()))


def _error_increases(
    routed: RoutedTokens, alive: Tensor, routes: Routes, output_nd: Tensor, losses_n: Tensor
) -> Tensor:
    """Return the rise of the error with the removal of each single expert (e), float64."""
    increases = torch.zeros(len(alive), dtype=torch.float64, device=alive.device)
    cases: list[tuple[int, Tensor, Routes]] = []
    rarest = _rarest_of_groups(routed, alive, routes)
    for place, expert in enumerate(alive.tolist()):
        tokens, _ = routes.of(expert)
        if len(tokens):
            removed = rarest.clone()
            removed[expert // routed.mixture.module.per_group] = expert
            after = routed.mixture.route(routed.x_nd[tokens], alive[torch.isin(alive, removed, invert=True)])
            cases.append((place, tokens, after))
    if cases:
        routed.run_experts(torch.cat([tokens for _, tokens, _ in cases]), torch.cat([one.experts for *_, one in cases]))
    for place, tokens, after in cases:
        before = Routes(routes.experts[tokens], routes.gates[tokens])
        rerouted = routed.rerouted_output(tokens, before, output_nd[tokens], after)
        increases[place] = (routed.losses(tokens, rerouted) - losses_n[tokens]).sum(dtype=torch.float64)
    return increases


def _rarest_of_groups(routed: RoutedTokens, alive: Tensor, routes: Routes) -> Tensor:
    """Return the expert of each group to which the fewest tokens are routed (groups).

    Groups must stay equally large, so the removal of one expert is measured with the rarest of every other group.
    """
    frequency, group_of = _frequency(routed, routes, 0), alive // routed.mixture.module.per_group
    groups = (alive[group_of == group] for group in range(routed.mixture.module.groups))
    return torch.stack([group[frequency[group].argmin()] for group in groups])


def _cheapest(costs: Tensor, alive: Tensor, step: int, groups: int, units: int) -> Tensor:
    """Return the places in `alive` of the `step` cheapest experts of each group, the cheapest first."""
    group_of = alive // (units // groups)
    found = [costs.masked_fill(group_of != group, float("inf")).argsort(stable=True)[:step] for group in range(groups)]
    return torch.stack(found, 1).reshape(-1)


def _reap(routed: RoutedTokens, routes: Routes, _: int) -> Tensor:
    routed.run_experts(routed.all_tokens, routes.experts)
    sums = torch.zeros(2, routed.mixture.module.units, dtype=torch.float64, device=routed.x_nd.device)
    for expert in routes.experts.unique().tolist():
        tokens, gates = routes.of(expert)
        weight = routed.weight_n[tokens]
        sums[0, expert] = (weight * gates * torch.linalg.vector_norm(routed.expert_output(expert, tokens), dim=1)).sum()
        sums[1, expert] = weight.sum()
    return sums[0] / sums[1].clamp_min(torch.finfo(torch.float64).tiny)


def _frequency(routed: RoutedTokens, routes: Routes, _: int) -> Tensor:
    weights = routed.weight_n.double()[:, None].expand(routes.experts.shape)
    sums = torch.zeros(routed.mixture.module.units, dtype=torch.float64, device=routed.x_nd.device)
    sums.index_add_(0, routes.experts.reshape(-1), weights.reshape(-1))
    return sums


def _random(routed: RoutedTokens, _: Routes, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(routed.mixture.module.units, dtype=torch.float64, generator=generator).to(routed.x_nd.device)


SCORES: dict[str, Callable[[RoutedTokens, Routes, int], Tensor]] = {
    "reap": _reap,
    "frequency": _frequency,
    "random": _random,
}
"""Functions from tokens, their routes and a seed to a score for each expert, higher for experts to keep."""
