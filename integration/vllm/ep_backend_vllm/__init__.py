"""vLLM plug-in: `vllm serve ... --all2all-backend ep_backend`.

vLLM calls `register` through the entry point group `vllm.general_plugins` in every process it starts. What
happens there is light and takes effect only for engines that select the name (`seam`). The rest is loaded
in the worker, from the communicator that vLLM then builds for the expert-parallel group (`communicator`,
`install`).
"""

import logging

NAME = "ep_backend"
TESTED_VERSIONS = ("0.26", "0.33")
"""First and last minor version of vLLM that the seams were tested against."""


def register() -> None:
    """Make the name selectable. Idempotent; never raises, because an exception here would end the process."""
    try:
        from . import seam

        seam.open_seam()
    except Exception:
        logging.getLogger("vllm.ep_backend").exception(
            "ep_backend could not register itself with this vLLM (tested with %s to %s); "
            "--all2all-backend ep_backend is not available.",
            *TESTED_VERSIONS,
        )
