"""Two-batch overlap: attention metadata for each half of a batch.

The model runner V1 of vLLM 0.26 to 0.33 builds it for the first half and, with an attention backend that can
change the block table of what it has built, such as FlashAttention, gives the second half that: with the
lengths of the first half's requests. Tokens are wrong then, or attention reads memory that is not there. The
shortcut is for models with several kinds of KV cache; where batches overlap, builders go without it.

This can go when the oldest supported vLLM has vllm-project/vllm#48659.
"""

import functools
from typing import Any

from .seam import mark, marked, overlaps


def build_metadata_for_each_half() -> None:
    """For attention groups whose builders are made from now on. Idempotent."""
    from vllm.v1.worker.utils import AttentionGroup

    original = AttentionGroup.create_metadata_builders
    if marked(original):
        return

    @functools.wraps(original)
    def create_metadata_builders(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if overlaps(vllm_config):
            for builder in self.metadata_builders:
                builder.supports_update_block_table = False

    AttentionGroup.create_metadata_builders = mark(create_metadata_builders)
