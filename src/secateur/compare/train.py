"""The training of a pruned model: adapters or all weights, on a text or on what the dense model makes of it.

transformers' Trainer trains; peft's adapters are merged at the end. With a teacher, the loss of a token is the
divergence of the pruned model's next-token distribution from the dense one's, and beside it how far the residual stream
behind each block is from the dense one, relative to that:

    KL(dense || pruned) + mean over blocks of ||h - h_dense||^2 / ||h_dense||^2

The state is kept in a folder as it goes, so that a training that was killed goes on from there.
"""

from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

from secateur.base.progress import Watcher
from secateur.base.quiet import quiet
from secateur.compare.training import Training
from secateur.model.families import family_of, mixture_of

SCALE = 2
"""The adapters' product counts so many times over its rank: alpha = 2 r, as in LLM-Pruner."""
DROPOUT = 0.05
"""Share of an adapter's inputs left out in a step, as in LLM-Pruner; none where there are experts."""
KEPT = 10
"""The state is written so many times in a training."""
STATE = "trainer_state.json"
"""What the Trainer writes last of a state."""


def train(
    network: Any,
    teacher: Any | None,
    rows: Tensor,
    training: Training,
    where: torch.device,
    folder: Path,
    watcher: Watcher,
) -> tuple[tuple[float, ...], int]:
    """Train a network in place: the loss of every step, and how many parameters were trained.

    Args:
        teacher: the dense model, on the same device; None to learn the text itself.
        rows: what it is trained on (rows x length).
        folder: where the state is kept, and gone on with.
    """
    steps = training.epochs * -(-len(rows) // training.batch)
    bar = cast("Generator[int, None, None]", watcher.track(range(steps), "Retrain"))

    class Progress(TrainerCallback):
        """Hands the Trainer's steps to the watcher."""

        def on_train_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            for _done in range(state.global_step):
                next(bar, None)

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            next(bar, None)

    class Distiller(Trainer):
        """Learns from the teacher, where there is one."""

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **how: Any) -> Any:
            if teacher is None:
                return super().compute_loss(model, inputs, return_outputs, **how)
            ids, how = inputs["input_ids"], {"use_cache": False, "output_hidden_states": True}
            with torch.no_grad():
                wanted = teacher(input_ids=ids, **how)
            found = model(input_ids=ids, **how)
            loss = distance(found, wanted)
            return (loss, found) if return_outputs else loss

    # Closed at once where the training fails, so that no bar is drawn after the error.
    with closing(bar), quiet():
        adapted = _adapted(network, training.rank)
        count = sum(value.numel() for value in adapted.parameters() if value.requires_grad)
        arguments = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=training.epochs,
            per_device_train_batch_size=training.batch,
            learning_rate=training.learning_rate,
            seed=training.seed,
            logging_steps=1,
            save_strategy="steps",
            save_steps=-(-steps // KEPT),
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=where.type == "cpu",
            dataloader_pin_memory=where.type != "cpu",
        )
        data: Any = [{"input_ids": row, "labels": row} for row in rows]
        trainer = Distiller(model=adapted, args=arguments, train_dataset=data, callbacks=[Progress()])
        # It prints every step's figures.
        trainer.remove_callback(PrinterCallback)
        states = sorted(folder.glob(f"checkpoint-*/{STATE}"), key=lambda file: int(file.parent.name.split("-")[1]))
        trainer.train(resume_from_checkpoint=str(states[-1].parent) if states else None)
        next(bar, None)
        if adapted is not network:
            adapted.merge_and_unload()
    network.eval().requires_grad_(True).to(where)
    return tuple(entry["loss"] for entry in trainer.state.log_history if "loss" in entry), count


def adapted_layers(network: Any) -> tuple[str, ...]:
    """Paths of the layers that get adapters: every matrix of the blocks, as in LLM-Pruner; not the output layer."""
    prefix, mixture = family_of(network.config).blocks, mixture_of(network.config)
    found = ((f"{prefix}.{name}", module) for name, module in network.get_submodule(prefix).named_modules())
    # A router may be a layer that gives more than its product.
    routers = () if mixture is None else (f".{mixture.router}",)
    return tuple(
        name for name, module in found if isinstance(module, nn.Linear | Conv1D) and not name.endswith(routers)
    )


def adapted_experts(network: Any) -> tuple[str, ...]:
    """Names of the parameters that hold the matrices of a block's experts, which get adapters too."""
    if (mixture := mixture_of(network.config)) is None:
        return ()
    prefix, leaves = f"{family_of(network.config).blocks}.", dict(mixture.stored)
    ends = tuple(f".{mixture.experts}.{leaf}" for leaf in leaves)
    return tuple(name for name, _ in network.named_parameters() if name.startswith(prefix) and name.endswith(ends))


def trained(network: Any, rank: int) -> tuple[str, ...]:
    """Names of the parameters that a training changes: those that adapters are merged into, or all of the blocks."""
    if rank:
        return (*(f"{layer}.weight" for layer in adapted_layers(network)), *adapted_experts(network))
    prefix = f"{family_of(network.config).blocks}."
    return tuple(name for name, _ in network.named_parameters() if name.startswith(prefix))


def _adapted(network: Any, rank: int) -> Any:
    """The network with adapters on its layers, or with only the weights of its blocks to be trained."""
    if rank == 0:
        wanted = set(trained(network, rank))
        for name, value in network.named_parameters():
            value.requires_grad_(name in wanted)
        return network
    from peft import LoraConfig, get_peft_model

    layers, experts = adapted_layers(network), adapted_experts(network)
    config = LoraConfig(
        r=rank,
        lora_alpha=SCALE * rank,
        # peft leaves no inputs of experts out.
        lora_dropout=0.0 if experts else DROPOUT,
        target_modules=list(layers),
        target_parameters=list(experts) or None,
        fan_in_fan_out=isinstance(network.get_submodule(layers[0]), Conv1D),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(network, config)


def distance(found: Any, wanted: Any) -> Tensor:
    """How far a model's output is from another's, per token: of logits (b x t x v) and of hidden states (b x t x d)."""
    logs = wanted.logits.float().log_softmax(-1)
    divergence = (logs.exp() * (logs - found.logits.float().log_softmax(-1))).sum(-1).mean()
    # The first are the embeddings, which nothing changes.
    gaps = [
        (mine - dense).square().sum(-1).div(dense.square().sum(-1)).mean()
        for mine, dense in zip(found.hidden_states[1:], wanted.hidden_states[1:], strict=True)
    ]
    return divergence + torch.stack(gaps).mean()
