"""Blocks of a model, loaded from disk one at a time and run by transformers' own forward.

The model is built without weights. Its embedding is run once, with recorders in place of the blocks. They keep the
arguments that the model prepares for each block, such as masks and rotary tables. Then any block can be run alone on
stored activations. Hooks exist only inside context managers.

Shapes: b rows of a batch, t positions, d residual width, c columns of the stream between blocks: d, or more where
blocks have side inputs (`secateur.model.side_inputs`).
"""

import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from secateur.base.device import fast_dtype, reduced_precision_matmul, to_device
from secateur.base.errors import SecateurError
from secateur.base.memory import MemoryBudget
from secateur.base.processes import Processes
from secateur.base.quiet import first_line
from secateur.base.services import Services
from secateur.checkpoints.checkpoint import Checkpoint, tied_weights
from secateur.checkpoints.expert_matrices import BlockTensor
from secateur.checkpoints.weights import read_ahead
from secateur.families.family import Other, submodule
from secateur.families.registry import family_of
from secateur.model.arena import Activations, Arena
from secateur.model.axes import ATTENTION, FEED_FORWARD
from secateur.model.experts import experts_as_modules
from secateur.model.hooks import LayerReached, Recorder, repeated, replayed, watched, zeroed
from secateur.model.per_layer import describe_blocks, empty_decoder
from secateur.model.rows import Rows
from secateur.model.side_inputs import SideInputs
from secateur.model.structure import PrunableModule
from secateur.model.surgery import assign

MIXED = 4
"""Factor on the tokens of a batch in mixtures whose matrices are converted to float32 expert by expert: with ordinary
batches, the conversion took a quarter of a forward pass."""


def fill(model: nn.Module, checkpoint: Checkpoint, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
    """Set tensors of a model by what `read` returns for their names; tied tensors share the memory of those to which
    they are tied, and come last."""
    tied = tied_weights(model)
    for name in sorted(names, key=lambda name: checkpoint.resolve(name) is None):
        is_tied = checkpoint.resolve(name) is None and name in tied
        assign(model, name, model.get_parameter(tied[name]).data if is_tied else read(name))


class BlockStream:
    """Open checkpoint as a sequence of blocks.

    Attributes:
        model: The transformers model, without weights.
        services: Processes, memory and progress output of the run.
        blocks: Description of each dense block.
        stock: The stock model, whose blocks are wider if the checkpoint is a pruned folder of the format `hf`.
    """

    def __init__(self, checkpoint: Checkpoint, *, device: str | torch.device = "cpu", services: Services | None = None):
        self.checkpoint, self.services = checkpoint, services or Services()
        self.device = torch.device(device)
        # Before its blocks are described, so that a config of no model is called that.
        self.model: Any = empty_decoder(checkpoint)
        if not checkpoint.config.num_hidden_layers:
            raise SecateurError(f"{checkpoint.source}: the model has no blocks; find the config.json of these weights")
        self.family = family_of(checkpoint.config)
        self.model.requires_grad_(False)
        self._matrices_of_experts = tuple(dict(self.family.experts.stored)) if self.family.experts else ()
        """Endings of the names of tensors that hold the matrices of all experts."""
        checkpoint.check_shapes(self.model)
        try:
            self.layers = self.model.get_submodule(self.family.blocks)
            self.stock, self.blocks = describe_blocks(checkpoint, self.layers.children())
        except AttributeError as error:
            raise SecateurError(
                f"{checkpoint.source}: the entry for {checkpoint.config.model_type} names a layer that does not exist "
                f"({first_line(error)}); correct the entry"
            ) from error
        self.width: int = checkpoint.config.hidden_size
        """Residual width d."""
        self.side_inputs = SideInputs(checkpoint.config, self.family, [*self.layers.children()], self.width)
        self.products_dtype = torch.float32
        """Dtype of matrix products in blocks; see `fast_products`."""
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []

    def __len__(self) -> int:
        return len(self.blocks)

    def using(self, **services: Any) -> "BlockStream":
        """Return the same open model with other values for some fields of its `Services`."""
        stream = copy(self)
        stream.services = replace(self.services, **services)
        return stream

    @cached_property
    def kept_dtypes(self) -> frozenset[str]:
        """Stored names of tensors that keep their own dtype, whatever the dtype of the model.

        These are all buffers, and parameters that transformers keeps in float32, such as the weights of a router.
        """
        parts = self.model._keep_in_fp32_modules_strict or ()
        names = [name for name, _ in self.model.named_parameters() if any(part in name for part in parts)]
        return self.checkpoint.buffers_of(self.model) | set(filter(None, map(self.checkpoint.resolve, names)))

    def keeps_dtype(self, index: int, name: str) -> bool:
        """Return whether a tensor of a block keeps its own dtype."""
        return self.checkpoint.resolve(self._inside(index, name)) in self.kept_dtypes

    @property
    def processes(self) -> Processes:
        """Processes that share the rows."""
        return self.services.processes

    @property
    def batch_tokens(self) -> int:
        """Largest number of tokens in a batch; more for mixtures, where each expert gets only some of the tokens."""
        # Llama 4 runs all experts on all tokens.
        experts = self.family.experts if self.reads_experts_one_by_one else None
        return self.services.batch_tokens * (1 if experts is None or experts.scales_inputs else MIXED)

    @property
    def reads_experts_one_by_one(self) -> bool:
        """Whether experts share the memory with activations, and are read again if it does not hold all of them."""
        return self.family.experts is not None and self.device.type == "cpu"

    def block_tensors(self, index: int, without: Container[str] = ()) -> dict[str, BlockTensor]:
        """Return a block's tensors as stored, by their names inside the block, without some of them.

        Matrices of experts are read when they are used.
        """
        return {
            name: self.checkpoint.expert_matrices(self._inside(index, name))
            if name.endswith(self._matrices_of_experts)
            else self._read_block(index, name)
            for name in self.blocks[index].shapes
            if name not in without
        }

    def pieces(self, index: int, name: str) -> tuple[str, ...]:
        """Return the stored names of the pieces of a block's tensor; see `Stored.pieces`."""
        return self.checkpoint.pieces(self._inside(index, name))

    def _inside(self, index: int, name: str) -> str:
        return f"{self.family.blocks}.{index}.{name}"

    def split(self, index: int, name: str, tensor: BlockTensor) -> Iterator[tuple[str, BlockTensor]]:
        """Yield the values of a block's tensor in its pieces, with their stored names."""
        return self.checkpoint.split(self._inside(index, name), tensor)

    @property
    def final_norm(self) -> list[str]:
        """Names of the weight and bias of the final norm in the model; some models have none."""
        names = (f"{self.family.final_norm}.{leaf}" for leaf in ("weight", "bias"))
        return [name for name in names if self.checkpoint.resolve(name) is not None]

    @cached_property
    def reading_gains(self) -> Tensor | None:
        """Gains of the norms before the modules, in the order in which they run, and of the final norm.

        (modules + 1) x d; None if a module has no such norm.
        """
        names = {ATTENTION: self.family.norm_before_attention, FEED_FORWARD: self.family.norm_before_feed_forward}
        modules = [(index, module) for index, block in enumerate(self.blocks) for module in block.modules]
        if any(f"{names[module.role]}.weight" not in self.blocks[index].shapes for index, module in modules):
            return None
        stored = [self._read_block(index, f"{names[module.role]}.weight") for index, module in modules]
        stored.append(self.read(f"{self.family.final_norm}.weight"))
        return torch.stack(stored).to(self.device, torch.float32) + self.family.norm_offset

    def read(self, name: str) -> Tensor:
        """Return a tensor as stored, by its name in the model."""
        return self.checkpoint.parameter(name).read()

    def _read_block(self, index: int, name: str) -> Tensor:
        return self.read(self._inside(index, name))

    @contextmanager
    def filled(self, index: int) -> Iterator[nn.Module]:
        """Load the weights of one block onto the device, and release them on exit. The next block is read ahead
        meanwhile. Experts are modules, whose matrices are read when they run and stay until the memory is full."""
        layer, shapes = self.layers.get_submodule(str(index)), self.blocks[index].shapes
        own = self._names_beside_experts(index)
        matrices = {
            name: self.checkpoint.expert_matrices(self._inside(index, name)) for name in shapes if name not in own
        }
        # On a GPU, all matrices stay in memory.
        budget = self.services.budget if self.device.type == "cpu" else MemoryBudget(sys.maxsize)
        with experts_as_modules(layer, matrices, self.device, budget):
            try:
                for name in own:
                    # Copied in the stored dtype, because float32 would be twice as many bytes.
                    assign(layer, name, to_device(self._read_block(index, name), self.device).float())
                layer.to(self.device)
                if index + 1 < len(self):
                    names = self._names_beside_experts(index + 1)
                    read_ahead(self.checkpoint.parameter(self._inside(index + 1, name)) for name in names)
                yield layer
            finally:
                for name in own:
                    assign(layer, name, torch.empty(shapes[name], device="meta"))
                for name in set(dict(layer.named_parameters())) - shapes.keys():
                    assign(layer, name, None)

    def _names_beside_experts(self, index: int) -> list[str]:
        """Return the names of a block's tensors without those that hold the matrices of all experts."""
        return [name for name in self.blocks[index].shapes if not name.endswith(self._matrices_of_experts)]

    def fast_products(self) -> AbstractContextManager[None]:
        """Compute matrix products of a bfloat16 checkpoint's blocks in bfloat16 if this device is faster with it.

        Activations between modules stay float32, and norms compute in float32.
        """
        is_bfloat16 = self.checkpoint.dtype == torch.bfloat16
        return self.multiplying_in(fast_dtype(self.device) if is_bfloat16 else torch.float32)

    @contextmanager
    def multiplying_in(self, dtype: torch.dtype) -> Iterator[None]:
        """Compute matrix products of blocks in a dtype. Activations between modules stay float32."""
        before, self.products_dtype = self.products_dtype, dtype
        try:
            yield
        finally:
            self.products_dtype = before

    def layer_products(self) -> AbstractContextManager[Any]:
        """Compute the matrix products of layers in the dtype that `fast_products` sets."""
        if self.products_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.products_dtype)

    def rounded_sums(self) -> AbstractContextManager[None]:
        """Compute float32 matrix products, such as sums over tokens, with factors rounded as in `fast_products`."""
        return reduced_precision_matmul(self.device, self.products_dtype)

    def arena(self) -> Arena:
        """Return room for activations, within the memory that the run may take."""
        folder = self.services.run_folder
        return Arena(self.services.budget, None if folder is None else folder.path)

    def local_rows(self, rows: Rows) -> Rows:
        """Return this process's share of some rows, in batches of `batch_tokens`."""
        return replace(rows, batch_tokens=self.batch_tokens).share(self.processes.rank, self.processes.size)

    def local_spans(self, rows: Rows) -> list[slice]:
        """Return the range of rows in each group that `local_rows` returns."""
        return replace(rows, batch_tokens=self.batch_tokens).spans(self.processes.rank, self.processes.size)

    def embed(self, rows: Rows, arena: Arena) -> Activations:
        """Return the input of the first block for rows of tokens.

        The arguments that the model passes to each block are recorded for each group of rows; `run` uses them.
        """
        base = self.model.get_submodule(self.family.base)
        result = arena.empty(rows, self.columns)
        with self._outside_blocks(base) as recorders:
            self._calls = []
            self.side_inputs.prepare(rows, arena)
            for group in rows.groups:
                # The arguments that the model prepares for one row broadcast over batches of any size.
                one = group[:1] if len(group) else group.new_zeros(1, group.shape[1])
                with self.checkpoint.model_errors():
                    base(one.to(self.device), use_cache=False)
                self._calls.append([recorder.call for recorder in recorders])
            for at in rows.batches():
                base(rows.ids(at).to(self.device), use_cache=False)
                arguments = [recorder.call[0] for recorder in recorders]
                result[at] = self.side_inputs.record(at, recorders[0].input_btd, arguments)
        return result

    @property
    def columns(self) -> int:
        """Number of columns c of the stream between blocks."""
        return self.side_inputs.columns

    def residual(self, hidden_btc: Tensor) -> Tensor:
        """Return the residual stream without additional columns (b x t x d)."""
        return hidden_btc[..., : self.width]

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Yield a function from the stream after the last block (k x c) to logits (k x v).

        It is the model's own final norm and output layer, run as k texts of one token.
        """
        with self._outside_blocks(self.model) as recorders:

            def logits(hidden_kc: Tensor) -> Tensor:
                recorders[-1].replacement = self.residual(hidden_kc.to(self.device))[:, None]
                ids = torch.zeros(len(hidden_kc), 1, dtype=torch.long, device=self.device)
                with self.checkpoint.model_errors():
                    return self.model(ids, use_cache=False).logits[:, 0]

            yield logits

    @contextmanager
    def replaced(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Replace the values of tensors that `head` has loaded."""
        before = {name: self.model.get_parameter(name).data for name in tensors}
        try:
            for name, tensor in tensors.items():
                assign(self.model, name, tensor.to(self.device, torch.float32))
            yield
        finally:
            for name, tensor in before.items():
                assign(self.model, name, tensor)

    def fewer_logits(self, tokens: Tensor) -> AbstractContextManager[None]:
        """Replace the output layer by one for some of the vocabulary (k ids), inside `head`."""
        layer = self.model.get_output_embeddings()
        path = next(name for name, module in self.model.named_modules() if module is layer)
        return self.replaced({f"{path}.{name}": value.data[tokens] for name, value in layer.named_parameters()})

    @contextmanager
    def _outside_blocks(self, part: nn.Module) -> Iterator[list[Recorder]]:
        """Load the weights of a part of the model outside its blocks, and yield recorders in place of the blocks."""
        recorders = [Recorder(layer, self.family.returns_tuple) for layer in self.layers.children()]
        parent_name, _, child = self.family.blocks.rpartition(".")
        parent = self.model.get_submodule(parent_name)
        inside = {f"{self.family.blocks}.{name}" for name, _ in self.layers.named_parameters()}
        prefix = "" if part is self.model else self.family.base
        names = [name for name, _ in part.named_parameters(prefix=prefix, remove_duplicate=False)]
        outside = [name for name in names if name not in inside]
        setattr(parent, child, nn.ModuleList(recorders))
        try:
            fill(self.model, self.checkpoint, outside, lambda name: self.read(name).to(self.device, torch.float32))
            part.to(self.device)
            yield recorders
        finally:
            setattr(parent, child, self.layers)
            for name in outside:
                assign(self.model, name, self.model.get_parameter(name).to("meta"))

    def run(
        self,
        index: int,
        layer: nn.Module,
        hidden_btc: Tensor,
        group: int,
        *,
        replay: Mapping[PrunableModule, Tensor | None] | None = None,
        watch: Mapping[str, Callable[[Tensor, Tensor], None]] | None = None,
        until: str | None = None,
        modules_only: bool = False,
    ) -> Tensor | None:
        """Run a filled block on one batch.

        Args:
            layer: The block, from `filled`.
            hidden_btc: Its input, on any device.
            group: Index of the batch's group of rows.
            replay: Outputs of modules that are not to be computed (b x t x d); None for zeros.
            watch: Functions of a layer's input and output, by the layer's path.
            until: Path of the layer at which to stop. Its function gets an empty output, and the result is None.
            modules_only: Whether to leave out layers that belong to none of the modules.
        """
        hidden_btc = to_device(hidden_btc, self.device)
        args, kwargs = self.side_inputs.arguments(index, group, hidden_btc, *self._calls[group][index])
        hidden_btd = self.residual(hidden_btc)
        args, kwargs = repeated(args, kwargs, self.family.repeated, len(hidden_btd))
        with ExitStack() as stack:
            for module, value in (replay or {}).items():
                provides_keys = module.role == ATTENTION and index in self.side_inputs.stores
                stack.enter_context(replayed(layer, module, hidden_btd, value, provides_keys))
            if modules_only:
                for path, outputs in self._other_layers(index):
                    stack.enter_context(zeroed(layer.get_submodule(path), hidden_btd, outputs))
            for path, see in (watch or {}).items():
                stack.enter_context(watched(layer.get_submodule(path), see, stop=path == until))
            stack.enter_context(self.layer_products())
            try:
                output = layer(hidden_btd, *args, **kwargs)
                after = output[0] if self.family.returns_tuple else output
                return self.side_inputs.stream_after(index, hidden_btc, after, kwargs)
            except LayerReached:
                return None
            except (SecateurError, torch.OutOfMemoryError):
                raise
            except Exception:
                stack.close()
                # If the block fails without our hooks too, the config is at fault and this raises SecateurError.
                with self.checkpoint.model_errors():
                    layer(hidden_btd, *args, **kwargs)
                raise

    def _other_layers(self, index: int) -> Iterator[tuple[str, int]]:
        """Yield the layers that add to the residual stream but belong to none of the block's modules, each with the
        number of its outputs."""
        if self.side_inputs.has_token_inputs:
            yield self.family.per_layer_output, 1
        yield from ((other.path, other.outputs) for other in self.others(index))
        if any(module.outer_norm is not None for module in self.blocks[index].modules):
            yield str(self.family.feed_forward), 1

    def others(self, index: int) -> list[Other]:
        """Return the submodules of a block that add to the residual stream and are never pruned."""
        own, layer = [module.path for module in self.blocks[index].modules], self.layers[index]
        has = (other for other in self.family.others if submodule(layer, other.path) is not None)
        return [other for other in has if other.path not in own]

    def run_through(self, index: int, layer: nn.Module, hidden_btc: Tensor, group: int, **options: Any) -> Tensor:
        """Run a block to its end, and check that all values are finite (b x t x c).

        Raises:
            SecateurError: Some are not; the message names the block and the module.
        """
        after = self.run(index, layer, hidden_btc, group, **options)
        assert after is not None
        if not _finite(after):
            raise self.activation_error(index, layer, hidden_btc, group)
        return after

    def advance(self, index: int, layer: nn.Module, rows: Rows, hidden: Activations) -> None:
        """Run all rows through a loaded block; their activations are replaced by the stream after the block."""
        for at in rows.batches():
            hidden[at] = self.run_through(index, layer, hidden[at], at.group)

    def activation_error(self, index: int, layer: nn.Module, hidden_btc: Tensor, group: int) -> SecateurError:
        """Return the error for a batch on which a loaded block gives NaN or infinite values, with the first module that
        does."""
        block = self.blocks[index]
        broken = {"the norms": True, "the input": not _finite(hidden_btc)}
        names = {module.output_layer: f"the {module.role} module" for module in block.modules_left}

        def watcher(name: str) -> Callable[[Tensor, Tensor], None]:
            return lambda x, z: broken.update({name: not (_finite(x) and _finite(z))})

        self.run(index, layer, hidden_btc, group, watch={layer: watcher(name) for layer, name in names.items()})
        where = next(name for name in ("the input", *names.values(), "the norms") if broken[name])
        return SecateurError(f"block {index}: {where} gives NaN or infinite activations; check the weights")


def _finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values.sum()))


@dataclass(frozen=True)
class FilledModule:
    """Module of a block whose weights are loaded."""

    stream: BlockStream
    """The model."""
    index: int
    """Index of the block."""
    layer: nn.Module
    """The block, from `BlockStream.filled`."""
    module: PrunableModule
    """Description of the module."""
