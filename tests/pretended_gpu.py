"""A GPU that is not there: tensors that say `cuda` and hold nothing, in a build of torch without CUDA.

Their operations run under `FakeTensorMode`: mixing devices raises, shapes and types come out as a GPU would make them, and each
allocation is counted. What would make the host wait for a GPU (a number or a copy read from it) is counted, and answered: a truth
value is True, a number 0 (an integer 1), a copy zeros. Tensors of the CPU are what they always are. No backward pass: autograd's
engine asks for a device. (Our losses make their gradients in the forward.)
"""

import copyreg
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>) }
"""


def load_guard(cache: Path) -> None:
    """What makes `.to("cuda")` of a tensor without data possible where torch is built without CUDA. Compiled once for a version of
    torch (two seconds)."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is pretended where there is none")
    if torch.backends.cuda.is_built():
        return  # FakeTensorMode sets its own
    library = cache / f"guard-{torch.__version__}.so"
    if not library.exists():
        compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
        if compiler is None:
            pytest.skip("no C++ compiler here: torch's CPU build takes no pretended CUDA device without an extension")
        root = Path(torch.__file__).parent
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            (source := Path(folder) / "guard.cpp").write_text(GUARD)
            made = Path(folder) / "guard.so"
            options = ["-std=c++20", "-shared", "-fPIC", f"-I{root}/include", f"-L{root}/lib", "-lc10", "-o", made]
            done = subprocess.run([compiler, source, *options], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"the C++ compiler does not take torch's headers: {done.stderr.strip()[-300:]}")
            os.replace(made, library)
    torch.ops.load_library(library)


class PretendedGPU(TorchDispatchMode):
    """`waits`: where the host waited, as operation names. `held()`: bytes of all tensors on the device now; `peak`: the most since
    it was set to 0."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits: list[str] = []
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        target = None if device is None else torch.device(device).type
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if target != "cuda" and not any(isinstance(leaf, FakeTensor) for leaf in inputs):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self.waits.append("item")
            kind = args[0].dtype
            return True if kind == torch.bool else 0.0 if kind.is_floating_point else 1
        if func is aten._to_copy.default and target == "cpu" and args[0].device.type == "cuda":
            self.waits.append("copy")
            if args[0].numel() < 10**7:  # else a model that leaves the device
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        with self.fake:
            out = func(*args, **kwargs)
        self._hold(out, inputs)
        return out

    def _hold(self, out, inputs) -> None:
        for leaf in tree_leaves(out):
            if isinstance(leaf, FakeTensor) and leaf.device.type == "cuda":
                storage = leaf.untyped_storage()
                self._live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, self.held())

    def held(self) -> int:
        self._live = {key: kept for key, kept in self._live.items() if not kept[0].expired()}
        return sum(size for _, size in self._live.values())


class Event:
    """Of the device's stream, which never reaches it before the host waits."""

    def __init__(self, gpu: PretendedGPU) -> None:
        self.gpu, self.done, self.at = gpu, False, 0.0

    def record(self, _) -> None:
        self.at = time.perf_counter()

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = True
        self.gpu.waits.append("synchronize")

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.at - self.at)


class Attention(TorchFunctionMode):
    """SDPA asks the device for its kernel: here it is the flash one, or with a mask the memory-efficient one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention and args[0].device.type == "cuda":
            return _attention(*args, **kwargs or {})
        return func(*args, **kwargs or {})


def _attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    bias = torch.zeros_like(attn_mask, dtype=q.dtype) if attn_mask.dtype == torch.bool else attn_mask
    bias = bias.expand(*q.shape[:3], k.shape[2])
    kept = torch.is_grad_enabled()
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, kept, dropout_p, is_causal, scale=scale)[0]


def _swap(one: Tensor, other: Tensor) -> None:
    """torch's own `swap_tensors`, which a module's `to` uses for tensors without data, refuses those that the mode remembers."""
    for name in ("__class__", "__dict__", *copyreg._slotnames(type(one))):
        if hasattr(one, name) and hasattr(other, name):
            value, its = getattr(one, name), getattr(other, name)
            setattr(one, name, its), setattr(other, name, value)
    torch._C._swap_tensor_impl(one, other)


@contextmanager
def pretended_gpu(config: type, memory: int = 80 * 10**9) -> Iterator[PretendedGPU]:
    """Inside, there is a device `cuda:0`, and a `config` (a class of TrainingArguments) made with `use_cpu` means it."""
    from accelerate.state import PartialState

    gpu = PretendedGPU()
    functions = {
        "_lazy_init": lambda: None,
        "is_bf16_supported": lambda *_, **__: True,
        "synchronize": lambda *_: gpu.waits.append("synchronize"),
        "Event": lambda **_: Event(gpu),
        "current_stream": lambda *_: None,
        "empty_cache": lambda: None,
        "device_of": lambda _: nullcontext(),
        "get_device_capability": lambda *_: (9, 0),
        "max_memory_allocated": lambda *_: gpu.peak,
        "mem_get_info": lambda *_: (memory - gpu.held(), memory),
    }
    with ExitStack() as patches:
        for name, function in functions.items():
            patches.enter_context(mock.patch.object(torch.cuda, name, function))
        patches.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        patches.enter_context(mock.patch("torch.utils.swap_tensors", _swap))
        patches.enter_context(mock.patch.object(config, "device", property(lambda self: _use(PartialState))))
        patches.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device="cuda")`: made on the CPU, and moved
        patches.enter_context(Attention())
        patches.enter_context(gpu)
        try:
            yield gpu
        finally:
            PartialState._reset_state()


def _use(state) -> torch.device:
    state()
    state._shared_state["device"] = CUDA
    return CUDA
