"""TRL's `GOLDTrainer` with a Gemma-style student, which it refuses: its data, collator and rollouts, SimCT's loss.

    python examples/trl_gold.py     # the demo's models; a few seconds on a CPU, offline

GOLD's own alignment counts bytes in byte-level tokens only: a student whose spaces are U+2581 ends in "The given tokenizer is not
ByteLevel". `use_extended_uld=False` leaves those byte offsets out, and the loss that would then compare by position is not called.
"""

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gold import GOLDConfig, GOLDTrainer

from simct import LocalTeacher, TokenizerPair
from simct.demo import ASSETS
from simct.padded import PaddedBatch
from simct_kernels import LMHead, linear_simct_loss


class SimCTGOLDTrainer(GOLDTrainer):
    loss_is_scaled_for_ga = False  # a mean over the micro-batch: the Trainer divides by the number of these

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = LocalTeacher(self.teacher_model, self.teacher_tokenizer)
        self.pair = TokenizerPair(self.processing_class, self.teacher_tokenizer)
        self.shared = self.pair.shared.to(self.accelerator.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, attention = inputs["input_ids"], inputs["attention_mask"]  # padded on both sides
        batch = PaddedBatch(ids, inputs["labels"] != -100, attention)
        states = model.get_decoder()(input_ids=ids, attention_mask=attention, use_cache=False)
        # Plain text: the teacher reads the prompt without the student's special tokens. (A chat needs its template rendered.)
        prompts = self.processing_class.batch_decode(inputs["prompts"], skip_special_tokens=True)
        teacher_ids = self.pair.encode_teacher(batch.responses)
        teacher_rows = self.teacher.hidden_states(self.teacher_tokenizer(prompts)["input_ids"], teacher_ids)
        units = self.pair.align_batch(batch.responses, teacher_ids).to(ids.device)
        heads = LMHead.from_model(model), self.teacher.head
        rows = batch.hidden_rows(states.last_hidden_state)
        loss = linear_simct_loss(rows, heads[0], teacher_rows, heads[1], units, self.shared, beta=self.beta)
        loss = loss / len(units.student_tokens)
        return (loss, states) if return_outputs else loss


def main() -> None:
    student = AutoModelForCausalLM.from_pretrained(ASSETS / "student", dtype="float32")
    teacher = AutoModelForCausalLM.from_pretrained(ASSETS / "teacher", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "student")
    gold = dict(use_uld_loss=True, use_extended_uld=False, lmbda=1.0, beta=1.0, max_completion_length=24, temperature=1.0)
    options = dict(per_device_train_batch_size=32, learning_rate=1e-3, logging_steps=1, max_steps=8)
    here = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, save_strategy="no", report_to="none")
    texts = Dataset.from_json(str(ASSETS / "train.jsonl")).select(range(32))["prompt"]
    data = Dataset.from_list([{"prompt": tokenizer.bos_token + text, "completion": ""} for text in texts])
    args = GOLDConfig("runs/gold", **gold, **options, **here)
    trainer = SimCTGOLDTrainer(student, teacher, args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    for entry in trainer.state.log_history[:-1]:
        print(f"step {entry['step']}: loss {entry['loss']:.6f}")


if __name__ == "__main__":
    main()
