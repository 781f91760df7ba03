"""Inside a vLLM server: the weight-transfer engine that reads safetensors files. (Imports vLLM: nothing of the training does.)"""

from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from simct.rollouts.vllm_weights import pack_heads


@dataclass
class Nothing(WeightTransferInitInfo):
    """There is nothing to set up."""


@dataclass
class Folder(WeightTransferUpdateInfo):
    """`folder`: of `.safetensors` files, the whole model's or a part's, under the names of a checkpoint."""

    folder: str


class FileTransferEngine(WeightTransferEngine[Nothing, Folder]):
    init_info_cls, update_info_cls = Nothing, Folder

    def init_transfer_engine(self, init_info: Nothing) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Folder) -> None:
        """FileNotFoundError for a folder that this machine does not see, or that holds no such file."""
        files = sorted(Path(update_info.folder).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{update_info.folder!r} holds no .safetensors file that this server can see")
        self.model.load_weights(self._tensors(files))

    @staticmethod
    def _tensors(files: list[Path]):
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping)
                    yield name, tensors.get_tensor(name)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        pack_heads(self.model)

    def shutdown(self) -> None:
        pass
