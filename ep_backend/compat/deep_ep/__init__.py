"""DeepEP V1's programming interface on ep_backend: ``Buffer``, ``Config``, ``EventOverlap``.

Signatures, shapes and meanings are those of https://github.com/deepseek-ai/DeepEP (``deep_ep/buffer.py`` and
its tests); docs/deep_ep.md says what maps to what and what differs. Arguments without a meaning here are
checked for their type and otherwise ignored; what is not supported raises EpArgumentError at the call, with
the alternative. Tensors may be on GPUs or on the CPU.
"""

import torch

from ep_backend.compat.deep_ep.buffer import Buffer
from ep_backend.compat.deep_ep.config import Config
from ep_backend.compat.deep_ep.utils import EventHandle, EventOverlap

topk_idx_t = torch.int64
"""dtype of expert indices."""

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "topk_idx_t"]
