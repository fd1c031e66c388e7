"""What a GGUF file that is read here says of its model: the config behind metadata and tensors.

The shapes of the tensors tell sizes, which blocks have experts, and what is biased or normed; the metadata tell the
rest. A key that is not known here is refused, since it may change what is computed.
"""

import re
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor
from torch import Tensor
from transformers import AutoConfig

from secateur.base.errors import SecateurError
from secateur.model.gguf_config import FACTORS, complete, facts_of, windows_of
from secateur.model.gguf_keys import (
    DEFAULTS,
    ELSEWHERE,
    KEYS,
    NEEDED,
    OF_WINDOWS,
    ROTATION,
    UNNAMED,
    gating_of,
    read_dense,
    reading_of,
)

_SHARED = "attention.shared_kv_layers"
_PIECE = 2**26
"""Bytes of a file that are dequantised at once: some models' embeddings are larger than all their blocks."""


def is_read_here(reader: GGUFReader) -> bool:
    """Whether a file holds a mixture of experts, or a dense model that transformers does not read."""
    architecture = str(reader.fields["general.architecture"].contents())
    return bool(facts_of(reader).get("expert_count")) or read_dense(architecture) is not None


class GgufFile:
    """A file that is read here: what it says, and its tensors.

    Attributes:
        model_type, family, how: the family by whose entry the file is read, and how.
        blocks: how many there are, without those behind the last, which predict tokens beyond the next one.
        tensors: those of the blocks, and of no block, by name.
    """

    def __init__(self, reader: GGUFReader):
        """Read no tensor; `SecateurError` for an architecture that is not in the table."""
        self.architecture = str(reader.fields["general.architecture"].contents())
        self._reader, self._facts = reader, facts_of(reader)
        found = reading_of(
            self.architecture,
            self._facts,
            biased=any(".exp_probs_b." in tensor.name for tensor in reader.tensors),
        )
        if found is None:
            raise SecateurError(f"mixtures of experts of the architecture {self.architecture!r} are not read from GGUF")
        self.model_type, self.family, self.how = found
        self.blocks = int(self._facts["block_count"]) - int(self._facts.get("nextn_predict_layers", 0))
        of_block = re.compile(r"blk\.(\d+)\.(.+)")
        # Keys and values of blocks that attend with those of earlier ones are used for nothing.
        idle, kept = ("attn_k.", "attn_v.", "attn_k_norm."), self.blocks - self._facts.get(_SHARED, 0)
        self.tensors: dict[str, ReaderTensor] = {
            tensor.name: tensor
            for tensor in reader.tensors
            if tensor.name not in FACTORS
            and (
                (match := of_block.match(tensor.name)) is None
                or int(match[1]) < (kept if match[2].startswith(idle) else self.blocks)
            )
        }
        if not 0 < self.blocks <= len(self.tensors):
            raise SecateurError(f"it says that it has {self.blocks:,} blocks, and holds {len(self.tensors):,} tensors")
        for kind in {tensor.tensor_type for tensor in self.tensors.values()}:
            try:
                gguf.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[kind][1], dtype=np.uint8), kind)
            except NotImplementedError as error:
                raise SecateurError(f"the gguf package does not read weights of the type {kind.name}") from error

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, outputs before inputs; `SecateurError` where there is none of that name."""
        if name not in self.tensors:
            raise SecateurError(f"there is no {name} in it")
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor's values, in memory of its own."""
        # What says which experts are chosen is finer than half precision.
        dtype = torch.float32 if ".exp_probs_b." in name else dtype
        return _values(self.tensors[name].data, self.tensors[name], dtype).reshape(self.shape(name))

    def stack(self, name: str, dtype: torch.dtype) -> list[Tensor]:
        """What a tensor holds of each expert; one at a time is in float32."""
        stored, shape = self.tensors[name], self.shape(name)[1:]
        return [_values(one, stored, dtype).reshape(shape) for one in stored.data]

    def _mixes(self, index: int) -> bool:
        """Whether something else stands in the place of a block's attention."""
        return self.family.token_mixer is not None and f"blk.{index}.attn_k.weight" not in self.tensors

    def _check_gating(self) -> None:
        """Raise `SecateurError` where gates are not made of a router's logits as the family makes them."""
        if self.family.experts is None:
            return
        gating = gating_of(self.family)
        if self._facts.get("expert_gating_func", gating) != gating:
            what = f"its {self.architecture}.expert_gating_func"
            raise SecateurError(f"{what} is not the {self.family.experts.gating} of {self.model_type}")

    def config(self) -> Any:
        """The config that the metadata and the tensors give.

        Raises:
            SecateurError: a key is not known here, is missing, or says what the model's class does not compute.
        """
        kind, how, facts, start = self.model_type, self.how, self._facts, f"its {self.architecture}."
        self._check_gating()
        keys = {**KEYS, **how.keys}
        for key in facts:
            of_windows = self.family.heads_by_layer_type and OF_WINDOWS.fullmatch(key)
            if key not in keys and not ELSEWHERE.fullmatch(key) and not of_windows:
                raise SecateurError(f"{start}{key} is not known here")
        for key in (*NEEDED, *how.keys):
            if key not in facts:
                raise SecateurError(f"{start}{key} is missing")
        # What is made of these numbers takes memory before shapes are compared.
        largest = max(int(size) for tensor in self.tensors.values() for size in tensor.shape)
        for key in ("attention.key_length", "attention.key_length_swa", "rope.dimension_count", *how.keys):
            if key.startswith(("attention.key", "rope.dimension_count", "ssm.")) and facts.get(key, 0) > largest:
                raise SecateurError(f"{start}{key} is {facts[key]:,}, and none of its tensors is as long")
        default = AutoConfig.for_model(kind)

        def has_place(own: str) -> bool:
            return own in UNNAMED or hasattr(default, own)

        values = DEFAULTS | {own: facts[key] for key, own in keys.items() if key in facts}
        for own, value in values.items():
            known = own in ROTATION or has_place(own)
            if value not in (how.fixed.get(own, value if known else None), DEFAULTS.get(own)):
                raise SecateurError(f"{kind} does not compute what it says: {own} = {value}")
        values |= {**how.fixed, **self._sizes()}
        for own in ("num_attention_heads", "num_key_value_heads"):
            if isinstance(values.get(own), list):
                raise SecateurError(f"{kind} has the same heads in all blocks, unlike it ({own})")
        # A class may put one of them right in place.
        kinds = tuple(values.get("layer_types", ()))
        config = AutoConfig.for_model(kind, **{own: value for own, value in values.items() if has_place(own)})
        if kinds and kinds != tuple(getattr(config, "layer_types", kinds)):
            raise SecateurError(f"{kind} does not compute its blocks in the order that it says")
        complete(config, self._reader)
        self._finish_rotation(config)
        return config

    def _sizes(self) -> dict[str, Any]:
        """What follows from the tensors, by every name that configs have for it."""
        facts, family, tensors = self._facts, self.family, self.tensors
        inside = {name.split(".", 2)[2] for name in tensors if name.startswith("blk.")}
        heads = _one(facts["attention.head_count"])
        ups = [name for index in range(self.blocks) if (name := f"blk.{index}.ffn_up.weight") in tensors]
        fed = [self.shape(name)[0] for name in ups]
        values = {
            "num_hidden_layers": self.blocks,
            "vocab_size": self.shape("token_embd.weight")[0],
            "tie_word_embeddings": "output.weight" not in tensors,
            "num_attention_heads": heads,
            "num_key_value_heads": _one(facts.get("attention.head_count_kv", heads)),
            # What has no dense blocks may say how wide these would be.
            "intermediate_size": fed[0] if fed else _one(facts.get("feed_forward_length", 0)),
            "head_dim": facts.get("attention.key_length", facts["embedding_length"] // max(1, _most(heads))),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": facts.get("rope.freq_base", 10000.0),
                # Some classes rotate a half where nothing is said.
                "partial_rotary_factor": 1.0,
            },
            **dict.fromkeys(("rms_norm_eps", "norm_eps"), facts["attention.layer_norm_rms_epsilon"]),
            **dict.fromkeys(("attention_bias", "qkv_bias"), "attn_k.bias" in inside),
        }
        if "attention.sliding_window" in facts and (kinds := windows_of(facts, self.blocks)):
            values["layer_types"] = kinds
        if facts.get("expert_count"):
            values |= self._experts()
        if family.token_mixer is not None:
            values["num_key_value_heads"] = _most(facts.get("attention.head_count_kv", heads))
            other = family.token_mixer.layer_type
            values["layer_types"] = [other if self._mixes(at) else "full_attention" for at in range(self.blocks)]
        if self.how.linear:
            keys, own = facts["ssm.group_count"], facts["ssm.time_step_rank"]
            if not keys or not own or own % keys:
                raise SecateurError(f"it says that its linear attention has {keys:,} key heads and {own:,} value heads")
            values["linear_value_head_dim"] = facts.get("ssm.inner_size", 0) // own
        if family.heads_by_layer_type:
            values |= self._mixed(fed)
        if family.latent is not None:
            rotated = facts["rope.dimension_count"]
            values |= {
                "num_key_value_heads": heads,
                "head_dim": rotated,
                "q_lora_rank": facts.get("attention.q_lora_rank"),
                # Older files say it of the heads.
                "qk_nope_head_dim": facts.get("attention.key_length_mla", facts["attention.key_length"]) - rotated,
                "v_head_dim": facts.get("attention.value_length_mla", facts["attention.value_length"]),
                "topk_method": "greedy" if facts.get("expert_group_count", 1) == 1 else "group_limited_greedy",
            }
        for token, key in {"bos": "bos", "eos": "eos", "pad": "padding"}.items():
            stored = self._reader.fields.get(f"tokenizer.ggml.{key}_token_id")
            values[f"{token}_token_id"] = None if stored is None else int(stored.contents())
        return values

    def _experts(self) -> dict[str, Any]:
        """The same of experts."""
        facts, tensors, places = self._facts, self.tensors, range(self.blocks)
        experts = self.family.experts
        assert experts is not None
        dense = [index for index in places if f"blk.{index}.ffn_gate_inp.weight" not in tensors]
        first = next((index for index in places if index not in dense), 0)
        inside = {name.removeprefix(f"blk.{first}.") for name in tensors}
        count, _, channels = self.shape(f"blk.{first}.ffn_down_exps.weight")
        shared = self.shape(f"blk.{first}.ffn_down_shexp.weight")[1] if "ffn_down_shexp.weight" in inside else 0
        met = facts.get("expert_used_count", 0)
        if not 0 < met <= count:
            raise SecateurError(f"it says that a token meets {met:,} of its {count:,} experts")
        return {
            experts.number: count,
            experts.experts_per_token: met,
            experts.expert_width: channels,
            "enable_moe_block": True,
            "shared_expert_intermediate_size": shared,
            "intermediate_size_mlp": facts.get("feed_forward_length", 0),
            "mlp_only_layers": dense,
            "moe_layers": [index for index in places if index not in dense],
            "mlp_layer_types": ["dense" if index in dense else "sparse" for index in places],
            "use_qk_norm": "attn_q_norm.weight" in inside,
            "use_expert_bias": "exp_probs_b.bias" in inside,
            **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"), first),
            **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), shared // channels),
            **({} if self.how.of_number is None else self.how.of_number(count)),
        }

    def _mixed(self, fed: list[int]) -> dict[str, Any]:
        """The same where blocks with a window have other heads than those without."""
        facts, kinds = self._facts, windows_of(self._facts, self.blocks) or []
        if {"sliding_attention", "full_attention"} != set(kinds):
            raise SecateurError("it has no blocks with a window, or none without")
        groups = facts.get("attention.head_count_kv", facts["attention.head_count"])
        around, full = (kinds.index(f"{kind}_attention") for kind in ("sliding", "full"))
        of_tokens, theta = "per_layer_token_embd.weight", facts.get("rope.freq_base", 10000.0)
        return {
            "head_dim": facts["attention.key_length_swa"],
            "num_key_value_heads": groups[around] if isinstance(groups, list) else groups,
            "num_global_key_value_heads": groups[full] if isinstance(groups, list) else groups,
            "attention_k_eq_v": f"blk.{full}.attn_v.weight" not in self.tensors,
            "use_double_wide_mlp": fed[-1] == 2 * fed[0],
            **({"vocab_size_per_layer_input": self.shape(of_tokens)[0]} if of_tokens in self.tensors else {}),
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": theta},
                "full_attention": {"rope_type": "proportional", "rope_theta": theta},
            },
        }

    def _finish_rotation(self, config: Any) -> None:
        """What is settled otherwise in some families, in place."""
        rope = config.rope_parameters
        if sections := self._facts.get("rope.dimension_sections"):
            # A text's tokens are at one place in all three directions; engines ask for them all the same.
            rope |= {"mrope_section": sections[:3], "mrope_interleaved": True}
        if beta := self._facts.get("attention.temperature_scale"):
            if not self.how.scales_queries:
                raise SecateurError(f"{self.model_type} does not scale queries with their positions, as it says")
            rope["llama_4_scaling_beta"] = beta
        if rope.get("rope_type") != "yarn":
            return
        rope |= self.how.yarn
        if self.family.latent is not None:
            # llama.cpp multiplies scores by its square, and what is rotated by nothing.
            scale = self._facts.get("rope.scaling.yarn_log_multiplier")
            if not scale:
                raise SecateurError("its yarn has no yarn_log_multiplier, so that it scales what is rotated")
            del rope["attention_factor"]
            rope |= dict.fromkeys(("mscale", "mscale_all_dim"), round(scale * 10, 6))


def _one(value: Any) -> Any:
    """A number that a file may say block by block; the list where they differ."""
    return value[0] if isinstance(value, list) and len(set(value)) == 1 else value


def _most(value: Any) -> int:
    """The largest of such numbers."""
    return int(max(value)) if isinstance(value, list) else int(value)


def _values(data: Any, stored: ReaderTensor, dtype: torch.dtype) -> Tensor:
    """Dequantised data in one row, in memory of its own; a piece at a time is in float32."""
    block, size = gguf.GGML_QUANT_SIZES[stored.tensor_type]
    result, at = torch.empty(data.nbytes // size * block, dtype=dtype), 0
    for piece in np.array_split(data, min(len(data), 1 + data.nbytes // _PIECE)):
        values = torch.from_numpy(np.array(gguf.dequantize(piece, stored.tensor_type))).flatten()
        result[at : at + len(values)] = values
        at += len(values)
    return result
