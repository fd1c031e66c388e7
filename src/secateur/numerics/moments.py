"""Moments of a layer's input X and of a target T, summed over batches of tokens.

With the weight w_n of token n,

    gram_aa = sum_n w_n x_n x_n',   cross_ao = sum_n w_n x_n t_n',   energy = sum_n w_n ||t_n||^2.

For a fit with an intercept, x_n and t_n are the deviations from their means. Criteria and refits read nothing else, so
their memory does not depend on the number of tokens.

The products of a batch are float32, where one product takes at most `CHUNK` tokens. Their sums do not depend on the
order of batches, and so not on the number of processes (`secateur.base.processes`).

Centred moments are computed batch by batch: from the rows of batch b, an origin u_b near their mean is subtracted, so
that no digits cancel. With the weight n_b of the batch, r_b = sum_n w_n (x_n - u_b), and the batch's mean
m_b = u_b + r_b / n_b,

    gram_aa = sum_b [ sum_n w_n (x_n - u_b)(x_n - u_b)' - r_b r_b' / n_b + n_b (m_b - mean)(m_b - mean)' ],

and likewise for the cross moment and the energy.

Shapes: n tokens, a entries of the input, o entries of the target, p batches.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from secateur.base.processes import Processes
from secateur.numerics.panels import mirror_panel, panels

CHUNK = 4096
"""Largest number of tokens in one float32 product, which limits the rounding error of its sums."""
ORIGIN_STRIDE = 7
"""Distance between the tokens whose mean is the origin of a batch. It is odd and rows are even, so that first tokens of
rows, which may have massive activations, are as frequent among these tokens as among all tokens."""


class BatchSums(NamedTuple):
    """Sums over each batch (p, or p x a + o): inputs come first, then targets."""

    weight_p: Tensor
    """Sum of the token weights, n_b."""
    energy_p: Tensor
    """Weighted sum of squared targets minus origin."""
    sums_pv: Tensor
    """Weighted sums of rows minus origin, r_b."""
    origins_pv: Tensor
    """Origins u_b; zero if the moments are not centred."""

    @property
    def totals_v(self) -> Tensor:
        """Weighted sums of rows (a + o)."""
        return (self.sums_pv + self.weight_p[:, None] * self.origins_pv).sum(0)

    def corrections(self, mean_v: Tensor) -> tuple[Tensor, Tensor]:
        """Return vectors (2p x a + o) and signs (2p) whose signed outer products turn sums of squares around the
        origins into sums around the mean."""
        root_p1 = self.weight_p.clamp_min(torch.finfo(torch.float64).tiny).sqrt()[:, None]
        inside = self.sums_pv / root_p1
        between = root_p1 * (self.origins_pv - mean_v) + inside
        signs = torch.cat([torch.ones_like(self.weight_p), -torch.ones_like(self.weight_p)])
        return torch.cat([between, inside]), signs


class Moments:
    """Streaming Gram matrix X'X (a x a), cross moment X'T (a x o), and means and energy of the target.

    Attributes:
        centre: Whether the moments are of deviations from the mean.
    """

    def __init__(self, inputs: int, targets: int = 0, *, centre: bool = False, device: str | torch.device = "cpu"):
        """Start with empty sums.

        Args:
            inputs: Entries of the input (a).
            targets: Entries of the target (o); 0 for moments of the input alone.
            centre: Whether the fit has an intercept.
            device: Device of the sums.
        """
        self.centre, self._inputs, self._targets = centre, inputs, targets
        self._cross_ao = torch.zeros(inputs, targets, dtype=torch.float64, device=device)
        self._panels = [self._cross_ao.new_zeros(stop - start, inputs - start) for start, stop in panels(inputs)]
        """Panels of the Gram matrix around the origins."""
        self._batches = self._cross_ao.new_zeros(0, 2 + 2 * (inputs + targets))
        """Rows of `BatchSums` (p x 2 + 2 (a + o))."""
        self._diagonal_a: Tensor | None = None
        """Diagonal of the Gram matrix, after the matrix was moved elsewhere."""

    def update(
        self, x_na: Tensor, t_no: Tensor | None = None, weight: float = 1.0, weights_n: Tensor | None = None
    ) -> None:
        """Add a batch of tokens.

        Args:
            x_na: Inputs, in any floating dtype.
            t_no: Targets; None for zeros.
            weight: Weight of every token in this call.
            weights_n: Factors on that weight for single tokens.
        """
        for start in range(0, len(x_na), CHUNK):
            x = x_na[start : start + CHUNK].float()
            t = x.new_zeros(len(x), self._targets) if t_no is None else t_no[start : start + CHUNK].float()
            w = x.new_ones(len(x)) if weights_n is None else weights_n[start : start + CHUNK].float()
            origin_a, origin_o = (self._origin(values) for values in (x, t))
            if self.centre:
                x, t = x - origin_a, t - origin_o
            if weight != 1:
                w = w * weight
            parts = [w.sum(dtype=torch.float64)[None], w @ x, w @ t, origin_a, origin_o]
            if weight != 1 or weights_n is not None:
                root_n1 = w.sqrt()[:, None]
                x, t = x * root_n1, t * root_n1
            # Each product is float32, so that its sum in float64 does not depend on the order.
            for panel, (first, stop) in zip(self._panels, panels(self._inputs), strict=True):
                panel += x[:, first:stop].T @ x[:, first:]
            self._cross_ao += x.T @ t
            parts.insert(1, torch.linalg.vector_norm(t).double().square()[None])
            self._batches = torch.cat([self._batches, torch.cat([part.double() for part in parts])[None]])

    def _origin(self, values: Tensor) -> Tensor:
        """Return the origin of a batch."""
        return values[::ORIGIN_STRIDE].mean(0) if self.centre else values.new_zeros(values.shape[1])

    def reduce(self, processes: Processes, owner: int) -> None:
        """Add up the sums of all processes: the two matrices at the owner rank only, all other sums at every rank."""
        self._batches = processes.gather(self._batches)
        processes.reduce(owner, *self._panels, self._cross_ao)
        if processes.rank != owner:
            self._give_away()

    @property
    def _sums(self) -> BatchSums:
        entries = self._inputs + self._targets
        weight, energy, sums, origins = self._batches.split([1, 1, entries, entries], 1)
        return BatchSums(weight[:, 0], energy[:, 0], sums, origins)

    @property
    def count(self) -> float:
        """Sum of the token weights."""
        return float(self._sums.weight_p.sum())

    @property
    def _divisor(self) -> float:
        """The count, or 1 if no token has a weight."""
        return self.count or 1.0

    @property
    def _mean_v(self) -> Tensor:
        """Means of the inputs and of the targets (a + o), float64."""
        return self._sums.totals_v / self._divisor

    @property
    def mean_a(self) -> Tensor:
        """Mean of the inputs (a), float64."""
        return self._mean_v[: self._inputs]

    @property
    def mean_o(self) -> Tensor:
        """Mean of the targets (o), float64."""
        return self._mean_v[self._inputs :]

    def gram(self) -> Tensor:
        """Return X'X (a x a), of centred rows if `centre` is set; float32."""
        return self._gram([*self._panels])

    def cross(self) -> Tensor:
        """Return X'T (a x o), of centred rows if `centre` is set; float32."""
        return self._around_mean(self._cross_ao, slice(self._inputs), slice(self._inputs, None))

    def take(self) -> tuple[Tensor, Tensor]:
        """Return `gram` and `cross`, and free the memory of their sums; afterwards this object has neither."""
        cross_ao, all_panels = self.cross(), self._panels
        self._give_away()
        return self._gram(all_panels), cross_ao

    def _give_away(self) -> None:
        """Drop both matrices, and keep the diagonal of the Gram matrix."""
        self._diagonal_a = self._diagonal()
        self._panels, self._cross_ao = [], self._cross_ao.new_zeros(0, 0)

    def _gram(self, sums: list[Tensor]) -> Tensor:
        """Return the complete Gram matrix from its panels; each is removed from the list once it has been read."""
        if not sums:
            return self._batches.new_zeros(0, 0).float()
        result = torch.empty(self._inputs, self._inputs, device=self._batches.device)
        for start, stop in panels(self._inputs):
            result[start:stop, start:] = self._around_mean(sums.pop(0), slice(start, stop), slice(start, self._inputs))
            mirror_panel(result, start, stop)
            block = result[start:stop, start:stop]
            block.copy_(block.triu() + block.triu(1).T)
        if self.centre:
            # If an input is constant, only rounding errors are left.
            rounding_a = (4 * torch.finfo(torch.float32).eps * self.mean_a).square() * self.count
            constant = result.diagonal() <= rounding_a
            result[constant] = 0
            result[:, constant] = 0
        return result

    def _around_mean(self, sums: Tensor, rows: slice, columns: slice) -> Tensor:
        """Return a part of the moments around the mean in float32, from the sums around the origins."""
        # Rounded before anything else is done, so that the order of the sum leaves no trace.
        rounded = sums.float()
        if not self.centre:
            return rounded
        vectors, signs = self._sums.corrections(self._mean_v)
        return (rounded + (vectors[:, rows] * signs[:, None]).T @ vectors[:, columns]).float()

    def energy(self) -> float:
        """Return the sum of the squared targets, centred if `centre` is set."""
        energy = self._sums.energy_p.sum()
        if self.centre:
            vectors, signs = self._sums.corrections(self._mean_v)
            energy = energy + signs @ vectors[:, self._inputs :].square().sum(1)
        return float(energy)

    def _diagonal(self) -> Tensor:
        """Return the diagonal of the Gram matrix around the origins (a), rounded to float32."""
        if self._diagonal_a is not None:
            return self._diagonal_a
        return torch.cat([panel.diagonal() for panel in self._panels]).float()

    def mean_square_a(self) -> Tensor:
        """Return E[x_j^2] of every input entry (a), not centred; float64."""
        weight_p, _, sums, origins = self._sums
        shifts = (2 * sums + weight_p[:, None] * origins) * origins
        return (self._diagonal().double() + shifts[:, : self._inputs].sum(0)) / self._divisor

    def finite(self) -> bool:
        """Return whether no sum is NaN or infinite."""
        return all(bool(torch.isfinite(value).all()) for value in (self._diagonal(), self._batches))
