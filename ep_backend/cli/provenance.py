"""What every kept result says of its making."""

from __future__ import annotations

import datetime
import os
import shlex
import sys
from collections.abc import Mapping
from typing import Any

from ep_backend import env


def provenance() -> dict[str, Any]:
    """The command line of this process, the date (UTC), and the variables that steer exchanges."""
    return {
        "command": shlex.join(["ep-backend", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": set_variables(),
    }


def set_variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Names and values of the variables of ep_backend and of NCCL that are set, and of no others. Where
    ep_backend itself has set some, EP_BACKEND_APPLIED says which."""
    return {name: environ[name] for name in sorted(environ) if name.startswith((env.PREFIX, "NCCL_"))}
