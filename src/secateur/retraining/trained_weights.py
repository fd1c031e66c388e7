"""Weights of a trained model as they are written: trained tensors, or stored tensors with their adapters merged.

Adapters are added to the stored weights, not to the copies in memory, which may have fewer bits.
"""

from functools import lru_cache

import torch
from torch import Tensor

from secateur.base.errors import SecateurError
from secateur.model.checkpoint import Checkpoint
from secateur.retraining.adapters import adapters_of, trained_parameters
from secateur.retraining.student import Student


class TrainedWeights:
    """Trained tensors by their stored names, in the stored dtype. Adapters are taken out of the network."""

    def __init__(self, checkpoint: Checkpoint, student: Student, rank: int):
        """Merge the adapters, and put the weights into the network as they are written.

        Raises:
            SecateurError: A weight is NaN or infinite.
        """
        self._checkpoint, self._network = checkpoint, student.network
        # Pieces of the few parameters that hold a block's experts alternate in the file.
        self._pieces = lru_cache(maxsize=4)(self._pieces_of)
        self._adapters = adapters_of(student.network) if rank else {}
        if rank:
            student.adapted.unload()
        names = trained_parameters(self._network, rank)
        self._owners = {stored: name for name in names for stored in checkpoint.pieces(name)}
        for name in names:
            value = self._network.get_parameter(name).data
            value.copy_(self._merged(name) if rank else value.to(self._dtype(name)))
            if not torch.isfinite(value.sum()):
                raise SecateurError(f"{name}: NaN or infinite after the training; use a smaller --learning-rate")

    def __contains__(self, stored: str) -> bool:
        return stored in self._owners

    def __getitem__(self, stored: str) -> Tensor:
        """Return a tensor by its stored name."""
        return self._pieces(self._owners[stored])[stored].to(self._checkpoint.tensors[stored].dtype)

    def _pieces_of(self, name: str) -> dict[str, Tensor]:
        """Return a parameter by stored names: its pieces, if the matrices of experts are stored one by one."""
        weight = self._merged(name) if self._adapters else self._network.get_parameter(name).data
        return dict(self._checkpoint.split(name, weight))

    def _merged(self, name: str) -> Tensor:
        """Return a stored matrix with its adapter added, rounded to the stored dtype."""
        weight, adapter = self._checkpoint.read_parameter(name), self._adapters[name]
        delta = adapter.get_delta_weight("default").detach().to("cpu", torch.float32)
        return (weight.float() + delta.view(weight.shape)).to(weight.dtype)

    def _dtype(self, name: str) -> torch.dtype:
        return self._checkpoint.tensors[self._checkpoint.pieces(name)[0]].dtype
