"""DeepEP's programming interface on ep_backend: ``Buffer``, ``Config`` and ``EventOverlap`` of V1, and V2's
``ElasticBuffer`` for dispatch and combine.

Signatures, shapes and meanings are those of https://github.com/deepseek-ai/DeepEP (``deep_ep/buffer.py``,
``deep_ep/buffers/elastic.py`` and their tests); docs/deep_ep.md says what maps to what and what differs.
Arguments without a meaning here are checked for their type and otherwise ignored; what is not supported
raises EpArgumentError at the call, with the alternative. Tensors may be on GPUs or on the CPU.
"""

import torch

from ep_backend import __version__ as _ours
from ep_backend.compat.deep_ep.buffer import Buffer
from ep_backend.compat.deep_ep.config import Config
from ep_backend.compat.deep_ep.elastic import ElasticBuffer, EPHandle
from ep_backend.compat.deep_ep.utils import EventHandle, EventOverlap

__version__ = f"1.2.1+ep.backend.{_ours}"
"""DeepEP's version that has this ``Buffer``, and ours behind it."""

topk_idx_t = torch.int64
"""dtype of expert indices."""

__all__ = ["Buffer", "Config", "EPHandle", "ElasticBuffer", "EventHandle", "EventOverlap", "topk_idx_t"]
