"""The options of a command: a value that cannot be meant is an error that names it, a file's value means what it says."""

import json

import pytest

from simct import SimCTConfig
from simct.commands.answers import AnswerArguments
from simct.commands.options import OptionParser
from simct.commands.train import RunArguments

NEEDED = "student: s\nteacher: t\ndata: d\noutput_dir: o\nuse_cpu: true\n"


def parse(tmp_path, text="", *words):
    (tmp_path / "run.yaml").write_text(NEEDED + text)
    parser = OptionParser((RunArguments, SimCTConfig), prog="simct train")
    return parser.parse(["--config", str(tmp_path / "run.yaml"), *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stop_strings", ""], "stop_strings holds '': expected texts"),
        (["--stop_strings", "\udcff"], "stop_strings holds '\\udcff'"),
        (["--temperature", "nan"], "temperature is nan: expected a number"),
        (["--temperature", "inf"], "temperature is inf: expected 0 (greedy) or more"),
        (["--eval_temperature", "inf"], "eval_temperature is inf"),
        (["--learning_rate", "nan"], "learning_rate is nan: expected a number"),
        (["--learning_rate=-1e-6"], "learning_rate is -1e-06: expected a number of at least 0"),
        (["--weight_decay", "nan"], "weight_decay is nan"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size is 0: expected at least 1"),
        (["--per_device_eval_batch_size", "0"], "per_device_eval_batch_size is 0"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps is 0"),
        (["--num_train_epochs", "0"], "num_train_epochs is 0.0: expected a number above 0"),
        (["--num_train_epochs", "inf"], "num_train_epochs is inf"),
        (["--seed", "-1"], "seed is -1"),
        (["--kv_cache_gb", "inf"], "kv_cache_gb is inf"),
        (["--vllm_gpu_memory_utilization", "1.5"], "vllm_gpu_memory_utilization is 1.5"),
        (["--model_init_kwargs", "[1]"], "model_init_kwargs is '[1]': expected a mapping"),
        (["--teacher_model_init_kwargs", '{"a": 1, "a": 2}'], "a key is there twice"),
        (["--chat_template_kwargs", "on"], "chat_template_kwargs is 'on'"),
        (["--teacher_server_kwargs", "4"], "teacher_server_kwargs is '4'"),
        (["--lr_scheduler_kwargs", "[1]"], "lr_scheduler_kwargs is '[1]'"),
        (["--bta", "0.5"], "unrecognized arguments: --bta 0.5 (did you mean --beta?)"),
        (["--beta", "half"], "argument --beta: invalid float value: 'half'"),
        (["--config"], "argument --config: expected one argument"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_values_that_cannot_be_meant_end_in_one_line(ended, words, message):
    command = ["train", "--student", "s", "--teacher", "t", "--data", "d", "--use_cpu", *words]
    result = ended(*command)
    assert result.code == 2 and result.error.startswith("simct train: error: ")
    assert message in result.error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model_init_kwargs: [1]", "model_init_kwargs is [1]: expected one value"),
        ("beta: 0.5\nbeta: 0.25", "option 'beta' is there twice"),
        ("max_steps: 2\nmax-steps: 3", "option 'max_steps' is there twice"),
        ("recipe: demo/distil", "names a recipe: expected --recipe on the command line"),
        ("config: other.yaml", "names a config: expected --config on the command line"),
        ("bta: 0.5", "'bta' is no option of simct train (did you mean beta?)"),
        ("max_steps: soon", "max_steps is 'soon': expected a whole number"),
        ("streaming: 7", "streaming is 7: expected true or false"),
        ("beta: {a: 1}", "beta is {'a': 1}: expected one value"),
        ("stop_strings: [[a]]", "stop_strings is ['a']: expected text"),
        ("optim: adamw", "optim"),
        ("model_init_kwargs: {day: 2026-01-01}", "expected what JSON can say"),
        (f"max_steps: {'9' * 5000}", "is not YAML"),
    ],
    ids=lambda value: value[:20],
)
def test_a_file_that_cannot_be_meant_names_the_file_and_the_key(ended, tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(NEEDED + text)
    result = ended("train", "--config", "run.yaml")
    assert result.code == 2 and message in result.error
    assert "run.yaml" in result.error


def test_a_file_that_is_no_text_is_named(ended, tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"beta: \xff\n")
    assert "config file 'run.yaml' is not YAML: 'utf-8' codec" in ended("train", "--config", "run.yaml").error


def test_values_that_look_like_options_are_values(tmp_path):
    _, config, _ = parse(tmp_path, 'stop_strings: ["a", "--beta", "0.25"]\nrun_name: "--max_steps=3"\n')
    assert config.stop_strings == ["a", "--beta", "0.25"] and config.run_name == "--max_steps=3"
    assert config.beta == 1.0 and config.max_steps == -1


def test_values_of_a_file_are_those_of_the_command_line(tmp_path):
    text = (
        "learning_rate: 1e-5\nmax-steps: 7\nbf16: false\nstop_strings: x\nmodel_init_kwargs: {revision: main, a: [1]}\n"
        "report_to: [none]\ndata_split: 2026-01-01\ntop_k:\nspecial_tokens: {'<eos>': '<end>'}\n"
    )
    run, config, _ = parse(tmp_path, text, "--max_steps", "9", "--streaming")
    assert (config.learning_rate, config.max_steps, config.bf16, config.stop_strings) == (1e-5, 9, False, ["x"])
    assert config.model_init_kwargs == {"revision": "main", "a": [1]} and config.top_k is None
    assert config.special_tokens == {"<eos>": "<end>"} and config.report_to in ("none", [], ["none"])
    assert (run.student, run.data_split, run.streaming) == ("s", "2026-01-01", True)


def test_a_config_is_over_a_recipe_and_the_command_line_over_both(tmp_path):
    (tmp_path / "recipe.yaml").write_text("beta: 0.1\ntop_k: 5\nmax_steps: 1\n")
    _, config, _ = parse(tmp_path, "beta: 0.2\ntop_k:\n", "--recipe", str(tmp_path / "recipe.yaml"), "--max_steps", "3")
    assert (config.beta, config.top_k, config.max_steps) == (0.2, None, 3)  # named without a value: the default


def test_options_of_python_are_checked_as_well(tmp_path):
    for options, message in (
        (dict(stop_strings="ab"), "stop_strings is 'ab': expected a list"),
        (dict(model_init_kwargs=[1]), r"model_init_kwargs is \[1\]: expected a mapping"),
        (dict(teacher_url=7), "teacher_url is 7: expected an address or a mapping"),
    ):
        with pytest.raises(ValueError, match=message):
            SimCTConfig(str(tmp_path), use_cpu=True, **options)
    assert SimCTConfig(str(tmp_path), use_cpu=True, teacher_url=json.dumps({"a": "http://b"})).teacher_url == {
        "a": "http://b"
    }
    for options, message in (
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(top_p=0.0), "top_p is 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            AnswerArguments("m", "d", "o", **options)


def test_a_limit_that_is_no_number_is_named(ended, monkeypatch):
    monkeypatch.setattr("simct.commands.eval.find_spec", lambda name: True)
    for limit in "nan", "inf":
        result = ended("eval", "nowhere", "--tasks", "gsm8k", "--limit", limit)
        assert result.code == 2 and f"limit is {limit}: expected a number of documents" in result.error
