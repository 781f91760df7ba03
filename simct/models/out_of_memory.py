"""A device's memory that runs out: how it is known, and what is done before the next try."""

import gc

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the machine, had no memory for a tensor."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def release_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
