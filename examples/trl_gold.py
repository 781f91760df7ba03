"""TRL's `GOLDTrainer` with a Gemma-style student, which it refuses: its data, collator and rollouts, SimCT's loss.

    python examples/trl_gold.py     # the demo's models; a few seconds on a CPU, offline

GOLD aligns by byte offsets, which it has for byte-level tokenizers only: it refuses a student whose spaces are U+2581 as "not
ByteLevel". `use_extended_uld=False` leaves the offsets out; the loss that would then compare by position is not called.
"""

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gold import GOLDConfig, GOLDTrainer

from simct import LocalTeacher, TokenizerPair
from simct.demo import ASSETS
from simct.models.hidden import forward_through
from simct.pairing.padded import PaddedBatch
from simct_kernels import LMHead, linear_simct_loss


class SimCTGOLDTrainer(GOLDTrainer):
    loss_is_scaled_for_ga = False  # a mean over the micro-batch: the Trainer divides by the number of these

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = LocalTeacher(self.accelerator.unwrap_model(self.teacher_model), self.teacher_tokenizer)
        self.pair = TokenizerPair(self.processing_class, self.teacher_tokenizer)
        self.shared = self.pair.shared.to(self.accelerator.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student = self.accelerator.unwrap_model(model)
        # Through the wrapper: data parallelism prepares its gradients there.
        loss = forward_through(model, student, lambda: self.simct_loss(student, inputs))
        return (loss, None) if return_outputs else loss

    def simct_loss(self, student, inputs):
        ids, attention = inputs["input_ids"], inputs["attention_mask"]  # padded on both sides
        batch = PaddedBatch(ids, inputs["labels"] != -100, attention)
        states = student.get_decoder()(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
        # Plain text: the teacher reads the prompt without the student's special tokens. (A chat needs its template.)
        texts = self.processing_class.batch_decode(inputs["prompts"], skip_special_tokens=True)
        teacher_ids, prompts = self.pair.encode_teacher(batch.responses), self.teacher_tokenizer(texts)["input_ids"]
        theirs = self.teacher.hidden_states(prompts, teacher_ids), self.teacher.head
        units = self.pair.align_batch(batch.responses, teacher_ids).to(ids.device)
        ours = batch.hidden_rows(states), LMHead.from_model(student)
        return linear_simct_loss(*ours, *theirs, units, self.shared, beta=self.beta) / len(units.student_tokens)


if __name__ == "__main__":
    models = [AutoModelForCausalLM.from_pretrained(ASSETS / side, dtype="float32") for side in ("student", "teacher")]
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "student")
    prompts = Dataset.from_json(str(ASSETS / "train.jsonl")).select(range(32))["prompt"]
    data = Dataset.from_list([{"prompt": tokenizer.bos_token + text, "completion": ""} for text in prompts])
    gold = dict(use_uld_loss=True, use_extended_uld=False, lmbda=1.0, beta=1.0, max_completion_length=24)
    options = dict(per_device_train_batch_size=32, learning_rate=1e-3, logging_steps=1, max_steps=8)
    here = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", report_to="none")
    args = GOLDConfig("runs/gold", **gold, **options, **here)
    trainer = SimCTGOLDTrainer(*models, args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    for entry in trainer.state.log_history[:-1]:
        print(f"step {entry['step']}: loss {entry['loss']:.6f}")
