"""What every kept result says of its making."""

from __future__ import annotations

import datetime
import shlex
import sys


def provenance() -> dict[str, str]:
    """The command line of this process and the date (UTC)."""
    return {
        "command": shlex.join(["ep-backend", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
