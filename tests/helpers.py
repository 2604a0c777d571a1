"""What tests of several parts say: random numbers from a seed, and the bits of a model."""

import torch
from torch import Tensor, nn


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, the same each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def bits(model: nn.Module | dict[str, Tensor]) -> dict[str, bytes]:
    """The bytes of each tensor of a model or state dict: equal where not a bit differs, NaN and -0 included."""
    state = model if isinstance(model, dict) else model.state_dict()
    return {n: t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for n, t in state.items()}
