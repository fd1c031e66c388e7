"""Pruned folders can be trained with peft, transformers' Trainer and trl, merged, saved and opened."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from conftest import CASES, IDS, MIXTURE, load, logits, train
from models import relative

HOW: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
HOW |= {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "bf16": False}
TARGETS: list[Any] = [None, ["down_proj"], ["o_proj"], "all-linear"]
# None stands for peft's default targets; it has none for mixtures whose experts are stored in one tensor.
LORA = [(case, targets) for case in CASES for targets in TARGETS if targets or case[0] != MIXTURE]


@pytest.mark.parametrize(("case", "targets"), LORA, ids=str)
def test_lora_trains_merges_and_opens(folders, case, targets, tmp_path):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(load(folders(case)), config)
    optimizer = torch.optim.AdamW((weight for weight in model.parameters() if weight.requires_grad), lr=1e-2)
    losses = train(model, optimizer, 6)
    assert losses[-1] < 0.95 * losses[0]
    trained = logits(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(load(folders(case)), tmp_path / "adapter").eval()), trained)
    merged = model.merge_and_unload()
    assert relative(logits(merged), trained) < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), logits(merged))


def test_the_trainer_trains_and_saves(folders, case, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in IDS.tolist()] * 4
    trainer = Trainer(load(folders(case)), TrainingArguments(str(tmp_path), **HOW), train_dataset=rows)
    assert falls(trainer)
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.equal(logits(load(tmp_path / "saved")), logits(trainer.model.eval()))


def test_trl_trains_an_adapter(folders, case, tmp_path):
    trainer = SFTTrainer(
        load(folders(case)),
        # The loss that balances experts needs the same number of experts in all blocks.
        SFTConfig(str(tmp_path), max_length=16, router_aux_loss_coef=0.0, **HOW),
        train_dataset=Dataset.from_dict({"text": ["w1 w2 w3 w4 w5 w6 w7 w8"] * 8}),
        processing_class=AutoTokenizer.from_pretrained(folders(case)),
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    assert falls(trainer)


def falls(trainer: Trainer) -> bool:
    """Train, and return whether the loss fell."""
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses[-1] < 0.95 * losses[0]
