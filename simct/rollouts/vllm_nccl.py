"""Weights from the training's GPU to those of a vLLM server by NCCL: vLLM's own trainer-side engine (vLLM is wanted here, too).

Rank 0 of the training and all of the server's workers are one NCCL group, met at an address of this machine. Nothing is written to
a disk, and weights travel in the precision that the server computes in.
"""

import socket
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from simct.rollouts.weights import checkpoint_weights


class NCCLTransfer:
    """Sends weights to one server, met at the first call.

    Args:
        server: a `ServedVLLM` whose server was started with --weight-transfer-config '{"backend": "nccl"}'.
        dtype: that floating-point weights travel in; None: their own.
    Raises:
        ValueError: no vLLM, or no GPU, on this side.
    """

    def __init__(self, server, dtype: torch.dtype | None) -> None:
        try:
            from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
            from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        except ImportError as error:
            raise ValueError(
                f"{server.base_url} takes weights by NCCL, which needs vLLM on this side as well ({error}): expected "
                "pip install 'simct[vllm]', or a server started without --weight-transfer-config"
            ) from error
        if not torch.cuda.is_available():
            raise ValueError(
                f"{server.base_url} takes weights by NCCL, and no GPU is here: expected a server started without "
                "--weight-transfer-config, which reads files"
            )
        transfer = self

        class Source(WeightSource):
            def metadata(self) -> list:
                return [ParamMeta(*row) for row in transfer.metadata()]

            def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
                return transfer.weights()

        self.server, self.dtype = server, dtype
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.model: PreTrainedModel | None = None
        self._metadata: list[tuple[str, torch.dtype, tuple[int, ...]]] | None = None
        self._source, self._init = Source(), WeightTransferTrainerFactory.trainer_init
        self._info, self._engine = NCCLTrainerInitInfo, None
        self._going: Iterator[tuple[str, torch.Tensor]] | None = None

    def send(self, model: PreTrainedModel) -> None:
        """Every training process must call it. RuntimeError, ConnectionError or TimeoutError if the server does not take them."""
        self.model = model
        self.metadata()  # gathers the shards once: not between the start and the end of an update
        several = torch.distributed.is_initialized()
        failure: list[Exception | None] = [None]
        if several and torch.distributed.get_rank() != 0:
            self._started(torch.distributed.get_rank()).send_weights()
        else:
            failure[0] = self._send()
        if several:  # nobody asks for samples before the weights are there, and nobody waits for one who failed
            torch.distributed.broadcast_object_list(failure, src=0)
        if failure[0] is not None:
            raise failure[0]

    def _send(self) -> Exception | None:
        """What went wrong, once the others have gathered all that they take part in."""
        self._going = None
        try:
            if self.device.type == "cuda":  # it reads on streams of its own, which do not wait for the optimiser
                torch.cuda.synchronize(self.device)
            with self.server.paused():
                self._started(0).send_weights()
        except Exception as error:
            for _ in self.weights() if self._going is None else self._going:
                pass
            return error
        return None

    def _started(self, rank: int):
        if self._engine is None:
            workers = self.server.world_size() if rank == 0 else 0
            info = self._info(_own_address(self.server.base_url), _free_port(), 1 + workers, rank=rank)
            self._engine = self._init(info, client=_Routes(self.server), source=self._source)
        return self._engine

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The current weights, in the precision that they travel in."""
        self._going = self._converted()
        return self._going

    def _converted(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in checkpoint_weights(self.model):
            target = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
            yield name, tensor.to(self.device, target).contiguous()

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        if self._metadata is None:
            self._metadata = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.weights()]
        return self._metadata


class _Routes:
    """vLLM's `VLLMWeightSyncClient` over the client of a `ServedVLLM`."""

    def __init__(self, server) -> None:
        self.server = server

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        self.server.post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self.server.post("/start_weight_update")

    def update_weights(self, update_info: dict) -> None:
        self.server.post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.server.post("/finish_weight_update")


def _own_address(url: str) -> str:
    """The address of this machine that the server's machine can reach: the one that packets to it leave from."""
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting a datagram socket sends nothing
        probe.connect((parts.hostname, parts.port or 80))
        return probe.getsockname()[0]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]
