"""Three decoders that transformers does not include; tests copy this file into folders of checkpoints.

`BiasedForCausalLM` adds a bias to the scores of each head, from one table for all blocks. The feed-forward of
`ChainForCausalLM` has three matrices, one after the other. The experts of `ListedForCausalLM` are lists of layers.
"""

import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast


class OwnConfig(PretrainedConfig):
    model_type = "own"

    def __init__(
        self,
        vocab_size=64,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        width=40,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        has_table=False,
        **kwargs,
    ):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
        self.width, self.num_experts, self.num_experts_per_tok = width, num_experts, num_experts_per_tok
        self.max_position_embeddings, self.has_table = max_position_embeddings, has_table
        super().__init__(**kwargs)


class Mixing(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.index, self.size = index, config.hidden_size // config.num_attention_heads
        self.asks = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.holds = nn.Linear(config.hidden_size, config.num_key_value_heads * self.size, bias=False)
        self.gives = nn.Linear(config.hidden_size, config.num_key_value_heads * self.size, bias=False)
        self.joins = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, bias, cache):
        q, k, v = (own(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for own in (self.asks, self.holds, self.gives))
        if cache is not None:
            k, v = cache.update(k, v, self.index)
        k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], 1) for one in (k, v))
        weights = torch.softmax(q @ k.transpose(2, 3) * self.size**-0.5 + bias, -1)
        return self.joins((weights @ v).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.first = nn.Linear(config.hidden_size, config.width, bias=False)
        self.second = nn.Linear(config.hidden_size, config.width, bias=False)
        self.last = nn.Linear(config.width, config.hidden_size, bias=False)

    def forward(self, x):
        return self.last(nn.functional.silu(self.first(x)) * self.second(x))


class Chain(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.enters = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.widens = nn.Linear(2 * config.hidden_size, config.width)
        self.leaves = nn.Linear(config.width, config.hidden_size)

    def forward(self, x):
        return self.leaves(torch.tanh(self.widens(torch.tanh(self.enters(x)))))


class Listed(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.chooses, self.number = nn.Linear(config.hidden_size, config.num_experts), config.num_experts_per_tok
        self.workers = nn.ModuleList(Gated(config) for _ in range(config.num_experts))

    def forward(self, x):
        gates, chosen = torch.softmax(self.chooses(x), -1).topk(self.number)
        result = torch.zeros_like(x)
        for index, worker in enumerate(self.workers):
            gate = (gates * (chosen == index)).sum(-1, keepdim=True)
            result = result + gate * worker(x)
        return result


class Layer(nn.Module):
    def __init__(self, config, index, inner):
        super().__init__()
        self.before, self.mixes = nn.RMSNorm(config.hidden_size), Mixing(config, index)
        self.between, self.inner = nn.RMSNorm(config.hidden_size), inner(config)

    def forward(self, hidden_states, bias=None, cache=None):
        hidden_states = hidden_states + self.mixes(self.before(hidden_states), bias, cache)
        return hidden_states + self.inner(self.between(hidden_states))


class OwnPreTrained(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "body"


class Body(OwnPreTrained):
    def __init__(self, config, inner):
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stack = nn.ModuleList(Layer(config, index, inner) for index in range(config.num_hidden_layers))
        self.ends = nn.RMSNorm(config.hidden_size)
        self.table = nn.Embedding(8, config.num_attention_heads) if config.has_table else None
        self.post_init()

    def forward(self, input_ids=None, past_key_values=None, use_cache=None, **_):
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        places = torch.arange(past + input_ids.shape[1], device=input_ids.device)
        apart = places[past:, None] - places[None]
        bias = torch.zeros_like(apart, dtype=self.dtype)[None, None]
        if self.table is not None:
            bias = self.table(apart.clamp(0, 7)).permute(2, 0, 1)[None]
        bias = bias.masked_fill(apart < 0, torch.finfo(self.dtype).min)
        hidden = self.tokens(input_ids)
        for layer in self.stack:
            hidden = layer(hidden, bias=bias, cache=past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.ends(hidden), past_key_values=past_key_values)


class OwnForCausalLM(OwnPreTrained, GenerationMixin):
    inner = Gated

    def __init__(self, config):
        super().__init__(config)
        self.body = Body(config, type(self).inner)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.body.tokens

    def forward(self, input_ids=None, past_key_values=None, use_cache=None, **_):
        found = self.body(input_ids, past_key_values=past_key_values, use_cache=use_cache)
        logits = self.lm_head(found.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, past_key_values=found.past_key_values)


class BiasedForCausalLM(OwnForCausalLM):
    pass


class ChainForCausalLM(OwnForCausalLM):
    inner = Chain


class ListedForCausalLM(OwnForCausalLM):
    inner = Listed
