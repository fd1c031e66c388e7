"""What a GGUF file with a mixture of experts says of its model: the config behind metadata and tensors, as a table.

The shapes of the tensors tell sizes, which blocks have experts, and what is biased or normed; the metadata tell the
rest. A key that is not known here is refused, since it may change what is computed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor
from torch import Tensor
from transformers import AutoConfig

from secateur.base.errors import SecateurError
from secateur.model.families import family_of
from secateur.model.gguf_config import FACTORS, complete, complete_windows, facts_of


@dataclass(frozen=True)
class Mixture:
    """How files of one of llama.cpp's architectures are read, as far as they do not say so themselves."""

    model_type: str
    keys: Mapping[str, str] = field(default_factory=dict)
    """Keys of the metadata that must be there, beside the usual ones → the config's."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """What the graph has in its code, by the config's keys."""
    gating: str = "sigmoid"
    """What makes gates of a router's logits."""
    pairs: bool = False
    """Consecutive entries of a head rotate together in the file, and not in checkpoints."""
    together: bool = False
    """Checkpoints hold all experts of a block in one tensor ..."""
    turned: bool = False
    """... input first ..."""
    alternating: bool = False
    """... with the outputs of gate and up in turn."""


_LATENT = {"attention.kv_lora_rank": "kv_lora_rank", "rope.dimension_count": "qk_rope_head_dim"}
_SCALES = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_NORMED, _AS_THEY_ARE = {"norm_topk_prob": True}, {"norm_topk_prob": False}
_CHUNKS = {"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1, "attn_temperature_tuning": True}

MIXTURES: dict[str, Mixture] = {
    "llama": Mixture("mixtral", fixed=_NORMED, gating="softmax", pairs=True),
    "qwen2moe": Mixture("qwen2_moe", fixed=_AS_THEY_ARE, gating="softmax"),
    "qwen3moe": Mixture("qwen3_moe", fixed=_NORMED, gating="softmax"),
    "olmoe": Mixture("olmoe", fixed=_AS_THEY_ARE, gating="softmax"),
    "granitemoe": Mixture("granitemoe", _SCALES, fixed=_NORMED, gating="softmax", pairs=True, together=True),
    "gpt-oss": Mixture("gpt_oss", _WINDOW, gating="softmax", together=True, turned=True, alternating=True),
    "glm4moe": Mixture("glm4_moe"),
    "dots1": Mixture("dots1", fixed={"sliding_window": None}),
    "hunyuan-moe": Mixture("hunyuan_v1_moe", fixed=_NORMED, gating="softmax"),
    "ernie4_5-moe": Mixture("ernie4_5_moe", fixed=_NORMED, gating="softmax"),
    "deepseek2": Mixture("deepseek_v3", _LATENT),
    "mistral4": Mixture("mistral4", _LATENT, gating="softmax", together=True),
    "lfm2moe": Mixture("lfm2_moe", {"shortconv.l_cache": "conv_L_cache"}, fixed=_NORMED),
    "minimax-m2": Mixture("minimax_m2", fixed=_NORMED),
    "llama4": Mixture("llama4_text", fixed=_CHUNKS, together=True, turned=True),
    "exaone-moe": Mixture("exaone_moe", _WINDOW),
}
"""By llama.cpp's name; `llama` where it has experts."""
_SOFTMAX = {"deepseek2": Mixture("deepseek_v2", _LATENT, gating="softmax")}
"""The same name where gates are made otherwise."""

_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.clamp_kqv": "clip_qkv",
    "expert_weights_norm": "norm_topk_prob",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
}
"""The usual keys → the config's."""
_NEEDED = (
    *("context_length", "embedding_length", "feed_forward_length", "expert_used_count"),
    *("attention.head_count", "attention.layer_norm_rms_epsilon"),
)
_DEFAULTS = {"norm_topk_prob": False, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "clip_qkv": None}
"""What llama.cpp takes where a file says nothing."""
_ELSEWHERE = re.compile(
    r"vocab_size|block_count|nextn_predict_layers|leading_dense_block_count|interleave_moe_layer_step|"
    r"expert_(count|used_count|shared_count|feed_forward_length|shared_feed_forward_length|gating_func)|"
    r"attention\.(layer_norm_rms_epsilon|sliding_window_pattern|value_length|(key|value)_length_mla|q_lora_rank|"
    r"temperature_(scale|length))|"
    r"rope\.(dimension_count|freq_base|scale_linear|scaling\.(type|factor|attn_factor|original_context_length|finetuned|"
    r"yarn_(beta_fast|beta_slow|log_multiplier)))|tensor_data_layout"
)
"""Keys that are read one by one, or follow from the tensors."""


def is_mixture(reader: GGUFReader) -> bool:
    """Whether a file holds a mixture of experts."""
    return bool(facts_of(reader).get("expert_count"))


class MixtureFile:
    """A file with a mixture of experts: what it says, and its tensors.

    Attributes:
        row: how it is read.
        blocks: how many there are, without those behind the last, which predict tokens beyond the next one.
        tensors: those of the blocks, and of no block, by name.
    """

    def __init__(self, reader: GGUFReader):
        """Read no tensor; `SecateurError` for an architecture that is not in the table."""
        self.architecture = str(reader.fields["general.architecture"].contents())
        self._reader, self._facts = reader, facts_of(reader)
        found = MIXTURES.get(self.architecture)
        if found is None:
            raise SecateurError(f"mixtures of experts of the architecture {self.architecture!r} are not read from GGUF")
        self.blocks = int(self._facts["block_count"]) - int(self._facts.get("nextn_predict_layers", 0))
        of_block = re.compile(r"blk\.(\d+)\.")
        self.tensors: dict[str, ReaderTensor] = {
            tensor.name: tensor
            for tensor in reader.tensors
            if tensor.name not in FACTORS
            and ((match := of_block.match(tensor.name)) is None or int(match[1]) < self.blocks)
        }
        # Files of models whose choice is biased may leave out that they are no V2.
        biased = any(".exp_probs_b." in name for name in self.tensors)
        softmax = gguf.ExpertGatingFuncType.SOFTMAX
        said = self._facts.get("expert_gating_func", None if biased else softmax)
        self.row = _SOFTMAX.get(self.architecture, found) if said == softmax else found
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

    def config(self) -> Any:
        """The config that the metadata and the tensors give.

        Raises:
            SecateurError: a key is not known here, is missing, or says what the model's class does not compute.
        """
        row, facts, start = self.row, self._facts, f"its {self.architecture}."
        gating = gguf.ExpertGatingFuncType[row.gating.upper()]
        if facts.get("expert_gating_func", gating) != gating:
            raise SecateurError(f"{start}expert_gating_func is not the {row.gating} of {row.model_type}")
        keys = {**_KEYS, **row.keys}
        for key in facts:
            if key not in keys and not _ELSEWHERE.fullmatch(key):
                raise SecateurError(f"{start}{key} is not known here")
        for key in (*_NEEDED, *row.keys):
            if key not in facts:
                raise SecateurError(f"{start}{key} is missing")
        default = AutoConfig.for_model(row.model_type)
        values = _DEFAULTS | {own: facts[key] for key, own in keys.items() if key in facts}
        for own, value in values.items():
            # Some classes take a head size without naming it.
            has_place = own == "head_dim" or hasattr(default, own)
            if value not in (row.fixed.get(own, value if has_place else None), _DEFAULTS.get(own)):
                raise SecateurError(f"{row.model_type} does not compute what it says: {own} = {value}")
        values |= {**row.fixed, **self._sizes(default)}
        placed = {key: value for key, value in values.items() if key == "head_dim" or hasattr(default, key)}
        config = AutoConfig.for_model(row.model_type, **placed)
        complete(config, self._reader)
        if "attention.sliding_window" in facts:
            complete_windows(config, facts)
        self._finish_rotation(config)
        return config

    def _sizes(self, default: Any) -> dict[str, Any]:
        """What follows from the tensors, by every name that configs have for it."""
        facts, family, tensors = self._facts, family_of(default), self.tensors
        experts = family.experts
        assert experts is not None
        places = range(self.blocks)
        dense = [index for index in places if f"blk.{index}.ffn_gate_inp.weight" not in tensors]
        first = next((index for index in places if index not in dense), 0)
        inside = {name.removeprefix(f"blk.{first}.") for name in tensors}
        count, _, channels = self.shape(f"blk.{first}.ffn_down_exps.weight")
        shared = self.shape(f"blk.{first}.ffn_down_shexp.weight")[1] if "ffn_down_shexp.weight" in inside else 0
        heads, met = facts["attention.head_count"], facts["expert_used_count"]
        if not 0 < met <= count:
            raise SecateurError(f"it says that a token meets {met:,} of its {count:,} experts")
        values = {
            "num_hidden_layers": self.blocks,
            "vocab_size": self.shape("token_embd.weight")[0],
            "tie_word_embeddings": "output.weight" not in tensors,
            experts.count: count,
            experts.chosen: met,
            experts.width: channels,
            "shared_expert_intermediate_size": shared,
            "intermediate_size_mlp": facts["feed_forward_length"],
            "mlp_only_layers": dense,
            "moe_layers": [index for index in places if index not in dense],
            "mlp_layer_types": ["dense" if index in dense else "sparse" for index in places],
            # Llama 4's norms have no weights; llama.cpp tells Maverick, which has none, by its experts.
            "use_qk_norm": "attn_q_norm.weight" in inside or (self.architecture == "llama4" and count != 128),
            "use_expert_bias": "exp_probs_b.bias" in inside,
            "head_dim": facts.get("attention.key_length", facts["embedding_length"] // heads),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": facts.get("rope.freq_base", 10000.0),
                # Some classes rotate a half where nothing is said.
                "partial_rotary_factor": 1.0,
            },
            **dict.fromkeys(("rms_norm_eps", "norm_eps"), facts["attention.layer_norm_rms_epsilon"]),
            **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"), first),
            **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), shared // channels),
            **dict.fromkeys(("attention_bias", "qkv_bias"), "attn_k.bias" in inside),
        }
        if family.mixer is not None:
            groups = facts["attention.head_count_kv"]
            values["num_key_value_heads"] = max(groups)
            values["layer_types"] = ["full_attention" if one else family.mixer[0] for one in groups]
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

    def _finish_rotation(self, config: Any) -> None:
        """What is settled otherwise in some families, in place."""
        rope = config.rope_parameters
        if beta := self._facts.get("attention.temperature_scale"):
            if self.row.model_type != "mistral4":
                raise SecateurError(f"{self.row.model_type} does not scale queries with their positions, as it says")
            rope["llama_4_scaling_beta"] = beta
        if rope["rope_type"] != "yarn":
            return
        if self.row.model_type == "gpt_oss":
            # Its checkpoints do not round what llama.cpp does.
            rope["truncate"] = False
        if family_of(config).latent is not None:
            # llama.cpp multiplies scores by its square, and what is rotated by nothing.
            scale = self._facts.get("rope.scaling.yarn_log_multiplier")
            if not scale:
                raise SecateurError("its yarn has no yarn_log_multiplier, so that it scales what is rotated")
            del rope["attention_factor"]
            rope |= dict.fromkeys(("mscale", "mscale_all_dim"), round(scale * 10, 6))


def _values(data: Any, stored: ReaderTensor, dtype: torch.dtype) -> Tensor:
    """Dequantised data, in memory of its own."""
    return torch.from_numpy(gguf.dequantize(data, stored.tensor_type).copy()).to(dtype)
