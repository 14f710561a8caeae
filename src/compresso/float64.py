"""Numbers in float64 on any device."""

from torch import Tensor


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the CPU where its device knows no such numbers (Apple's)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
