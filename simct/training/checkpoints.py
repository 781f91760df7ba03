"""Checkpoints of a run that may be killed at any moment: written beside their place and renamed into it, whole or not there; which
of them are whole, and what a run goes on with."""

import copy
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from simct.console import error_line
from simct.files import write_json
from simct.models.checks import nonfinite_tensors, nonfinite_weights
from simct.rollouts.protocol import Response
from simct.rollouts.weights import checkpoint_weights
from simct.training.run_record import differences, record_of, record_of_rollouts

ROLLOUTS = "simct_rollouts-{}.json"
LAST = "simct_checkpoint.json"  # the last file of a checkpoint: which files there are, their sizes, and what run they are of
SAVING = "_saving"  # the folder of what is not whole yet; a leading _ is not uploaded to the hub
# The files of a model, of which one that is saved again may have fewer.
WEIGHTS = re.compile(r"(adapter_)?model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
ADAPTER = "adapter"  # the folder of a student's adapter, where the output folder holds it merged
CONFIGS = ("config.json", "adapter_config.json")  # a folder without them does not load as a model


def problem(folder: str | Path) -> str | None:
    """Why a checkpoint is not whole; None if it is."""
    folder = Path(folder)
    try:
        files = json.loads((folder / LAST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"{LAST}, its last file, is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{LAST} cannot be read ({error})"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
    return None


def newest_complete(folder: str | Path) -> str | None:
    """The newest whole checkpoint of an output folder, None if there is none; others are passed over with a warning."""
    folder = Path(folder)
    for whole in (folder / SAVING).glob("checkpoint-*"):
        # Between a run's last write and its renaming, or between the two renamings of one that was there already.
        if not (folder / whole.name).exists() and problem(whole) is None:
            with suppress(OSError):  # another process does the same
                whole.rename(folder / whole.name)
    numbered = []
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if path.is_dir() and number.isdigit():
            numbered.append((int(number), path))
    for _, path in sorted(numbered, reverse=True):
        wrong = problem(path) or unusable(path)
        if wrong is None:
            return str(path)
        warnings.warn(f"{path} is not complete ({wrong}): passed over", stacklevel=2)
    return None


def unusable(folder: str | Path) -> str | None:
    """What a run cannot go on without, of a checkpoint that is whole as it was written; None if all is there."""
    names = {path.name for path in Path(folder).iterdir()}
    if TRAINER_STATE_NAME not in names:
        return f"{TRAINER_STATE_NAME} is missing"
    # A sharded student's optimiser is a folder, DeepSpeed's is in one with the weights.
    if not any(re.fullmatch(r"optimizer(\.pt|\.bin|_\d+)|global_step\d+", name) for name in names):
        return f"{OPTIMIZER_NAME} is missing, as save_only_model leaves it out"
    if SCHEDULER_NAME not in names:
        return f"{SCHEDULER_NAME} is missing"
    return None


def write_last(folder: Path, run: dict[str, Any]) -> None:
    """The file that says a checkpoint is whole."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != LAST]
    files = {str(path.relative_to(folder)): path.stat().st_size for path in paths}
    write_json(folder / LAST, {"run": run, "files": files})


def move_folder(new: Path, place: Path) -> None:
    """A new folder into its place, where another may be."""
    old = new.with_name(f"replaced-{new.name}")
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def move_model(new: Path, place: Path) -> None:
    """A model's files from a new folder into one that also holds other things (checkpoints, curves). Its configuration leaves
    first and comes last: in between, the folder does not load."""
    for name in CONFIGS:
        (place / name).unlink(missing_ok=True)
    names = [str(path.relative_to(new)) for path in sorted(new.rglob("*")) if path.is_file()]
    for stale in place.iterdir():
        if WEIGHTS.fullmatch(stale.name) and stale.name not in names:
            stale.unlink()
    for name in sorted(names, key=lambda name: name in CONFIGS):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(new / name, place / name)
    shutil.rmtree(new)
    with suppress(OSError):  # of another save
        new.parent.rmdir()


def save_responses(folder: str | Path, process: int, responses: list[Response], used: int, run: dict[str, Any]) -> None:
    """The rollouts that the run is in the middle of using, for how many steps they were used, and what they were drawn for."""
    rows = [[response.token_ids, response.finish_reason, response.logprobs] for response in responses]
    write_json(Path(folder) / ROLLOUTS.format(process), {"used": used, "run": run, "responses": rows})


def load_responses(folder: str | Path, process: int) -> tuple[list[Response], int, dict[str, Any]] | None:
    """What `save_responses` wrote; None if the checkpoint was not in the middle of a batch of rollouts."""
    path = Path(folder) / ROLLOUTS.format(process)
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return [Response(*row) for row in content["responses"]], content["used"], content["run"]


class Checkpoints:
    """The part of `SimCTTrainer` that saves and resumes. No weights that are no finite numbers are written; the rollouts in use are
    in every checkpoint."""

    _saving: str | None = None  # where a checkpoint is being written
    _record: tuple[Any, dict[str, Any]] = (None, {})  # the data set, and the record made of it
    _resumed: tuple[list[Response], int, dict[str, Any]] | None = None  # what a checkpoint was in the middle of

    # ---- Saving ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's, by way of a new folder. FloatingPointError, with nothing written, for weights that are no finite
        numbers."""
        if self._saving is not None:  # a part of a checkpoint
            return super().save_model(output_dir, _internal_call)
        place = Path(output_dir if output_dir is not None else self.args.output_dir)
        self.check_weights(str(place))
        new = place / SAVING / "student"
        if self.args.should_save:
            shutil.rmtree(new, ignore_errors=True)
        with self._whole_state():
            super().save_model(str(new), _internal_call=True)
        if self.args.should_save:
            move_model(new, place)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    @contextmanager
    def _whole_state(self) -> Iterator[None]:
        """Inside, a sharded student is saved as one model: with SHARDED_STATE_DICT, right for a checkpoint, the Trainer would write
        no model at all."""
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is None:
            yield
            return
        kind = plugin.state_dict_type
        plugin.set_state_dict_type("FULL_STATE_DICT")
        try:
            yield
        finally:
            plugin.set_state_dict_type(kind)

    def save_merged(self, output_dir: str) -> None:
        """The student with its adapter merged into the weights, as a folder that `AutoModelForCausalLM.from_pretrained` loads.
        The adapter itself is saved first, in the run's folder `adapter`: whatever goes wrong here, it is not lost. A sharded
        student (FSDP2) is gathered weight by weight, into main memory: every process must call this.

        Raises ValueError if it has no adapter, FloatingPointError if the merged weights are no finite numbers, RuntimeError, which
        says where the adapter is, if they cannot be merged."""
        student = self.accelerator.unwrap_model(self.model)
        if not hasattr(student, "merge_and_unload"):
            raise ValueError(
                f"the student is a {type(student).__name__}: expected one with a PEFT adapter (peft_config)"
            )
        adapter = Path(self.args.output_dir) / ADAPTER
        self.save_model(str(adapter), _internal_call=True)  # pushed to the hub is what is merged
        try:
            merged, weights, bad = self._merged(student)
            self.check_weights(output_dir, bad)
            if self.args.should_save:
                new = Path(output_dir) / SAVING / "student"
                shutil.rmtree(new, ignore_errors=True)
                merged.save_pretrained(new, state_dict=weights, save_original_format=weights is None)
                self.processing_class.save_pretrained(new)
                self.write_card(new)
                move_model(new, Path(output_dir))
        except FloatingPointError:
            raise
        except Exception as error:  # peft, safetensors and the collectives fail in their own ways
            raise RuntimeError(f"the adapter is saved in {adapter}, but was not merged: {error_line(error)}") from error

    def _merged(self, student: nn.Module) -> tuple[nn.Module, dict[str, Tensor] | None, list[str]]:
        """A model, the weights that it is saved with, in main memory (None: its own), and which of them are no finite numbers."""
        if not any(hasattr(parameter, "full_tensor") for parameter in student.parameters()):
            merged = copy.deepcopy(student).merge_and_unload()
            return merged, None, nonfinite_weights(merged)
        weights, bad = {}, []
        for name, value in checkpoint_weights(student):
            bad += nonfinite_tensors([(name, value)])
            if self.args.should_save:
                weights[name] = value.to("cpu", copy=True)
        return student.get_base_model(), weights, bad

    def _get_output_dir(self, trial) -> str:
        return self._saving if self._saving is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        name = f"checkpoint-{self.state.global_step}"
        run_dir = Path(self._get_output_dir(trial))
        self.check_weights(name)
        new, place = run_dir / SAVING / name, run_dir / name
        if self.accelerator.is_local_main_process:
            shutil.rmtree(new.parent, ignore_errors=True)  # what a save that failed has left
        self.accelerator.wait_for_everyone()
        self._saving = str(new.parent)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = None
        if self.state.best_model_checkpoint == str(new):
            self.state.best_model_checkpoint = str(place)
            if self.args.should_save:
                self.state.save_to_json(str(new / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_last(new, self.record())
            move_folder(new, place)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_local_main_process:
            if new.exists():  # this machine does not see the folder of the process that saves: its own files
                move_folder(new, place)
            with suppress(OSError):
                new.parent.rmdir()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(place))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._saving is None:  # else once it is in its place
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._used < self.args.num_iterations and self._records is not None:
            drawn_for = record_of_rollouts(self._drawn.student_prompts, self.sampling)
            save_responses(output_dir, self.args.process_index, self._drawn.responses, self._used, drawn_for)

    def record(self) -> dict[str, Any]:
        """What the run draws its samples from (`record_of`), made once."""
        if self._record[0] is not self.train_dataset:
            found = record_of(self.args, self.train_dataset, self.processing_class)
            self._record = (self.train_dataset, found)
        return self._record[1]

    # ---- Resuming ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As the Trainer's; `resume_from_checkpoint=True` takes the newest checkpoint that is whole.

        ValueError, before the first step, for one that is not whole, lacks what a run goes on with, or is of a run with other data,
        seed or batches (`allow_changed_run` makes that a warning).
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_complete(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint is True: there is no whole checkpoint in {self.args.output_dir!r}"
                )
        if resume_from_checkpoint:
            same = self.check_checkpoint(resume_from_checkpoint)
            self._resumed = load_responses(resume_from_checkpoint, self.args.process_index) if same else None
        self._records, self._used = None, 0  # of an earlier call
        if self.accelerator.is_local_main_process:
            shutil.rmtree(Path(self.args.output_dir) / SAVING, ignore_errors=True)  # what a killed run has left
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def check_checkpoint(self, folder: str) -> bool:
        """Whether a whole checkpoint is of this run. ValueError as said at `train`."""
        wrong = problem(folder) or unusable(folder)
        if wrong is not None:
            raise ValueError(f"resume_from_checkpoint is {folder!r}, which is not complete: {wrong}")
        then = json.loads((Path(folder) / LAST).read_text(encoding="utf-8"))["run"]
        return not self.told_of_changes(folder, differences(self.record(), then))

    def told_of_changes(self, where: str, changes: list[str]) -> bool:
        """Whether there are any. ValueError, or with `allow_changed_run` a warning, says them."""
        if not changes:
            return False
        message = f"{where} is of another run: {'; '.join(changes)}"
        if not self.args.allow_changed_run:
            raise ValueError(
                f"{message} (allow_changed_run=True goes on, with other samples than the run would have had)"
            )
        warnings.warn(f"{message}; going on, with other samples than that run would have had", stacklevel=3)
        return True

    def resumed_responses(self, records: list[dict[str, Any]]) -> tuple[list[Response] | None, int]:
        """The rollouts that the checkpoint was in the middle of, and for how many steps they were used; (None, 0) where responses
        to `records` are to be drawn. ValueError as said at `train` if they are of other prompts, or drawn with other options."""
        if self._resumed is None:
            return None, 0
        (responses, used, then), self._resumed = self._resumed, None
        now = record_of_rollouts([self.student_prompt(record) for record in records], self.sampling)
        changes = differences(now, then)
        if self.accelerator.num_processes > 1:
            changes = list(dict.fromkeys(gather_object(changes)))
        if self.told_of_changes("the batch of rollouts that the checkpoint is in the middle of", changes):
            return None, 0
        return responses, used

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Of a checkpoint's weights: those that are missing are an error, unless they are tied to others."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        missing = set(load_result.missing_keys)
        loaded = {id(weight) for name, weight in named.items() if name not in missing}
        lost = sorted(name for name in missing if name in named and id(named[name]) not in loaded)
        if lost:
            raise ValueError(
                f"the checkpoint has no weights for {', '.join(lost[:5])}: expected those of the whole student"
            )
        super()._issue_warnings_after_load(load_result)
