"""Expert-parallel all-to-all for Mixture-of-Experts inference: ``Communicator``, ``EpConfig`` and the errors.

Importing this package does not import PyTorch; the names below do, when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ep_backend.errors import EpArgumentError, EpConfigError, EpError, EpProtocolError, EpTimeoutError

if TYPE_CHECKING:
    from ep_backend.communicator import Communicator, Handle
    from ep_backend.config import EpConfig
    from ep_backend.transports.base import Received

__version__ = "0.1.0"

_LAZY = {
    "Communicator": "ep_backend.communicator",
    "Handle": "ep_backend.communicator",
    "EpConfig": "ep_backend.config",
    "Received": "ep_backend.transports.base",
}

__all__ = [
    "Communicator",
    "EpArgumentError",
    "EpConfig",
    "EpConfigError",
    "EpError",
    "EpProtocolError",
    "EpTimeoutError",
    "Handle",
    "Received",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import_module("ep_backend._native")  # says what to do where PyTorch or the library is missing
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'ep_backend' has no attribute {name!r}")
