"""One module's curves: a sample is taken while the dense block runs, and asked for the error curve of each axis.

Of several processes each samples its own rows; the module's owner tells the others what it has measured.
"""

from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn

from secateur.model.post_norm import PostNorm
from secateur.model.rows import Batch
from secateur.model.stream import BlockStream
from secateur.survey.curve_estimator import CurveEstimator, ModuleActivations
from secateur.survey.curves import ErrorCurve
from secateur.survey.probes import Cut


class Collector:
    """Takes one module's sample, and measures it."""

    def __init__(self, stream: BlockStream, layer: nn.Module, sample: CurveEstimator):
        self.stream, self.sample, self.module = stream, sample, sample.module
        self._norm = PostNorm(stream, sample.index, layer, sample.module)
        nothing = torch.empty(0)
        self._source, self._inner, self._output = nothing, nothing, nothing
        self._found = (list[ErrorCurve](), list[Cut]())
        self._probed: list[Tensor] = []
        """What the sample keeps of the rows to be probed, a batch each (b x t x ...)."""

    def watches(self) -> dict[str, Callable[[Tensor, Tensor], None]]:
        """Return what to watch, by layer path."""
        result: dict[str, Callable[[Tensor, Tensor], None]] = {self.module.output_layer: self._see_sink}
        if self.sample.reads_source and self.module.input_layer != self.module.output_layer:
            result[self.module.input_layer] = self._see_source
        return result

    def _see_sink(self, x: Tensor, z: Tensor) -> None:
        self._inner, self._output = x, z
        if self.module.input_layer == self.module.output_layer:
            self._source = x

    def _see_source(self, x: Tensor, _: Tensor) -> None:
        self._source = x

    def update(self, after: Tensor, at: Batch) -> None:
        """Add the last run to the sample; `after` is the residual stream after the block (b, t, d)."""
        seen = ModuleActivations(self._source, self._inner, self._output)
        if not (at.weight or at.score):
            self._probed.append(self.sample.probed(seen).reshape(*after.shape[:-1], -1))
            return
        norms = torch.linalg.vector_norm(self._norm.read(after).reshape(-1, after.shape[-1]), dim=1, keepdim=True)
        self.sample.add(seen, self._norm.inverse_rms(seen.output), norms.clamp_min(1e-6), at)

    def measure(self, ridge: float, seed: int) -> None:
        """Find the curves and the cuts, which `told` gives; all processes do it together."""
        if self.sample.reduce(ridge, seed):
            found = [self.sample.curve(axis) for axis in self.sample.axes]
            cuts = [cut for _, some in found for cut in some]
            self._found = [curve for curve, _ in found], [*cuts, self.sample.whole()]
        # What was measured is larger than the module itself.
        self.sample.release()

    def told(self) -> tuple[list[ErrorCurve], list[Cut]]:
        """Return the module's curves, one for each axis, and the cuts to be probed."""
        processes, owner, (curves, cuts) = self.stream.processes, self.sample.owner, self._found
        if processes.is_single:
            return curves, cuts
        raw, errors = processes.broadcast(lambda: [[asdict(one) for one in curves], [cut.error for cut in cuts]], owner)
        tensors = {f"{n} {what}": getattr(cut, what) for n, cut in enumerate(cuts) for what in ("kept", "weight_ao")}
        tensors = processes.broadcast_tensors(tensors, owner, self.stream.device)
        return [ErrorCurve.of(one) for one in raw], [
            Cut(self.sample.index, self.module, error, tensors[f"{n} kept"], tensors[f"{n} weight_ao"])
            for n, error in enumerate(errors)
        ]

    def output(self, cut: Cut) -> Tensor:
        """Return the module's output at a cut, on the rows to be probed (b x t x d)."""
        if not self._probed:
            return torch.empty(0, 1, self.stream.width, device=self.stream.device)
        if len(self._probed) > 1:
            self._probed = [torch.cat(self._probed)]
        return self.sample.output(cut, self._probed[0])
