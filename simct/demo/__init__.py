"""`simct demo`: a small teacher and student with different tokenizers, distilled on a CPU in about two minutes, offline.

The models ship with the package; `simct.demo.make_models` made them.
"""

from pathlib import Path

from rich.console import Console
from rich.text import Text

from simct.console import console as terminal
from simct.console import printable

ASSETS = Path(__file__).parent / "assets"
SENTENCE = "Return the codec's StreamWriter for UTF-8.\nIt is unnecessarily slow: 1024 bytes at 3.5 MB/s."


def run_demo(
    output: Path, *, steps: int = 100, seed: int = 0, console: Console | None = None
) -> dict[str, dict[str, float]]:
    """Shows the pair, distils the student and compares it before and after on two responses to each held-out prompt.

    Writes `output/student` (a folder that `AutoModelForCausalLM.from_pretrained` loads) and `output/curves.png`. Returns the two
    evaluations, {"before": ..., "after": ...}. One seed gives the same numbers on one machine.
    """
    console = console or terminal

    import torch
    from transformers.utils import logging

    from simct.data.records import read_prompts
    from simct.inspection.tables import coverage_table, cut_text, pair_table
    from simct.training.config import SimCTConfig
    from simct.training.plots import evaluation_table, plot_curves
    from simct.training.progress import ProgressBar
    from simct.training.trainer import SimCTTrainer

    torch.set_num_threads(1)  # small matrices: more threads would not be faster, and the numbers would depend on them
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = SimCTConfig(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=50,
        learning_rate=5e-4,
        temperature=1.0,
        top_p=1.0,
        max_new_tokens=48,
        logging_steps=5,
        logging_first_step=False,
        save_strategy="no",
        use_cpu=True,
        seed=seed,
    )
    prompts, held_out = read_prompts(ASSETS / "train.jsonl"), read_prompts(ASSETS / "eval.jsonl")
    console.print(
        "Loading the demo's teacher (Llama, byte-level BPE) and student (Gemma-2, SentencePiece style) ...",
        highlight=False,
    )
    trainer = SimCTTrainer(str(ASSETS / "student"), str(ASSETS / "teacher"), config, prompts, 2 * held_out)
    bar = ProgressBar.install(trainer, console)

    console.print(pair_table(trainer.pair, trainer.processing_class, trainer.teacher.tokenizer))
    one, longer = ("one-to-one", "green"), ("longer", "yellow")
    said = ("\nOne text, cut by both tokenizers (", one, ": SimpleOPD and SimCT, ", longer, ": SimCT only):")
    console.print(Text.assemble(*said), soft_wrap=True)
    console.print(cut_text(trainer.pair.cut(SENTENCE), console.width), soft_wrap=True)
    console.print()
    texts = [record["prompt"] for record in held_out]
    console.print(coverage_table(trainer.pair.coverage(texts)))

    console.print(
        f"\nDistilling: {steps} steps of {config.per_device_train_batch_size} responses sampled by the student",
        highlight=False,
    )
    with console.status("evaluating on held-out prompts"):
        before = trainer.evaluate()
    with bar:
        trainer.train()
    with console.status("evaluating on held-out prompts"):
        after = trainer.evaluate()
    student, curves = output / "student", output / "curves.png"
    trainer.state.log_history.insert(0, {"step": 0, **before})
    plot_curves(trainer.state.log_history, curves)
    trainer.card_notes = {"Recipe": "demo/distil", "Data": "the demo's own prompts"}
    trainer.save_model(str(student))
    console.print(evaluation_table(before, after))
    console.print(f"student: {printable(student)}\ncurves:  {printable(curves)}", highlight=False)
    return {"before": before, "after": after}
