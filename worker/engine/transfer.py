"""What goes to the device and comes back while steps are on their way, without waiting for them."""

from __future__ import annotations

import torch
from torch import Tensor


class Pending:
    """A step on its way, whose tokens the device copies to the host by itself."""

    def __init__(self, tokens: Tensor) -> None:
        self._event = torch.cuda.Event() if tokens.is_cuda else None
        self._tokens = torch.empty_like(tokens, device="cpu", pin_memory=tokens.is_cuda)
        self._tokens.copy_(tokens, non_blocking=True)
        if self._event:
            self._event.record()

    def tokens(self) -> list[int]:
        """Wait for the step; return its tokens, `BAD_ROW` or `UNDECIDED` among them.

        Raises:
            torch.AcceleratorError: the device is lost.
        """
        if self._event:
            self._event.synchronize()
        found: list[int] = self._tokens.tolist()
        return found


class Mirror:
    """A tensor `[fields, size]` on a device, written on the host.

    Two buffers take turns there, so that writing need not wait for the copy before.

    Attributes:
        host: the array to write to, before each `send`; it holds what it held two times before.
        device: the tensor, always the same.
    """

    def __init__(self, fields: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._buffers = [torch.zeros(fields, size, dtype=dtype, pin_memory=cuda) for _ in range(2)]
        self._events = [torch.cuda.Event() for _ in self._buffers] if cuda else []
        self._turn = 0
        self.device = self._buffers[0].to(device, copy=True)
        self.host = self._buffers[0].numpy()

    def send(self) -> None:
        """Copy what was written to the device, behind the steps that are on their way."""
        self.device.copy_(self._buffers[self._turn], non_blocking=True)
        if self._events:
            self._events[self._turn].record()
        self._turn = 1 - self._turn
        if self._events:
            self._events[self._turn].synchronize()
        self.host = self._buffers[self._turn].numpy()
