"""FusedInTI, and a compressed tower, trained by two processes, under DDP and FSDP2: the same step as one process with
both clips takes."""

from __future__ import annotations

import datetime
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import towers
from torch import Tensor, nn

from inti_kernels import FusedInTI, backends, compress
from inti_kernels.testing import module_case

RANKS = 2
# The module alone, and in a tower of each library; DINOv2 has a parameter that is never used, ToMe works inside blocks.
SUBJECTS = ("module", "open_clip", "openai_clip", "clip", "dinov2", "timm", "tome")
SECONDS = 120
pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")


def build(subject: str) -> tuple[nn.Module, Tensor]:
    """The same model in every process, and a clip a rank.

    Of the module's parameters σ [1] leaves rank 1 with nothing, and token.linear's [3, 6] and [3] don't divide by two.
    """
    if subject == "module":
        inti, x = module_case(dim=6, frames=4, grid=(2, 3), batch=RANKS, dtype=torch.float64)
        return FusedInTI.from_reference(inti, backend="cpu"), x
    name = "timm" if subject == "tome" else subject
    tower, clips = towers.in_double(name), towers.clips(name, RANKS, 4).double()
    if subject == "tome":
        model = compress(tower, 4, method="tome", tome={"r": 2}, num_classes=3)
    else:
        temporal = {"temporal": "uniformer_v2", "uniformer_v2": {"global_blocks": 2, "dropout": 0.0}}
        model = compress(tower, 4, (1, 3), inti={"backend": "cpu"}, num_classes=3, **temporal)
    return towers.randomized(model).train(), clips


def shard(model: nn.Module) -> None:
    """FSDP2, as its users do it: block by block, then the rest; whole where blocks are taken apart."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (RANKS,))
    for block in () if getattr(model, "reduction", None) else getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def step(model: nn.Module, clips: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """One training step: the gradient and the updated value of every parameter, whole."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    output, weights = model(clips, return_weights=True)
    weights = weights if isinstance(weights, list) else [weights]
    (output.square().mean() + sum(w.sin().square().mean() for w in weights)).backward()
    optimizer.step()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: (_whole(p.grad), _whole(p.detach())) for name, p in trained.items()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def work(rank: int, folder: str, strategy: str) -> None:
    """What a process does: every subject's step; leaves the results in the folder."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=timeout)
    for subject in SUBJECTS:
        model, x = build(subject)
        if strategy == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        else:
            shard(model)
            if subject == "module":
                assert isinstance(model, FusedInTI)
                assert model.position_scale.to_local().numel() == 1 - rank
        backends.executed.clear()
        results = step(model, x[rank : rank + 1])
        assert (("inti_backward", "cpu") in backends.executed) == (subject != "tome"), subject
        whole = {name.removeprefix("module."): both for name, both in results.items()}
        torch.save(whole, f"{folder}/{subject}-{rank}.pt")
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
    for subject in SUBJECTS:
        expected = step(*build(subject))
        for rank in range(RANKS):
            actual = torch.load(tmp_path / f"{subject}-{rank}.pt")
            assert list(actual) == list(expected), subject
            for name, (gradient, value) in expected.items():
                assert gradient.any(), (subject, name)
                torch.testing.assert_close(actual[name], (gradient, value), rtol=1e-10, atol=1e-12, msg=name)
