"""FSDP2 on a CPU: accelerate sets it up on accelerators only, torch itself shards on a CPU as well."""

import accelerate.state
from accelerate.utils import DistributedType


def shard_on_a_cpu() -> None:
    """From now on, in this process."""
    original = accelerate.state.AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            accelerate.state.PartialState._shared_state["distributed_type"] = self.distributed_type

    accelerate.state.AcceleratorState.__init__ = init
