"""Moments of a layer's input X and of a target T, summed over batches of tokens.

With the weight w_n of token n,

    gram_aa = sum_n w_n x_n x_n',   cross_ao = sum_n w_n x_n t_n',   energy = sum_n w_n ||t_n||^2.

For a fit with an intercept, x_n and t_n are the deviations from their means. Criteria and refits read nothing else, so
their memory does not depend on the number of tokens. Matrices are products and sums in float32, where one product takes
at most `CHUNK` tokens; vectors and numbers are float64.

Shapes: n tokens, a entries of the input, o entries of the target.
"""

import torch
from torch import Tensor

from secateur.base.processes import Processes
from secateur.numerics.panels import mirror_panel, panels

CHUNK = 4096
"""Largest number of tokens in one float32 product, which limits the rounding error of its sums."""


def add_gram(gram_aa: Tensor, x_na: Tensor, weight: float = 1.0) -> None:
    """Add weight * X'X to the panels of `gram_aa`; entries below the panels stay as they are."""
    for start, stop in panels(len(gram_aa)):
        # Faster than addmm_ where products are rounded to bfloat16.
        gram_aa[start:stop, start:].add_(x_na[:, start:stop].T @ x_na[:, start:], alpha=weight)


class Moments:
    """Streaming Gram matrix X'X (a x a), cross moment X'T (a x o), and means and energy of the target.

    With `centre`, the mean of the first batch is subtracted from all rows, so that the final centring does not cancel.

    Attributes:
        centre: Whether the moments are of deviations from the mean.
        count: Sum of the token weights.
    """

    def __init__(self, inputs: int, targets: int = 0, *, centre: bool = False, device: str | torch.device = "cpu"):
        """Start with empty sums.

        Args:
            inputs: Entries of the input (a).
            targets: Entries of the target (o); 0 for moments of the input alone.
            centre: Whether the fit has an intercept.
            device: Device of the sums.
        """
        self.centre, self.count = centre, 0.0
        self._gram_aa = torch.zeros(inputs, inputs, device=device)
        self._cross_ao = torch.zeros(inputs, targets, device=device)
        self._sum_a = torch.zeros(inputs, dtype=torch.float64, device=device)
        self._sum_o = torch.zeros(targets, dtype=torch.float64, device=device)
        self._energy = torch.zeros((), dtype=torch.float64, device=device)
        self._diagonal_a: Tensor | None = None
        """Diagonal of the Gram matrix, after the matrix was moved elsewhere."""
        self._origin_a, self._origin_o = torch.zeros(inputs, device=device), torch.zeros(targets, device=device)
        """Vectors that are subtracted from all rows; zero without `centre`."""
        self._has_origin = not centre

    def update(
        self, x_na: Tensor, t_no: Tensor | None = None, weight: float = 1.0, weights_n: Tensor | None = None
    ) -> None:
        """Add tokens.

        Args:
            x_na: Inputs, in any floating dtype.
            t_no: Targets; None for zeros.
            weight: Weight of every token in this call.
            weights_n: Factors on that weight for single tokens.
        """
        for start in range(0, len(x_na), CHUNK):
            x = x_na[start : start + CHUNK].float()
            t = x.new_zeros(len(x), len(self._sum_o)) if t_no is None else t_no[start : start + CHUNK].float()
            w = x.new_ones(len(x)) if weights_n is None else weights_n[start : start + CHUNK].float()
            if not self._has_origin:
                self._origin_a, self._origin_o, self._has_origin = x.mean(0), t.mean(0), True
            if self.centre:
                x, t = x - self._origin_a, t - self._origin_o
            self.count += weight * float(w.sum(dtype=torch.float64))
            self._sum_a += weight * (w @ x)
            self._sum_o += weight * (w @ t)
            if weights_n is not None:
                root_n1 = w.sqrt()[:, None]
                x, t = x * root_n1, t * root_n1
            add_gram(self._gram_aa, x, weight)
            self._cross_ao.add_(x.T @ t, alpha=weight)
            self._energy += weight * torch.linalg.vector_norm(t).double().square()

    def reduce(self, processes: Processes, owner: int) -> None:
        """Add up the sums of all processes: the two matrices at the owner rank only, all other sums at every rank."""
        if processes.is_single:
            return
        if self.centre:
            self._share_origin(processes)
        count = torch.tensor([self.count], dtype=torch.float64, device=self._sum_a.device)
        processes.all_reduce(count, self._sum_a, self._sum_o, self._energy)
        self.count = float(count)
        processes.reduce(owner, *(self._gram_aa[start:stop, start:] for start, stop in panels(len(self._gram_aa))))
        processes.reduce(owner, self._cross_ao)
        if processes.rank != owner:
            self._give_away()

    def _share_origin(self, processes: Processes) -> None:
        """Replace the origin of this process by the mean over all processes.

        With x' = x + b, X'X becomes X'X + b (s + n b)' + s b', where s is the sum of n rows. X'T changes likewise.
        """
        total = torch.cat([self.mean_a, self.mean_o, self._sum_a.new_ones(1)]) * self.count
        processes.all_reduce(total)
        # float32, as rows are shifted by it.
        mean_a, mean_o = (total[:-1] / total[-1]).float().split([len(self._sum_a), len(self._sum_o)])
        by_a, by_o = self._origin_a.double() - mean_a, self._origin_o.double() - mean_o
        new_sum_a, new_sum_o = self._sum_a + self.count * by_a, self._sum_o + self.count * by_o
        self._energy += by_o @ (self._sum_o + new_sum_o)
        self._gram_aa.addr_(by_a.float(), new_sum_a.float()).addr_(self._sum_a.float(), by_a.float())
        self._cross_ao.addr_(by_a.float(), new_sum_o.float()).addr_(self._sum_a.float(), by_o.float())
        self._sum_a, self._sum_o = new_sum_a, new_sum_o
        self._origin_a, self._origin_o, self._has_origin = mean_a, mean_o, True

    @property
    def _divisor(self) -> float:
        """The count, or 1 if no token has a weight."""
        return self.count or 1.0

    @property
    def mean_a(self) -> Tensor:
        """Mean of the inputs (a), float64."""
        return self._sum_a / self._divisor + self._origin_a.double()

    @property
    def mean_o(self) -> Tensor:
        """Mean of the targets (o), float64."""
        return self._sum_o / self._divisor + self._origin_o.double()

    def gram(self) -> Tensor:
        """Return X'X (a x a), of centred rows if `centre` is set."""
        return self._complete(self._gram_aa.clone())

    def cross(self) -> Tensor:
        """Return X'T (a x o), of centred rows if `centre` is set."""
        if not self.centre:
            return self._cross_ao
        return self._cross_ao - (torch.outer(self._sum_a, self._sum_o) / self._divisor).to(self._cross_ao.dtype)

    def take(self) -> tuple[Tensor, Tensor]:
        """Return `gram` and `cross` without copying; afterwards this object has neither."""
        gram_aa, cross_ao = self._gram_aa, self.cross()
        self._give_away()
        return self._complete(gram_aa), cross_ao

    def _give_away(self) -> None:
        """Drop both matrices, and keep the diagonal of the Gram matrix."""
        self._diagonal_a = self._gram_aa.diagonal().clone()
        self._gram_aa = self._cross_ao = self._gram_aa.new_zeros(0, 0)

    def _complete(self, gram_aa: Tensor) -> Tensor:
        """Fill in the lower triangle of a Gram matrix and centre it, in place."""
        for start, stop in panels(len(gram_aa)):
            mirror_panel(gram_aa, start, stop)
            block = gram_aa[start:stop, start:stop]
            block.copy_(block.triu() + block.triu(1).T)
        return self._centred(gram_aa) if self.centre and len(gram_aa) else gram_aa

    def _centred(self, gram_aa: Tensor) -> Tensor:
        """Centre a complete Gram matrix in place."""
        for start, stop in panels(len(gram_aa)):
            outer = torch.outer(self._sum_a[start:stop], self._sum_a) / self._divisor
            gram_aa[start:stop] -= outer.to(gram_aa.dtype)
        # If an input is constant, only rounding errors are left.
        rounding_a = (4 * torch.finfo(torch.float32).eps * self._origin_a).square() * self.count
        constant = gram_aa.diagonal() <= rounding_a
        gram_aa[constant] = 0
        gram_aa[:, constant] = 0
        return gram_aa

    def energy(self) -> float:
        """Return the sum of the squared targets, centred if `centre` is set."""
        offset = self._sum_o.square().sum() / self._divisor if self.centre else 0.0
        return float(self._energy - offset)

    def _diagonal(self) -> Tensor:
        return self._gram_aa.diagonal() if self._diagonal_a is None else self._diagonal_a

    def mean_square_a(self) -> Tensor:
        """Return E[x_j^2] of every input entry (a), not centred; float64."""
        origin_a = self._origin_a.double()
        diagonal_a = self._diagonal().double() / self._divisor
        return diagonal_a + 2 * origin_a * self._sum_a / self._divisor + origin_a.square()

    def finite(self) -> bool:
        """Return whether no sum is NaN or infinite."""
        sums = (self._diagonal(), self._sum_a, self._sum_o, self._energy)
        return all(bool(torch.isfinite(value).all()) for value in sums)
