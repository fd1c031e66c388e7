"""Tensors of the matrices of all experts of a block, in which each matrix is read when it is used.

transformers' modules index these tensors by expert, one expert after the other. Such a tensor therefore needs a shape
and a dtype, but no memory: it is on the meta device, and indexing reads one matrix. Slices and changes of dtype are
computed for each matrix when it is read. Other operations fail, as on every meta tensor.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from secateur.model.arena import Arena
from secateur.model.matrix_sources import ChangedMatrices, ComputedMatrices, MatrixSource


class ExpertMatrices(Tensor):
    """Matrices of all experts (experts x rows x columns) in any dtype; indexing returns one expert's matrix in float32.

    Inside autocast, indexing returns the matrix in its stored dtype: converting it twice took a quarter of an expert's
    forward.

    Attributes:
        source: Source of the matrices.
    """

    source: MatrixSource

    @classmethod
    def of(cls, source: MatrixSource) -> "ExpertMatrices":
        """Return the tensor of a source."""
        tensor = torch.empty(source.shape, dtype=source.dtype, device="meta").as_subclass(cls)
        tensor.source = source
        return tensor

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the matrix of each expert, as stored."""
        return map(self.source.read, range(len(self)))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Apply an operation of torch; see PyTorch's documentation of `__torch_function__`."""
        if func in _OPERATIONS:
            return _OPERATIONS[func](*args, **kwargs or {})
        found = super().__torch_function__(func, types, args, kwargs or {})
        if func in _SAME_VALUES:
            found.source = args[0].source
        return found


def _matrix(matrices: ExpertMatrices, expert: Tensor | int) -> Tensor:
    """Return one expert's matrix for a product."""
    found = matrices.source.read(int(expert))
    return found if torch.is_autocast_enabled("cpu") else found.float()


def _set_matrix(matrices: ExpertMatrices, expert: Tensor | int, value: Tensor) -> None:
    """Set one expert's matrix."""
    cast(ChangedMatrices, matrices.source).write(int(expert), value)


def _select(matrices: ExpertMatrices, axis: int, experts: Tensor) -> ExpertMatrices:
    """Return the matrices of some experts."""
    assert axis == 0, "the matrices are selected as a whole"
    numbers, read = experts.tolist(), matrices.source.read
    shape = (len(numbers), *matrices.shape[1:])
    return ExpertMatrices.of(ComputedMatrices(shape, matrices.dtype, lambda expert: read(numbers[expert])))


def _to(matrices: ExpertMatrices, *args: Any, **kwargs: Any) -> Tensor:
    """Return the matrices in a dtype, if one is given; they are read into CPU memory whatever the device."""
    dtype = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)), matrices.dtype)
    if dtype == matrices.dtype:
        return matrices
    return matrix_by_matrix(lambda matrix: matrix.to(dtype), matrices, dtype=dtype)


def _transpose(matrices: ExpertMatrices, one: int, other: int) -> ExpertMatrices:
    """Return the transposed matrices."""
    assert {one, other} == {1, 2}, "the axis of the experts comes first"
    (count, rows, columns), read = matrices.shape, matrices.source.read
    return ExpertMatrices.of(ComputedMatrices((count, columns, rows), matrices.dtype, lambda expert: read(expert).T))


_OPERATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.device.__get__: lambda _: torch.device("cpu"),
    Tensor.__getitem__: _matrix,
    Tensor.__setitem__: _set_matrix,
    Tensor.index_select: _select,
    Tensor.to: _to,
    Tensor.cpu: _to,
    Tensor.transpose: _transpose,
    Tensor.contiguous: _to,
}
"""Operations that read or change matrices, or are computed when a matrix is read."""
_SAME_VALUES = {Tensor.detach, Tensor.data.__get__, Tensor.requires_grad_}  # type: ignore[attr-defined]
"""Operations whose result has the same values."""


def stored_matrix(matrices: Tensor, expert: int) -> Tensor:
    """Return one expert's matrix as stored; the caller must not change it."""
    return matrices.source.read(expert) if isinstance(matrices, ExpertMatrices) else matrices.data[expert]


def changeable(matrices: Tensor, dtype: torch.dtype, arena: Arena) -> Tensor:
    """Return a copy of the matrices of all experts in a dtype, in which single matrices can be set."""
    if isinstance(matrices, ExpertMatrices):
        return ExpertMatrices.of(ChangedMatrices(matrices.source, dtype, arena))
    return matrices.to(dtype, copy=True)


def matrix_by_matrix(function: Callable[..., Tensor], *tensors: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a function of tensors of one shape, such as their mean.

    For the matrices of all experts, it is computed for each expert when the expert's matrix is read.

    Args:
        function: The function, entry by entry.
        tensors: Its arguments.
        dtype: Dtype of its result.
    """
    if not isinstance(tensors[0], ExpertMatrices):
        return function(*tensors)

    def compute(expert: int) -> Tensor:
        return function(*(stored_matrix(tensor, expert) for tensor in tensors))

    return ExpertMatrices.of(ComputedMatrices(tuple(tensors[0].shape), dtype, compute))


def select_in_each(tensor: Tensor, axis: int, entries_ek: Tensor) -> Tensor:
    """Return the matrices of all experts with some entries along an axis, which differ from expert to expert.

    Args:
        tensor: The matrices, or other tensors with the expert first.
        axis: Axis of `tensor`, not the first.
        entries_ek: Entries that stay of each expert.
    """

    def selected(matrix: Tensor, expert: int) -> Tensor:
        return matrix.index_select(axis - 1, entries_ek[expert])

    if not isinstance(tensor, ExpertMatrices):
        # One index for all entries would be several times the weights' size.
        return torch.stack([selected(matrix, expert) for expert, matrix in enumerate(tensor)])
    shape = (*tensor.shape[:axis], entries_ek.shape[1], *tensor.shape[axis + 1 :])
    read = tensor.source.read
    return ExpertMatrices.of(ComputedMatrices(shape, tensor.dtype, lambda expert: selected(read(expert), expert)))


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that is in memory: the matrices of all experts, or any other tensor as it is."""
    return torch.stack(list(tensor)) if isinstance(tensor, ExpertMatrices) else tensor


def in_parts(tensor: Tensor) -> Iterable[Tensor]:
    """Return consecutive parts of a tensor that are in memory one at a time."""
    return tensor if isinstance(tensor, ExpertMatrices) else (tensor,)
