"""SimCT as an algorithm class of KDFlow's shape: the teacher's hidden rows come from another process, only its head is here.

    python examples/kdflow_algorithm.py     # the demo's models, eight steps on one batch; a few seconds on a CPU, offline

After `simple_ctkd.py` of github.com/songmzhang/KDFlow. KDFlow is not imported, and this has not run inside it.
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from simct import LocalTeacher, TokenizerPair
from simct.data.records import read_prompts
from simct.demo import ASSETS
from simct.models.hidden import forward_through
from simct.pairing.padded import PaddedBatch, padded_to_packed
from simct_kernels import LMHead, linear_simct_loss


class SimCT:
    def __init__(self, strategy, student_model, teacher_lm_head, student_tokenizer, teacher_tokenizer, **kwargs):
        self.student, self.model = student_model, student_model.model
        self.pair = TokenizerPair(student_tokenizer, teacher_tokenizer)
        self.shared = self.pair.shared.to(teacher_lm_head.weight.device)
        # A teacher that caps or scales its logits needs `softcap` or `scale` here: a linear layer does not know.
        self.teacher_head = LMHead(teacher_lm_head.weight, teacher_lm_head.bias)

    def training_step(self, micro_batch: dict) -> dict:
        sides = [[micro_batch[f"{s}_{n}"] for n in ("input_ids", "loss_mask", "attn_mask")] for s in ("stu", "tea")]
        # KDFlow marks the positions that predict, we mark the tokens that they predict.
        batches = [PaddedBatch(ids, predicts.roll(1, dims=1), read) for ids, predicts, read in sides]
        # Inside the student's forward (where FSDP has its weights whole), but without the logits that it would make.
        loss = forward_through(self.student, self.student, lambda: self.loss(*batches, micro_batch["teacher_hiddens"]))
        return {"loss": loss / micro_batch["avg_micro_batch_token_num"]}

    def loss(self, ours: PaddedBatch, theirs: PaddedBatch, shipped):  # [N_t, H_t], packed already
        states = self.model.get_decoder()(ours.input_ids, attention_mask=ours.attention_mask).last_hidden_state
        own, their, units = padded_to_packed(self.pair, ours, states, theirs, shipped.to(self.teacher_head.weight))
        return linear_simct_loss(own, LMHead.from_model(self.model), their, self.teacher_head, units, self.shared)


if __name__ == "__main__":
    models = [AutoModelForCausalLM.from_pretrained(ASSETS / side, dtype="float32") for side in ("student", "teacher")]
    tokenizers = [AutoTokenizer.from_pretrained(ASSETS / side) for side in ("student", "teacher")]
    algorithm = SimCT(None, torch.nn.ModuleDict({"model": models[0]}), models[1].lm_head, *tokenizers)
    cut = [record["prompt"].partition(" ") for record in read_prompts(ASSETS / "train.jsonl")[:32]]
    prompts = [tokenizer([first for first, _, _ in cut])["input_ids"] for tokenizer in tokenizers]
    answers = tokenizers[0]([space + rest for _, space, rest in cut], add_special_tokens=False)["input_ids"]
    responses = answers, algorithm.pair.encode_teacher(answers)
    shipped = LocalTeacher(models[1], tokenizers[1]).hidden_states(prompts[1], responses[1])
    micro_batch = {"teacher_hiddens": shipped, "avg_micro_batch_token_num": sum(map(len, answers))}
    for side, batch in zip(("stu", "tea"), map(PaddedBatch.build, prompts, responses), strict=True):
        micro_batch |= {f"{side}_input_ids": batch.input_ids, f"{side}_attn_mask": batch.attention_mask}
        micro_batch[f"{side}_loss_mask"] = batch.response_mask.roll(-1, dims=1)
    optimizer = torch.optim.AdamW(models[0].parameters(), lr=1e-3)
    for step in range(1, 9):
        loss = algorithm.training_step(micro_batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.6f}")
