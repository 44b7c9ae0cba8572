"""What is decided when an engine starts, and the sentences about it. Each function is pure but the last
two."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable

from ep_backend import env

MAX_TOKENS_PER_RANK = 16384
"""Upper bound of EpConfig.max_tokens_per_rank; here, so that a launcher need not import PyTorch."""


def version_note(engine: str, version: str, tested: tuple[str, str]) -> str | None:
    """A warning if `version` of ``engine`` is outside the tested range; None inside it or if it cannot be
    read.

    ``tested``: first and last version, as "0.26" or "0.5.17"; as many numbers as these have are compared.
    """
    first, last = (tuple(int(part) for part in limit.split(".")) for limit in tested)
    try:
        found = tuple(int(part) for part in version.split("+")[0].split(".")[: len(first)])
    except ValueError:
        return None
    if first <= found <= last:
        return None
    return (
        f"ep_backend was tested with {engine} {' to '.join(tested)}, this is {version}. "
        "It is tried all the same."
    )


def share(tokens: int, ranks: int) -> int:
    """Most tokens that one of ``ranks`` has when ``tokens`` are spread evenly."""
    return -(-tokens // ranks)


def capacity_refusal(tokens: int | None, remedy: str) -> str | None:
    """Why a rank cannot bring ``tokens`` (None: not known yet) to one exchange; ``remedy`` says what to
    add."""
    if tokens is None or tokens <= MAX_TOKENS_PER_RANK:
        return None
    return (
        f"ep_backend exchanges at most {MAX_TOKENS_PER_RANK} tokens per rank and step, this engine may "
        f"schedule {tokens}: {remedy}."
    )


def raise_first(reasons: Iterable[str | None]) -> None:
    """ValueError with the first wrong value of a variable of ours, or else the first of ``reasons``."""
    for reason in (*env.wrong_values(), *reasons):
        if reason is not None:
            raise ValueError(reason)


def scale_for_tests(warn: Callable[[str], None]) -> float:
    """What the result of every MoE layer is multiplied by: 1, unless a test wants to see another test
    fail."""
    scale = float(env.get("EP_BACKEND_TEST_SCALE_COMBINE"))
    if scale != 1:
        warn(
            f"ep_backend: EP_BACKEND_TEST_SCALE_COMBINE={scale:g} multiplies the result of every MoE layer: "
            "THE MODEL'S OUTPUT IS WRONG. Unset it unless this is a test of a test."
        )
    return scale


def is_first_process() -> bool:
    """Of the engine, on this host: the others would only say the same again."""
    return multiprocessing.parent_process() is None


@functools.cache
def apply_profile(device: str, log: logging.Logger) -> None:
    """Apply the settings of the machine's profile; NCCL must not have started anywhere. The first process
    says what it set.

    The other processes of an engine keep what the first one has set. With fewer GPUs to see they might decide
    otherwise, each for itself. One that did not inherit it decides as the first one would, and says nothing.
    ``device``: "cpu", or anything else for this process' GPUs.
    """
    from ep_backend.probe import probe
    from ep_backend.select import apply_env, decide, missing

    if not is_first_process() and env.APPLIED in os.environ:
        return
    decision = decide([probe("cpu" if device == "cpu" else None)])
    settings = [f"{item.name}={item.value}" for item in missing(decision, os.environ)]
    conflicts = apply_env(decision)
    if is_first_process():
        for conflict in conflicts:
            log.warning("ep_backend: %s", conflict)
        if settings:
            log.info("ep_backend: profile %s sets %s", decision.profile or "none", " ".join(settings))
