"""Prune a model by another method and write the result as a folder, for `secateur retrain` and other commands.

    python benchmarks/peer_folder.py MODEL OUT --peer flap --sparsity 0.25
    secateur retrain OUT HEALED --teacher MODEL
    python benchmarks/basket.py MODEL OUT HEALED --texts TEXTS --only unseen

Calibration rows are those of `secateur prune` with its default options. `flap` runs as a plan of secateur, because its
widths differ between blocks. Every other method gives all blocks the same widths, so its folder opens with the standard
transformers class; MODEL must be of the LLaMA lineage.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from peers import PEERS, flap_widths, pruned_by, rows_of
from secateur import BlockStream, Options, open_checkpoint, prune

DRAWN: dict[str, Any] = {"samples": Options.samples, "length": Options.length, "seed": 0}


def write_flap(stream: BlockStream, model: str, out: Path, sparsity: float) -> None:
    """Prune to FLAP's widths with secateur's own command; the plan stays beside the folder."""
    widths = flap_widths(stream, rows_of("flap", stream, Options.calibration, **DRAWN), sparsity)
    plan = out.with_suffix(".plan.json")
    entries = [{"block": index, "width": dict(width)} for index, width in widths.items()]
    plan.write_text(json.dumps({"blocks": entries}, indent=2), encoding="utf-8")
    prune(model, out, plan=str(plan), criterion="flap-wifv", recovery="bias", **DRAWN)


def write_network(network: Any, stream: BlockStream, out: Path) -> None:
    """Write a network with the widths of its first block in its config."""
    config, layer = network.config, network.get_submodule(stream.family.blocks)[0]
    config.head_dim = layer.self_attn.head_dim
    config.num_attention_heads = len(layer.self_attn.q_proj.weight) // config.head_dim
    config.num_key_value_heads = len(layer.self_attn.k_proj.weight) // config.head_dim
    config.intermediate_size = len(layer.mlp.up_proj.weight)
    network.to(torch.bfloat16).save_pretrained(out)
    stream.checkpoint.tokenizer().save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--peer", required=True, choices=PEERS)
    parser.add_argument("--sparsity", type=float, default=0.25)
    arguments = parser.parse_args()
    stream = BlockStream(open_checkpoint(arguments.model))
    if arguments.peer == "flap":
        write_flap(stream, arguments.model, arguments.out, arguments.sparsity)
        return
    peer = pruned_by(arguments.peer, stream, arguments.sparsity, Options.calibration, **DRAWN)
    write_network(peer.network, stream, arguments.out)
    print(f"{arguments.out}: {peer.kept_parameters:,} parameters in the blocks; {peer.note}")


if __name__ == "__main__":
    main()
