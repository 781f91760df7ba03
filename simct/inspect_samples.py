"""A page of sampled responses at each evaluation of a run: `inspect_samples` of `SimCTConfig`."""

import re
from dataclasses import replace
from pathlib import Path

from simct.advice import advise
from simct.inspect_page import write_page
from simct.inspection import inspect_answers
from simct.prompts import prompt_of
from simct.samples import Samples
from simct.unit_scores import score_samples


def page_path(folder: str, prefix: str, step: int) -> Path:
    """`inspect-STEP.html`, with the data set's name in it where an evaluation has several (the metrics' prefix says it)."""
    name = _file_name(re.sub("^eval_?", "", prefix))
    return Path(folder) / f"inspect-{f'{name}-' if name else ''}{step}.html"


def draw_samples(trainer, samples: Samples, path: Path) -> None:
    """The samples with their scores, as one page for each teacher (its name in the file's name where there are several). All
    processes score, the first one writes its own. `trainer`: a `SimCTTrainer`, its student in evaluation mode."""
    scored = score_samples(trainer, samples)
    if not trainer.is_world_process_zero():
        return
    answers = []
    for number, (sample, answer) in enumerate(zip(samples, scored, strict=True), 1):
        ended = "cut off" if sample.response.finish_reason == "length" else "ended"
        answers.append(replace(answer, title=f"Response {number}, {ended}", prompt=_text(prompt_of(sample.record))))
    for name, scorer in trainer.scorers.items():
        own = [answer for answer, sample in zip(answers, samples, strict=True) if sample.teacher == name]
        if not own:
            continue
        sides = (trainer.processing_class, scorer.teacher.tokenizer)
        inspection = inspect_answers(scorer.pair, *sides, own)
        several = len(trainer.scorers) > 1
        target = path.with_name(f"{path.stem}-{_file_name(name)}.html") if several else path
        note = (
            f"The first {len(samples)} responses of the evaluation at step {trainer.state.global_step}, temperature 1."
        )
        write_page(target, inspection, advise(inspection, scorer.pair, *sides, own), note=note)


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]", "_", text)


def _text(prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
