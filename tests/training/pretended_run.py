"""Two steps of a run with models of real widths on a pretended GPU: what it holds by phase, and where the host waits."""

import copy
from collections import Counter, defaultdict
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from pretended_gpu import CUDA
from test_trainer import PROMPTS, STUDENT, TEACHER, config
from tiny import tokenizer
from transformers import AutoModelForCausalLM

from simct import SimCTTrainer
from simct.rollouts.protocol import Response
from simct.training import trainer as trainer_module
from simct.training.metrics import PhaseTimer


class Responses:
    """In an engine's place: responses of so many tokens, from the text of the demo's prompts."""

    def __init__(self, student, tokens: int) -> None:
        self.student, self.tokens = student, tokens

    def update_weights(self, model) -> None:
        assert model.device == CUDA

    def generate(self, prompts, sampling, *, seed):
        text = tokenizer(STUDENT)("\n".join(record["prompt"] for record in PROMPTS), add_special_tokens=False)[
            "input_ids"
        ]
        draws = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(text), (len(prompts),), generator=draws).tolist()
        text = text * (2 + self.tokens // len(text))
        return [Response(text[start : start + self.tokens], "length") for start in starts]


@contextmanager
def launches_left_out():
    """Of Triton's kernels, compiled or interpreted: the tensors that they write are made before."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from simct_kernels.torch_backend import rows
    from simct_kernels.triton_backend import tiles

    with (
        mock.patch.object(JITFunction, "run", lambda *_, **__: None),
        mock.patch.object(InterpretedFunction, "__getitem__", lambda *_: lambda *_, **__: None, create=True),
        mock.patch.object(tiles, "_multiprocessors", lambda device: 132),
        mock.patch.object(rows, "sums_in_float32", lambda device: True),
    ):
        yield


def shortened(config, layers: int):
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


def models(gpu, configs, layers: int, dtypes=(torch.float32, torch.bfloat16), attention=("eager", "sdpa")):
    """Student and teacher as they are loaded: in main memory."""
    with gpu.fake:
        made = [
            AutoModelForCausalLM.from_config(shortened(each, layers), dtype=dtype, attn_implementation=kernel)
            for each, dtype, kernel in zip(configs, dtypes, attention, strict=True)
        ]
    for model, name in zip(made, (STUDENT, TEACHER), strict=True):
        model.generation_config.eos_token_id, model.generation_config.bos_token_id = tokenizer(name).eos_token_id, None
    return made


@contextmanager
def phases_watched(gpu):
    """By phase, nested ones too: the most that was held, and the waits."""
    held, waits, open_phases = defaultdict(int), defaultdict(Counter), []
    original = PhaseTimer.__call__

    @contextmanager
    def phase(self, name):
        def close():
            for each in open_phases:
                held[each] = max(held[each], gpu.peak)
            waits[open_phases[-1] if open_phases else "other"].update(gpu.waits)
            gpu.peak, gpu.waits[:] = gpu.held(), []

        close()
        open_phases.append(name)
        try:
            with original(self, name):
                yield
        finally:
            close()
            open_phases.pop()

    with mock.patch.object(PhaseTimer, "__call__", phase):
        yield SimpleNamespace(held=held, waits=waits)


def two_steps(gpu, tmp_path, student, teacher, *, tokens: int, rows: int, peft_config=None, copied=False, **options):
    """The trainer after its steps (the second has the optimiser's states), and what was seen. Of the backward pass there are the
    loss's own part and the gradients' place. `copied`: with room for a copy of the student where the run's options want one."""
    options = {"bf16": True, "max_steps": 2, "per_device_train_batch_size": rows, "max_new_tokens": tokens, **options}

    def build(name, student, *_, dtype=None, **__):
        engine = Responses(student, tokens)
        if copied and dtype is not None:  # in the place of `CopiedStudent`: what has no data cannot be copied deeply
            engine.copy = [torch.empty_like(parameter, dtype=dtype) for parameter in student.parameters()]
        return engine

    engine = mock.patch.object(trainer_module, "build_engine", build)
    with engine, launches_left_out(), phases_watched(gpu) as seen:
        trainer = SimCTTrainer(
            student, teacher, config(tmp_path, **options), PROMPTS[: 2 * rows], peft_config=peft_config,
            processing_class=tokenizer(STUDENT), teacher_processing_class=tokenizer(TEACHER),
        )  # fmt: skip
        seen.construction = Counter(gpu.waits)

        def backward(loss, **_):
            run_loss_backward(loss)
            for parameter in trainer.model.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

        # A step is looked at by its numbers, and there are none.
        look = mock.patch.object(trainer, "check_step", lambda: None)
        with mock.patch.object(trainer.accelerator, "backward", backward), look:
            trainer.train()
    return trainer, seen


def run_loss_backward(loss) -> None:
    """The loss's own node: it makes the gradient of the head, with what it needs for that."""
    nodes = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if "SimCT" in type(node).__name__:
            with torch.no_grad():
                node.apply(torch.ones((), device=CUDA), None)
            return
        nodes += [following for following, _ in node.next_functions if following is not None]
    raise AssertionError("the loss has no node of its own")
