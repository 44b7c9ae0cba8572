"""Two-batch overlap: attention metadata for each half of a batch.

vLLM 0.26 to 0.33 builds it for the first half and, with an attention backend that can change the block table
of what it has built (FlashAttention), gives the second half that: with the lengths of the first half's
requests. Tokens are wrong then, or attention reads memory that is not there (vllm-project/vllm#48659). That
shortcut is for models with several kinds of KV cache; where batches overlap, builders go without it.
"""

import functools
from typing import Any

from .seam import mark, marked


def build_metadata_for_each_half() -> None:
    """For attention groups whose builders are made from now on. Idempotent."""
    from vllm.v1.worker.utils import AttentionGroup

    original = AttentionGroup.create_metadata_builders
    if marked(original):
        return

    @functools.wraps(original)
    def create_metadata_builders(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if len(self.metadata_builders) > 1:  # one for each half
            for builder in self.metadata_builders:
                builder.supports_update_block_table = False

    AttentionGroup.create_metadata_builders = mark(create_metadata_builders)
