"""A frozen teacher spread over processes (FSDP2): each holds its share of the layers, and a layer is whole while it runs.

The head is not shared out. The loss reads it whole in every micro-batch, which is the largest phase of a step: its shares would
save nothing there, and the rows that the loss keeps of a head are kept of one tensor.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's layers, as the model itself names what no device may split; else the members of its longest list."""
    decoder = model.get_decoder()
    names = set(getattr(model, "_no_split_modules", None) or ())
    found = [each for each in decoder.modules() if type(each).__name__.removeprefix("FSDP") in names]
    inside = {id(child) for module in found for child in module.modules() if child is not module}
    found = [module for module in found if id(module) not in inside]
    lists = [list(module) for module in decoder.modules() if isinstance(module, nn.ModuleList)]
    return found or max(lists, key=len, default=[])


def load_once(load: Callable[[], PreTrainedModel], process: int) -> PreTrainedModel:
    """The model that process 0 loads; in the others the same without weights (on the meta device), which `shard` sends them. A
    quantised one, which is not shared out, is loaded by each. What cannot be loaded is a ValueError in all of them. Every process
    must call it."""
    model, said = None, [None]
    if process == 0:
        try:
            model = load()
            said = [None if getattr(model, "is_quantized", False) else (model.config, model.generation_config)]
        except ValueError as error:
            said = [str(error)]
    broadcast_object_list(said)
    if isinstance(said[0], str):
        raise ValueError(said[0])
    if model is not None or said[0] is None:
        return model or load()
    config, generation = said[0]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=config._attn_implementation)
    model.generation_config = generation
    return model


@torch.no_grad()
def shard(model: PreTrainedModel, mesh: DeviceMesh, device: torch.device, *, offload: bool = False) -> None:
    """Shares the decoder's weights out among the processes of `mesh`, on `device`; the head and what is outside of the decoder are
    whole on each. The weights are those of process 0: another's may be on the meta device. No more than a layer is whole at a
    time. `offload`: the shares wait in main memory, pinned where there is a GPU, and a layer's is copied while the one before it
    runs.

    Every process must call it, and run the decoder as often as the others from then on: layers are gathered in its forward.
    """
    decoder, layers, weights = model.get_decoder(), layers_of(model), _Weights(model, device)
    pinned = device.type == "cuda" and torch.cuda.is_available()
    options = {
        "mesh": mesh,
        "reshard_after_forward": True,  # there is no backward to keep anything for
        "offload_policy": CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy(),
    }
    for layer in layers:
        weights.send(layer)
        fully_shard(layer, **options)
    weights.send(model, without=layers)
    fully_shard(decoder, ignored_params=set(model.get_output_embeddings().parameters()), **options)


class _Weights:
    """The tensors of a model, as process 0 has them, on the device of each process: a part at a time."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device, self.first = device, torch.distributed.get_rank() == 0
        self._sent: dict[int, Tensor] = {}
        # Numbered by place while all of them are there: a tensor that is gone leaves its id to the next. Tied ones share it.
        places, numbers = list(_places(model)), {}
        kinds = [[(numbers.setdefault(id(each), len(numbers)), each.shape, each.dtype) for _, _, each in places]]
        broadcast_object_list(kinds)
        self._tied = {number for number, times in Counter(kind[0] for kind in kinds[0]).items() if times > 1}
        self._kinds = {(id(owner), name): kind for (owner, name, _), kind in zip(places, kinds[0], strict=True)}

    def send(self, module: nn.Module, without: Iterable[nn.Module] = ()) -> None:
        for owner, name, tensor in list(_places(module, {part for each in without for part in each.modules()})):
            number, shape, dtype = self._kinds[id(owner), name]
            if (sent := self._sent.get(number)) is None:
                if self.first:
                    value = tensor.detach().to(self.device).contiguous()
                else:
                    value = torch.empty(shape, dtype=dtype, device=self.device)
                torch.distributed.broadcast(value, src=0)
                sent = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
                if number in self._tied:
                    self._sent[number] = sent
            owner[name] = sent


def _places(module: nn.Module, without: Collection[nn.Module] = ()) -> Iterator[tuple[dict, str, Tensor]]:
    """Where each tensor is held: among the parameters, the buffers or the plain attributes of a module."""
    for part in module.modules():
        if part not in without:
            for owner in (part._parameters, part._buffers, vars(part)):
                yield from ((owner, name, tensor) for name, tensor in owner.items() if isinstance(tensor, Tensor))
