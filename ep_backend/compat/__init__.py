"""Programming interfaces of other libraries on ep_backend: the same kernels through another door."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys

from ep_backend import env
from ep_backend.errors import EpConfigError, EpError

NAME = "deep_ep"
_PACKAGE = f"{__name__}.{NAME}"
STANDS_IN = f"ep_backend stands in for the module {NAME} in this process"


def provide_deep_ep() -> None:
    """Make ``import deep_ep`` give `ep_backend.compat.deep_ep` in this process, from now on. Idempotent.

    Call it before anything imports ``deep_ep``. Raises EpConfigError if DeepEP itself is installed or has
    been imported: nobody shall believe to run the one and run the other.
    """
    present = sys.modules.get(NAME)
    if present is not None and present is sys.modules.get(_PACKAGE):
        return
    where = getattr(present, "__file__", None)
    if present is None:
        found = importlib.util.find_spec(NAME)
        if found is None or found.origin is None:  # a folder of that name, without a module in it
            for part in ("", ".buffer", ".utils"):
                sys.modules[NAME + part] = importlib.import_module(_PACKAGE + part)
            return
        where = found.origin
    raise EpConfigError(
        f"ep_backend was asked to stand in for {NAME}, but DeepEP itself is installed ({where}): uninstall "
        "it, or unset EP_BACKEND_PROVIDE_DEEP_EP and import ep_backend.compat.deep_ep by its own name"
    )


def provide_if_asked(log: logging.Logger) -> bool:
    """`provide_deep_ep` if EP_BACKEND_PROVIDE_DEEP_EP is 1; whether it is in place then.

    For the engines' plug-ins, which must not raise. ``log`` gets a warning, which is seen before an engine
    has set its logging up, or an error that says what is wrong: the engine then does without, or with DeepEP
    itself.
    """
    try:
        if env.get("EP_BACKEND_PROVIDE_DEEP_EP") == "1":
            provide_deep_ep()
            log.warning(STANDS_IN)
            return True
    except (EpError, ImportError) as error:
        log.error("ep_backend: %s", error)
    return False
