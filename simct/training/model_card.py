"""The README.md of what a run saves: what the student is, whose it was, what the teacher could supervise, how it was trained."""

import dataclasses
import json
import warnings
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from simct.console import error_line, printable
from simct.data.prompts import prompt_of
from simct.pairing.coverage import RULES, Coverage, in_words
from simct.secrets import redact
from simct.training.groups import GROUPS

PAPER = "2605.07711"
PROMPTS = 200  # of the data, whose text the coverage is measured on
# Of a run on one machine, and nothing that another needs to know.
ELSEWHERE = ("backend", "chunk_rows", "offload_teacher", "use_cpu", "vllm_server_url", "vllm_sync_dir", "vllm_kwargs")


class ModelCards:
    """The part of `SimCTTrainer` that says what it saves. `card_notes` are more lines of the card, by their first words."""

    card_notes: dict[str, str] = {}
    _coverage: tuple[Any, Coverage | None] = (None, None)  # the data set, and what was measured on it

    def create_model_card(self, model_name: str | None = None, **metadata: Any) -> None:
        """Writes README.md into the output folder, as `push_to_hub` does; in place of the Trainer's. `metadata`: further fields of
        `huggingface_hub.ModelCardData`, such as `license`, `language` and `tags`."""
        if self.is_world_process_zero():
            self.write_card(self.args.output_dir, model_name, **metadata)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """With a card for each folder that holds a student or its adapter (PEFT's own is a form that nobody filled in)."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.write_card(output_dir if output_dir is not None else self.args.output_dir)

    def write_card(self, folder: str | Path, model_name: str | None = None, **metadata: Any) -> None:
        """README.md of a folder; what is in it says whether that is an adapter's. What fails is told: it may cost no student."""
        try:
            model_card(self, Path(folder), model_name, **metadata).save(Path(folder) / "README.md")
        except Exception as error:  # options, records and metadata of any kind
            warnings.warn(f"the card of {str(folder)!r} was not written: {error_line(error)}", stacklevel=2)

    def prompt_coverage(self) -> Coverage | None:
        """What the (first) teacher would supervise of the first prompts' own text; None where the data are streamed."""
        if self._coverage[0] is not self.train_dataset:
            texts = []
            for i in range(min(len(self.train_dataset), PROMPTS) if hasattr(self.train_dataset, "__len__") else 0):
                prompt = prompt_of(self.train_dataset[i])
                texts.append(prompt if isinstance(prompt, str) else prompt[-1]["content"])
            self._coverage = (self.train_dataset, self.pair.coverage(texts) if texts else None)
        return self._coverage[1]


def model_card(trainer, folder: Path, name: str | None = None, **metadata: Any) -> ModelCard:
    """The card of a folder that `trainer` has saved."""
    adapter = folder / "adapter_config.json"
    base = student_name(trainer)
    data = ModelCardData(
        **{
            "base_model": None if Path(base).exists() else base,  # names of the hub only
            "base_model_relation": "adapter" if adapter.is_file() else "finetune",
            "library_name": "peft" if adapter.is_file() else "transformers",
            "pipeline_tag": "text-generation",
            **metadata,
        }
    )
    tags = [metadata["tags"]] if isinstance(metadata.get("tags"), str) else list(metadata.get("tags") or ())
    data.tags = list(dict.fromkeys([*tags, "generated_from_trainer", "simct", "on-policy-distillation"]))
    parts = [
        f"# {plain(name or Path(trainer.args.hub_model_id or trainer.args.output_dir).name)}",
        what_it_is(trainer, base),
        how_to_load(adapter if adapter.is_file() else None, base),
        *results(trainer.state.log_history, (folder / "curves.png").is_file()),
        *covered(trainer),
        how_it_was_trained(trainer),
    ]
    return ModelCard(redact(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def what_it_is(trainer, base: str) -> str:
    teachers = " and ".join(f"`{plain(scorer.teacher.tokenizer.name_or_path)}`" for scorer in trainer.scorers.values())
    steps = trainer.state.global_step
    return (
        f"`{plain(base)}`, distilled from {teachers}, which {'reads' if len(trainer.scorers) == 1 else 'read'} text with another "
        f"tokenizer, on what it wrote itself in {steps:,} optimiser step{'s' * (steps != 1)} of "
        f"[SimCT](https://arxiv.org/abs/{PAPER})."
    )


def how_to_load(adapter: Path | None, base: str) -> str:
    if adapter is None:
        said, imports = "", "from transformers import AutoModelForCausalLM, AutoTokenizer"
    else:
        options = json.loads(adapter.read_text(encoding="utf-8"))
        modules = options.get("target_modules") or ()
        on = plain(modules) if isinstance(modules, str) else ", ".join(map(plain, sorted(modules)))
        rank = f", rank {options['r']}" if options.get("r") else ""
        said = (
            f"This folder holds an adapter ({plain(options.get('peft_type'))}{rank}, on {on}), not a whole model: it is loaded on "
            f"top of `{plain(base)}`, which has to be there. `simct train --merge_adapter` saves a whole model.\n\n"
        )
        imports = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer"
    kind = imports.split()[3].rstrip(",")
    return (
        f"{said}```python\n{imports}\n\n"
        f'folder = "."  # this one\nmodel = {kind}.from_pretrained(folder)\ntokenizer = AutoTokenizer.from_pretrained(folder)\n```'
    )


def results(log: list[dict[str, float]], curves: bool):
    evaluations = [row for row in log if "eval_reverse_kl_per_byte" in row]
    if evaluations or curves:
        yield "## Results"
    if evaluations:
        shown = evaluations[:1] if len(evaluations) == 1 else [evaluations[0], evaluations[-1]]
        measures = (
            ("reverse KL, nats per byte", "eval_reverse_kl_per_byte", ".4f"),
            ("right answers", "eval_accuracy", ".1%"),
            ("response length, tokens", "eval_response_length", ".1f"),
            ("responses that ended", "eval_response_ended", ".1%"),
        )
        rows = [["held-out prompts", *(f"step {row['step']}" for row in shown)], ["---"] * (1 + len(shown))]
        for title, key, form in measures:
            if all(key in row for row in shown):
                error = f"{key}_stderr"
                figures = (f"{row[key]:{form}}" + (f" ± {row[error]:{form}}" if error in row else "") for row in shown)
                rows.append([title, *figures])
        yield table(rows)
    if curves:
        yield "![What was logged, step by step](curves.png)"


def covered(trainer):
    last = next((row for row in reversed(trainer.state.log_history) if "tokens/single" in row), None)
    coverage = trainer.prompt_coverage()
    if last or coverage:
        yield "## What the teacher could supervise"
    if last:
        yield (
            f"Of the student's own tokens at the end of the run {last['tokens/single']:.1%} were in units of one token a side, "
            f"{last['tokens/longer']:.1%} in longer units, {last.get('tokens/unsupervised', 0):.1%} in none."
        )
    if coverage:
        rows = [["alignment", "one-to-one", "longer units", "lost", "why"], ["---", "---:", "---:", "---:", "---"]]
        for rule, row in coverage.rules.items():
            why = ", ".join(f"{in_words(reason)} {count:,}" for reason, count in row.dropped.items())
            rows.append([RULES[rule], f"{row.single:.1%}", f"{row.longer:.1%}", f"{row.lost:.1%}", why])
        yield f"By alignment, of the text of {coverage.texts:,} prompts ({coverage.student_tokens:,} tokens):"
        yield table(rows)


def how_it_was_trained(trainer) -> str:
    notes = [f"- {what}: `{plain(text)}`" for what, text in trainer.card_notes.items()]
    packages = ", ".join(f"{package} {version(package)}" for package in ("transformers", "torch"))
    plain_values = json.loads(json.dumps(changed_options(trainer.args), default=str))
    options = yaml.safe_dump(plain_values, sort_keys=False, allow_unicode=True, width=10_000)
    lines = [*notes, f"- Made with: SimCT {import_module('simct').__version__}, {packages}"]
    return (
        "## How it was trained\n\n"
        + "\n".join(lines)
        + "\n\nOptions other than the defaults, as `simct train --config` reads "
        f"them:\n\n```yaml\n{options}```"
    )


def changed_options(args) -> dict[str, Any]:
    """The options of a `SimCTConfig` that shape the student, where they are not the defaults; no key among them."""
    values, found = args.to_dict(), {}
    defaults = {field.name: getattr(field.default, "value", field.default) for field in dataclasses.fields(args)}
    for subject, group in GROUPS.items():
        for name in (*group.own, *group.inherited) if subject not in ("served", "saving") else ():
            if (
                name in values
                and name not in ELSEWHERE
                and (values[name] or defaults[name])
                and values[name] != defaults[name]
            ):
                found[name] = values[name]
    return found


def student_name(trainer) -> str:
    """The model that was trained from: a hub name or a folder."""
    student = trainer.accelerator.unwrap_model(trainer.model)
    student = student.get_base_model() if hasattr(student, "get_base_model") else student
    name = getattr(getattr(student, "config", None), "_name_or_path", "")
    return name or trainer.processing_class.name_or_path or type(student).__name__


def plain(text: Any) -> str:
    """A name inside a line of Markdown: what would end the code or the table around it is replaced."""
    return printable(text).replace("`", "'").replace("|", "/")


def table(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
