"""`simct answers`: a model's answers to prompts, one kept for each, as data for the supervised warm-up of a student.

The paper samples 8 from the teacher and keeps the shortest correct one. What is written is read by TRL's `trl sft`, and by
`simct train` as off-policy answers.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from simct.endings import end_ids
from simct.loading import load_model, load_tokenizer
from simct.prompts import prompt_of, read_prompts, render_prompt
from simct.rollout import Sampling, make_engine

KEEP = ("shortest_correct", "shortest")
COLUMNS = ("messages", "prompt_completion")
BATCH = 64  # prompts between two writes

Grade = Callable[[str, str], bool]  # (response, answer) -> whether it is right


@dataclass
class AnswerArguments:
    """What `simct answers` reads."""

    model: str = field(metadata={"help": "Who answers: a folder or hub name."})
    data: str = field(
        metadata={"help": "A JSONL file with `prompt` or `messages`, and `answer` where one can be checked."}
    )
    output: str = field(metadata={"help": "JSONL file to write."})
    samples: int = field(default=8, metadata={"help": "Answers sampled to each prompt."})
    keep: str = field(default="shortest_correct", metadata={"help": f"Which one is kept: {', '.join(KEEP)}."})
    columns: str = field(
        default="messages", metadata={"help": "messages, or prompt_completion with the answer in a column of its own."}
    )
    max_new_tokens: int = field(default=4096, metadata={"help": "Longest answer, in tokens."})
    temperature: float = field(default=0.6, metadata={"help": "Sampling temperature; 0 is greedy."})
    top_p: float = field(default=0.95, metadata={"help": "Nucleus sampling."})
    prompt_format: str = field(default="auto", metadata={"help": "As in simct train."})
    rollout_engine: str = field(default="auto", metadata={"help": "As in simct train."})
    dtype: str = field(default="bfloat16", metadata={"help": "Precision of the weights."})
    seed: int = field(default=0, metadata={"help": "Of the samples."})

    def __post_init__(self) -> None:
        for name, choices in (("keep", KEEP), ("columns", COLUMNS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(map(repr, choices))}")
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}: expected at least 1")
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype is {self.dtype!r}: expected bfloat16, float16 or float32")


def choose(texts: Sequence[str | None], answer: str | None, keep: str, grade: Grade | None) -> int | None:
    """Which of a prompt's responses is kept; None if none can be.

    Args:
        texts: the responses, None for one that did not come to its end.
        answer: the right answer; with None nothing can be checked, and the shortest is kept.
        keep: one of `KEEP`.
        grade: decides whether a response is right.
    """
    order = sorted((len(text), i) for i, text in enumerate(texts) if text)
    if keep == "shortest" or answer is None:
        return order[0][1] if order else None
    return next((i for _, i in order if grade(texts[i], answer)), None)  # graded only until one is right


def write_answers(arguments: AnswerArguments, *, grade: Grade | None = None, progress=None) -> Counter[str]:
    """Samples, chooses and writes. Returns what became of the prompts: kept, kept_unchecked (no `answer`), no_ended_answer,
    no_correct_answer.

    The output is written beside its place and renamed into it at the end. `progress` is called with the prompts done and their
    number.

    Raises:
        ValueError: data, model or tokenizer that cannot be read, an output that cannot be written, answers to check but nothing
            installed to check them with.
    """
    records = read_prompts(arguments.data)
    checked = arguments.keep == "shortest_correct" and any(record.get("answer") is not None for record in records)
    if checked and grade is None:
        from simct.grading import check_math_verify, is_correct

        check_math_verify()
        grade = is_correct
    output = Path(arguments.output)
    partial = output.with_name(output.name + ".partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        target = partial.open("w", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"output {arguments.output!r} cannot be written: {error}") from error
    try:
        with target:
            counts = _write(arguments, records, checked, grade, target, progress)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, output)
    return counts


def _write(
    arguments: AnswerArguments, records: list[dict[str, Any]], checked: bool, grade, target, progress
) -> Counter[str]:
    model = load_model(arguments.model, "model", dtype=getattr(torch, arguments.dtype)).eval()
    tokenizer = load_tokenizer(None, model, "model")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    ends = end_ids(tokenizer, model.generation_config, chat=arguments.prompt_format != "text")
    sampling = Sampling(
        ends, tokenizer.pad_token_id or 0, arguments.max_new_tokens, arguments.temperature, arguments.top_p
    )
    prompts = [prompt_of(record) for record in records]
    rendered = [render_prompt(prompt, tokenizer, arguments.prompt_format) for prompt in prompts]
    engine = make_engine(model, arguments.rollout_engine)
    counts: Counter[str] = Counter()
    for start in range(0, len(records), BATCH):
        batch = range(start, min(start + BATCH, len(records)))
        asked = [rendered[i] for i in batch for _ in range(arguments.samples)]
        responses = engine.generate(asked, sampling, seed=arguments.seed * 1_000_003 + start)
        texts = [
            tokenizer.decode(response.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if response.finish_reason == "stop"
            else None
            for response in responses
        ]
        for n, i in enumerate(batch):
            own = texts[n * arguments.samples : (n + 1) * arguments.samples]
            answer = records[i].get("answer")
            answer = None if answer is None or not checked else str(answer)
            chosen = choose(own, answer, arguments.keep, grade)
            if chosen is None:
                counts["no_correct_answer" if any(own) else "no_ended_answer"] += 1
                continue
            counts["kept" if answer is not None else "kept_unchecked"] += 1
            line = as_columns(prompts[i], own[chosen], arguments.columns)
            target.write(json.dumps(line, ensure_ascii=False) + "\n")
        if progress is not None:
            progress(batch.stop, len(records))
    return counts


def as_columns(prompt: str | list[dict[str, str]], text: str, columns: str) -> dict[str, Any]:
    """One record of the output."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answer = [{"role": "assistant", "content": text}]
    return {"messages": messages + answer} if columns == "messages" else {"prompt": messages, "completion": answer}
