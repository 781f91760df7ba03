"""On-policy distillation across two tokenizers as a `LightningModule`: Lightning's `Trainer`, SimCT's loss.

    python examples/lightning_module.py     # the demo's models; a few seconds on a CPU, offline

The batch is text: each side's tokenizer makes its own tokens of it (and would apply its own chat template).
"""

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from simct import LocalTeacher, TokenizerPair
from simct.data.records import read_prompts
from simct.demo import ASSETS
from simct.pairing.padded import PaddedBatch
from simct_kernels import LMHead, linear_simct_loss


class Distillation(lightning.LightningModule):
    def __init__(self, student, tokenizer, teacher: LocalTeacher, learning_rate: float = 1e-3) -> None:
        super().__init__()
        # A `LocalTeacher` is no module: it is not trained, not put in training mode and not written into checkpoints.
        self.student, self.tokenizer, self.teacher, self.learning_rate = student, tokenizer, teacher, learning_rate
        self.pair = TokenizerPair(tokenizer, teacher.tokenizer)

    def on_fit_start(self) -> None:
        self.teacher.place(self.device)
        self.shared = self.pair.shared.to(self.device)

    def training_step(self, texts: list[str], batch_index: int):
        prompts = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
        self.student.eval()
        sequences = self.student.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=24)
        batch = PaddedBatch.generated(sequences, prompts["attention_mask"], self.pair.student_end_ids)
        teacher_ids = self.pair.encode_teacher(batch.responses)
        theirs = self.teacher.hidden_states(self.teacher.tokenizer(texts)["input_ids"], teacher_ids), self.teacher.head
        units = self.pair.align_batch(batch.responses, teacher_ids).to(self.device)

        decoder = self.student.train().get_decoder()
        states = decoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        ours = batch.hidden_rows(states), LMHead.from_model(self.student)
        loss = linear_simct_loss(*ours, *theirs, units, self.shared) / len(units.student_tokens)
        print(f"step {self.global_step + 1}: loss {loss.item():.6f}")
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.student.parameters(), lr=self.learning_rate)


if __name__ == "__main__":
    lightning.seed_everything(0, verbose=False)
    models = [AutoModelForCausalLM.from_pretrained(ASSETS / side, dtype="float32") for side in ("student", "teacher")]
    tokenizers = [AutoTokenizer.from_pretrained(ASSETS / side, padding_side="left") for side in ("student", "teacher")]
    texts = [record["prompt"] for record in read_prompts(ASSETS / "train.jsonl")[:32]]
    module = Distillation(models[0], tokenizers[0], LocalTeacher(models[1], tokenizers[1]))
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = lightning.Trainer(accelerator="cpu", max_steps=8, **quiet)
    trainer.fit(module, DataLoader(texts, batch_size=32))
