"""`simct eval`: real runs of lm-evaluation-harness on a task of our own, without a network."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from simct.commands import eval as eval_command
from simct.commands.eval import checkpoint_arguments, main, task_names
from simct.demo import ASSETS

STUDENT = str(ASSETS / "student")
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["</nothing>"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
unsafe_code: {unsafe}
"""
QUESTIONS = ["Return the", "This method is called", "If the"]


def greedy(model, question: str) -> str:
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    inputs = tokenizer(question, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.fixture
def task(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "tasks").mkdir()

    def make(answers, name="own", unsafe="false"):
        data = tmp_path / f"{name}.jsonl"
        records = [{"question": q, "answer": a} for q, a in zip(QUESTIONS, answers, strict=True)]
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        (tmp_path / "tasks" / f"{name}.yaml").write_text(TASK.format(name=name, data=data, unsafe=unsafe))
        return ["--tasks", name, "--include_path", "tasks", "--device", "cpu"]

    return make


def test_a_checkpoint_is_scored_and_the_results_are_written(task, demo_student, capsys):
    first, second = (greedy(demo_student, q) for q in QUESTIONS[:2])
    arguments = task([first, second, "something else"])
    results = main([STUDENT, *arguments, "--output", "out/scores.json", "--batch-size", "2", "--dtype", "float32"])
    assert results["results"]["own"]["exact_match,none"] == pytest.approx(2 / 3)
    written = json.loads(Path("out/scores.json").read_text())
    assert written["results"]["own"]["exact_match,none"] == pytest.approx(2 / 3)
    assert written["config"]["checkpoint"] == STUDENT
    assert [path.name for path in Path("out").iterdir()] == ["scores.json"]
    shown = capsys.readouterr().out
    assert "0.6667 ± 0.3333" in shown and "exact_match" in shown and "--limit" not in shown


def test_an_adapter_is_put_on_its_base_and_a_limit_is_said(task, demo_student, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    base = greedy(demo_student, QUESTIONS[0])
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32), config)
    adapted.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(STUDENT).save_pretrained(tmp_path / "adapter")
    answer = greedy(adapted, QUESTIONS[0])
    assert answer != base
    results = main([str(tmp_path / "adapter"), *task([answer, "", ""]), "--limit", "1", "--dtype", "float32"])
    assert results["results"]["own"]["exact_match,none"] == 1
    assert results["n-samples"]["own"]["effective"] == 1
    assert "--limit 1" in capsys.readouterr().out


def test_what_cannot_be_evaluated_is_named_before_a_model_is_loaded(task, tmp_path, monkeypatch):
    from lm_eval import tasks

    def own_tasks_only(include_path=None, include_defaults=True, manager=tasks.TaskManager):
        return manager(include_path=include_path, include_defaults=False)  # the whole index takes many seconds

    monkeypatch.setattr(tasks, "TaskManager", own_tasks_only)
    monkeypatch.setattr("lm_eval.models.huggingface.HFLM", lambda **kwargs: pytest.fail("a model was loaded"))
    good = task(["", "", ""])
    task(["", "", ""], name="code", unsafe="true")
    gone = task(["", "", ""], name="gone")
    (tmp_path / "gone.jsonl").unlink()
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    for arguments, message in (
        ([STUDENT, *good, "--tasks", "owm"], "task 'owm' is unknown to .*; near it are own"),
        ([STUDENT, *good, "--tasks", "livecodebench_v6"], "LiveCodeBench is not among"),
        ([STUDENT, *good, "--tasks", ","], "tasks is ','"),
        ([STUDENT, *good, "--tasks", "code"], "runs code that the model writes: expected --confirm_run_unsafe_code"),
        ([STUDENT, *gone], "task 'gone' cannot be loaded: "),
        ([STUDENT, *good, "--limit", "1.5"], "limit is 1.5"),
        ([STUDENT, *good, "--batch_size", "0"], "batch_size is '0'"),
        ([STUDENT, *good, "--include_path", "nowhere"], "include_path 'nowhere' is no folder"),
        ([STUDENT, *good, "--output", str(tmp_path)], "cannot be written: it is a folder"),
        (["run", *good], "'run' holds no model: .*; it holds checkpoint-5"),
        (["./nowhere", *good], "'./nowhere' is no folder"),
    ):
        with pytest.raises(ValueError, match=message):
            main(arguments)


def test_a_checkpoint_that_does_not_load_is_named(task, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="checkpoint '.*broken' cannot be loaded"):
        main([str(tmp_path / "broken"), *task(["", "", ""])])
    with pytest.raises(
        ValueError, match="apply_chat_template is set, but the checkpoint's tokenizer has no chat template"
    ):
        main([STUDENT, *task(["", "", ""]), "--apply-chat-template"])


def test_the_papers_names_are_tasks_of_the_harness():
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    names = task_names("gsm8k, MATH-500,mbpp,math500")
    assert names == ["gsm8k", "minerva_math500", "mbpp"]
    folder = Path(lm_eval.__file__).parent / "tasks"
    folders = [folder / name for name in ("gsm8k", "minerva_math", "hendrycks_math", "mbpp")]
    assert set(names) <= set(TaskManager(include_path=folders, include_defaults=False).all_tasks)


def test_a_missing_harness_is_named(monkeypatch):
    monkeypatch.setattr(eval_command, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'simct\[eval\]'"):
        main([STUDENT, "--tasks", "gsm8k"])


def test_an_adapter_without_a_base_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="does not name its base model"):
        checkpoint_arguments(str(tmp_path))
