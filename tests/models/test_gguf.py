"""A teacher in a GGUF file, through transformers' own reader."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from simct import SimCTConfig, SimCTTrainer
from simct.data.records import read_prompts
from simct.demo import ASSETS
from simct.models.hidden import PackedSequences, response_hidden_states

gguf = pytest.importorskip("gguf")


def in_pairs(weight, heads):
    """llama.cpp's order of the rows of a rotated projection: dimension i beside i + half."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def folder(tmp_path, demo_teacher):
    """The demo's teacher, weights and tokenizer, as a GGUF file in float32."""
    config = demo_teacher.config
    writer = gguf.GGUFWriter(tmp_path / "teacher.gguf", "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    model = json.loads((ASSETS / "teacher" / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if i == 0 else gguf.TokenType.NORMAL for i in range(len(tokens))])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in demo_teacher.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        weight = weight.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = in_pairs(weight, heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path


def test_a_teacher_from_a_gguf_file(folder, demo_teacher):
    config = SimCTConfig(
        output_dir=str(folder / "out"), max_steps=1, per_device_train_batch_size=4, max_new_tokens=12, use_cpu=True,
        save_strategy="no", disable_tqdm=True, logging_steps=1, teacher_model_init_kwargs={"gguf_file": "teacher.gguf"},
    )  # fmt: skip
    student = AutoModelForCausalLM.from_pretrained(ASSETS / "student", dtype=torch.float32)
    student.name_or_path = str(ASSETS / "student")
    trainer = SimCTTrainer(student, str(folder), config, read_prompts(ASSETS / "train.jsonl")[:8])
    sequences = PackedSequences.build([[5, 9, 77]], [[300, 41, 2000, 8]])
    ours, theirs = (response_hidden_states(m, sequences) for m in (trainer.teacher.model, demo_teacher))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    trainer.train()
    (row,) = [row for row in trainer.state.log_history if "loss" in row]
    assert 0 < row["loss"] < 100 and row["tokens/unsupervised"] < 0.1
