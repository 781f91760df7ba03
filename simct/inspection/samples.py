"""A page of sampled responses at each evaluation of a run: `inspect_samples` of `SimCTConfig`, as a callback of the trainer."""

import re
from dataclasses import replace
from pathlib import Path

import torch
from transformers import TrainerCallback

from simct.data.prompts import prompt_of
from simct.inspection.advice import advise
from simct.inspection.page import write_page
from simct.inspection.report import inspect_answers
from simct.inspection.unit_scores import score_samples
from simct.training.samples import Samples


class SamplePages(TrainerCallback):
    """Draws the first `inspect_samples` responses of each evaluation of a `SimCTTrainer`."""

    def __init__(self, trainer) -> None:
        self.trainer = trainer

    @torch.no_grad()
    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if not args.inspect_samples:
            return
        samples = self.trainer.evaluated
        chosen = samples.pick(list(range(min(args.inspect_samples, len(samples)))))
        prefix = next(name for name in metrics if name.endswith("_reverse_kl_per_byte")).removesuffix(
            "_reverse_kl_per_byte"
        )
        student = self.trainer.accelerator.unwrap_model(self.trainer.model)
        training = student.training
        student.eval()
        try:
            draw_samples(self.trainer, chosen, page_path(args.output_dir, prefix, state.global_step))
        finally:
            student.train(training)


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
