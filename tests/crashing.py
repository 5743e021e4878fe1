"""A module whose TorchScript file ends the process that runs it."""

import torch
from torch import Tensor, nn


class Crashing(nn.Module):
    """Writes far outside a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        """Never returns."""
        indices = torch.full((1, 1), 1 << 40, dtype=torch.int64)
        return torch.ops.aten._sparse_coo_tensor_unsafe(indices, x.flatten()[:1], [4]).to_dense()
