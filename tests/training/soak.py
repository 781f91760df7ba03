"""`python tests/training/soak.py FOLDER KILLS SEED`: a training run that is killed again and again, and what becomes of it.

Each life is a fork of this process, which has everything imported, that ends itself by SIGKILL: no handler runs, nothing is tidied
up. Where, is drawn from all that is seen of a run (`Points`): before every change to a file or folder, before, after or in the
middle of what writes weights, optimiser and state, and between the parts of a step.
"""

import gc
import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

os.environ.update(TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")

sys.path.append(str(Path(__file__).parents[1]))  # pytest's pythonpath

import safetensors.torch
import torch
from safetensors.torch import load_file
from tiny import tiny_trainer, tokenizer
from transformers import TrainerCallback, TrainerState, modeling_utils

from simct.demo import ASSETS
from simct.training.checkpoints import SAVING, newest_complete, problem
from simct.training.collector import Collector

OPTIONS = dict(
    max_steps=4, num_iterations=2, save_strategy="steps", save_steps=1, save_total_limit=2, gradient_accumulation_steps=2,
    per_device_train_batch_size=1,
)  # fmt: skip
CHANGES = {
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.truncate",
    "shutil.rmtree",
    "shutil.move",
    "shutil.copyfile",
}


class Points(TrainerCallback):
    """Counts the places where a process may end, and ends it at one of them."""

    def __init__(self, folder: Path, last: int | None, draw: random.Random) -> None:
        self.folder, self.last, self.draw, self.count, self.on = str(folder), last, draw, 0, True
        sys.addaudithook(self.audit)
        self.wrap(torch, "save", 1)
        self.wrap(safetensors.torch, "save_file", 1)
        modeling_utils.safe_save_file = safetensors.torch.save_file
        self.wrap(TrainerState, "save_to_json", 1)
        self.wrap(Collector, "generate")

    def here(self) -> bool:
        self.count += self.on
        return self.on and self.count == self.last

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and not arguments[1].startswith("r")
        if (writes or event in CHANGES) and str(arguments[0]).startswith(self.folder) and self.here():
            self.die()

    def wrap(self, owner, name: str, path: int | None = None) -> None:
        """`path`: which argument says where it writes."""
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            end = self.draw.choice(("before", "within", "after")) if self.here() else None
            if end == "before":
                self.die()
            self.on = self.on and end is None
            result = original(*args, **kwargs)
            if end == "within" and path is not None:
                os.truncate(args[path], int(os.path.getsize(args[path]) * self.draw.random()))
            if end is not None:
                self.die()
            return result

        setattr(owner, name, wrapped)

    def event(self, args, state, control, **kwargs):
        if self.here():
            self.die()

    on_step_begin = on_substep_end = on_pre_optimizer_step = on_optimizer_step = on_step_end = on_save = event


def live(folder: Path, result: Path, last: int | None, seed: int, resume: str | None) -> None:
    """A process's whole life: it trains to the end, from a checkpoint if one is given, saves the student and leaves the result, or
    why it refused."""
    points = Points(folder, last, random.Random(seed))
    trainer = tiny_trainer(folder.parent / folder.name, callbacks=[points], output_dir=str(folder), **OPTIONS)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except ValueError as error:
        result.write_text(json.dumps({"refused": str(error)}))
        return
    trainer.save_model()
    points.on = False
    losses = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    safetensors.torch.save_file(weights, str(result.with_suffix(".safetensors")))
    result.write_text(json.dumps({"points": points.count, "losses": losses}))


def fork(*arguments, output: Path) -> int:
    """The exit code of a life, negative for a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with output.open("w") as log:  # not in a folder that is looked at
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            live(*arguments)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            log.flush()
        finally:
            os._exit(1)


def equal(ours: Path, theirs: Path) -> bool:
    one, other = load_file(ours), load_file(theirs)
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def main(root: Path, kills: int, seed: int) -> dict:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for side in "student", "teacher":
        tokenizer(str(ASSETS / side))
    gc.collect()
    gc.freeze()  # every `train()` collects garbage: it need not look through all that is imported
    draw = random.Random(seed)
    result, output = root / "result.json", root / "output.txt"
    assert fork(root / "whole", result, None, 0, None, output=output) == 0, output.read_text()
    whole = json.loads(result.read_text())
    reference = result.with_suffix(".safetensors").rename(root / "whole.safetensors")
    found = {"points": whole["points"], "killed": 0, "equal": 0, "rewritten": 0, "refused": [], "wrong": []}
    runs, life = 0, 0
    folder = root / "run-0"
    while found["killed"] < kills:
        life += 1
        resume = newest_complete(folder)
        done = sorted(str(path) for path in folder.glob("checkpoint-*") if problem(path) is None)
        if done and draw.random() < 0.2:  # from an older one: later ones are written again
            resume = draw.choice(done)
            found["rewritten"] += len(done) > 1
        result.unlink(missing_ok=True)
        last = draw.randint(1, max(2, whole["points"] // 2))
        code = fork(folder, result, last, draw.randrange(2**30), resume, output=output)
        what = f"life {life}, {folder.name}, from {resume and Path(resume).name}, ended at {last}"
        if (folder / "config.json").exists() and not equal(folder / "model.safetensors", reference):
            found["wrong"].append(f"{what}: the student in its place is another one")
        if code == -signal.SIGKILL:
            found["killed"] += 1
            continue
        if code != 0:
            found["wrong"].append(f"{what}: exit code {code}: {output.read_text()[-2000:]}")
        elif "refused" in (content := json.loads(result.read_text())):
            found["refused"].append(content["refused"])
        elif content["losses"] != whole["losses"] or not equal(result.with_suffix(".safetensors"), reference):
            found["wrong"].append(f"{what}: other weights or losses")
        elif (folder / SAVING).exists():
            found["wrong"].append(f"{what}: something is left in {SAVING}")
        else:
            found["equal"] += 1
        if draw.random() < 0.5 or code != 0:  # else the same folder, where all is written again
            runs += 1
            folder = root / f"run-{runs}"
    return found


if __name__ == "__main__":
    started = time.monotonic()
    outcome = main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps({**outcome, "seconds": round(time.monotonic() - started)}))
