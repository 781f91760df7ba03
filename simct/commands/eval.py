"""`simct eval`: hands a checkpoint to lm-evaluation-harness, prints its scores and writes them to a file."""

import difflib
import json
import math
import os
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from simct.commands.options import OptionParser
from simct.console import console, error_line, printable
from simct.files import check_file, write_json

# What the paper calls its benchmarks, and what the harness does. (Every other name is the harness's own.)
TASKS = {"gsm8k": "gsm8k", "math500": "minerva_math500", "math-500": "minerva_math500", "mbpp": "mbpp"}
ABSENT = {
    "livecodebench": "LiveCodeBench is not among the harness's tasks: run its own code (github.com/LiveCodeBench/LiveCodeBench)"
}


@dataclass
class EvalArguments:
    """What `simct eval` reads."""

    tasks: str = field(
        metadata={
            "help": "Comma-separated: gsm8k, math500, mbpp, any task or group of the harness, or the path of a task's YAML."
        }
    )
    output: str | None = field(default=None, metadata={"help": "Write all that the harness reports to this JSON file."})
    limit: float | None = field(
        default=None,
        metadata={"help": "Only so many documents of each task (below 1: a share of them). For trying out."},
    )
    num_fewshot: int | None = field(
        default=None, metadata={"help": "Examples before each question; the task says if not given."}
    )
    batch_size: str = field(default="8", metadata={"help": "Sequences at a time, or auto."})
    device: str | None = field(
        default=None, metadata={"help": "cpu, cuda, cuda:1, mps ...; the first GPU if there is one."}
    )
    dtype: str = field(default="auto", metadata={"help": "Precision of the weights: auto, bfloat16, float16, float32."})
    apply_chat_template: bool = field(default=False, metadata={"help": "Ask in the checkpoint's own chat template."})
    system_instruction: str | None = field(default=None, metadata={"help": "System prompt."})
    gen_kwargs: str | None = field(
        default=None,
        metadata={"help": "Generation options of all tasks: do_sample=True,temperature=0.6,max_gen_toks=1024."},
    )
    include_path: str | None = field(default=None, metadata={"help": "Folder with more tasks, as YAML."})
    log_samples: bool = field(default=False, metadata={"help": "Every document and response in the output file, too."})
    confirm_run_unsafe_code: bool = field(
        default=False,
        metadata={"help": "Run code that the model wrote on this machine (mbpp needs it): use a sandbox."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run Python code that comes with the checkpoint."})


def main(argv: list[str]) -> dict[str, Any] | None:
    """Evaluates and returns what the harness reports (None in all processes but the first of several).

    ValueError, before a model is loaded: lm-evaluation-harness is not installed, an unknown task or one that cannot be loaded,
    no model in the folder, an output that cannot be written.
    """
    parser = OptionParser(EvalArguments, prog="simct eval", description=__doc__)
    parser.add_argument("checkpoint", help="folder or hub name of a model, or of a LoRA adapter")
    options, rest = parser.parse(argv)
    if find_spec("lm_eval") is None:
        raise ValueError("simct eval needs lm-evaluation-harness, which is not installed: pip install 'simct[eval]'")
    check(options)
    model_args = checkpoint_arguments(rest.checkpoint)
    if options.confirm_run_unsafe_code:
        os.environ.setdefault("HF_ALLOW_CODE_EVAL", "1")
    with console.status("looking up the tasks"):
        tasks = load_tasks(task_names(options.tasks), options)
    results = evaluate(model_args, tasks, options)
    if results is None:
        return None
    results.setdefault("config", {}).update(checkpoint=rest.checkpoint, **model_args)
    if options.output:
        write_results(results, options.output)
    console.print(results_table(results, rest.checkpoint))
    if options.limit is not None:
        console.print(f"with --limit {options.limit:g}: no score to report", style="yellow", highlight=False)
    if options.output:
        console.print(f"results: {printable(options.output)}", highlight=False, soft_wrap=True)
    return results


def check(options: EvalArguments) -> None:
    """ValueError for an option out of its range, or an output that cannot be written."""
    limit = options.limit
    if limit is not None and not (0 < limit < 1 or 1 <= limit < math.inf and limit == int(limit)):
        raise ValueError(f"limit is {limit:g}: expected a number of documents, or a share between 0 and 1")
    if not (options.batch_size.startswith("auto") or options.batch_size.isdecimal() and int(options.batch_size) > 0):
        raise ValueError(f"batch_size is {options.batch_size!r}: expected a number above 0, or auto")
    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise ValueError(f"include_path {options.include_path!r} is no folder: expected one with tasks as YAML")
    if options.output is not None:
        check_file(options.output)


def checkpoint_arguments(checkpoint: str) -> dict[str, str]:
    """What the harness is told of a checkpoint: `pretrained`, and for an adapter of PEFT `peft` and the base as `pretrained`.
    ValueError for a folder that holds neither."""
    folder = Path(checkpoint).expanduser()
    if not folder.is_dir():
        if folder.exists() or checkpoint.startswith((".", "/", "~")) or checkpoint.count("/") > 1:
            raise ValueError(f"checkpoint {checkpoint!r} is no folder: expected one with a model, or a hub name")
        return {"pretrained": checkpoint}
    if (folder / "adapter_config.json").is_file():
        try:
            base = json.loads((folder / "adapter_config.json").read_text("utf-8")).get("base_model_name_or_path")
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"checkpoint {checkpoint!r} has an adapter_config.json that cannot be read: {error}"
            ) from error
        if not base:
            raise ValueError(
                f"checkpoint {checkpoint!r} is an adapter that does not name its base model: expected base_model_name_or_path"
            )
        own = {"tokenizer": str(folder)} if (folder / "tokenizer_config.json").is_file() else {}
        return {"pretrained": base, "peft": str(folder), **own}
    if not (folder / "config.json").is_file():
        inside = sorted(path.name for path in folder.glob("checkpoint-*"))
        hint = f"; it holds {', '.join(inside)}" if inside else ""
        raise ValueError(
            f"checkpoint {checkpoint!r} holds no model: expected a config.json or an adapter_config.json in it{hint}"
        )
    return {"pretrained": str(folder)}


def task_names(listed: str) -> list[str]:
    """The harness's names of the tasks. ValueError if there is none, or for a benchmark that the harness does not have."""
    names = [name.strip() for name in listed.split(",") if name.strip()]
    if not names:
        raise ValueError(f"tasks is {listed!r}: expected names, separated by commas")
    for name in names:
        for prefix, problem in ABSENT.items():
            if name.lower().startswith(prefix):
                raise ValueError(f"task {name!r}: {problem}")
    return list(dict.fromkeys(TASKS.get(name.lower(), name) for name in names))


def load_tasks(names: list[str], options: EvalArguments) -> list:
    """The tasks and groups, as the harness's objects. ValueError for a name it does not know, or data it cannot load."""
    from lm_eval.tasks import TaskManager

    def unknown(manager: TaskManager) -> list[str]:
        return [name for name in names if name not in manager.all_tasks and not Path(name).is_file()]

    # The harness takes many seconds to index its own tasks: not where all that is asked for are the user's.
    manager = TaskManager(include_path=options.include_path, include_defaults=False)
    if unknown(manager):
        manager = TaskManager(include_path=options.include_path)
    if missing := unknown(manager):
        near = difflib.get_close_matches(missing[0], manager.all_tasks, n=5)
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise ValueError(
            f"task {missing[0]!r} is unknown to lm-evaluation-harness: expected one that `lm-eval ls tasks` lists{hint}"
        )
    tasks = []
    for name in names:
        try:
            loaded = manager.load([name])
        except Exception as error:  # each task brings its own code, data and requirements
            raise ValueError(f"task {name!r} cannot be loaded: {unsafe_hint(error, options)}") from error
        tasks += [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()
        for task in loaded["tasks"].values():
            if getattr(task, "UNSAFE_CODE", False) and not options.confirm_run_unsafe_code:
                raise ValueError(f"task {name!r} {UNSAFE}")
    return tasks


UNSAFE = "runs code that the model writes: expected --confirm_run_unsafe_code, in a sandbox"


def unsafe_hint(error: Exception, options: EvalArguments) -> str:
    if "HF_ALLOW_CODE_EVAL" in str(error) and not options.confirm_run_unsafe_code:
        return f"it {UNSAFE}"
    return f"{type(error).__name__}: {error}"


def evaluate(model_args: dict[str, str], tasks: list, options: EvalArguments) -> dict[str, Any] | None:
    """`lm_eval.simple_evaluate` on the checkpoint. ValueError if that cannot be loaded, or has no chat template but needs one."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    batch_size = int(options.batch_size) if options.batch_size.isdecimal() else options.batch_size
    device = {} if options.device is None else {"device": options.device}
    try:
        model = HFLM(
            **model_args,
            **device,
            batch_size=batch_size,
            dtype=options.dtype,
            trust_remote_code=options.trust_remote_code,
        )
    except Exception as error:  # a broken file of weights or of a tokenizer has errors of its own
        raise ValueError(
            f"checkpoint {model_args.get('peft', model_args['pretrained'])!r} cannot be loaded: {error_line(error)}"
        ) from error
    has_template = bool(model.tokenizer.chat_template)
    if options.apply_chat_template and not has_template:
        raise ValueError("apply_chat_template is set, but the checkpoint's tokenizer has no chat template")
    if has_template and not options.apply_chat_template:
        console.print(
            "The checkpoint has a chat template, which is not used without --apply_chat_template.", style="yellow"
        )
    limit = options.limit
    return simple_evaluate(
        model=model,
        tasks=tasks,
        num_fewshot=options.num_fewshot,
        batch_size=batch_size,
        device=options.device,
        limit=limit if limit is None or limit < 1 else int(limit),
        log_samples=options.log_samples,
        system_instruction=options.system_instruction,
        apply_chat_template=options.apply_chat_template,
        gen_kwargs=options.gen_kwargs,
        confirm_run_unsafe_code=options.confirm_run_unsafe_code,
        task_manager=TaskManager(include_defaults=False),  # the tasks are there: its own need not be indexed again
    )


def results_table(results: dict[str, Any], checkpoint: str) -> Table:
    """Task, metric (with the filter that read the responses), value ± standard error, and how many documents there were."""
    table = Table(title=Text(f"lm-evaluation-harness: {printable(checkpoint)}"))
    for column, justify in (("task", "left"), ("metric", "left"), ("value", "right"), ("documents", "right")):
        table.add_column(column, justify=justify)
    for task, scores in results["results"].items():
        documents = results.get("n-samples", {}).get(task, {}).get("effective", "")
        for key, value in scores.items():
            metric, _, taken = key.partition(",")
            if not taken or metric.endswith("_stderr"):
                continue
            error = scores.get(f"{metric}_stderr,{taken}")
            shown = f"{value:.4f}" if isinstance(value, float) else str(value)
            shown += f" ± {error:.4f}" if isinstance(error, float) else ""
            table.add_row(
                Text(printable(task)), metric if taken == "none" else f"{metric} ({taken})", shown, str(documents)
            )
    return table


def write_results(results: dict[str, Any], output: str) -> None:
    from lm_eval.utils import handle_non_serializable

    write_json(output, results, indent=2, ensure_ascii=False, default=handle_non_serializable)
