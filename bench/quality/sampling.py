"""Samples from a small Llama on a CPU, with NumPy: PyTorch takes milliseconds a token however small the model, most of a step."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from simct.rollouts.draws import uniform_numbers
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
        uniform = uniform_numbers(seed, len(prompts), sampling.max_new_tokens).numpy()
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            own = self._batch(
                [prompts[i] for i in chosen], uniform[chosen], sampling, np.random.default_rng((seed, start))
            )
            for i, response in zip(chosen, own, strict=True):
                found[i] = response
        return found

    def _batch(
        self, prompts: list[list[int]], uniform: np.ndarray, sampling: Sampling, again: np.random.Generator
    ) -> list[Response]:
        width = max(map(len, prompts))
        ids = np.full((len(prompts), width), sampling.pad_id)
        seen = np.ones((len(prompts), width + sampling.max_new_tokens), dtype=bool)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = prompt
            seen[row, : width - len(prompt)] = False
        model = _Pass(self.model, seen)
        tokens, logprobs = [], []
        going = np.ones(len(prompts), dtype=bool)
        while len(tokens) < sampling.max_new_tokens and going.any():
            logits = model(ids)
            token = draw(logits, uniform[:, len(tokens)], sampling.temperature, sampling.top_p, again)
            highest = logits.max(1)
            total = np.exp(logits - highest[:, None]).sum(1)
            logprobs.append(np.take_along_axis(logits, token[:, None], 1)[:, 0] - highest - np.log(total))
            tokens.append(token)
            for end in sampling.end_ids:
                going &= token != end
            ids = token[:, None]
        responses = [sampling.response(row) for row in np.stack(tokens, 1).tolist()]
        own = np.stack(logprobs, 1).tolist()
        return [
            Response(r.token_ids, r.finish_reason, row[: len(r.token_ids)])
            for r, row in zip(responses, own, strict=True)
        ]


def draw(
    logits: np.ndarray, uniform: np.ndarray, temperature: float, top_p: float, again: np.random.Generator
) -> np.ndarray:
    """From the distribution of `simct.rollouts.draws.draw`, without a sort: a token from outside of the nucleus (those that are
    more probable have `top_p` already) is drawn once more, with a number of `again`."""
    if temperature == 0:
        return logits.argmax(1)
    weights = np.exp((logits - logits.max(1, keepdims=True)) / np.float32(temperature))
    reached = weights.cumsum(1, dtype=np.float64)
    token = np.empty(len(logits), dtype=np.int64)
    rows = np.arange(len(logits))
    while len(rows):
        target = uniform[rows] * reached[rows, -1]
        drawn = np.minimum((reached[rows] <= target[:, None]).sum(1), logits.shape[1] - 1)
        token[rows] = drawn
        if top_p == 1:
            break
        own = weights[rows]
        above = np.where(own > own[np.arange(len(rows)), drawn][:, None], own, 0).sum(1, dtype=np.float64)
        rows = rows[above >= top_p * reached[rows, -1]]
        uniform = again.random(len(logits))
    return token


class _Pass:
    """The model over new tokens [B, n], behind those that it has seen; returns the last ones' logits [B, V]. `seen` [B, T]:
    which places are tokens, the others filling on the left."""

    def __init__(self, model: LlamaForCausalLM, seen: np.ndarray) -> None:
        config, inner = model.config, model.model
        self.heads, self.epsilon = config.num_attention_heads, np.float32(config.rms_norm_eps)
        self.embedding, self.head = _array(inner.embed_tokens.weight), _array(model.lm_head.weight).T
        self.norm = _array(inner.norm.weight)
        self.layers = [
            (
                _array(layer.input_layernorm.weight),
                np.concatenate([_array(getattr(layer.self_attn, f"{name}_proj").weight) for name in "qkv"]).T,
                _array(layer.self_attn.o_proj.weight).T,
                _array(layer.post_attention_layernorm.weight),
                _array(layer.mlp.gate_proj.weight).T,
                _array(layer.mlp.up_proj.weight).T,
                _array(layer.mlp.down_proj.weight).T,
            )
            for layer in inner.layers
        ]
        rows, total = seen.shape
        self.width = config.hidden_size // self.heads
        self.scale = np.float32(self.width**-0.5)
        self.cache = np.zeros((len(self.layers), 2, rows, self.heads, total, self.width), dtype=np.float32)
        self.length = 0
        positions = torch.from_numpy(np.maximum(seen.cumsum(1) - 1, 0))
        cos, sin = inner.rotary_emb(inner.embed_tokens.weight, positions)
        self.cos, self.sin = _array(cos)[:, :, None, None], _array(sin)[:, :, None, None]
        # Filling sees itself, so that no row is without anything to see.
        visible = (np.tril(np.ones((total, total), dtype=bool)) & seen[:, None]) | np.eye(total, dtype=bool)
        self.mask = np.where(visible, np.float32(0), np.float32(-np.inf))[:, None]

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        rows, new = ids.shape
        begin, end = self.length, self.length + new
        self.length = end
        x = self.embedding[ids.ravel()]
        mask, cos, sin = self.mask[:, :, begin:end, :end], self.cos[:, begin:end], self.sin[:, begin:end]
        half = self.width // 2
        for (norm, qkv, out, norm_after, gate, up, down), (keys, values) in zip(self.layers, self.cache, strict=True):
            found = (self._normed(x, norm) @ qkv).reshape(rows, new, 3, self.heads, self.width)
            qk = found[:, :, :2]
            turned = np.concatenate([-qk[..., half:], qk[..., :half]], -1)
            q, k = (qk * cos + turned * sin).transpose(2, 0, 3, 1, 4)
            keys[:, :, begin:end], values[:, :, begin:end] = k, found[:, :, 2].transpose(0, 2, 1, 3)
            scores = q @ keys[:, :, :end].swapaxes(2, 3) * self.scale + mask
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            seen = (weights @ values[:, :, :end]).transpose(0, 2, 1, 3).reshape(rows * new, -1)
            x = x + seen @ out
            normed = self._normed(x, norm_after)
            opened = normed @ gate
            x = x + (opened / (1 + np.exp(-opened)) * (normed @ up)) @ down
        return self._normed(x[new - 1 :: new], self.norm) @ self.head

    def _normed(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        size = np.einsum("ij,ij->i", x, x)[:, None] / np.float32(x.shape[1])
        return x * (weight / np.sqrt(size + self.epsilon))


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()
