"""One engine opens one model, in a process that nothing but this runs in.

    python -m secateur.commands.doctor_probe PACKAGE JSON

The last line on standard output is JSON: what there is to say, and the tokens that were written.
"""

import json
import sys
from collections.abc import Callable
from typing import Any


def _model(how: dict[str, Any]) -> Any:
    import transformers

    auto = getattr(transformers, how["class"])
    return auto.from_pretrained(how["out"], dtype="auto", trust_remote_code=how["trust"]).eval()


def _transformers(how: dict[str, Any]) -> dict[str, Any]:
    import torch

    ids = torch.tensor([how["ids"]])
    found = _model(how).generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=how["new"], max_new_tokens=how["new"]
    )
    return {"says": "", "tokens": found[0, ids.shape[1] :].tolist()}


def _vllm(how: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    model = LLM(
        how["out"], trust_remote_code=how["trust"], enforce_eager=True, max_model_len=len(how["ids"]) + how["new"]
    )
    sampling = SamplingParams(temperature=0, max_tokens=how["new"], ignore_eos=True)
    (found,) = model.generate([{"prompt_token_ids": how["ids"]}], sampling, use_tqdm=False)
    return {"says": "", "tokens": list(found.outputs[0].token_ids)}


def _lm_eval(how: dict[str, Any]) -> dict[str, Any]:
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = HFLM(pretrained=how["out"], trust_remote_code=how["trust"], batch_size=1, device=device)
    asked = Instance("loglikelihood", {}, ("The capital of France", " is Paris"), 0)
    ((score, _),) = model.loglikelihood([asked], disable_tqdm=True)
    return {"says": f"scores a text, {score:.2f} nats"}


def _peft(how: dict[str, Any]) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(_model(how), LoraConfig(r=4, target_modules="all-linear"))
    model(input_ids=torch.tensor([how["ids"]]))
    adapted = sum("lora_A" in name for name, _ in model.named_parameters())
    return {"says": f"adapts {adapted} layers"}


PROBES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "transformers": _transformers,
    "vllm": _vllm,
    "lm_eval": _lm_eval,
    "peft": _peft,
}
"""By package."""

if __name__ == "__main__":
    print(f"\n{json.dumps(PROBES[sys.argv[1]](json.loads(sys.argv[2])))}")
