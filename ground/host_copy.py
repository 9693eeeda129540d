"""Numbers that a device has computed, read by the host once they have come."""

import torch


class HostCopy:
    """Numbers on their way from the device to the host, which waits for them only at `read`."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor.to("cpu", non_blocking=True)  # pinned, if it comes from a GPU
        self.copied = torch.cuda.Event() if tensor.is_cuda else None
        if self.copied:
            self.copied.record()

    def read(self) -> list[float]:
        if self.copied:
            self.copied.synchronize()
        return self.tensor.tolist()
