import pytest
import torch
from kernels.cases import in_pairs
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from simct.rollouts.draws import draw, uniform_numbers
from simct.rollouts.protocol import Sampling
from simct.rollouts.transformers_engines import StaticBatching


def kept(logits, temperature, top_p):
    """The distribution that transformers itself samples from."""
    logits = TemperatureLogitsWarper(temperature)(None, logits.clone())
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(None, logits)
    return logits.double().softmax(dim=1)


@pytest.mark.parametrize(
    ("top_p", "temperature", "vocabulary"),  # of these, below a block, whole blocks, a rest
    in_pairs([1.0, 0.95, 0.5, 1e-6], [0.6, 1.0, 1.7], [37, 1024, 1300]),
)
def test_numbers_spread_evenly_give_transformers_distribution(temperature, top_p, vocabulary):
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(0)) * 3
    logits[1, 5:] = -torch.inf
    n = 3_000
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = torch.stack([draw(row.expand(n, -1), grid, temperature, top_p) for row in logits])
    shares = torch.nn.functional.one_hot(tokens, vocabulary).double().mean(dim=1)
    expected = kept(logits, temperature, top_p)
    assert (shares - expected).abs().max() <= 1.01 / n + 1e-6
    assert not shares[expected == 0].any()


def test_tokens_too_rare_for_float32_sums_are_drawn():
    logits = torch.zeros(1, 200_001)
    logits[0, 0] = 17.5  # the others hold 0.5 % together, 2.5e-8 each: a float32 sum near 1 does not see them
    rare = 1 - logits.double().softmax(dim=1)[0, 0]
    n = 64
    uniform = 1 - rare * (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = draw(logits.expand(n, -1), uniform, 1.0, 1.0)
    assert tokens.unique().numel() == n and not (tokens == 0).any()


@pytest.mark.parametrize("vocabulary", [512, 700])
def test_a_nucleus_of_the_whole_vocabulary(vocabulary):
    n = 7_000
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens = draw(torch.zeros(n, vocabulary), grid, 1.0, 0.999)
    assert len(tokens.unique()) == -(-vocabulary * 999 // 1000)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_ends_of_the_interval_and_no_numbers(top_p):
    logits = torch.full((3, 5), -torch.inf)
    logits[:, 2] = 0.0
    logits[2] = torch.nan
    uniform = torch.tensor([0.0, 1 - 2.0**-53, 0.5], dtype=torch.float64)
    tokens = draw(logits, uniform, 1.0, top_p)
    assert tokens[:2].tolist() == [2, 2]
    assert 0 <= int(tokens[2]) < 5


def test_a_prompts_numbers_do_not_depend_on_its_batch(demo_student, demo_tokenizers):
    tokenizer = demo_tokenizers[0]
    prompts = tokenizer(["The", "Return the", "This method is called", "If the", "A list of names"])["input_ids"]
    settings = Sampling((tokenizer.eos_token_id,), tokenizer.pad_token_id, max_new_tokens=24, top_p=0.9)
    together, apart = (
        StaticBatching(demo_student, batch_size=size).generate(prompts, settings, seed=3) for size in (8, 2)
    )
    assert [r.token_ids for r in together] == [r.token_ids for r in apart]
    assert not torch.equal(*uniform_numbers(3, 2, 24))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_are_the_models_own(temperature, demo_student, demo_tokenizers):
    tokenizer = demo_tokenizers[0]
    prompts = tokenizer(["The", "This method is called"])["input_ids"]
    settings = Sampling((tokenizer.eos_token_id,), tokenizer.pad_token_id, 12, temperature, top_p=0.8)
    for prompt, response in zip(prompts, StaticBatching(demo_student).generate(prompts, settings, seed=0), strict=True):
        ids = torch.tensor([prompt + response.token_ids])
        with torch.no_grad():
            logits = demo_student.eval()(ids).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(dim=1).gather(1, ids[0, len(prompt) :, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(response.logprobs), expected, atol=1e-4, rtol=0)
