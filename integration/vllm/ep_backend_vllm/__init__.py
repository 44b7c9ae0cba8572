"""vLLM plug-in: `vllm serve ... --all2all-backend ep_backend`.

vLLM calls `register` through the entry point group `vllm.general_plugins` in every process it starts. What
happens there is light and takes effect only for engines that select the name (`seam`). The rest is loaded
in the worker, from the communicator that vLLM then builds for the expert-parallel group (`communicator`,
`install`).
"""

import logging
import os

NAME = "ep_backend"
TESTED_VERSIONS = ("0.26", "0.33")
"""First and last minor version of vLLM that the seams were tested against."""


def register() -> None:
    """Make the name selectable. Idempotent; never raises, because an exception here would end the process."""
    log = logging.getLogger("vllm.ep_backend")
    if "EP_BACKEND_PROVIDE_DEEP_EP" in os.environ:  # only then is the library loaded here
        from ep_backend.compat import provide_if_asked

        provide_if_asked(log)
    try:
        from . import seam

        seam.open_seam()
    except Exception:
        log.exception(
            "ep_backend could not register itself with this vLLM (tested with %s to %s); "
            "--all2all-backend ep_backend is not available.",
            *TESTED_VERSIONS,
        )
