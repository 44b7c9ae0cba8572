"""``python -m ep_backend.compat script.py ...``: run a program that says ``import deep_ep`` as it is."""

from __future__ import annotations

import os
import runpy
import sys

from ep_backend.compat import STANDS_IN, provide_deep_ep
from ep_backend.errors import EpConfigError

USAGE = """usage: python -m ep_backend.compat script.py [arguments]
       python -m ep_backend.compat -m module [arguments]

Run a Python program for which ep_backend stands in for the module deep_ep. So it does for the processes that
the program starts through multiprocessing."""


def main(arguments: list[str]) -> None:
    """As ``python`` would run ``arguments``. Raises SystemExit where DeepEP itself is installed."""
    module = arguments[:1] == ["-m"]
    target = arguments[int(module) :]
    if not target or target[0].startswith("-"):
        raise SystemExit(USAGE)
    if not module and not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.abspath(target[0]))
    try:
        provide_deep_ep()
    except EpConfigError as error:
        raise SystemExit(f"ep_backend: {error}") from None
    print(STANDS_IN, file=sys.stderr)
    sys.argv = target
    if module:
        runpy.run_module(target[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(target[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
