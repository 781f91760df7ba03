"""What holds for every engine with a real vLLM behind it. A test module takes these in and gives the fixture `engine`."""

import pytest
import torch

from .conftest import MAX_MODEL_LEN, VOCABULARY, greedy, own_logprobs, plain, take_steps


class EngineContract:
    samples = 1500

    def test_greedy_responses_are_those_of_transformers_before_and_after_steps(
        self, engine, student, prompts, sampling
    ):
        settings = sampling(temperature=0.0)
        before = engine.generate(prompts, settings, seed=0)
        assert plain(before) == greedy(student, prompts, settings)
        for _ in range(2):  # two changes: the second finds the traces of the first
            take_steps(student)
            assert greedy(student, prompts, settings) != plain(before), "the steps changed nothing that shows"
            engine.update_weights(student)
            before = engine.generate(prompts, settings, seed=0)
            assert plain(before) == greedy(student, prompts, settings)

    def test_adapters_are_merged_and_the_student_keeps_its_weights(self, engine, student, prompts, sampling):
        peft = pytest.importorskip("peft")
        settings = sampling(temperature=0.0)
        untouched = greedy(student, prompts, settings)
        torch.manual_seed(0)
        adapted = peft.get_peft_model(student, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
        take_steps(adapted, steps=10)
        weights = {name: p.detach().clone() for name, p in adapted.named_parameters()}
        engine.update_weights(adapted)
        assert all(torch.equal(weights[name], p) for name, p in adapted.named_parameters())
        expected = greedy(adapted.get_base_model(), prompts, settings)
        assert expected != untouched
        assert plain(engine.generate(prompts, settings, seed=0)) == expected

    def test_one_seed_gives_one_sample(self, engine, student, prompts, sampling):
        first = engine.generate(prompts, sampling(), seed=7)
        assert plain(first) == plain(engine.generate(prompts, sampling(), seed=7))
        assert plain(first) != plain(engine.generate(prompts, sampling(), seed=8))
        # A repeated prompt (samples per prompt) is drawn anew, and the next seed is not the same draws moved by one.
        again = engine.generate([prompts[1]] * 4, sampling(), seed=0)
        assert len({tuple(r.token_ids) for r in again}) > 1
        assert plain(again)[1:] != plain(engine.generate([prompts[1]] * 4, sampling(), seed=1))[:-1]

    def test_samples_follow_the_students_distribution(self, engine, student, prompts, sampling):
        """First tokens of many samples against softmax: a top_k or a penalty from anywhere would show."""
        prompt, count = prompts[0], self.samples
        samples = engine.generate([prompt] * count, sampling(max_new_tokens=1), seed=3)
        with torch.no_grad():
            probability = student.eval()(torch.tensor([prompt])).logits[0, -1].float().softmax(-1)
        drawn = torch.bincount(torch.tensor([r.token_ids[0] for r in samples]), minlength=len(probability)) / count
        best = probability.topk(5).indices
        error = (drawn - probability)[best].abs()
        assert (error < 5 * (probability[best] / count).sqrt()).all()  # 5 standard errors
        rest = probability.clone()
        rest[probability.topk(50).indices] = 0
        expected = rest.sum()  # beyond the 50 best
        assert abs(drawn[rest > 0].sum() - expected) < 5 * (expected / count).sqrt()

    @pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "top_p": 0.8}])
    def test_logprobs_are_the_models_own(self, engine, student, prompts, sampling, options):
        for prompt, response in zip(prompts, engine.generate(prompts, sampling(**options), seed=5), strict=True):
            own = own_logprobs(student, prompt, response.token_ids)
            torch.testing.assert_close(torch.tensor(response.logprobs), own, atol=1e-3, rtol=0)

    def test_responses_end_with_an_end_token_or_run_out_of_budget(self, engine, student, prompts, sampling, tokenizer):
        comma = tokenizer.convert_tokens_to_ids(",")
        settings = sampling(end_ids=(tokenizer.eos_token_id, comma), max_new_tokens=16)
        responses = engine.generate(prompts * 4, settings, seed=1)
        assert {r.finish_reason for r in responses} == {"stop", "length"}
        for response in responses:
            ends = [token in settings.end_ids for token in response.token_ids]
            assert not any(ends[:-1])
            assert ends[-1] == (response.finish_reason == "stop")
            assert response.finish_reason == "stop" or len(response.token_ids) == 16
        assert {r.token_ids[-1] for r in responses if r.finish_reason == "stop"} == set(settings.end_ids)

    def test_only_the_end_ids_end_a_response(self, engine, student, prompts, sampling, tokenizer):
        """The model's own end token is one token among others if the settings do not name it."""
        eos = tokenizer.eos_token_id
        ended = engine.generate(prompts, sampling(), seed=1)
        going_on = engine.generate(prompts, sampling(end_ids=(VOCABULARY - 1,)), seed=1)
        short = [i for i, r in enumerate(ended) if r.finish_reason == "stop"]
        assert short
        for i in short:
            length = len(ended[i].token_ids)
            assert going_on[i].token_ids[:length] == ended[i].token_ids and going_on[i].token_ids[length - 1] == eos
            assert len(going_on[i].token_ids) > length or length == 24

    def test_stop_strings_end_a_response(self, engine, student, prompts, sampling, tokenizer):
        settings = sampling(temperature=0.0)
        i, full = next(
            (i, r.token_ids) for i, r in enumerate(engine.generate(prompts, settings, seed=0)) if len(r.token_ids) > 8
        )
        text = tokenizer.decode(full[:6])
        stop = text[-4:]
        (response,) = engine.generate([prompts[i]], sampling(temperature=0.0, stop_strings=(stop,)), seed=0)
        length = len(response.token_ids)
        assert response.finish_reason == "stop_string" and response.token_ids == full[:length]
        assert stop in tokenizer.decode(full[:length]) and stop not in tokenizer.decode(full[: length - 1])
        assert len(response.logprobs) == length

    def test_prompts_that_cannot_be_answered_are_refused(self, engine, prompts, sampling):
        too_long = prompts[0] * (MAX_MODEL_LEN // len(prompts[0]))
        with pytest.raises(
            ValueError, match=rf"prompts\[1\] has {len(too_long)} tokens.*max_model_len, {MAX_MODEL_LEN}"
        ):
            engine.generate([prompts[0], too_long], sampling(), seed=0)
        with pytest.raises(ValueError, match=r"prompts\[0\] is empty"):
            engine.generate([[]], sampling(), seed=0)
        with pytest.raises(ValueError, match=f"token id {VOCABULARY}"):
            engine.generate([[5, VOCABULARY]], sampling(), seed=0)
        assert engine.generate([], sampling(), seed=0) == []

    def test_another_model_is_refused(self, engine, demo_student):
        with pytest.raises(ValueError, match=f"serves a model of {VOCABULARY} token ids, the student has"):
            engine.update_weights(demo_student)
