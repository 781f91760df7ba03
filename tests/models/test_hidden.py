import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from simct.models.checks import check_head
from simct.models.hidden import PackedSequences, response_hidden_states

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
RESPONSES = [[20, 21], [22, 23, 24, 25], []]


def test_packed_rows_equal_those_of_each_sequence_alone(demo_student):
    packed = PackedSequences.build(PROMPTS, RESPONSES)
    assert packed.input_ids.shape == (3, 5)  # the last response token is not fed
    hidden = response_hidden_states(demo_student, packed)
    assert hidden.shape == (6, demo_student.config.hidden_size)
    row = 0
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        alone = demo_student.model(torch.tensor([prompt + response])).last_hidden_state[0]
        for j in range(len(response)):
            torch.testing.assert_close(hidden[row], alone[len(prompt) - 1 + j], rtol=1e-4, atol=1e-4)
            row += 1


def test_a_response_of_one_token_is_predicted_by_the_prompt(demo_student):
    packed = PackedSequences.build([[4, 5]], [[1]])
    assert packed.input_ids.tolist() == [[4, 5]] and packed.rows.tolist() == [1]


class Rescaled(LlamaForCausalLM):
    """A model that does something to its logits which no configuration field says."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 3 + 1
        return output


@pytest.mark.parametrize("cls", [LlamaForCausalLM, Rescaled])
def test_a_head_that_cannot_be_reproduced_is_refused(cls):
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = cls(config).train()
    if cls is LlamaForCausalLM:
        check_head(model, "student")
    else:
        with pytest.raises(ValueError, match="student Rescaled changes its logits"):
            check_head(model, "student")
    assert model.training
