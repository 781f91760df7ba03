"""A trainer of models so small that a step takes milliseconds; their tokenizers are the demo's."""

import functools

import torch
from test_trainer import PROMPTS, STUDENT, TEACHER, config
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from simct import SimCTTrainer

OPTIONS = dict(max_new_tokens=6, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[])


@functools.cache
def tokenizer(name):
    return AutoTokenizer.from_pretrained(name)


def tiny_model(name, seed=0, **options):
    torch.manual_seed(seed)
    own = tokenizer(name)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, **options)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(own), max_position_embeddings=64, eos_token_id=own.eos_token_id, bos_token_id=None, **sizes
        )
    )
    return model


def tiny_trainer(tmp_path, records=PROMPTS, callbacks=(), peft_config=None, student=None, eval_dataset=None, **options):
    arguments = config(tmp_path, **{**OPTIONS, **options})
    return SimCTTrainer(
        student if student is not None else tiny_model(STUDENT), tiny_model(TEACHER), arguments, records, eval_dataset,
        processing_class=tokenizer(STUDENT), teacher_processing_class=tokenizer(TEACHER), callbacks=list(callbacks),
        peft_config=peft_config,
    )  # fmt: skip
