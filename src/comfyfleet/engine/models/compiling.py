"""Fusing kernels: a network's repeated blocks, compiled by torch.compile. The same mathematics, rounded elsewhere.

Off unless asked for (`comfyfleet engine --compile`): the first job of every new size pays for the compilation. All
blocks of a network share one compiled function, so 24 blocks cost what one costs. What is not repeated stays as it is.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn

BACKEND = "inductor"  # torch.compile's own; tests take one that needs no compiler on the machine


@runtime_checkable
class HasRepeatedBlocks(Protocol):
    def repeated_blocks(self) -> nn.ModuleList:
        """The like-built blocks in which nearly all time is spent."""
        ...


def compile_blocks(network: nn.Module, backend: str = BACKEND) -> int:
    """Compile what repeats in `network`, at its next use; returns how many blocks that are (0: it has none)."""
    if not isinstance(network, HasRepeatedBlocks):
        return 0
    blocks = network.repeated_blocks()
    for block in blocks:
        # A block that cannot be compiled whole would be slower for it; sizes are fixed within a job.
        block.compile(backend=backend, fullgraph=True, dynamic=False)
    return len(blocks)
