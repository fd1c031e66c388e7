"""Folder of safetensors that transformers loads: the common part of the formats `hf` and `stock`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from secateur.base.errors import SecateurError
from secateur.base.names import FORMATS
from secateur.base.quiet import first_line
from secateur.checkpoints.checkpoint import Checkpoint, open_checkpoint
from secateur.checkpoints.config_file import TEXT
from secateur.checkpoints.expert_matrices import whole
from secateur.families.registry import twin_of
from secateur.formats.format import Format, Loading, PrunedModel, format_class
from secateur.formats.opened import check_written, network_of, planned_misfit
from secateur.formats.vllm import vllm_unsupported
from secateur.model.axes import Width
from secateur.model.layer_sizes import BIAS_KEYS
from secateur.model.structure import Block, KeptUnits, combined
from secateur.model.surgery import first_units, width_of
from secateur.model.units.channels import CHANNELS
from secateur.model.units.experts import EXPERT_CHANNELS, EXPERTS_MULTIPLE
from secateur.plan.problem import Plan
from secateur.plan.widths import head_widths
from secateur.write.files import copy_into, write_json, write_text_or_json
from secateur.write.shards import ShardWriter, header_bytes_for

Biases = Mapping[int, dict[str, bool]]
"""Whether output projections have a bias that the stock class does not have, by block and by config key."""


class Folder(Format):
    """Folder with config.json, safetensors shards and the files of the tokenizer."""

    code: ClassVar[tuple[Path, ...]] = ()
    """Python files that the folder needs to be opened."""
    advice: ClassVar[str]
    """Advice for a user whose transformers does not open the written folder."""

    @abstractmethod
    def format_reason(self, width: Width) -> str | None:
        """Return why this format of folder cannot hold a block of a width; None if it can."""

    @abstractmethod
    def language_config(self, plan: Plan, biases: Biases) -> dict[str, Any]:
        """Return the contents of the language model's config.json."""

    @classmethod
    def vllm_reason(cls, config: Any, widths: Sequence[Width], *, multimodal: bool) -> str | None:
        """Return why vLLM does not serve a folder, as a clause that ends in what can be done instead, or None.

        Args:
            config: The config object of the dense model, or of the folder.
            widths: Width of every block.
            multimodal: The model is inside a multimodal one.
        """
        return vllm_unsupported(config, widths, per_layer=bool(cls.code), multimodal=multimodal)

    def whole_config(self, outer: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
        """Return the contents of a multimodal model's config.json with the config of its pruned language model."""
        return outer | {TEXT: own}

    @classmethod
    def how_to_load(cls, auto_class: str, path: str) -> Loading:
        """Return the call of `from_pretrained`."""
        runs_code = bool(cls.code)
        call = f'{auto_class}.from_pretrained("{path}"{", trust_remote_code=True" if runs_code else ""})'
        registered = "secateur.register()" if runs_code and auto_class == "AutoModelForCausalLM" else ""
        other = f", or after {registered} without it" if registered else ""
        return Loading(f"Load it: {call}{other}", call, runs_code, registered)

    def unsupported_reason(self, width: Width) -> str | None:
        """Return the first reason why the folder cannot hold a width: because of kernels, transformers, or the format
        itself."""
        config, dense = self.stream.checkpoint.config, self.dense(width)
        channels = width.get(EXPERT_CHANNELS, 0)
        if channels % EXPERTS_MULTIPLE and channels != dense[EXPERT_CHANNELS]:
            return (
                f"kernels of experts need a number of channels that is a multiple of {EXPERTS_MULTIPLE}, not {channels}"
            )
        if (twin := twin_of(config)) and twin.inputs_first and 2 * channels == config.hidden_size:
            return (
                f"transformers cannot tell whether the weights of experts with {channels} channels are transposed; use "
                "another size"
            )
        return self.format_reason(width)

    def block_with(self, width: Width, indices: Iterable[int] = ()) -> Block:
        """Return the first stock block with the same axes as a width, preferably one of the given indices; if there is
        none, a block combined from several."""
        blocks = self.stream.stock.blocks
        candidates = (*(blocks[index] for index in indices), *blocks)
        found = next((block for block in candidates if block.width.keys() == width.keys()), None)
        return found or combined(candidates, width.kinds)

    def dense(self, width: Width) -> Width:
        """Return the width of the first stock block that has the same axes."""
        return self.block_with(width).width

    def vllm_unsupported_reason(self, widths: Sequence[Width]) -> str | None:
        """Return why vLLM does not serve the folder, or None."""
        checkpoint = self.stream.checkpoint
        return self.vllm_reason(checkpoint.config, widths, multimodal=checkpoint.multimodal_config is not None)

    def write(self, out: Path, pruned: PrunedModel) -> int:
        """Write config, weights, code, records, and the other files of the dense folder."""
        plan, checkpoint = pruned.plan, self.stream.checkpoint
        if (reason := self.unsupported_plan(plan.widths)) is not None:
            raise SecateurError(reason)
        with self.output(out, plan, overwrite=pruned.overwrite, at=pruned.partial_output) as folder:
            writer = ShardWriter(folder, header_bytes=header_bytes_for(self._possible_names(plan)))
            if pruned.fit_checkpoint is not None and (
                state := pruned.fit_checkpoint.value("shards", writer.save_state)
            ):
                writer.resume(state)
            for name, tensor in self.tensors(pruned, written=writer):
                writer.add(name, tensor)
                # Free the tensor before the next block is fitted.
                del tensor
            writer.close()
            biases = self._biases(writer)
            write_json(folder / "config.json", self.config(plan, biases))
            for file in checkpoint.files:
                copy_into(folder, file)
            self.write_code(folder)
            for file_name, record in pruned.records.items():
                write_text_or_json(folder / file_name, record)
            check_written(folder, out, self.advice, checkpoint.trust_remote_code)
            return writer.total_bytes

    def build(self, pruned: PrunedModel) -> Any:
        """Return the pruned model in memory: the model that transformers makes of the folder that `write` writes.

        Raises:
            SecateurError: The format cannot hold the plan, or the tensors do not fit the model's class.
        """
        if (reason := self.unsupported_plan(pruned.plan.widths)) is not None:
            raise SecateurError(reason)
        tensors = {name: whole(tensor) for name, tensor in self.tensors(pruned)}
        biases = self._biases(tensors)
        return network_of(self.config(pruned.plan, biases), tensors, self.dtype)

    def config(self, plan: Plan, biases: Biases) -> dict[str, Any]:
        """Return the contents of config.json."""
        own = self.language_config(plan, biases)
        if (outer := self.stream.stock.multimodal_config) is None:
            return own
        return self.whole_config(outer, own) | {"dtype": own["dtype"], "torch_dtype": own["torch_dtype"]}

    def write_code(self, folder: Path) -> None:
        """Write the code with which transformers opens the folder, besides files of the checkpoint's own."""

    def check_family(self) -> None:
        """Check a family's entry: open a config with narrower blocks, and compare the shapes that its class makes."""
        checkpoint, stream = self.stream.checkpoint, self.stream
        # Every second block, because the config must also hold for the blocks between them.
        cut = self.block_range if self.declaration.uniform else self.block_range[::2]
        keeps = {index: keep for index in cut if (keep := self._narrower(index))}
        if not keeps or checkpoint.multimodal_config is not None:
            return
        plan = Plan({index: width_of(stream.blocks[index], keep) for index, keep in keeps.items()}, 0, 0)
        kind = checkpoint.config.model_type
        try:
            why = planned_misfit(stream, keeps, self.config(plan, {}))
        except Exception as error:
            why = first_line(error).removeprefix(f"{checkpoint.source}: ")
        if why is not None:
            raise SecateurError(
                f"{checkpoint.source}: the entry for {kind} does not fit its class ({why}); correct the entry"
            )

    def _narrower(self, index: int) -> KeptUnits | None:
        """Return the units of a narrow trial block: as few heads as the format allows and half of the channels; None if
        the format allows none."""
        block, dense = self.stream.blocks[index], self.stream.blocks[index].width
        half = {CHANNELS: -(-dense[CHANNELS] // 2)} if CHANNELS in dense else {}
        widths = (width | half for width in reversed(head_widths(block)))
        width = next((width for width in widths if self.unsupported_reason(width) is None), None)
        return None if width is None else first_units(block, width)

    def _possible_names(self, plan: Plan) -> list[str]:
        """Return all tensor names that a shard's header may contain, including biases that a refit may add."""
        modules = [(index, module) for index in plan.widths for module in self.stream.blocks[index].modules]
        added = {self.stored_name(index, module.bias_name) for index, module in modules if module.may_gain_bias}
        return [*self.stream.checkpoint.tensors, *self.names_inside(plan), *added]

    def _biases(self, written: Container[str]) -> Biases:
        """Return which output projections have a bias that the stock class does not have."""
        return {index: self._biases_of(index, written) for index in range(len(self.stream))}

    def _biases_of(self, index: int, written: Container[str]) -> dict[str, bool]:
        """Return the values for one block; a bias from an earlier pruning is never removed."""
        before, now = self.stream.stock.blocks[index].modules, self.stream.blocks[index].modules
        return {
            BIAS_KEYS[own.role]: stock.bias is None
            and (own.bias is not None or (own.may_gain_bias and self.stored_name(index, own.bias_name) in written))
            for stock, own in zip(before, now, strict=True)
            if stock.may_gain_bias
        }


def open_folder(folder: Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Open a model's folder.

    Args:
        folder: The folder.
        trust_remote_code: Whether the model's own code may run.

    Raises:
        SecateurError: The folder has no model, or a broken one.
    """
    if not (folder / "config.json").is_file():
        raise SecateurError(f"{folder}: not a folder with a config.json; name a folder that secateur prune wrote")
    return open_checkpoint(folder, trust_remote_code=trust_remote_code)


def format_of_folder(folder: Path) -> type[Folder]:
    """Return the format of a folder: the first format whose code files the folder has. The format `stock` has no code
    files."""
    kinds = map(format_class, FORMATS)
    own = (kind for kind in kinds if issubclass(kind, Folder))
    return next(kind for kind in own if all((folder / file.name).is_file() for file in kind.code))
