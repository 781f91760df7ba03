"""The README.md of what a run saves says what it is, how it loads and how it was trained, and holds no key."""

import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from tiny import tiny_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from simct import SimCTConfig
from simct.pairing.coverage import RULES


def code_of(card: ModelCard, language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", card.text, re.DOTALL | re.MULTILINE)
    return found


def test_the_card_of_a_student(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, beta=0.5, max_steps=3, hub_token="hf_" + "s" * 20, save_strategy="no")
    folder = Path(trainer.args.output_dir)
    trainer.card_notes = {"Recipe": "demo/distil", "Data": "a `b|c`\n# forged"}
    trainer.state.log_history = [
        {"step": 0, "eval_reverse_kl_per_byte": 0.5, "eval_reverse_kl_per_byte_stderr": 0.25},
        {"step": 3, "tokens/single": 0.75, "tokens/longer": 0.25},
        {"step": 3, "eval_reverse_kl_per_byte": 0.125, "eval_reverse_kl_per_byte_stderr": 0.0625},
    ]
    trainer.save_model()
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers" and card.data.base_model_relation == "finetune"
    assert {"simct", "generated_from_trainer"} <= set(card.data.tags) and card.data.pipeline_tag == "text-generation"
    assert "| reverse KL, nats per byte | 0.5000 ± 0.2500 | 0.1250 ± 0.0625 |" in card.text
    assert "75.0% were in units of one token a side, 25.0% in longer units, 0.0% in none" in card.text
    assert all(f"| {name} | " in card.text for name in RULES.values())
    assert "- Recipe: `demo/distil`" in card.text and "\n# forged" not in card.text
    options = yaml.safe_load(code_of(card, "yaml"))
    assert options["beta"] == 0.5 and options["max_steps"] == 3 and "output_dir" not in options
    config = SimCTConfig(**options, output_dir=str(tmp_path / "again"), use_cpu=True)
    assert config.beta == 0.5 and config.max_new_tokens == trainer.args.max_new_tokens
    assert "sss" not in card.content
    assert "curves.png" not in card.text  # there are none yet
    (folder / "curves.png").write_bytes(b"")
    trainer.create_model_card("A name", license="apache-2.0", tags="mine")
    card = ModelCard.load(folder / "README.md")
    assert "# A name\n" in card.text and "](curves.png)" in card.text
    assert card.data.license == "apache-2.0" and card.data.tags[0] == "mine"
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(code_of(card, "python"), names)
    assert len(names["tokenizer"]) == names["model"].config.vocab_size


def test_a_card_that_cannot_be_written_costs_no_student(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no card today")

    trainer = tiny_trainer(tmp_path, save_strategy="no")
    monkeypatch.setattr("simct.training.model_card.model_card", fail)
    with pytest.warns(UserWarning, match="card of .* was not written: no card today"):
        trainer.save_model()
    assert AutoModelForCausalLM.from_pretrained(trainer.args.output_dir).num_parameters() > 0


def test_an_adapters_folder_says_what_it_is(tmp_path, monkeypatch):
    from peft import LoraConfig

    from simct.demo import ASSETS

    student = AutoModelForCausalLM.from_pretrained(ASSETS / "student")
    adapter = LoraConfig(r=2, target_modules=["v_proj", "q_proj"])
    trainer = tiny_trainer(
        tmp_path, student=student, peft_config=adapter, max_steps=1, save_strategy="steps", save_steps=1
    )
    trainer.train()
    trainer.save_model()
    saved = Path(trainer.args.output_dir)
    for folder in saved, saved / "checkpoint-1":
        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == "peft" and card.data.base_model_relation == "adapter"
        assert "This folder holds an adapter (LORA, rank 2, on q_proj, v_proj), not a whole model" in card.text
        assert f"`{ASSETS / 'student'}`" in card.text and "in 1 optimiser step of" in card.text
        assert "More Information Needed" not in card.text
    monkeypatch.chdir(saved)
    names: dict = {}
    exec(code_of(card, "python"), names)
    assert names["model"].peft_config["default"].r == 2
    trainer.save_merged(str(tmp_path / "merged"))
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert card.data.library_name == "transformers" and "adapter" not in card.text
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == student.config.vocab_size


@pytest.mark.parametrize("option", ["gradient_checkpointing", "activation_checkpointing"])
def test_activations_computed_again_go_by_either_name(tmp_path, option, recwarn):
    if not hasattr(SimCTConfig, option):
        pytest.skip("of transformers 5.21 and later")
    config = SimCTConfig(str(tmp_path), use_cpu=True, **{option: True})
    assert config.gradient_checkpointing and not [found for found in recwarn if found.category is FutureWarning]
