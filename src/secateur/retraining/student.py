"""The pruned model as it is trained: its weights, the part of them that is trained, and the loss of some rows.

Matrices that are not trained are held in the dtype of the products, which is bfloat16 where the device multiplies it.
All else is float32: trained weights, norms, and the residual stream.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from secateur.base.processes import Processes
from secateur.base.quiet import quiet
from secateur.checkpoints.checkpoint import Checkpoint
from secateur.families.registry import experts_of, family_of
from secateur.measure.perplexity import device_of, perplexity
from secateur.model.per_layer import model_class
from secateur.retraining.adapters import with_adapters
from secateur.retraining.halved import convert_in_products
from secateur.retraining.loss import distribution_loss
from secateur.retraining.shares import load_shares, whole
from secateur.retraining.targets import Targets


class Student(nn.Module):
    """Network whose forward returns the loss of rows.

    The network stays in evaluation mode: dropout and the noise of routers would make the loss depend on random numbers.

    Attributes:
        network: The pruned model, a causal language model of transformers.
        adapted: The same model with adapters; the network itself if it has none.
        rows: Token ids of all rows (rows x length).
        targets: What the model learns to predict in these rows.
    """

    rows: Tensor
    targets: Targets

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        rank: int,
        products: torch.dtype,
        device: torch.device,
        processes: Processes,
        halved: bool = False,
    ):
        """Load the pruned model for training.

        Args:
            checkpoint: The pruned model.
            rank: Rank of the adapters; 0 to train all weights of the blocks.
            products: Dtype of matrix products.
            device: Device of the training.
            processes: Processes that share the weights of the blocks.
            halved: Whether all weights of the blocks are trained in bfloat16.
        """
        super().__init__()
        network = checkpoint.empty(model_class(checkpoint.config))
        self.family, self.products, self.halved = family_of(network.config), products, halved
        with quiet():
            self.network, self.adapted = network, with_adapters(network, rank)
        if halved:
            for value in self.trained().values():
                value.data = value.data.bfloat16()
        load_shares(network, self.family.blocks, checkpoint, products, device, processes)
        if halved and products == torch.float32:
            convert_in_products(network.get_submodule(self.family.blocks))
        self._decoder = self.family.blocks.rpartition(".")[0]
        """Path of the module that holds the blocks, from embedding to final norm."""
        self.vocabulary: int = network.get_output_embeddings().weight.shape[0]
        network.get_input_embeddings().register_forward_hook(lambda _, __, output: output.float())
        if experts_of(network.config) is not None:
            # Grouped products of several experts have no autocast.
            network.set_experts_implementation("eager")
        self.eval()

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the training changes, by name."""
        return {name: value for name, value in self.named_parameters() if value.requires_grad}

    def whole(self, name: str) -> AbstractContextManager[None]:
        """Gather all weights of the block with a parameter in every process."""
        blocks = f"{self.family.blocks}."
        return whole(self.network.get_submodule(blocks + name.removeprefix(blocks).partition(".")[0]))

    def recompute(self) -> None:
        """Keep only the inputs of blocks for the backward pass, and compute their insides again (one forward more)."""
        for layer in self.network.get_submodule(self.family.blocks).children():
            layer.forward = partial(recomputed, layer.forward, use_reentrant=False)

    def forward(self, at: Tensor) -> dict[str, Tensor]:
        """Return the mean loss per token of rows, in nats.

        Args:
            at: Numbers of the rows (b).
        """
        ids, log_p = self.targets.of(at.cpu())
        device = device_of(self.network)
        with self._multiplying():
            decoder = self.network.get_submodule(self._decoder)
            hidden = decoder(input_ids=self.rows[at.cpu()].to(device), use_cache=False)[0]
            # A text has no target for the last position.
            hidden = hidden[:, : ids.shape[1]].flatten(0, 1)
            ids, log_p = (one.flatten(0, 1).to(device) for one in (ids, log_p))
            with self._head() as head:
                return {"loss": distribution_loss(hidden, head, ids, log_p, self.vocabulary)}

    def perplexity(self, rows: Tensor) -> float:
        """Return the perplexity of rows of token ids (rows x length)."""
        with self._multiplying():
            return perplexity(self.network, rows).perplexity

    def _multiplying(self) -> AbstractContextManager[Any]:
        """Compute matrix products in their dtype."""
        return torch.autocast(device_of(self.network).type, self.products, enabled=self.products != torch.float32)

    @contextmanager
    def _head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield a function from hidden states (n x d) to logits (n x v): all that the model runs after its blocks."""
        parent_name, _, child = self._decoder.rpartition(".")
        parent = self.network.get_submodule(parent_name)
        decoder, stub = getattr(parent, child), _Given()
        setattr(parent, child, stub)
        try:

            def logits(hidden: Tensor) -> Tensor:
                stub.hidden = hidden[None]
                ids = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
                # Indexing, unlike squeeze, would copy the gradient into a tensor of zeros.
                found: Tensor = self.network(input_ids=ids, use_cache=False).logits.squeeze(0)
                return found

            yield logits
        finally:
            setattr(parent, child, decoder)


class _Given(nn.Module):
    """Module in place of the part of the model before its output layer; it returns given hidden states."""

    hidden: Tensor

    def forward(self, *_: Any, **__: Any) -> Any:
        return _Output(self.hidden)


class _Output:
    """Output of a model without its output layer. Attributes of other transformers outputs are None.

    Attributes:
        last_hidden_state: Hidden states after the final norm.
    """

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden

    def __getattr__(self, _: str) -> None:
        return None

    def __getitem__(self, at: Any) -> Any:
        return (self.last_hidden_state,)[at]
