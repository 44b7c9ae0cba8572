"""SGLang plug-in: `python -m sglang.launch_server ... --moe-a2a-backend ep_backend`.

SGLang calls `register` through the entry point group `sglang.srt.plugins`: in the launcher before it reads
the command line, and again in every scheduler process. What happens there is light and passes everything
through unless the name is selected (`seam`). The rest is put in place when the first MoE layer asks for a
dispatcher under our name (`install`).
"""

import logging
import os

NAME = "ep_backend"
TESTED_VERSIONS = ("0.5.17", "0.5.23")
"""First and last version of SGLang that the seams were tested against."""

logger = logging.getLogger("sglang.ep_backend")


def register() -> None:
    """Make the name selectable. Idempotent; never raises, because SGLang would swallow it: one line says why
    the name is missing."""
    if "EP_BACKEND_PROVIDE_DEEP_EP" in os.environ:  # only then is the library loaded here
        _provide_deep_ep()
    try:
        from . import seam

        seam.open_seam()
    except Exception as error:
        logger.error(
            "ep_backend IS NOT AVAILABLE in this process: it could not register itself with this SGLang "
            "(tested with %s to %s): %s: %s",
            *TESTED_VERSIONS,
            type(error).__name__,
            " ".join(str(error).split()),
        )


def _provide_deep_ep() -> None:
    from ep_backend.compat import provide_if_asked

    from .deepep import DISPATCHER, hand_over

    if provide_if_asked(logger):
        try:
            hand_over()
        except (AttributeError, ImportError) as error:
            logger.error("ep_backend: deep_ep could not be handed to %s: %s", DISPATCHER, error)
