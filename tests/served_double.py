"""A server that answers as vLLM's and SGLang's do where log-probabilities of prompts are concerned, with a real model behind it.

`tests/recorded/vllm-0.32-answers.json` holds answers of a real vLLM, which `test_served_teacher` compares this one's with.
"""

import functools
import threading
import time

import torch

MAX_MODEL_LEN = 256


class Double:
    """The answers, as (status, JSON). `kind`: "vllm" or "sglang"; `key`: what it wants to be asked with."""

    def __init__(
        self, model, tokenizer, *, kind="vllm", name="teacher", max_logprobs=64, key=None, tokenize=True, delay=0.0
    ):
        self.model, self.tokenizer, self.kind, self.name = model.eval(), tokenizer, kind, name
        self.max_logprobs, self.key, self.tokenize, self.delay = max_logprobs, key, tokenize, delay
        self.asked, self._lock = [], threading.Lock()
        self.text = functools.cache(lambda token: tokenizer.decode([token]))

    def answer(self, method, route, body, authorization):
        self.asked.append((route, body))
        if self.key is not None and authorization != f"Bearer {self.key}":
            return 401, {"error": "Unauthorized"}
        time.sleep(self.delay)
        if route == "/v1/models":
            entry = {"id": self.name, "object": "model", "created": int(time.time()), "owned_by": self.kind}
            return 200, {
                "object": "list",
                "data": [{**entry, "root": "here", "parent": None, "max_model_len": MAX_MODEL_LEN}],
            }
        routes = {
            "vllm": {"/v1/completions": self.completions, "/tokenize": self.tokens},
            "sglang": {"/generate": self.generate},
        }
        found = routes[self.kind].get(route)
        if found is None or (route == "/tokenize" and not self.tokenize):
            return 404, {"detail": "Not Found"}
        with self._lock:
            return found(body)

    def tokens(self, body):
        ids = self.tokenizer(body["prompt"], add_special_tokens=body.get("add_special_tokens", True))["input_ids"]
        return 200, {"count": len(ids), "max_model_len": MAX_MODEL_LEN, "tokens": ids, "token_strs": None}

    def completions(self, body):
        ids, k = body["prompt"], body["prompt_logprobs"]
        if body["model"] != self.name:
            return refused(f"The model `{body['model']}` does not exist. Valid aliases: {self.name}.", "model", 404)
        if k > self.max_logprobs:
            return refused(
                f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs} "
                f"(parameter=prompt_logprobs, value={k})",
                "prompt_logprobs",
            )
        if len(ids) > MAX_MODEL_LEN:
            return refused(
                f"This model's maximum context length is {MAX_MODEL_LEN} tokens. However, your prompt contains {len(ids)} input "
                "tokens, which exceeds this limit even without any output tokens. Please reduce the length of the input prompt. "
                f"(parameter=input_tokens, value={len(ids)})",
                "input_tokens",
            )
        if len(ids) == MAX_MODEL_LEN or body["max_tokens"] < 1:
            return refused("max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)", "max_tokens")
        if max(ids) >= self.model.config.vocab_size:
            return refused(f"Token id {max(ids)} is out of vocabulary", None)
        rows = [None]
        logprobs = self._logprobs(ids)
        own = logprobs.gather(1, torch.tensor(ids[1:])[:, None])
        ranks = (logprobs >= own).sum(dim=1).tolist()
        values, best = (part.tolist() for part in logprobs.topk(min(k, logprobs.shape[1]), dim=1))
        for i, token in enumerate(ids[1:]):
            row = {token: (float(own[i]), ranks[i])}
            row |= {id: (v, r) for r, (v, id) in enumerate(zip(values[i], best[i], strict=True), start=1)}
            rows.append(
                {
                    str(i): {"logprob": max(v, -9999.0), "rank": r, "decoded_token": self.text(i)}
                    for i, (v, r) in row.items()
                }
            )
        choice = {
            "index": 0, "text": " and", "logprobs": None, "finish_reason": "length", "stop_reason": None, "token_ids": None,
            "prompt_logprobs": rows, "prompt_token_ids": None,
        }  # fmt: skip
        usage = {"prompt_tokens": len(ids), "total_tokens": len(ids) + 1, "completion_tokens": 1}
        head = {"id": "cmpl-0", "object": "text_completion", "created": int(time.time()), "model": self.name}
        return 200, {**head, "choices": [choice], "usage": usage}

    def generate(self, body):
        ids, start, k = body["input_ids"], body["logprob_start_len"], body["top_logprobs_num"]
        texts = body.get("return_text_in_logprobs", False)

        def entry(value, token):
            return [value, token, self.text(token) if texts else None]

        own, top = [entry(None, ids[start])], [None]
        for token, logprobs in zip(ids[start + 1 :], self._logprobs(ids)[start:], strict=True):
            own.append(entry(float(logprobs[token]), token))
            values, best = (part.tolist() for part in logprobs.topk(k))
            top.append([entry(v, i) for v, i in zip(values, best, strict=True)])
        meta = {"prompt_tokens": len(ids), "completion_tokens": 1, "cached_tokens": 0, "input_token_logprobs": own}
        if k:
            meta["input_top_logprobs"] = top
        return 200, {"text": " and", "output_ids": [0], "meta_info": meta}

    @torch.no_grad()
    def _logprobs(self, ids):
        return self.model(input_ids=torch.tensor([ids])).logits[0, :-1].float().log_softmax(dim=-1)


def refused(message, parameter, code=400):
    kind = {400: "BadRequestError", 404: "NotFoundError"}[code]
    return code, {"error": {"message": message, "type": kind, "param": parameter, "code": code}}
