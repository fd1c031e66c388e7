"""Second moments of a layer's input and of its target, streamed over batches.

Everything that scores or refits a module needs only X'X, X'T, the means and the token count, whatever the
number of tokens. Products run in float32 over at most `CHUNK` rows, and their sums are added up in
float32 too; sums of those over all batches, where there is one number and not a matrix of them, are float64.

Shapes: n tokens, a entries of the layer's input, o entries of its target.
"""

import torch
from torch import Tensor

from secateur.base.processes import Processes

CHUNK = 4096
"""Rows of one float32 product: bounds the length of its inner sums."""
PANEL = 256
"""Smallest panel of the symmetric product; below it, the saving is less than the calls cost."""


def add_gram(gram_aa: Tensor, x_na: Tensor, weight: float = 1.0) -> None:
    """Add weight * X'X to the upper panels of `gram_aa`; about 0.6 of the flops of the full product."""
    a, panel = gram_aa.shape[0], panel_width(gram_aa.shape[0])
    for start in range(0, a, panel):
        stop = min(start + panel, a)
        # Faster than addmm_ where products are rounded.
        gram_aa[start:stop, start:].add_(x_na[:, start:stop].T @ x_na[:, start:], alpha=weight)


def panel_width(a: int) -> int:
    """Rows of one panel."""
    return max(PANEL, -(-a // 6))


class Moments:
    """Streaming Gram matrix X'X (a x a), cross moment X'T (a x o), means and energy of the target.

    With `centre`, rows are shifted by the first batch's mean, so that centring at the end does not cancel.
    """

    def __init__(self, inputs: int, targets: int = 0, *, centre: bool = False, device: str | torch.device = "cpu"):
        self.centre = centre
        self.count = 0.0
        self._gram_aa = torch.zeros(inputs, inputs, device=device)
        self._cross_ao = torch.zeros(inputs, targets, device=device)
        self._sum_a = torch.zeros(inputs, dtype=torch.float64, device=device)
        self._sum_o = torch.zeros(targets, dtype=torch.float64, device=device)
        self._energy = torch.zeros((), dtype=torch.float64, device=device)
        self._diagonal_a: Tensor | None = None
        self._origin_a: Tensor | None = None
        self._origin_o: Tensor | None = None

    def update(
        self, x_na: Tensor, t_no: Tensor | None = None, weight: float = 1.0, weights_n: Tensor | None = None
    ) -> None:
        """Add rows: inputs (n x a) and, if the cross moment is wanted, their targets (n x o).

        `weight` is what each of these rows counts, in every sum; `weights_n` are factors for the single rows.
        """
        for start in range(0, x_na.shape[0], CHUNK):
            x = x_na[start : start + CHUNK].float()
            t = None if t_no is None else t_no[start : start + CHUNK].float()
            w = x.new_ones(x.shape[0]) if weights_n is None else weights_n[start : start + CHUNK].float()
            if self.centre:
                if self._origin_a is None:
                    self._origin_a = x.mean(0)
                    self._origin_o = None if t is None else t.mean(0)
                x = x - self._origin_a
                t = None if t is None or self._origin_o is None else t - self._origin_o
            self.count += weight * float(w.sum(dtype=torch.float64))
            self._sum_a += weight * (w @ x)
            if t is not None:
                self._sum_o += weight * (w @ t)
            if weights_n is not None:
                root = w.sqrt()[:, None]
                x, t = x * root, None if t is None else t * root
            add_gram(self._gram_aa, x, weight)
            if t is not None:
                self._cross_ao.add_(x.T @ t, alpha=weight)
                self._energy += weight * torch.linalg.vector_norm(t).double().square()

    def reduce(self, processes: Processes, owner: int) -> None:
        """Add up what several processes have summed: the matrices at the owner alone, all else at each of them."""
        if processes.is_single:
            return
        if self.centre:
            self._shift(processes)
        totals = torch.tensor([self.count], dtype=torch.float64, device=self._sum_a.device)
        processes.all_reduce(totals, self._sum_a, self._sum_o, self._energy)
        self.count = float(totals)
        a, panel = len(self._gram_aa), panel_width(len(self._gram_aa))
        processes.reduce(owner, *(self._gram_aa[start : start + panel, start:] for start in range(0, a, panel)))
        processes.reduce(owner, self._cross_ao)
        if processes.rank != owner:
            # Parts of sums are of no use, and large.
            self._diagonal_a = self._gram_aa.diagonal().clone()
            self._gram_aa = self._cross_ao = self._gram_aa.new_zeros(0, 0)

    def _shift(self, processes: Processes) -> None:
        """Centre on the mean over all processes in place of the first batch's.

        With x' = x + b, X'X becomes X'X + b (s + n b)' + s b', s being the sum of n rows; X'T likewise.
        """
        total = torch.cat([self.mean_a, self.mean_o, self._sum_a.new_ones(1)]) * self.count
        processes.all_reduce(total)
        # As float32 holds it: later sums of rows are of their differences from it.
        mean_a, mean_o = (total[:-1] / total[-1]).float().split([len(self._sum_a), len(self._sum_o)])
        by_a, by_o = (
            torch.zeros_like(mean).double() if before is None else before.double() - mean
            for before, mean in ((self._origin_a, mean_a), (self._origin_o, mean_o))
        )
        ends_a, ends_o = self._sum_a + self.count * by_a, self._sum_o + self.count * by_o
        self._energy += by_o @ (self._sum_o + ends_o)
        self._gram_aa.addr_(by_a.float(), ends_a.float()).addr_(self._sum_a.float(), by_a.float())
        self._cross_ao.addr_(by_a.float(), ends_o.float()).addr_(self._sum_a.float(), by_o.float())
        self._sum_a, self._sum_o = ends_a, ends_o
        self._origin_a, self._origin_o = mean_a, mean_o

    @property
    def mean_a(self) -> Tensor:
        """Mean of the inputs, float64."""
        shift = 0.0 if self._origin_a is None else self._origin_a.double()
        return self._sum_a / (self.count or 1.0) + shift

    @property
    def mean_o(self) -> Tensor:
        """Mean of the targets, float64."""
        shift = 0.0 if self._origin_o is None else self._origin_o.double()
        return self._sum_o / (self.count or 1.0) + shift

    def gram(self) -> Tensor:
        """X'X (a x a), of centred rows where `centre` is set."""
        return self._whole(self._gram_aa.clone())

    def take(self) -> tuple[Tensor, Tensor]:
        """`gram` and `cross` without copies: the sums go to the caller, and cannot be asked for again."""
        gram, cross = self._gram_aa, self.cross()
        self._gram_aa = self._cross_ao = gram.new_zeros(0, 0)
        self._diagonal_a = gram.diagonal().clone()
        return self._whole(gram), cross

    def _whole(self, gram_aa: Tensor) -> Tensor:
        """Fill in the lower triangle and centre, in place."""
        a, panel = gram_aa.shape[0], panel_width(gram_aa.shape[0])
        for start in range(0, a, panel):
            stop = min(start + panel, a)
            gram_aa[stop:, start:stop] = gram_aa[start:stop, stop:].T
            block = gram_aa[start:stop, start:stop]
            block.copy_(block.triu() + block.triu(1).T)
        for start in range(0, a if self.centre else 0, panel):
            stop = min(start + panel, a)
            outer = torch.outer(self._sum_a[start:stop], self._sum_a) / (self.count or 1.0)
            gram_aa[start:stop] -= outer.to(gram_aa.dtype)
        if self._origin_a is not None and a:
            # Of an input that is always the same, rounding is left.
            noise = (4 * torch.finfo(torch.float32).eps * self._origin_a).square() * self.count
            constant = gram_aa.diagonal() <= noise
            gram_aa[constant] = 0
            gram_aa[:, constant] = 0
        return gram_aa

    def _diagonal(self) -> Tensor:
        return self._gram_aa.diagonal() if self._diagonal_a is None else self._diagonal_a

    def cross(self) -> Tensor:
        """X'T (a x o), of centred rows where `centre` is set."""
        if not self.centre:
            return self._cross_ao
        return self._cross_ao - (torch.outer(self._sum_a, self._sum_o) / (self.count or 1.0)).to(self._cross_ao.dtype)

    def energy(self) -> float:
        """Sum of the squared targets, of centred ones where `centre` is set."""
        offset = self._sum_o.square().sum() / (self.count or 1.0) if self.centre else 0.0
        return float(self._energy - offset)

    def mean_square_a(self) -> Tensor:
        """E[x_j^2] of every input entry (a), of the rows as they are, centred or not; float64."""
        diagonal = self._diagonal().double() / (self.count or 1.0)
        if self._origin_a is None:
            return diagonal
        o = self._origin_a.double()
        return diagonal + 2 * o * self._sum_a / (self.count or 1.0) + o.square()

    def finite(self) -> bool:
        """Whether no sum is NaN or infinite."""
        sums = (self._diagonal(), self._sum_a, self._sum_o, self._energy)
        return all(bool(torch.isfinite(value).all()) for value in sums)
