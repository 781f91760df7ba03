"""Weights by NCCL, as far as that goes without a GPU: vLLM's own sender stands aside for one that keeps what it is given."""

import sys
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch

from simct.rollouts.vllm_nccl import NCCLTransfer, _own_address
from simct.rollouts.weights import checkpoint_weights

BASE = "vllm.distributed.weight_transfer"


@dataclass
class ParamMeta:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Sender:
    """As much of vLLM's trainer-side engine as there is without a network: what it would send, and what it says over the routes."""

    def __init__(self, info, client, source):
        self.info, self.client, self.source, self.sent = info, client, source, []
        if info.rank == 0:
            client.init_weight_transfer_engine({"world_size": info.world_size})

    def send_weights(self):
        metadata, weights = self.source.metadata(), list(self.source)
        assert [(m.name, m.dtype, m.shape) for m in metadata] == [(n, t.dtype, tuple(t.shape)) for n, t in weights]
        self.sent.append({name: tensor.clone() for name, tensor in weights})
        if self.info.rank == 0:
            self.client.start_weight_update()
            self.client.update_weights({"names": [m.name for m in metadata]})
            self.client.finish_weight_update()


class Server:
    base_url = "http://127.0.0.1:8000"

    def __init__(self):
        self.asked = []

    def post(self, route, body=None):
        self.asked.append(route)

    def world_size(self):
        return 4

    @contextmanager
    def paused(self):
        self.asked.append("paused")
        yield
        self.asked.append("resumed")


@pytest.fixture
def senders(monkeypatch):
    """vLLM's modules; gives the senders that are made."""
    made = []

    def trainer_init(info, *, client, source):
        made.append(Sender(info, client, source))
        return made[-1]

    def info(address, port, world_size, *, rank):
        return SimpleNamespace(address=address, port=port, world_size=world_size, rank=rank)

    contents = {
        "base": {"ParamMeta": ParamMeta, "WeightSource": object},
        "factory": {"WeightTransferTrainerFactory": SimpleNamespace(trainer_init=trainer_init)},
        "nccl_engine": {"NCCLTrainerInitInfo": info},
    }
    for name, content in contents.items():
        module = ModuleType(f"{BASE}.{name}")
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in "vllm", "vllm.distributed", BASE:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return made


def test_the_current_weights_go_in_the_servers_precision_between_two_requests(senders, demo_student):
    server = Server()
    transfer = NCCLTransfer(server, torch.bfloat16)
    transfer.device = torch.device("cpu")
    for _ in range(2):
        transfer.send(demo_student)
        with torch.no_grad():
            demo_student.model.norm.weight.add_(1)
    update = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
    assert server.asked == ["paused", "/init_weight_transfer_engine", *update, "resumed", "paused", *update, "resumed"]
    (sender,) = senders  # one group for the whole run
    assert sender.info.world_size == 5 and sender.info.address == "127.0.0.1"  # this process and four workers
    first, second = sender.sent
    assert {tensor.dtype for tensor in second.values()} == {torch.bfloat16}
    assert first.keys() == second.keys() == dict(checkpoint_weights(demo_student)).keys()
    assert torch.equal(second["model.norm.weight"], (demo_student.model.norm.weight.detach() - 1).bfloat16())
    assert not torch.equal(first["model.norm.weight"], second["model.norm.weight"])


def test_the_other_processes_gather_and_say_nothing(senders, demo_student, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda objects, src: None)
    server = Server()
    transfer = NCCLTransfer(server, None)
    transfer.device = torch.device("cpu")
    transfer.send(demo_student)
    assert not server.asked and len(senders[0].sent) == 1


def test_all_processes_hear_of_a_failure_once_all_is_gathered(senders, demo_student, monkeypatch):
    """And of its absence: before that nobody asks the server for samples."""
    told, gathered = [], []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda objects, src: told.append(list(objects)))
    server = Server()
    transfer = NCCLTransfer(server, None)
    transfer.device = torch.device("cpu")
    transfer.send(demo_student)
    assert told == [[None]]

    def fail():
        gathered.append(next(iter(transfer.weights())))
        raise RuntimeError("no network")

    monkeypatch.setattr(senders[0], "send_weights", fail)
    names, converted = [], NCCLTransfer._converted

    def watched(self):
        for name, tensor in converted(self):
            names.append(name)
            yield name, tensor

    monkeypatch.setattr(NCCLTransfer, "_converted", watched)
    with pytest.raises(RuntimeError, match="no network"):
        transfer.send(demo_student)
    assert isinstance(told[1][0], RuntimeError)
    assert names == list(dict(checkpoint_weights(demo_student))), "the others gather all of them, once"


def test_what_is_missing_on_this_side_is_named(senders, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match="takes weights by NCCL, and no GPU is here: expected a server started without"
    ):
        NCCLTransfer(Server(), None)
    monkeypatch.setitem(sys.modules, f"{BASE}.factory", None)
    with pytest.raises(ValueError, match="which needs vLLM on this side as well"):
        NCCLTransfer(Server(), None)


def test_the_address_that_a_server_reaches_this_machine_at():
    assert _own_address("http://127.0.0.1:8000") == "127.0.0.1"
