"""The student in several processes (torchrun): who is there, what they share, what they agree on.

Every process computes the step of its own micro-shards. Losses are brought to their global means,
so that the gradients are those of one process with all views (`Ranks` says who takes what).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from radio.config import ParallelConfig
from radio.data.ranks import Ranks
from radio.errors import RadioError
from student.vit import Block

Value = TypeVar("Value")
PATIENCE = timedelta(hours=24)  # the others wait while one measures; torchrun ends them with it


@contextmanager
def joined(config: ParallelConfig, device: torch.device) -> Iterator[Ranks]:
    """Join torchrun's processes inside the block; alone where `parallel.kind` is null.

    Processes that are connected already, as Ray Train's, stay so afterwards.

    Raises:
        RadioError: several processes without a kind, or a kind without torchrun.
    """
    if dist.is_initialized() and config.kind is not None:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        yield Ranks(dist.get_rank(), dist.get_world_size(), config.placement)
        return
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if config.kind is None:
        if size > 1:
            raise RadioError(
                f"{size} processes were started, but parallel.kind is null and each would train "
                "alone; set parallel.kind=ddp or fsdp"
            )
        yield Ranks()
        return
    if "RANK" not in os.environ:
        raise RadioError(
            f"parallel.kind={config.kind} shares a step among processes, but this one is alone; "
            "start them with: torchrun --nproc-per-node 2 --no-python radio train ..."
        )
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Ranks(dist.get_rank(), size, config.placement)
    finally:
        dist.destroy_process_group()


def spread(module: nn.Module, kind: str | None) -> nn.Module:
    """Return the module as the processes call it: DDP around it, or sharded in place (FSDP2)."""
    if kind == "ddp":
        # Placement by_rank leaves some adaptors without a gradient on some ranks.
        return nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for block in [each for each in module.modules() if isinstance(each, Block)]:
            fully_shard(block)
        fully_shard(module)
    return module


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor of which every process holds a part as one; all must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's part of a whole tensor, laid out as the parameter is."""
    if not isinstance(parameter, DTensor):
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor.to(parameter.device), mesh, placements, src_data_rank=None)


def summed(values: Tensor, ranks: Ranks) -> Tensor:
    """Return the sum over processes; the tensor itself where there is one process."""
    if ranks.size > 1:
        dist.all_reduce(values)
    return values


def gathered(value: Value, ranks: Ranks) -> list[Value]:
    """Return every process's value, in the order of ranks."""
    if ranks.size == 1:
        return [value]
    values: list[Any] = [None] * ranks.size
    dist.all_gather_object(values, value)
    return values


def merged(values: Mapping[str, str], ranks: Ranks) -> dict[str, str]:
    """Return the entries of every process together."""
    return {key: entry for each in gathered(values, ranks) for key, entry in each.items()}


def leader_first(make: Callable[[], Value], ranks: Ranks) -> Value:
    """Call `make` in the leading process, then in the others, who find what it wrote."""
    if ranks.size == 1 or ranks.leads:
        value = make()
        gathered(None, ranks)
        return value
    gathered(None, ranks)
    return make()


def from_leader(make: Callable[[], Value], ranks: Ranks) -> Value:
    """Return in every process what `make` returned in the leading one."""
    if ranks.size == 1:
        return make()
    values: list[Any] = [make() if ranks.leads else None]
    dist.broadcast_object_list(values)
    value: Value = values[0]
    return value
