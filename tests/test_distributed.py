"""FusedInTI trained by two processes, under DDP and FSDP2: the same step as one process with both clips takes."""

from __future__ import annotations

import datetime
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from inti_kernels import FusedInTI, backends
from inti_kernels.testing import module_case

RANKS = 2
SECONDS = 120
pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")


def build() -> tuple[FusedInTI, Tensor]:
    """The same module in every process, and a clip a rank.

    Of its parameters σ [1] leaves rank 1 with nothing, and token.linear's [3, 6] and [3] don't divide by two.
    """
    inti, x = module_case(dim=6, frames=4, grid=(2, 3), batch=RANKS, dtype=torch.float64)
    return FusedInTI.from_reference(inti, backend="cpu"), x


def step(model: nn.Module, clips: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """One training step: the gradient and the updated value of every parameter, whole."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    z, weights = model(clips, return_weights=True)
    (z.square().mean() + weights.sin().square().mean()).backward()
    optimizer.step()
    return {name: (_whole(p.grad), _whole(p.detach())) for name, p in model.named_parameters()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def work(rank: int, folder: str, strategy: str) -> None:
    """What a process does; leaves its results in the folder."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timeout)
    module, x = build()
    if strategy == "ddp":
        module = nn.parallel.DistributedDataParallel(module)
    else:
        from torch.distributed.fsdp import fully_shard

        fully_shard(module, mesh=dist.init_device_mesh("cpu", (RANKS,)))
        assert isinstance(module, FusedInTI)
        assert module.position_scale.to_local().numel() == 1 - rank
    results = step(module, x[rank : rank + 1])
    assert ("inti_backward", "cpu") in backends.executed
    torch.save({name.removeprefix("module."): both for name, both in results.items()}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.timeout(SECONDS + 30)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_take_the_step_of_one(tmp_path: Path, strategy: str) -> None:
    processes = mp.spawn(work, (str(tmp_path), strategy), nprocs=RANKS, join=False)
    deadline = time.monotonic() + SECONDS
    try:
        while not processes.join(timeout=1):  # raises what a process raised
            assert time.monotonic() < deadline, f"the processes did not finish in {SECONDS} s"
    finally:
        for process in processes.processes:
            if process.is_alive():
                process.kill()
    expected = step(*build())
    for rank in range(RANKS):
        actual = torch.load(tmp_path / f"{rank}.pt")
        assert list(actual) == list(expected)
        for name, (gradient, value) in expected.items():
            assert gradient.any(), name
            torch.testing.assert_close(actual[name], (gradient, value), rtol=1e-10, atol=1e-12, msg=name)
