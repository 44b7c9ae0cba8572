"""What to do after a failure. Pure."""

from __future__ import annotations


def advise(phase: str, kind: str, transport: str, device: str, error: str = "") -> tuple[str, ...]:
    """Steps in the order in which to take them.

    ``kind`` and ``error`` as in `phases.Failure`; ``transport``: what the group was asked to use, "auto" if
    nothing.
    """
    steps = []
    if kind == "late":
        steps.append("If the machine is only slow or busy, allow more time: --deadline 600.")
    if error != "EpConfigError" and device == "cuda" and phase == "local":
        steps.append(
            "One GPU was on its own, so no link is to blame: look for Xid errors in the kernel's log and for "
            "ECC errors in nvidia-smi -q, and update a driver older than 580."
        )
    if phase == "graph":
        steps.append("Until it is mended, serve without CUDA graphs (vLLM: --enforce-eager).")
    elif transport == "collective":
        steps += _collective(phase, device)
    else:
        steps += _ours(phase, device)
    steps.append("See what is here and how it is joined: ep-backend doctor.")
    steps.append(f"Report it with the output of: ep-backend selftest --phase {phase} --json")
    return tuple(steps)


def _ours(phase: str, device: str) -> list[str]:
    steps = []
    if device == "cuda" and phase != "local":
        steps.append(
            "If GPUs cannot rightly reach each other's memory, do without: EP_BACKEND_PEER_ACCESS=0, then "
            "run this again."
        )
    if device == "cpu" or phase != "local":  # on GPUs the kernels are the same
        steps.append(
            "Exchange through torch.distributed: EP_BACKEND_TRANSPORT=collective, then run this again."
        )
    if device == "cpu" and phase == "node":
        steps.append("In a container: start all ranks in one, or with --ipc=host --network=host.")
    return steps


def _collective(phase: str, device: str) -> list[str]:
    steps = []
    if device == "cuda":
        steps.append(
            "If NCCL carried the rows: NCCL_DEBUG=WARN says why it failed; NCCL_P2P_LEVEL=LOC (or "
            "EP_BACKEND_PEER_ACCESS=0) keeps it from direct access between GPUs."
        )
    if phase == "network":
        steps.append(
            "Every rank must reach every other: name the interface with GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME, and look at the firewall between the machines."
        )
    return steps
