"""NT-Xent in plain PyTorch: what the operator equals, in a form anyone can read. It stores the M × M logits; use it for checking
only."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def ntxent_loss_reference(z: torch.Tensor, temperature: float | torch.Tensor = 0.1, *, normalize: bool = True) -> torch.Tensor:
    """NT-Xent of ``z`` [2N, D], row i's positive being row (i + N) mod 2N, as one cross entropy over the masked similarity
    matrix.

    Source: Chen et al., SimCLR (2020), equation 1.
    """
    num_rows = z.shape[0]
    zhat = F.normalize(z, dim=1) if normalize else z
    logits = zhat @ zhat.T / temperature
    logits = logits.masked_fill(torch.eye(num_rows, dtype=torch.bool, device=z.device), float("-inf"))
    positives = (torch.arange(num_rows, device=z.device) + num_rows // 2) % num_rows
    return F.cross_entropy(logits, positives)
