"""Programming interfaces of other libraries on ep_backend: the same kernels through another door."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import pkgutil
import sys

from ep_backend import env
from ep_backend.errors import EpConfigError, EpError

NAME = "deep_ep"
_PACKAGE = f"{__name__}.{NAME}"
CHILDREN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "children")
STANDS_IN = f"ep_backend stands in for the module {NAME} in this process"


def provide_deep_ep() -> None:
    """Make ``import deep_ep`` give `ep_backend.compat.deep_ep` in this process, from now on, and its modules
    those of ours, and so in the processes that it starts through multiprocessing, from their beginning:
    they take over ``sys.path``, which gets a folder for that at its end. Idempotent.

    Call it before anything imports ``deep_ep``. Raises EpConfigError if DeepEP itself is installed, or a
    module of its name has been imported: nobody shall believe to run the one and run the other.
    """
    package = sys.modules.get(_PACKAGE)
    if package is not None and sys.modules.get(NAME) is package:
        return
    if wrong := _in_the_way():
        raise EpConfigError(
            f"ep_backend was asked to stand in for {NAME}, but {wrong}, or unset EP_BACKEND_PROVIDE_DEEP_EP "
            "and import ep_backend.compat.deep_ep by its own name"
        )
    package = importlib.import_module(_PACKAGE)
    for each in pkgutil.iter_modules(package.__path__):
        sys.modules[f"{NAME}.{each.name}"] = importlib.import_module(f"{_PACKAGE}.{each.name}")
    sys.modules[NAME] = package
    if CHILDREN not in sys.path:
        sys.path.append(CHILDREN)


def _in_the_way() -> str | None:
    """What else ``import deep_ep`` gives in this process and what can be done about it; None for nothing."""
    present = sys.modules.get(NAME)
    if present is not None:
        file = getattr(present, "__file__", None)
        if file is None:
            return "a module of that name, which has no file, has been imported already: do without it"
    else:
        found = importlib.util.find_spec(NAME)
        file = None if found is None else found.origin
        if file is None:  # nothing, or a folder of that name without a module in it
            return None
    ours = os.path.dirname(file) == CHILDREN
    return None if ours else f"DeepEP itself is installed ({file}): uninstall it"


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
