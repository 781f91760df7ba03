"""The tokenizers, and the models that are trained on the spot for them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from bench import texts
from simct.data.renderer import Renderer

from .losses import sampled_cross_entropy
from .problems import Problem

VOCABULARIES: dict[str, Callable[[], PreTrainedTokenizerBase]] = {"qwen": texts.qwen, "deepseek": texts.deepseek}
Record = Callable[[int, float, float], None]  # of a step: its number, its loss, the accuracy
DRAWN = 4096  # tokens that stand for all that are in no document


@dataclass(frozen=True)
class Size:
    """A Llama with a tied head. `rate`: the highest learning rate of its first training."""

    width: int
    layers: int
    head: int = 64
    rate: float = 1e-3

    def model(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=64 * math.ceil(len(tokenizer) / 64), hidden_size=self.width, num_hidden_layers=self.layers,
            intermediate_size=64 * math.ceil(self.width * 8 / 3 / 64), num_attention_heads=self.width // self.head,
            num_key_value_heads=self.width // self.head, max_position_embeddings=256, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).float()


def body_parameters(model: LlamaForCausalLM) -> int:
    """Without the embedding, which is the head too."""
    return model.num_parameters() - model.get_input_embeddings().weight.numel()


@dataclass(frozen=True)
class Documents:
    """Prompts and responses. On the device: ids, int64 [N, T]; used, int64 [U], ids that some response has; other, int64 [V - U];
    place, int64 [V], of an id in `used`. On the CPU, where rows are chosen without waiting for the device: first, last, int64 [N],
    positions of the first response token and behind the end of the turn."""

    ids: Tensor
    first: Tensor
    last: Tensor
    used: Tensor
    other: Tensor
    place: Tensor

    @classmethod
    def build(
        cls, problems: list[Problem], tokenizer: PreTrainedTokenizerBase, vocabulary: int, device: str
    ) -> Documents:
        """`vocabulary`: rows of the model's head."""
        prompts = tokenizer([p.prompt for p in problems])["input_ids"]
        if prompts[0] != Renderer(tokenizer, "text")({"prompt": problems[0].prompt}):
            raise RuntimeError("a batch of prompts is not encoded as the trainer encodes each")
        responses = tokenizer([p.text for p in problems], add_special_tokens=False)["input_ids"]
        end = [tokenizer.eos_token_id]
        rows = [prompt + response + end for prompt, response in zip(prompts, responses, strict=True)]
        ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        used = torch.tensor(sorted({i for response in responses for i in response} | set(end)))
        free = torch.ones(vocabulary, dtype=torch.bool)
        free[used] = False
        place = torch.zeros(vocabulary, dtype=torch.int64)
        place[used] = torch.arange(len(used))
        first, last = torch.tensor([len(p) for p in prompts]), torch.tensor([len(row) for row in rows])
        return cls(ids.to(device), first, last, *(t.to(device) for t in (used, free.nonzero().flatten(), place)))


class Learner:
    """Trains a model on documents, a step at a time."""

    def __init__(self, model: LlamaForCausalLM, documents: Documents, rate: float, batch: int, seed: int) -> None:
        self.model, self.documents, self.rate, self.batch = model.train(), documents, rate, batch
        self.device = documents.ids.device
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=fused
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.steps = 0

    def step(self, scale: float) -> Tensor:
        """One step at the share `scale` of the highest learning rate. Returns its loss, without waiting for it."""
        own = self.documents
        for group in self.optimizer.param_groups:
            group["lr"] = scale * self.rate
        chosen = self._draw(len(own.ids), self.batch)
        ids = own.ids[chosen.to(self.device)]
        positions = torch.arange(ids.shape[1] - 1)
        predicts = (positions >= own.first[chosen, None] - 1) & (positions < own.last[chosen, None] - 1)
        at = predicts.flatten().nonzero().flatten().to(self.device)
        drawn = own.other[self._draw(len(own.other), DRAWN).to(self.device)]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            # Filling is behind the text, where causal attention never looks: no mask.
            hidden = self.model.get_decoder()(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            hidden, targets = hidden.flatten(0, 1)[at], own.place[ids[:, 1:].flatten()[at]]
            weight = self.model.get_output_embeddings().weight
            loss = sampled_cross_entropy(hidden, weight, own.used, drawn, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return loss.detach()

    def _draw(self, below: int, count: int) -> Tensor:
        return torch.randint(below, (count,), generator=self.generator)


def learn_until(
    learner: Learner, end: float, steps: int, accuracy: Callable[[], float], every: float, record: Record
) -> None:
    """A teacher: until `end` (time.time()) or for so many steps, with a cosine schedule over what comes first. `accuracy` is asked
    for all `every` seconds."""
    begin = asked = time.time()
    loss = torch.zeros(())
    while (now := time.time()) < end and learner.steps < steps:
        done = max((now - begin) / (end - begin), learner.steps / steps)
        cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2
        loss = learner.step(min(learner.steps / 50 + 0.02, cosine))
        if now - asked > every:
            asked = now
            record(learner.steps, loss.item(), accuracy())
    record(learner.steps, loss.item(), accuracy())


def learn_to(
    learner: Learner, target: float, end: float, steps: int, accuracy: Callable[[], float], every: int, record: Record
) -> None:
    """A student: until `accuracy()`, asked for all `every` steps, is at least `target`, or until `end` or for so many steps. It is
    left with the weights, of those that were asked about, whose accuracy is closest to the target."""
    best, closest = None, math.inf
    while time.time() < end and learner.steps < steps:
        loss = learner.step(min(1.0, learner.steps / 50 + 0.02))
        if learner.steps % every == 0:
            found = accuracy()
            record(learner.steps, loss.item(), found)
            if abs(found - target) < closest:
                closest = abs(found - target)
                best = {name: value.detach().clone() for name, value in learner.model.state_dict().items()}
            if found >= target:
                break
    if best is not None:
        learner.model.load_state_dict(best)
