"""Loads the compiled library and names its operators: ``from ep_backend._native import ops``.

Also here: the numbers that C++ and Python must agree on, and the shape functions that ``torch.compile`` asks
for.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from ep_backend.errors import EpError

try:
    import torch
except ImportError as error:
    raise EpError(
        "ep_backend uses the PyTorch of your engine and installs none itself: install vLLM, SGLang or "
        "PyTorch 2.11 or later first (CPU: pip install torch --index-url https://download.pytorch.org/whl/cpu)"
    ) from error

LIBRARY = "libep_backend.so"

# csrc/common/numerics.h
DTYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float8_e4m3fn: 3,
    torch.uint8: 4,
}
# csrc/kernels/cpu/exchange.h
LAYOUTS = {"rank_major": 0, "compact": 1, "expert_major": 2}
# csrc/common/layout.h
MAX_WORLD = 72

# csrc/common/status.h
(
    OK,
    TIMEOUT,
    ABORTED,
    AHEAD,
    SLOTS_DIFFER,
    PEER_CLOSED,
    BAD_ID,
    DUPLICATE_ID,
    WRONG_STATE,
    RECOVERING,
    WAITING,
) = range(11)
PHASES = ("dispatch", "combine")


def _load() -> Any:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 11):
        raise EpError(f"ep_backend needs PyTorch 2.11 or later; this is {torch.__version__}")
    with resources.as_file(resources.files("ep_backend") / LIBRARY) as path:
        if not path.exists():
            raise EpError(
                f"ep_backend has no compiled library at {path}: install the package (pip install .) and "
                "import it from outside the source tree, or build in the tree as CONTRIBUTING.md says"
            )
        torch.ops.load_library(str(path))
    return torch.ops.ep_backend


ops = _load()
HAS_CUDA = hasattr(ops, "cuda_dispatch")
"""Whether this build has CUDA kernels."""

# Operators that write into their arguments and return a status or nothing: all that tracing needs to know.
_RETURNS_STATUS = (
    "dispatch_send",
    "dispatch_counts",
    "combine_send",
    "combine_recv",
    "check_ids",
    "pack_count",
    "unpack_dispatch",
    "pack_combine",
    "pack_close",
    "unpack_combine",
    "host_sum",
)
_RETURNS_NOTHING: tuple[str, ...] = ("dispatch_read", "pack_dispatch")
if HAS_CUDA:
    _RETURNS_NOTHING += (
        "cuda_dispatch",
        "cuda_combine",
        "cuda_index_rows",
        "cuda_gather_rows",
        "cuda_sort_rows",
        "cuda_return_rows",
    )

    torch.library.register_fake("ep_backend::cuda_exchange_sums")(lambda *args, **kwargs: True)

for _name in _RETURNS_STATUS:
    torch.library.register_fake(f"ep_backend::{_name}")(lambda *args, **kwargs: OK)
for _name in _RETURNS_NOTHING:
    torch.library.register_fake(f"ep_backend::{_name}")(lambda *args, **kwargs: None)
