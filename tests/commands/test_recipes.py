"""The recipes hold real options, the paper's numbers, and nothing else."""

import dataclasses
import re
from functools import cache
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from simct import SimCTConfig
from simct.commands.cli import RunArguments
from simct.commands.recipe import (
    COMMANDS,
    FOLDER,
    STEPS,
    find_recipe,
    list_recipes,
    read_options,
    recipe_summary,
    recipe_table,
)

PAIRS = ("qwen2.5-7b_gemma-2-2b", "qwen2.5-7b_phi-4-mini", "phi-4-mini_gemma-2-2b")
DISTIL = [name for name in list_recipes() if name.split("/")[1].startswith("distil")]

# Options of SimCTConfig that are being added beside the recipes: to be deleted when they are there.
NEW_FIELDS: set[str] = set()
NEW_VALUES: set[tuple[str, str]] = set()


def names_of(*classes) -> set[str]:
    return {field.name for cls in classes for field in dataclasses.fields(cls) if field.init}


def options_of(name: str) -> dict:
    return read_options(find_recipe(name))


def distil_config(options: dict, tmp_path) -> SimCTConfig:
    known = {k: v for k, v in options.items() if k in names_of(SimCTConfig) and (k, v) not in NEW_VALUES}
    # The card of the recipe is not the machine of the test.
    return SimCTConfig(**{**known, "output_dir": str(tmp_path), "bf16": False, "use_cpu": True})


def test_every_pair_has_every_step():
    assert list_recipes() == ["demo/distil", *(f"{pair}/{step}" for pair in sorted(PAIRS) for step in STEPS)]


@pytest.mark.parametrize("name", DISTIL)
def test_options_of_a_distillation_are_options_of_simct_train(name, tmp_path, recwarn):
    options = options_of(name)
    unknown = set(options) - names_of(SimCTConfig, RunArguments) - NEW_FIELDS
    assert not unknown
    config = distil_config(options, tmp_path)
    for key in set(options) & names_of(SimCTConfig) - {"output_dir", "bf16", "use_cpu"}:
        value = getattr(config, key)
        assert str(getattr(value, "value", value)) == str(options[key]), key
    assert not [str(found.message) for found in recwarn if issubclass(found.category, FutureWarning)]


@pytest.mark.parametrize("name", DISTIL)
def test_changes_named_in_comments_are_options_too(name, tmp_path):
    text = find_recipe(name).read_text()
    named = re.findall(r"^# +(\w+): ([\w.]+)(?=  |$)", text, flags=re.MULTILINE)
    assert len(named) >= (2 if name.startswith("demo") else 8)
    for key, value in named:
        value = yaml.safe_load(value)
        assert key in names_of(SimCTConfig) | NEW_FIELDS, key
        assert value != options_of(name).get(key), "no change"
        distil_config({**options_of(name), key: value}, tmp_path)


@pytest.mark.parametrize("pair", PAIRS)
def test_table_4_and_the_public_scripts(pair):
    paper, public = options_of(f"{pair}/distil"), options_of(f"{pair}/distil-public")
    table_4 = {"learning_rate": 1e-6, "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "num_train_epochs": 2,
               "temperature": 0.6, "top_p": 0.95, "max_new_tokens": 4096, "bf16": True, "num_generations": 1,
               "beta": 1.0, "score": "mean_logprob", "alignment": "bytes", "units": "all"}  # fmt: skip
    assert {key: paper[key] for key in table_4} == table_4
    assert paper["per_device_train_batch_size"] * paper["gradient_accumulation_steps"] == 64
    changed = {key for key in paper | public if paper.get(key) != public.get(key)}
    assert changed == {"output_dir", "learning_rate", "num_train_epochs", "top_p", "max_new_tokens", "score", "alignment",
                       "on_bad_row"}  # fmt: skip
    assert (public["learning_rate"], public["num_train_epochs"], public["top_p"]) == (5e-7, 1, 1.0)
    assert (public["score"], public["alignment"]) == ("mean_logit", "anchored")
    answers, sft = options_of(f"{pair}/answers"), options_of(f"{pair}/sft")
    assert (answers["samples"], answers["keep"]) == (8, "shortest_correct")
    assert (sft["learning_rate"], sft["num_train_epochs"]) == (2e-6, 2)


@pytest.mark.parametrize("pair", PAIRS)
def test_steps_hand_over_to_one_another(pair):
    answers, sft, distil, public, evaluation = (options_of(f"{pair}/{step}") for step in STEPS)
    assert answers["output"] == f"{sft['dataset_name']}/train.jsonl"
    assert distil["student"] == public["student"] == sft["output_dir"]
    assert distil["teacher"] == public["teacher"] == answers["model"]
    assert evaluation["checkpoint"] == distil["output_dir"] != public["output_dir"]
    assert (answers["columns"] == "messages") == ("assistant_only_loss" in sft)


def test_the_demos_recipe_finds_its_own_files():
    options = options_of("demo/distil")
    assert all(Path(options[name], "tokenizer.json").is_file() for name in ("student", "teacher"))
    assert Path(options["data"]).is_file()


def test_pairs_differ_in_their_models_only():
    def settings(pair: str, step: str) -> dict:
        options = options_of(f"{pair}/{step}")
        for key in (
            "student",
            "teacher",
            "model",
            "model_name_or_path",
            "dataset_name",
            "output_dir",
            "output",
            "checkpoint",
        ):
            options.pop(key, None)
        return options

    first, second, third = PAIRS
    for step in STEPS:
        assert settings(first, step) == settings(third, step)
    # Phi-4-mini's optimiser states do not fit in 32 bits.
    assert settings(second, "distil") == {**settings(first, "distil"), "optim": "adamw_bnb_8bit"}


@cache
def trl_fields() -> set[str]:
    trl = pytest.importorskip("trl")
    return names_of(trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig)


@pytest.mark.parametrize("pair", PAIRS)
def test_sft_options_are_trl_options(pair, tmp_path):
    trl_names = trl_fields()
    from trl import SFTConfig

    options = options_of(f"{pair}/sft")
    assert not set(options) - trl_names
    known = {key: value for key, value in options.items() if key in names_of(SFTConfig)}
    config = SFTConfig(**{**known, "output_dir": str(tmp_path), "bf16": False, "use_cpu": True})
    assert config.learning_rate == 2e-6 and config.num_train_epochs == 2
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 64


@pytest.mark.parametrize("pair", PAIRS)
def test_evaluation_options_are_options_of_simct_eval(pair):
    command = pytest.importorskip("simct.commands.eval")
    options = options_of(f"{pair}/eval")
    assert set(options) - {"checkpoint"} <= names_of(command.EvalArguments)
    assert command.task_names(options["tasks"]) == ["gsm8k", "minerva_math500", "mbpp"]


def test_an_unknown_name_is_answered_with_what_there_is(tmp_path):
    with pytest.raises(ValueError) as raised:
        find_recipe("qwen2.5-7b_gemma-2b/distil")
    message = str(raised.value)
    assert "did you mean qwen2.5-7b_gemma-2-2b/distil?" in message
    assert all(name in message for name in list_recipes())
    for name in "../recipe", "", "nowhere.yaml", str(tmp_path):
        with pytest.raises(ValueError, match="does not exist"):
            find_recipe(name)
    own = tmp_path / "own.yaml"
    own.write_text("beta: 0.5\n")
    assert read_options(find_recipe(str(own))) == {"beta": 0.5}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- beta\n", "holds list: expected a mapping"),
        ("beta: [1\n", "is not YAML"),
        ("units: all\nunits: single\n", "'units' is there twice"),
        ("1: 2\n", "expected a mapping of options"),
        ("", "holds NoneType"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_options(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_options(tmp_path / "missing.yaml")


def test_the_table_names_every_recipe_and_how_to_run_it(capsys):
    Console(width=200).print(recipe_table())
    shown = capsys.readouterr().out
    assert all(name in shown for name in list_recipes())
    assert all(command in shown for command in COMMANDS.values())
    assert all(recipe_summary(FOLDER / f"{name}.yaml") for name in list_recipes())
