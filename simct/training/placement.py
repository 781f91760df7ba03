"""Where a run's models are, and in which precision: decided before the first step, and said where it would not work."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import PreTrainedModel

from simct.models.checks import check_head
from simct.models.hidden import uses_flash
from simct.models.loading import is_dispatched
from simct.rollouts.protocol import RolloutEngine
from simct.rollouts.transformers_engines import attention_of_any_shape
from simct.teachers.local import LocalTeacher
from simct.teachers.served import ServedTeacher

SAMPLED = 1 << 16  # elements of each weight that `moved_share` looks at


def student_options(config, adapter) -> dict[str, Any]:
    """The arguments of `from_pretrained` for a student given by name.

    Master weights in float32 unless the user says otherwise: at learning rates of 1e-6 bfloat16 weights would not move. Under an
    adapter nothing moves them: where the run computes in 16 bits anyway they stay in their own, and rollouts need no copy (but for
    an adapter that trains modules whole: those in float32 among others in 16 bits would run under autocast only).
    """
    given = config.model_init_kwargs or {}
    light = adapter is not None and not getattr(adapter, "modules_to_save", None)
    own = light and (config.bf16 or config.fp16) and not {"gguf_file", "quantization_config"} & given.keys()
    return {"dtype": "auto" if own else torch.float32, **given}


def float32_masters(model: nn.Module) -> None:
    """What an adapter trains of a 16-bit model whole (`modules_to_save`) gets float32 master weights, as the adapter has."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point() and parameter.itemsize < 4:
            parameter.data = parameter.data.float()


def place_student(trainer) -> PreTrainedModel:
    """The student, whole on the device of the run and checked there; one to be sharded waits in main memory."""
    attention_of_any_shape(trainer.args.device)  # the teachers' too
    settle_processes(trainer)
    student = trainer.accelerator.unwrap_model(trainer.model)
    if not (trainer.is_fsdp_enabled or is_dispatched(student) or getattr(student, "is_quantized", False)):
        student.to(trainer.args.device)  # with bf16_full_eval the Trainer would do it where training starts
    whole = any(".modules_to_save." in name for name, _ in student.named_parameters())
    with trainer.accelerator.autocast() if uses_flash(student) or whole else contextlib.nullcontext():
        check_head(student, "student")
    warn_of_still_weights(student, trainer.args)
    return student


def settle_processes(trainer) -> None:
    """What accelerate hands to DDP and FSDP2, as a training with several forward passes a step wants it.

    DDP: gradients in its buckets, not beside them once more; no buffers sent around, which nothing here trains: a forward pass that
    is tried again would send them alone. FSDP2: what a forward pass gives stays in its precision (the loss is float32).
    """
    accelerator = trainer.accelerator
    handler, plugin = accelerator.ddp_handler, getattr(accelerator.state, "fsdp_plugin", None)
    if handler is not None:
        handler.gradient_as_bucket_view = True
        handler.broadcast_buffers = bool(trainer.args.ddp_broadcast_buffers)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)


def reshard(model: nn.Module) -> None:
    """Gives back what FSDP2 keeps gathered behind a forward pass that no backward pass follows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shard_student(trainer) -> None:
    """FSDP shards the student where training begins, and leaves it in main memory until then. What comes before, an evaluation,
    needs it on the devices: it is sharded now, with its optimiser, as accelerate wants it, and training finds it so."""
    if not trainer.is_fsdp_enabled or isinstance(trainer.model, FSDPModule):
        return
    trainer.create_optimizer()
    trainer.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model_wrapped = trainer.model
    # By now its layers have it; where training begins they would get it once more.
    trainer.accelerator.state.fsdp_plugin.activation_checkpointing = False


def place_teachers(trainer, teachers: dict[str, LocalTeacher | ServedTeacher]) -> None:
    """Each where it scores: whole on the device of each process, or shared out among the processes. ValueError for `shard_teacher`
    where there is nobody to share with, and as said at `LocalTeacher.place`."""
    config, local = trainer.args, [each for each in teachers.values() if isinstance(each, LocalTeacher)]
    if config.shard_teacher:
        if config.world_size == 1:
            raise ValueError(
                "shard_teacher is True, but there is one process: expected several (torchrun, accelerate launch); one process "
                "spreads a teacher over its GPUs with teacher_model_init_kwargs={'device_map': 'auto'}"
            )
        if not local:
            raise ValueError("shard_teacher is True, but the teacher is served: its weights are not here")
    mesh = processes_that_share(trainer) if config.shares_teacher(config.world_size) and local else None
    for teacher in teachers.values():
        options = {"packing": config.packing, "offload": config.offload_teacher}
        if isinstance(teacher, LocalTeacher) and (config.shard_teacher or not teacher.stays):
            options["mesh"] = mesh
        teacher.place(config.device, **options)


def processes_that_share(trainer) -> DeviceMesh:
    """Those that share the student under FSDP (with accelerate's hybrid sharding, those of a group), else all."""
    mesh = getattr(trainer.accelerator, "torch_device_mesh", None)
    if mesh is None:
        return init_device_mesh(trainer.args.device.type, (trainer.args.world_size,))
    return mesh[tuple(trainer.accelerator.parallelism_config.fsdp_dim_names)]


def warn_of_still_weights(student: nn.Module, config) -> None:
    """Of 16-bit weights most updates round back to what was there. Known of optimisers whose update is of the learning rate's
    size."""
    trained = [p for p in student.parameters() if p.requires_grad and p.is_floating_point() and p.itemsize == 2]
    optimiser = str(getattr(config.optim, "value", config.optim)).removeprefix("paged_").removeprefix("stable_")
    if not trained or not config.learning_rate or not optimiser.startswith(("adam", "ademamix", "lion")):
        return
    share = moved_share(trained, float(config.learning_rate))
    if share < 0.5:
        kind = str(trained[0].dtype).removeprefix("torch.")
        warnings.warn(
            f"the student's weights are {kind}: at learning_rate {config.learning_rate:g} a step of {optimiser} moves "
            f"{share:.1%} of them, the others round back to what they were. Expected float32 weights (dtype=torch.float32 where "
            "the model is loaded, or the model by its name; bf16=True computes in bfloat16 all the same)",
            stacklevel=4,
        )


@torch.no_grad()
def moved_share(parameters: Iterable[nn.Parameter], step: float) -> float:
    """The share of elements that an update of the size `step` changes at all, in the parameters' own precision: of up to `SAMPLED`
    elements of each, evenly spaced. Waits for a device once."""
    moved, count = [], []
    for parameter in parameters:
        weights = parameter.detach().flatten()
        weights = weights[:: max(1, len(weights) // SAMPLED)]
        changed = ((weights.float() - step).to(weights.dtype) != weights).float().mean()
        moved.append(changed.to(moved[0].device) if moved else changed)
        count.append(parameter.numel())
    total = torch.stack(moved).cpu().double() @ torch.tensor(count, dtype=torch.float64)
    return float(total) / sum(count)


def release_cache(engine: RolloutEngine) -> None:
    """Gives back the keys and values that transformers' continuous batching keeps with a model for its next session: what comes
    now, the teacher and the student's backward, needs the memory. To allocate them again is nothing beside a rollout."""
    model = getattr(engine, "model", None)
    if hasattr(model, "get_base_model"):  # PEFT: the engine is the base model's
        model = model.get_base_model()
    if hasattr(model, "destroy_cached_continuous_batching_manager"):
        model.destroy_cached_continuous_batching_manager()
