"""Make a mixture of experts from a dense model, since no package ships the weights of one.

    python benchmarks/mixtures.py MODEL OUT --experts 8 --chosen 2 --calibration TEXT

The script cuts every feed-forward into experts with the same number of channels. Channels that are active on the same
tokens share an expert: balanced k-means on |activation| times the norm of the channel's row of the output projection,
over the tokens of a text. The router is fitted by least squares to the norm of each expert's output. Its logits have a
standard deviation of only `NARROW`, so that with all experts active the model computes nearly what the dense one does.
Then the output projection of one expert after the other is solved for the residual error: the dense stream after the
layer, minus the mixture's own stream. `--raw` skips this step.

A Llama becomes a Mixtral. A Qwen2 becomes a Qwen2-MoE whose shared expert has the most active channels.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur import BlockStream, calibration_rows, open_checkpoint
from secateur.model.rows import Rows
from secateur.numerics.moments import Moments
from secateur.numerics.ridge import least_squares, normal_equations

NARROW = 0.02
"""Standard deviation of the router's logits, and about the relative difference between gates."""
RIDGE = 0.03
ROUNDS, TOKENS = 10, 2048
"""Number of rounds of k-means, and of tokens that it uses."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--chosen", type=int, default=2)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--raw", action="store_true")
    given = parser.parse_args()
    checkpoint = open_checkpoint(given.model)
    stream, qwen = BlockStream(checkpoint), checkpoint.config.model_type == "qwen2"
    how: dict[str, Any] = {"samples": given.samples, "length": 128, "vocab_size": checkpoint.config.vocab_size}
    rows = Rows.of(calibration_rows(checkpoint.tokenizer(), given.calibration, seed=7, **how)).with_openings()
    full = stream.blocks[0].modules[-1].units
    shared = full // (given.experts + 1) if qwen else 0
    shared += (full - shared) % given.experts
    given.out.mkdir(parents=True)
    outside = {name: checkpoint.read(name) for name in checkpoint.weights if ".mlp." not in name}
    names = NAMES["qwen2_moe" if qwen else "mixtral"]
    with stream.arena() as arena, torch.inference_mode():
        dense = stream.embed(rows, arena)
        own = arena.copy(rows, dense)
        for index in range(len(stream)):
            with stream.filled(index) as layer:
                module, seen, wanted, counts = stream.blocks[index].modules[-1], list[Tensor](), [], []
                for at in rows.batches():
                    dense[at] = stream.run_through(index, layer, dense[at], at.group)
                    watch = {"mlp": lambda x, _, seen=seen: seen.append(x.reshape(-1, x.shape[-1]))}
                    whole = stream.run_through(index, layer, own[at], at.group, watch=watch)
                    own[at] = stream.run_through(index, layer, own[at], at.group, replay={module: None})
                    wanted.append((dense[at] - own[at]).reshape(seen[-1].shape))
                    inherited = (dense[at] - whole).square().sum(-1).flatten()
                    counts.append(at.weight / (1 + inherited / inherited.median().clamp_min(1e-6)))
                x, target, count = torch.cat(seen), torch.cat(wanted), torch.cat(counts)
                part, left = mixture(
                    layer.get_submodule("mlp"), x, target, count, given.experts, given.chosen, shared, given.raw
                )
                place = 0
                for at in rows.batches():
                    length = rows.ids(at).numel()
                    given_at = slice(place, place + length)
                    own[at] = own[at].flatten(0, 1) + (target - left)[given_at]
                    place += length
            prefix = f"model.layers.{index}." + ("mlp." if qwen else "block_sparse_moe.")
            for name, tensor in part.items():
                for ours, stored in names.items():
                    name = name.replace(ours, stored)
                outside[prefix + name] = tensor.to(checkpoint.dtype)
            lost = (count[:, None] * left.square()).sum() / (count[:, None] * target.square()).sum()
            print(f"block {index}: {lost:.3f} of the energy of the layer's target is lost", flush=True)
    save_file({name: tensor.contiguous() for name, tensor in outside.items()}, given.out / "model.safetensors")
    write_config(checkpoint, given.out, given.experts, given.chosen, shared)
    for file in checkpoint.files:
        (given.out / file.name).write_bytes(file.read_bytes())


NAMES = {"qwen2_moe": {}, "mixtral": {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}}


def mixture(
    mlp: nn.Module, x_nd: Tensor, wanted: Tensor, count: Tensor, experts: int, chosen: int, shared: int, raw: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors of one layer's mixture, under Qwen2-MoE's names, and the residual error (tokens x hidden)."""
    up, gate, down = (mlp.get_parameter(f"{name}_proj.weight").data for name in ("up", "gate", "down"))
    inner = nn.functional.silu(x_nd @ gate.T) * (x_nd @ up.T)
    active = inner.abs() * torch.linalg.vector_norm(down, dim=0)
    order = active.mean(0).argsort(descending=True)
    always, rest = order[:shared].sort().values, order[shared:].sort().values
    owner = balanced(active[:: max(1, len(active) // TOKENS), rest].T, experts)
    own = [rest[owner == expert] for expert in range(experts)]
    sizes = torch.stack([torch.linalg.vector_norm(inner[:, at] @ down[:, at].T, dim=1) for at in own], 1)
    router = solved(x_nd, sizes, torch.zeros(x_nd.shape[1], experts), count)
    # A part that all experts share does not change the routing.
    router -= router.mean(1, keepdim=True)
    router *= NARROW / (x_nd @ router).std()
    scores, places = (x_nd @ router).topk(chosen)
    gates = torch.zeros(len(x_nd), experts).scatter_(1, places, scores.softmax(1))
    downs = [down[:, at].T * chosen for at in own]
    left = wanted - inner[:, always] @ down[:, always].T
    left -= sum(gates[:, e, None] * (inner[:, at] @ downs[e]) for e, at in enumerate(own))
    for expert in () if raw else range(experts):
        met = gates[:, expert].nonzero()[:, 0]
        rows = gates[met, expert, None] * inner[met][:, own[expert]]
        new = solved(rows, left[met] + rows @ downs[expert], downs[expert], count[met])
        left[met] += rows @ (downs[expert] - new)
        downs[expert] = new
    result = {"gate.weight": router.T}
    for e, at in enumerate(own):
        result |= {f"experts.{e}.up_proj.weight": up[at], f"experts.{e}.gate_proj.weight": gate[at]}
        result[f"experts.{e}.down_proj.weight"] = downs[e].T
    if shared:
        result |= {"shared_expert.up_proj.weight": up[always], "shared_expert.gate_proj.weight": gate[always]}
        # Its gate is sigmoid(0) = 0.5.
        result["shared_expert.down_proj.weight"] = 2 * down[:, always]
        result["shared_expert_gate.weight"] = torch.zeros(1, x_nd.shape[1])
    return result, left


def solved(x: Tensor, t: Tensor, old: Tensor, count: Tensor) -> Tensor:
    """Solve a ridge regression of `t` on `x` with token weights `count`."""
    moments = Moments(x.shape[1], t.shape[1])
    moments.update(x, t, 1.0, count)
    (gram, cross), energy = moments.take(), moments.energy()
    return least_squares(normal_equations(gram, cross, energy, old, RIDGE), torch.arange(x.shape[1]))[0]


def balanced(rows: Tensor, groups: int) -> Tensor:
    """Return the group of each row (m x n) by k-means with the cosine distance and groups of equal size."""
    rows = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-12)
    generator, size = torch.Generator().manual_seed(0), len(rows) // groups
    owner = torch.arange(len(rows))[torch.randperm(len(rows), generator=generator)] % groups
    for _ in range(ROUNDS):
        centres = torch.stack([rows[owner == group].mean(0) for group in range(groups)])
        near = rows @ nn.functional.normalize(centres, dim=1).T
        owner = torch.full((len(rows),), -1)
        left = [size] * groups
        best = near.topk(2).values
        # Rows with the largest gap between their two nearest groups choose first.
        for row in (best[:, 0] - best[:, 1]).argsort(descending=True).tolist():
            group = next(g for g in near[row].argsort(descending=True).tolist() if left[g])
            owner[row], left[group] = group, left[group] - 1
    return owner


def write_config(checkpoint: Any, out: Path, experts: int, chosen: int, shared: int) -> None:
    """Write the config.json of the mixture."""
    config = checkpoint.raw_config | {"num_experts_per_tok": chosen, "output_router_logits": False}
    each = (config["intermediate_size"] - shared) // experts
    if checkpoint.config.model_type == "qwen2":
        config |= {"model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "num_experts": experts}
        config |= {"moe_intermediate_size": each, "shared_expert_intermediate_size": shared, "norm_topk_prob": True}
    else:
        config |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": experts}
        config |= {"intermediate_size": each, "sliding_window": None}
    (out / "config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    main()
