"""`simct answers`: a model's answers to prompts, one kept for each, as data for the supervised warm-up of a student.

The paper samples 8 from the teacher and keeps the shortest correct one. What is written is read by TRL's `trl sft`, and by
`simct train` as off-policy answers.
"""

import hashlib
import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from simct.commands.journal import Journal
from simct.commands.options import OptionParser
from simct.console import before_work, console, printable
from simct.data.prompts import PROMPT_FORMATS, Prompt, prompt_of, render_prompt, tools_of
from simct.data.records import load_records, place_of, rows
from simct.files import check_file, is_ordinary, replaced
from simct.models.loading import load_generation_config, load_model, load_tokenizer
from simct.pairing.endings import end_ids
from simct.rollouts.engines import vllm_of_folder
from simct.rollouts.protocol import ENGINES, IN_PROCESS, Sampling
from simct.rollouts.transformers_engines import make_engine
from simct.secrets import read_address

KEEP = ("shortest_correct", "shortest")
COLUMNS = ("messages", "prompt_completion")
BATCH = 64  # prompts between two writes

Grade = Callable[[str, str], bool]  # (response, answer) -> whether it is right


@dataclass
class AnswerArguments:
    """What `simct answers` reads."""

    model: str = field(metadata={"help": "Who answers: a folder or hub name."})
    data: str = field(
        metadata={
            "help": "`prompt` or `messages`, and `answer` where one can be checked: JSONL, Parquet, a folder or a hub data set."
        }
    )
    output: str = field(metadata={"help": "JSONL file to write."})
    data_split: str = field(default="train", metadata={"help": "Split of a folder or hub data set."})
    samples: int = field(default=8, metadata={"help": "Answers sampled to each prompt."})
    keep: str = field(default="shortest_correct", metadata={"help": f"Which one is kept: {', '.join(KEEP)}."})
    columns: str = field(
        default="messages", metadata={"help": "messages, or prompt_completion with the answer in a column of its own."}
    )
    max_new_tokens: int = field(default=4096, metadata={"help": "Longest answer, in tokens."})
    temperature: float = field(default=0.6, metadata={"help": "Sampling temperature; 0 is greedy."})
    top_p: float = field(default=0.95, metadata={"help": "Nucleus sampling."})
    prompt_format: str = field(default="auto", metadata={"help": "As in simct train."})
    rollout_engine: str = field(default="auto", metadata={"help": f"Who samples: {', '.join(ENGINES)}."})
    vllm_server_url: str | None = field(
        default=None,
        metadata={"help": "rollout_engine=vllm-server: where one serves the model, http://host:port."},
    )
    dtype: str = field(default="bfloat16", metadata={"help": "Precision of the weights."})
    seed: int = field(default=0, metadata={"help": "Of the samples."})

    def __post_init__(self) -> None:
        for name, choices in (
            ("keep", KEEP),
            ("columns", COLUMNS),
            ("prompt_format", PROMPT_FORMATS),
            ("rollout_engine", ENGINES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(map(repr, choices))}")
        if self.rollout_engine == "vllm-server" and not self.vllm_server_url:
            raise ValueError(
                "rollout_engine is 'vllm-server', but vllm_server_url is not given: expected http://host:port"
            )
        if self.vllm_server_url:
            self.vllm_server_url = read_address("vllm_server_url", self.vllm_server_url)
        if self.samples < 1:
            raise ValueError(f"samples is {self.samples}: expected at least 1")
        Sampling((0,), 0, self.max_new_tokens, self.temperature, self.top_p)  # checks them
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype is {self.dtype!r}: expected bfloat16, float16 or float32")


def main(argv: list[str]) -> None:
    """`simct answers --model M --data FILE.jsonl --output FILE.jsonl [--recipe NAME]`"""
    parser = OptionParser(AnswerArguments, prog="simct answers", description=main.__doc__)
    with before_work():
        arguments, _ = parser.parse(argv)
    with Progress(console=console) as bar:
        task = bar.add_task("answering", total=None)
        counts = write_answers(arguments, progress=lambda done, total: bar.update(task, completed=done, total=total))
    for name, count in counts.items():
        console.print(f"{name.replace('_', ' ')}: {count:,}", highlight=False)
    console.print(f"answers: {printable(arguments.output)}", highlight=False, soft_wrap=True)


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

    Finished batches are kept in `OUTPUT.partial`: a run that was killed goes on after them when it is started again with the same
    options and data, and writes what it would have written. `progress` is called with the prompts done and their number.

    Raises:
        ValueError: data, model or tokenizer that cannot be read, an output that cannot be written, answers to check but nothing
            installed to check them with, an unfinished run of other options or data.
    """
    found = load_records(arguments.data, split=arguments.data_split)
    records = list(rows(found))
    checked = arguments.keep == "shortest_correct" and any(record.get("answer") is not None for record in records)
    if checked and grade is None:
        from simct.training.grading import check_math_verify, is_correct

        check_math_verify()
        grade = is_correct
    output = Path(arguments.output)
    check_file(output)
    prompts = [prompt_of(record) for record in records]
    tools = [tools_of(record) for record in records]
    sample = sampler(arguments, prompts, tools, lambda i: place_of(found, i))
    answers = [str(r["answer"]) if checked and r.get("answer") is not None else None for r in records]
    data = hashlib.sha256(json.dumps([prompts, answers, tools]).encode()).hexdigest()
    work = {**asdict(arguments), "output": output.name, "data": f"{len(records)} prompts, sha256 {data}"}
    del work["vllm_server_url"]  # another address is no other work, and may have a key in its path
    # Beside a device or a stream is no place for it, and nobody would go on there.
    spare = None if is_ordinary(output) else tempfile.TemporaryDirectory(prefix="simct-")
    folder = output.parent if spare is None else Path(spare.name)
    journal = Journal(folder / (output.name + ".partial"), work)
    try:
        for start in range(len(journal.parts) * BATCH, len(records), BATCH):
            batch = range(start, min(start + BATCH, len(records)))
            texts = sample(batch, seed=arguments.seed * 1_000_003 + start)
            fates = [fate(own, answers[i], arguments.keep, grade) for own, i in zip(texts, batch, strict=True)]
            lines = [
                None if chosen is None else as_columns(prompts[i], own[chosen], arguments.columns, tools[i])
                for (_, chosen), own, i in zip(fates, texts, batch, strict=True)
            ]
            journal.add([[name, line] for (name, _), line in zip(fates, lines, strict=True)])
            if progress is not None:
                progress(batch.stop, len(records))
    finally:
        journal.close()
    with replaced(output) as target:
        for _, line in itertools.chain.from_iterable(journal.parts):
            if line is not None:
                target.write(json.dumps(line, ensure_ascii=False) + "\n")
    journal.remove()
    if spare is not None:
        spare.cleanup()
    return Counter(name for name, _ in itertools.chain.from_iterable(journal.parts))


def sampler(
    arguments: AnswerArguments,
    prompts: Sequence[Prompt],
    tools: Sequence[list[dict[str, Any]] | None],
    place: Callable[[int], str],
) -> Callable[..., list[list[str | None]]]:
    """A function of some prompts' numbers and a seed: to each prompt so many texts, None for one that did not come to its end.

    Every prompt is rendered here, so that one that cannot be is an error before any sampling, with its `place` in the data."""
    name, model, generation = arguments.rollout_engine, None, None
    if name in IN_PROCESS:
        model = load_model(arguments.model, "model", dtype=getattr(torch, arguments.dtype)).eval()
        generation = model.generation_config
    else:  # vLLM loads the weights itself
        generation = load_generation_config(arguments.model, "model")
    tokenizer = load_tokenizer(None, arguments.model if model is None else model, "model")
    ends = end_ids(tokenizer, generation, chat=arguments.prompt_format != "text")
    sampling = Sampling(
        ends, tokenizer.pad_token_id or 0, arguments.max_new_tokens, arguments.temperature, arguments.top_p
    )
    rendered = []
    for i, prompt in enumerate(prompts):
        try:
            options = {} if tools[i] is None else {"tools": tools[i]}
            rendered.append(render_prompt(prompt, tokenizer, arguments.prompt_format, options))
        except ValueError as error:
            raise ValueError(f"{place(i)}: {error}") from error
    if model is None:
        engine = vllm_of_folder(
            name,
            arguments.model,
            max_model_len=max(map(len, rendered)) + arguments.max_new_tokens,
            dtype=arguments.dtype,
            server_url=arguments.vllm_server_url,
        )
    else:
        engine = make_engine(model.to("cuda" if torch.cuda.is_available() else "cpu"), name)
    times = arguments.samples

    def sample(batch: Sequence[int], seed: int) -> list[list[str | None]]:
        asked = [rendered[i] for i in batch for _ in range(times)]
        texts = [
            tokenizer.decode(response.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            if response.finish_reason == "stop"
            else None
            for response in engine.generate(asked, sampling, seed=seed)
        ]
        return [texts[i : i + times] for i in range(0, len(texts), times)]

    return sample


def fate(texts: Sequence[str | None], answer: str | None, keep: str, grade: Grade | None) -> tuple[str, int | None]:
    """What becomes of a prompt, and which of its responses is kept."""
    chosen = choose(texts, answer, keep, grade)
    if chosen is None:
        return ("no_correct_answer" if any(texts) else "no_ended_answer"), None
    return ("kept_unchecked" if answer is None else "kept"), chosen


def as_columns(prompt: Prompt, text: str, columns: str, tools: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """One record of the output."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answer = [{"role": "assistant", "content": text}]
    record = {"messages": messages + answer} if columns == "messages" else {"prompt": messages, "completion": answer}
    return record if tools is None else {**record, "tools": tools}
