"""LLM-Pruner: how much the loss changes, to first or second order, if the weights of a unit become zero.

With g the gradient of the loss with respect to a weight w, and h the diagonal of the empirical Fisher matrix (an
approximation of the Hessian matrix),

    vector      |sum g w|           with the sum over one row of a matrix
    element1    |g w|
    element2    |g w - w h w / 2|

The score of a unit is the sum over its coupled group: its rows in the input projections and its columns in the output
projection. Biases are left out, as in the authors' program, which calls element2 `param_mix`.

h is the mean over samples of the squared gradient of a sample's own loss. A sample is one calibration row, and its loss
is the mean over its tokens, as in the authors' program. The exact Fisher matrix has the squared gradients of single
tokens, which would need one backward pass per token.

The gradients of all modules come from one backward pass over the dense model, before pruning
(`secateur.survey.gradients`).

Source: Ma, Fang, Wang, 2023, *LLM-Pruner: On the Structural Pruning of Large Language Models*.
"""

from torch import Tensor

from secateur.criteria.registry import Named, criterion
from secateur.criteria.statistics import sum_by_unit
from secateur.model.structure import PrunableModule


@criterion(field="from_gradients")
def vector(module: PrunableModule, weights: Named, gradient: Named, _: Named) -> Tensor:
    """Return a score for each unit (units), float64."""
    return sum_by_unit(module, _products(module, weights, gradient), lambda part: part.sum(1).abs())


@criterion(field="from_gradients")
def element1(module: PrunableModule, weights: Named, gradient: Named, _: Named) -> Tensor:
    """Return a score for each unit (units), float64."""
    return sum_by_unit(module, _products(module, weights, gradient), lambda part: part.abs().sum(1))


@criterion(field="from_gradients", squared_gradients=True)
def element2(module: PrunableModule, weights: Named, gradient: Named, square: Named) -> Tensor:
    """Return a score for each unit (units), float64."""
    products = _products(module, weights, gradient)
    change = {name: product - weights[name].square() * square[name] / 2 for name, product in products.items()}
    return sum_by_unit(module, change, lambda part: part.abs().sum(1))


def scored_matrices(module: PrunableModule) -> tuple[str, ...]:
    """Return the names of the matrices whose gradients the scores need."""
    names = dict.fromkeys(slab.name for slab in (*module.input_projections, module.output_projection))
    return tuple(name for name in names if not name.endswith(".bias"))


def _products(module: PrunableModule, weights: Named, gradient: Named) -> dict[str, Tensor]:
    """Return g w of every weight, by tensor name."""
    return {name: weights[name] * gradient[name] for name in scored_matrices(module)}
