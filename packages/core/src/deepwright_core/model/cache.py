"""How attention meets the paged cache.

The cache of a layer is one tensor of slots. A slot holds what the attention variant keeps of one token: latent and
rope key for MLA, keys and values for GQA. Slots come in blocks of `block_size`; a sequence owns a list of blocks.
Block 0 is never owned: padding writes there, so that no step needs a mask or a host synchronisation.

Shapes: B sequences, Q new tokens of each (right-padded), P blocks of the longest sequence, N slots, W cache width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class CacheBatch:
    """Where the new tokens of a batch go and what they may see. All tensors are int64 on the model's device.

    positions_BQ: absolute position of each new token (0 for padding).
    slots_BQ: slot = block * block_size + offset to write (padding: a slot of block 0).
    blocks_BP: each sequence's blocks in order, padded with 0.
    lengths_B: tokens cached after this step, new ones included.
    """

    positions_BQ: Tensor
    slots_BQ: Tensor
    blocks_BP: Tensor
    lengths_B: Tensor
    block_size: int

    @property
    def context(self) -> int:
        """Positions that the blocks of the longest sequence have room for."""
        return self.blocks_BP.shape[1] * self.block_size
