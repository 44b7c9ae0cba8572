"""The platform's device communicator with our all-to-all manager in it.

vLLM asks the platform for the *name* of a class. `derive` makes a subclass of the named one and returns a
name under which this module finds it again.
"""

import functools
from typing import Any

from vllm.config import get_current_vllm_config
from vllm.utils.import_utils import resolve_obj_by_qualname


class _WithEpManager:
    """Mixed in front of CpuCommunicator, CudaCommunicator, ..."""

    cpu_group: Any
    device: Any
    all2all_manager: Any
    _base_is_built = False

    # The base class raises on names it does not know, or falls back with a warning, while it builds its own
    # manager. It sees no all-to-all until it is done.
    @property
    def use_all2all(self) -> bool:
        return self._base_is_built and self._use_all2all

    @use_all2all.setter
    def use_all2all(self, value: bool) -> None:
        self._use_all2all = value

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._base_is_built = True
        if self.use_all2all:
            from .agreement import agree_through_shared_memory
            from .install import install
            from .manager import EpManager

            install(get_current_vllm_config())
            agree_through_shared_memory()
            self.all2all_manager = EpManager(
                self.cpu_group, kwargs.get("tcp_store_group"), device=self.device
            )


@functools.cache
def _subclass(base_name: str) -> type:
    base = resolve_obj_by_qualname(base_name)
    return type(f"Ep{base.__name__}", (_WithEpManager, base), {"__module__": __name__})


def derive(base_name: str) -> str:
    """Qualified name of a subclass of `base_name` (also a qualified name) that uses ep_backend."""
    subclass = _subclass(base_name)
    globals()[subclass.__name__] = subclass
    return f"{__name__}.{subclass.__name__}"
