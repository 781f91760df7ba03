"""What is compared between two arithmetics (precisions, kernels, machines) must not hang on what each of them would sample."""

import torch

from simct.training.collector import Collector


class Tape:
    """Keeps the responses of every call to sample. Rewound, later calls sample as well, and get the kept ones in their place."""

    def __init__(self, monkeypatch) -> None:
        self._kept, self._position = [], None
        sample = Collector.generate

        def generate(collector, prompts, sampling, seed):
            responses = sample(collector, prompts, sampling, seed)
            if self._position is None:
                self._kept.append(responses)
                return responses
            given = self._kept[self._position]
            self._position += 1
            assert len(given) == len(prompts)
            return given

        monkeypatch.setattr(Collector, "generate", generate)

    def rewind(self) -> None:
        assert self._kept
        self._position = 0


@torch.no_grad()
def greedy_shortfall(model, prompts, responses) -> float:
    """By how much the logit of a chosen token lies below its row's largest at most, each response read as it is."""
    training, largest = model.training, 0.0
    model.eval()
    for prompt, response in zip(prompts, responses, strict=True):
        logits = model(torch.tensor([prompt + response.token_ids])).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(response.token_ids)[:, None])[:, 0]
        largest = max(largest, (logits.amax(1) - chosen).max().item())
    model.train(training)
    return largest
