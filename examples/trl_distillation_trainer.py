"""TRL's `DistillationTrainer` with two vocabularies: its rollouts, batches, metrics and checkpoints, SimCT's loss.

    python examples/trl_distillation_trainer.py     # the demo's models; a few seconds on a CPU, offline

TRL refuses a `teacher_model` of another `vocab_size`, since its own loss compares whole distributions. Subclasses may leave that
argument out and "supply the teacher another way": this one does. Nothing is patched, no vocabulary resized.
"""

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DistillationConfig, DistillationTrainer

from simct import LocalTeacher, TokenizerPair
from simct.data.prompts import render_prompt
from simct.demo import ASSETS
from simct.pairing.padded import PaddedBatch
from simct.training.placement import processes_that_share
from simct_kernels import LMHead, linear_simct_loss, token_statistics


class SimCTDistillationTrainer(DistillationTrainer):
    def __init__(self, model, teacher: LocalTeacher, args, train_dataset, processing_class) -> None:
        super().__init__(model, None, args, train_dataset, processing_class=processing_class)
        self.teacher, self.pair = teacher, TokenizerPair(processing_class, teacher.tokenizer)
        teacher.place(self.args.device, mesh=processes_that_share(self) if self.is_fsdp_enabled else None)
        self.shared = self.pair.shared.to(self.accelerator.device)

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)  # TRL shuffles and splits what stands in here
        batch["teacher_prompts"] = [render_prompt(example["prompt"], self.teacher.tokenizer) for example in inputs]
        return batch

    def _compute_loss(self, student, inputs, num_items_in_batch):
        prompt, completion = inputs["prompt_mask"], inputs["completion_mask"]  # padded on the left, on the right
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        marked = torch.cat([torch.zeros_like(prompt), completion], dim=1)
        batch = PaddedBatch(ids, marked, torch.cat([prompt, completion], dim=1))
        states = student.get_decoder()(input_ids=ids, attention_mask=batch.attention_mask, use_cache=False)
        rows, head = batch.hidden_rows(states.last_hidden_state), LMHead.from_model(student)
        teacher_ids = self.pair.encode_teacher(batch.responses)
        theirs = self.teacher.hidden_states(inputs["teacher_prompts"], teacher_ids), self.teacher.head
        units = self.pair.align_batch(batch.responses, teacher_ids).to(ids.device)
        loss, tokens = linear_simct_loss(rows, head, *theirs, units, self.shared, beta=self.beta), completion.sum()
        entropy = token_statistics(rows.detach(), head, units.student_tokens).entropy.sum()  # TRL logs it
        return loss / (tokens if num_items_in_batch is None else num_items_in_batch), entropy, tokens


if __name__ == "__main__":
    models = [AutoModelForCausalLM.from_pretrained(ASSETS / side, dtype="float32") for side in ("student", "teacher")]
    tokenizers = [AutoTokenizer.from_pretrained(ASSETS / side, padding_side="left") for side in ("student", "teacher")]
    options = dict(per_device_train_batch_size=32, learning_rate=1e-3, max_completion_length=24, logging_steps=1)
    here = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", report_to="none")
    args = DistillationConfig("runs/trl", max_steps=8, **options, **here)
    prompts = Dataset.from_json(str(ASSETS / "train.jsonl")).select(range(32))
    trainer = SimCTDistillationTrainer(models[0], LocalTeacher(models[1], tokenizers[1]), args, prompts, tokenizers[0])
    trainer.train()
    for entry in trainer.state.log_history[:-1]:
        print(f"step {entry['step']}: loss {entry['loss']:.6f}, entropy {entry['entropy']:.3f}")
