"""LLM-Pruner: how much the loss changes, to first or second order, where a unit's weights become zero.

Source: Ma, Fang, Wang, 2023, *LLM-Pruner: On the Structural Pruning of Large Language Models*. With g the gradient of
the loss with respect to a weight w, and h the diagonal of the empirical Fisher matrix in place of the Hessian's,

    vector      |sum g w|           the sum over a row of one matrix that belongs to the unit
    element1    |g w|
    element2    |g w - w h w / 2|

and a unit's score is the sum over its coupled group, which is all its rows or columns in level 1 and level 2; biases
do not count, as in the authors' program. There element2 is called `param_mix`, and `param_second` is |w h w| alone.

h is the mean over samples of the squared gradient of a sample's own loss. A sample is one row of the calibration,
and its loss the mean over its tokens, as in the authors' program; squares of single tokens' gradients, which the
Fisher matrix proper has, would need a backward pass for every token.

Scores of all modules come from one backward pass over the dense model, ahead of pruning (`secateur.survey.gradients`).
"""

from torch import Tensor

from secateur.criteria.registry import Named, criterion
from secateur.criteria.statistics import sum_by_unit
from secateur.model.structure import PrunableModule


@criterion("llm-pruner-vector", kind="from_gradients")
def vector(module: PrunableModule, weights: Named, gradient: Named, _: Named) -> Tensor:
    """Score per unit (units), float64."""
    return sum_by_unit(module, _products(module, weights, gradient), lambda part: part.sum(1).abs())


@criterion("llm-pruner-element1", kind="from_gradients")
def element1(module: PrunableModule, weights: Named, gradient: Named, _: Named) -> Tensor:
    """Score per unit (units), float64."""
    return sum_by_unit(module, _products(module, weights, gradient), lambda part: part.abs().sum(1))


@criterion("llm-pruner-element2", kind="from_gradients", squared_gradients=True)
def element2(module: PrunableModule, weights: Named, gradient: Named, square: Named) -> Tensor:
    """Score per unit (units), float64."""
    products = _products(module, weights, gradient)
    change = {name: product - weights[name].square() * square[name] / 2 for name, product in products.items()}
    return sum_by_unit(module, change, lambda part: part.abs().sum(1))


def scored_matrices(module: PrunableModule) -> tuple[str, ...]:
    """Names of the matrices whose gradients the scores need."""
    names = dict.fromkeys(slab.name for slab in (*module.input_projections, module.output_projection))
    return tuple(name for name in names if not name.endswith(".bias"))


def _products(module: PrunableModule, weights: Named, gradient: Named) -> dict[str, Tensor]:
    return {name: weights[name] * gradient[name] for name in scored_matrices(module)}
