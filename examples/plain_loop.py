"""On-policy distillation across two tokenizers in a plain PyTorch loop: the student writes, the teacher reads it, one fused loss.

    python examples/plain_loop.py     # the demo's models; a few seconds on a CPU, offline

Yours take their place: a path or a hub name for each side, and your prompts, each side's in its own chat template.
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from simct import LocalTeacher, TokenizerPair
from simct.data.records import read_prompts
from simct.demo import ASSETS
from simct.pairing.padded import PaddedBatch
from simct_kernels import LMHead, linear_simct_loss


def main(steps: int = 8) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "student", padding_side="left")
    student = AutoModelForCausalLM.from_pretrained(ASSETS / "student", dtype=torch.float32)
    teacher_tokenizer = AutoTokenizer.from_pretrained(ASSETS / "teacher")
    teacher_model = AutoModelForCausalLM.from_pretrained(ASSETS / "teacher", dtype=torch.float32)
    teacher = LocalTeacher(teacher_model, teacher_tokenizer)  # gives hidden rows, never logits
    pair = TokenizerPair(tokenizer, teacher_tokenizer)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)

    texts = [record["prompt"] for record in read_prompts(ASSETS / "train.jsonl")[:32]]
    prompts = tokenizer(texts, padding=True, return_tensors="pt")
    teacher_prompts = teacher_tokenizer(texts)["input_ids"]
    for step in range(1, steps + 1):
        student.eval()
        sequences = student.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=24)
        batch = PaddedBatch.generated(sequences, prompts["attention_mask"], pair.student_end_ids)

        teacher_responses = pair.encode_teacher(batch.responses)  # the same bytes in the teacher's tokens
        teacher_hidden = teacher.hidden_states(teacher_prompts, teacher_responses)
        units = pair.align_batch(batch.responses, teacher_responses)

        student.train()
        decoder = student.get_decoder()  # without the head: the loss reads it itself
        hidden = decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        head = LMHead.from_model(student)
        loss = linear_simct_loss(batch.hidden_rows(hidden), head, teacher_hidden, teacher.head, units, pair.shared)
        loss = loss / len(units.student_tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.6f}, {len(units)} units, {units.student_covered:.0%} of the tokens")


if __name__ == "__main__":
    main()
