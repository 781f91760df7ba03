"""Samples from a small Llama on a CPU. `generate` takes milliseconds a token however small the model: most of a step here."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from simct.rollouts.draws import draw, uniform_numbers
from simct.rollouts.protocol import Response, RolloutEngine, Sampling
from simct.rollouts.transformers_engines import StaticBatching


def engine(model: PreTrainedModel, batch_size: int = 256) -> RolloutEngine:
    """`LlamaSampler` for the models that it knows, else `StaticBatching`."""
    own, config = isinstance(model, LlamaForCausalLM) and model.device.type == "cpu", model.config
    plain = own and config.hidden_act == "silu" and not (config.attention_bias or config.mlp_bias)
    known = plain and config.num_key_value_heads == config.num_attention_heads and model.dtype == torch.float32
    return (LlamaSampler if known else StaticBatching)(model, batch_size)


class LlamaSampler:
    """A `simct.rollouts.protocol.RolloutEngine` for a float32 Llama without biases and with as many key as query heads."""

    def __init__(self, model: LlamaForCausalLM, batch_size: int = 256) -> None:
        self.model, self.batch_size = model, batch_size

    def update_weights(self, model: LlamaForCausalLM) -> None:
        """The model is the student itself."""

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], sampling: Sampling, *, seed: int) -> list[Response]:
        found: list[Response | None] = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        uniform = uniform_numbers(seed, len(prompts), sampling.max_new_tokens)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            own = self._batch([prompts[i] for i in chosen], uniform[chosen], sampling)
            for i, response in zip(chosen, own, strict=True):
                found[i] = response
        return found

    def _batch(self, prompts: list[list[int]], uniform: Tensor, sampling: Sampling) -> list[Response]:
        width = max(map(len, prompts))
        total = width + sampling.max_new_tokens
        ids = torch.full((len(prompts), width), sampling.pad_id)
        seen = torch.ones(len(prompts), total, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            seen[row, : width - len(prompt)] = False
        pass_ = _Pass(self.model, seen)
        ends = torch.tensor(sampling.end_ids)
        tokens, logprobs = [], []
        going = torch.ones(len(prompts), dtype=torch.bool)
        while len(tokens) < sampling.max_new_tokens and going.any():
            logits = pass_(ids)
            token = draw(logits, uniform[:, len(tokens)], sampling.temperature, sampling.top_p)
            logprobs.append(logits.gather(1, token[:, None]).squeeze(1) - logits.logsumexp(1))
            tokens.append(token)
            going &= ~torch.isin(token, ends)
            ids = token[:, None]
        drawn = zip(torch.stack(tokens, 1).tolist(), torch.stack(logprobs, 1).tolist(), strict=True)
        responses = [(sampling.response(row), own) for row, own in drawn]
        return [replace(response, logprobs=own[: len(response.token_ids)]) for response, own in responses]


class _Pass:
    """The model over new tokens [B, n], behind those that it has seen; returns the last ones' logits [B, V]. `seen` [B, T]:
    which places are tokens, the others filling on the left."""

    def __init__(self, model: LlamaForCausalLM, seen: Tensor) -> None:
        config, inner = model.config, model.model
        self.heads, self.epsilon = config.num_attention_heads, config.rms_norm_eps
        self.embedding, self.head = inner.embed_tokens.weight, model.lm_head.weight
        self.norm = inner.norm.weight
        self.layers = [
            (
                layer.input_layernorm.weight,
                torch.cat([getattr(layer.self_attn, f"{name}_proj").weight for name in "qkv"]),
                layer.self_attn.o_proj.weight,
                layer.post_attention_layernorm.weight,
                torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]),
                layer.mlp.down_proj.weight,
            )
            for layer in inner.layers
        ]
        rows, self.total = seen.shape
        shape = (len(self.layers), 2, rows, self.heads, self.total, config.hidden_size // self.heads)
        self.cache, self.length = torch.zeros(shape), 0
        positions = (seen.cumsum(1) - 1).clamp(min=0)
        self.cos, self.sin = inner.rotary_emb(self.cache, positions)
        causal = torch.ones(self.total, self.total, dtype=torch.bool).tril()
        # Filling sees itself, so that no row is without anything to see.
        self.mask = (causal & seen[:, None] | torch.eye(self.total, dtype=torch.bool))[:, None]

    def __call__(self, ids: Tensor) -> Tensor:
        begin, end = self.length, self.length + ids.shape[1]
        self.length = end
        x = self.embedding[ids]
        rows, new, width = x.shape
        mask, cos, sin = self.mask[:, :, begin:end, :end], self.cos[:, begin:end], self.sin[:, begin:end]
        for (norm, qkv, out, norm_after, gate_up, down), cache in zip(self.layers, self.cache, strict=True):
            q, k, v = (
                linear(rms_norm(x, (width,), norm, self.epsilon), qkv)
                .view(rows, new, 3, self.heads, -1)
                .permute(2, 0, 3, 1, 4)
            )
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            cache[0, :, :, begin:end], cache[1, :, :, begin:end] = k, v
            found = scaled_dot_product_attention(q, cache[0, :, :, :end], cache[1, :, :, :end], attn_mask=mask)
            x = x + linear(found.transpose(1, 2).reshape(rows, new, width), out)
            gate, up = linear(rms_norm(x, (width,), norm_after, self.epsilon), gate_up).chunk(2, dim=-1)
            x = x + linear(silu(gate) * up, down)
        return linear(rms_norm(x[:, -1], (width,), self.norm, self.epsilon), self.head)
