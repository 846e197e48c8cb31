"""How every entry point of the module is called: on x's device, in the current stream, tensors as addresses; and how
the sums of blocks' partial sums, by which parameters' gradients end, are left to one launch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._arguments import name_of
from .._memory import empty
from . import load

NOWHERE = 1 << 12  # an address that nothing is at, aligned to all that kernels ask for


def launch(entry: str, like: Tensor, /, **arguments: Any) -> None:
    """Calls an entry point of the module.

    Args:
        entry: its name.
        like: on whose device the kernels run.
        **arguments: the members of its struct but the stream. A tensor stands for its address, and must be contiguous
            or have its strides beside it; None is the null pointer, a list of these an array of addresses.
    """
    values = {name: _address(v) if v is None or isinstance(v, (Tensor, list)) else v for name, v in arguments.items()}
    run = getattr(load(), entry)
    if not like.is_cuda:  # the emulator
        run(stream=0, **values)
        return
    with torch.cuda.device_of(like):
        run(stream=torch.cuda.current_stream(like.device).cuda_stream, **values)


class Sums:
    """Sums of partial sums that are still to be launched. See csrc/include/inti/cuda/partial_sums.h."""

    def __init__(self) -> None:
        self._sums: list[tuple[list[Tensor], Tensor, bool]] = []  # partial sums, where their sum goes, its sign
        self._positions: list[tuple[Tensor, list[Tensor]]] = []
        self._behind: list[Callable[[], None]] = []

    def add(self, partials: Tensor, to: Tensor, *, negated: bool = False) -> None:
        """to = ±partials.sum(0).

        Args:
            partials: [rows, …] in the wide dtype, up to two axes behind the first, the last of them contiguous.
            to: contiguous, of as many elements as a row, any dtype.
            negated: whether the sum changes its sign.
        """
        self._sums.append(([partials], to, negated))

    def add_both_signs(self, partials: Tensor, to: Tensor) -> None:
        """to[0] = partials.sum(0), to[1] = -to[0]."""
        self.add(partials, to[0])
        self.add(partials, to[1], negated=True)

    def position(self, partials: Tensor, position: Tensor) -> Tensor | None:
        """The gradient of ``position`` [T, C], from partials [rows, T, C]. One tensor for all the calls with the same
        ``position``, to the first of them; the others get None, and theirs is in that one."""
        for known, of_all in self._positions:
            if known is position:
                of_all.append(partials.flatten(1))
                return None
        grad = empty(position.shape, position)
        of_all = [partials.flatten(1)]
        self._positions.append((position, of_all))
        self._sums.append((of_all, grad, False))
        return grad

    def then(self, run: Callable[[], None]) -> None:
        """What needs a sum, to be run behind them all."""
        self._behind.append(run)

    def launch(self) -> None:
        most, batch = load().MOST_PARTIAL_SUMS, []
        for partials, to, negated in self._sums:
            if batch and (len(batch) + len(partials) > most or batch[0][0].dtype != partials[0].dtype):
                self._run(batch)
                batch = []
            batch += [(part, to, negated, part is not partials[-1]) for part in partials]
        self._run(batch)
        for run in self._behind:
            run()

    @staticmethod
    def _run(batch: list[tuple[Tensor, Tensor, bool, bool]]) -> None:
        if not batch:
            return
        sums = []
        for partials, to, negated, goes_on in batch:
            if partials.dim() == 2:  # as runs of one
                partials = partials.unsqueeze(2)
            _, runs, run = partials.shape
            if run == 1 and partials.stride(1) == 1:  # neighbours: one run
                run = runs
            pitch, run_pitch, _ = partials.stride()
            places = (_address(partials), partials.shape[0], pitch, to.numel(), run, run_pitch)
            sums.append((*places, _address(to), name_of(to.dtype), negated, goes_on))
        like = batch[0][0]
        # A tuple: a list is one of tensors.
        launch("partial_sums", like, sums=tuple(sums), dtype=name_of(like.dtype))


_open = threading.local()


@contextmanager
def deferred_sums() -> Iterator[Sums]:
    """Leaves the sums of all backward functions that are called inside the block to one launch at its end.

    What those functions return is complete only then: gradients of parameters and of position, and what they are
    multiplied with afterwards; x's, features' and cube's are complete at once. Of several gradients of one and the same
    position tensor, the first is that of them all and the others are None. A block inside another joins it. After an
    exception nothing is launched.
    """
    outer = getattr(_open, "sums", None)
    if outer is not None:
        yield outer
        return
    _open.sums = sums = Sums()
    try:
        yield sums
        sums.launch()
    finally:
        _open.sums = None


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of [B, T, N, C] but for the channels. That of an axis of one is nothing, and must not forbid wide accesses."""
    return tuple(x.stride(axis) if x.shape[axis] > 1 else 0 for axis in range(3))


def rows(tensor: Tensor) -> tuple[Tensor, int]:
    """[…, C] as rows at one distance, which comes second; a copy where they aren't."""
    *sizes, channels = tensor.shape
    outer = [(size, stride) for size, stride in zip(sizes, tensor.stride(), strict=False) if size > 1]
    pitch = expected = outer[-1][1] if outer else channels
    for size, stride in reversed(outer):
        if stride != expected:
            return tensor.contiguous(), channels
        expected *= size
    if pitch < channels or (tensor.stride(-1) != 1 and channels > 1):
        return tensor.contiguous(), channels
    return tensor, pitch


def _address(tensor: Tensor | list[Tensor | None] | None) -> int | list[int]:
    if isinstance(tensor, list):
        return [_address(one) for one in tensor]
    # PyTorch gives an empty tensor no address; what has no elements is still not what was left out.
    return 0 if tensor is None else tensor.data_ptr() or NOWHERE
