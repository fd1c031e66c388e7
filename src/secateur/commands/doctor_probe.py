"""Open a model in one engine, in a process that runs nothing else.

    python -m secateur.commands.doctor_probe PACKAGE JSON

JSON is an object: `out` the folder, `class` the auto class of transformers, `ids` the token ids of a prompt, `new` the
number of tokens to generate, and `trust` whether code in the folder may run. For a .gguf file `out` is the file, and
`prompt` the text before the new tokens. The last line on standard output is JSON
too: a message, and the generated tokens if there are any.
"""

import json
import sys
from collections.abc import Callable
from typing import Any


def _model(request: dict[str, Any]) -> Any:
    """Open the model with transformers."""
    import transformers

    auto_class = getattr(transformers, request["class"])
    return auto_class.from_pretrained(request["out"], dtype="auto", trust_remote_code=request["trust"]).eval()


def _transformers(request: dict[str, Any]) -> dict[str, Any]:
    """Generate tokens with transformers."""
    import torch

    ids, new = torch.tensor([request["ids"]]), request["new"]
    generated = _model(request).generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new, max_new_tokens=new
    )
    return {"message": "", "tokens": generated[0, ids.shape[1] :].tolist()}


def _vllm(request: dict[str, Any]) -> dict[str, Any]:
    """Generate tokens with vLLM."""
    from vllm import LLM, SamplingParams

    ids, new = request["ids"], request["new"]
    model = LLM(request["out"], trust_remote_code=request["trust"], enforce_eager=True, max_model_len=len(ids) + new)
    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    (result,) = model.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
    return {"message": "", "tokens": list(result.outputs[0].token_ids)}


def _lm_eval(request: dict[str, Any]) -> dict[str, Any]:
    """Score a text with lm-eval."""
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = HFLM(pretrained=request["out"], trust_remote_code=request["trust"], batch_size=1, device=device)
    asked = Instance("loglikelihood", {}, ("The capital of France", " is Paris"), 0)
    ((score, _),) = model.loglikelihood([asked], disable_tqdm=True)
    return {"message": f"scores a text: {score:.2f} nats"}


def _peft(request: dict[str, Any]) -> dict[str, Any]:
    """Add LoRA to all linear layers with peft, and run the model."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(_model(request), LoraConfig(r=4, target_modules="all-linear"))
    model(input_ids=torch.tensor([request["ids"]]))
    adapted = sum("lora_A" in name for name, _ in model.named_parameters())
    return {"message": f"adds LoRA to {adapted} layers"}


def _llama_cpp(request: dict[str, Any]) -> dict[str, Any]:
    """Generate text with llama.cpp's library, from a .gguf file."""
    from secateur.checkpoints.tokens import encode
    from secateur.measure.generation import greedy_tokens
    from secateur.measure.llama_cpp import LlamaCppFile, LlamaCppModel

    file = LlamaCppFile(request["out"])
    tokenizer = file.tokenizer()
    prompt = encode(tokenizer, request["prompt"], special=True)
    (tokens,) = greedy_tokens(LlamaCppModel(file), [prompt], ends=[], new_tokens=request["new"])
    return {"message": f"generates: {' '.join(tokenizer.decode([*prompt, *tokens]).split())[-80:]}"}


PROBES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "transformers": _transformers,
    "vllm": _vllm,
    "lm_eval": _lm_eval,
    "peft": _peft,
    "llama_cpp_py_sync": _llama_cpp,
}
"""Probes by package: each is a function of the request, and returns the message and the tokens."""

if __name__ == "__main__":
    print(f"\n{json.dumps(PROBES[sys.argv[1]](json.loads(sys.argv[2])))}")
