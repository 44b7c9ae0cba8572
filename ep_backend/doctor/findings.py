"""What is wrong with a machine, why it matters, and what to type next. Pure: from records to sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from ep_backend import checks, env
from ep_backend.checks import Direction
from ep_backend.doctor import nccl
from ep_backend.doctor.warmup import WarmUp
from ep_backend.errors import EpConfigError
from ep_backend.facts import LEAST_SHARED_MEMORY, gather, short_of_shared_memory
from ep_backend.probe import Record
from ep_backend.profiles import version
from ep_backend.select import Decision
from ep_backend.transports import OLDEST_CUDA


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """``wrong``: it must be mended (exit status 1); otherwise it is worth knowing."""

    what: str
    why: str
    next: str
    wrong: bool = True


def find(
    record: Record,
    decision: Decision | None,
    warm_up: WarmUp,
    environ: Mapping[str, str],
    *,
    kernels: bool = True,
    undecided: str = "",
) -> tuple[Finding, ...]:
    """Everything that can be said, what is wrong first. ``decision`` None: there is none, because of
    ``undecided``. ``kernels``: this build has CUDA kernels."""
    causes = [*_driver(record, decision, kernels)]
    found = [
        *_environment(record, environ),
        *_undecided(environ, undecided, any(one.wrong for one in causes)),
        *causes,
        *_peer_access(record, decision, environ),
        *_nccl_over_broken_links(record, decision, environ),
        *_memory(record, decision),
        *_forced(decision),
        *_nccl(record, decision, warm_up, environ),
        *_boards(record),
    ]
    return tuple(sorted(found, key=lambda finding: not finding.wrong))


def used_directions(record: Record) -> list[Direction]:
    used = set(record.used_gpus())
    return [one for one in record.directions if one.source in used and one.target in used]


def gpu_names(record: Record) -> dict[str, str]:
    """ "GPU 0", "GPU 1", ... as the driver numbers them, by UUID."""
    return {gpu.uuid: f"GPU {number}" for number, gpu in enumerate(record.gpus)}


def _environment(record: Record, environ: Mapping[str, str]) -> Iterable[Finding]:
    for sentence in env.misspelt(environ):
        yield Finding(
            what=sentence,
            why="the setting that was meant has no effect",
            next="correct the name, or unset it; ep-backend env lists all names",
        )
    for sentence in env.wrong_values(environ):
        yield Finding(
            what=sentence, why="every communicator refuses to start", next="correct the value, or unset it"
        )
    if record.used_gpus() and environ.get("EP_BACKEND_PEER_ACCESS", "").strip() == "0":
        yield Finding(
            what="EP_BACKEND_PEER_ACCESS=0: every pair of GPUs counts as if the data check had failed",
            why="transports peer and mixed are not used, and NCCL is told to do without peer access",
            next="unset EP_BACKEND_PEER_ACCESS, unless you mean it",
            wrong=False,
        )
    for variable in env.VARIABLES:
        if variable.kind == "set" and environ.get(variable.name, "").strip():
            try:
                variable.parse(environ[variable.name])
            except EpConfigError as error:
                yield Finding(
                    what=str(error),
                    why="the library that reads it may ignore it or stop",
                    next=f"unset {variable.name}, unless you know better",
                    wrong=False,
                )


def _undecided(environ: Mapping[str, str], undecided: str, explained: bool) -> Iterable[Finding]:
    """Why nothing can be chosen, unless another finding says it. ``explained``: one about driver or build."""
    named = env.PREFIX in undecided
    if any(undecided in sentence for sentence in env.wrong_values(environ)) or (explained and not named):
        return
    if undecided:
        step = "correct or unset the variable that is named" if named else "mend what is named"
        yield Finding(
            what=undecided,
            why="no profile and transport can be chosen, so nothing starts",
            next=f"{step}, then ep-backend doctor again",
        )


def _driver(record: Record, decision: Decision | None, kernels: bool) -> Iterable[Finding]:
    torch = record.versions.get("torch", "")
    if record.gpus and torch.endswith("+cpu"):
        yield Finding(
            what=f"this machine has GPUs, and PyTorch {torch} is built for CPUs only",
            why="the GPUs are not used, neither here nor by an engine",
            next="install your engine's own PyTorch, for example: pip install vllm",
        )
    if any("NVML does not describe" in problem for problem in record.problems):
        yield Finding(
            what="the GPUs' links are not known, because NVML does not describe the GPUs",
            why="no profile fits, so nothing is set, and transport peer is not used",
            next="pip install nvidia-ml-py (in a container also: give it the driver's utility capability)",
        )
    if not record.used_gpus():
        return
    if record.cuda_driver and version(record.cuda_driver) < OLDEST_CUDA:
        yield Finding(
            what=f"NVIDIA driver {record.driver} is too old: it serves CUDA {record.cuda_driver}",
            why="the kernels of all transports for GPUs need CUDA 13.0, that is driver 580 or newer, so no "
            "transport can be chosen",
            next="install driver 580 or newer",
            wrong=True,
        )
    if not kernels:
        yield Finding(
            what="this build of ep_backend has no CUDA kernels",
            why="there is no transport for rows on GPUs",
            next="EP_BACKEND_CUDA=1 pip install . in the source of ep_backend",
            wrong=True,
        )


def _peer_access(record: Record, decision: Decision | None, environ: Mapping[str, str]) -> Iterable[Finding]:
    directions, names = used_directions(record), gpu_names(record)
    broken = [one for one in directions if one.broken]
    if broken:
        pairs = ", ".join(
            f"{names.get(d.source, d.source)} -> {names.get(d.target, d.target)}" for d in broken
        )
        said = next((f" ({one.problem})" for one in broken if one.problem), "")
        wanted = [i for i in decision.env if i.name.startswith("NCCL_P2P_")] if decision else []
        cure = nccl.less_access(record, directions)
        # A value of the user's own stays, and may reach what is broken.
        if wanted and all(environ.get(item.name, item.value) == item.value for item in wanted):
            settings = " ".join(f"{item.name}={item.value}" for item in wanted)
            cure = f"engines with this library's plug-in get {settings}; for other programs: {cure}"
        used = f"uses transport {decision.transport} here" if decision else "does not use transport peer here"
        hint = ""
        if record.iommu == "translated":
            hint = "; the IOMMU translates addresses here, which often is the cause: boot with iommu=pt, or "
            hint += "switch off the IOMMU and ACS in the BIOS"
        yield Finding(
            what=f"the data check of peer access failed: {pairs}{said}",
            why="the driver offers direct access, and what one GPU writes does not reach the other: NCCL "
            f"hangs or sums wrong data. ep_backend {used}",
            next=f"{cure}{hint}",
        )
    untried = [one for one in directions if one.access and one.works is None and one.problem]
    if untried:
        yield Finding(
            what=f"peer access was not checked between {len(untried)} ordered pairs: {untried[0].problem}",
            why="without the check the profiles of PCIe machines are not recognised",
            next="see the notes; ep-backend doctor again",
            wrong=False,
        )
    gpus = {gpu.uuid: gpu for gpu in record.gpus}
    staged = [
        note
        for one in directions
        if one.source in gpus
        and one.target in gpus
        and (note := checks.staged(one, gpus[one.source], gpus[one.target]))
    ]
    if staged:
        yield Finding(
            what=f"peer access works and is slow between {len(staged)} ordered pairs: {staged[0]}",
            why="transport peer and NCCL wait for every row that goes this way",
            next="compare with transport host: EP_BACKEND_PEER_ACCESS=0 ep-backend doctor; keep the faster",
            wrong=False,
        )


def _nccl_over_broken_links(
    record: Record, decision: Decision | None, environ: Mapping[str, str]
) -> Iterable[Finding]:
    """The user's own values win. These ones break something."""
    level = environ.get("NCCL_P2P_LEVEL", "").strip()
    if nccl.reaches_broken(level, record, used_directions(record)) and environ.get("NCCL_P2P_DISABLE") != "1":
        yield Finding(
            what=f"NCCL_P2P_LEVEL={level} makes NCCL use peer access between GPUs where it does not work",
            why="NCCL hangs or sums wrong data",
            next="unset NCCL_P2P_LEVEL, or export NCCL_P2P_DISABLE=1",
        )
    wanted = {item.name for item in decision.env} if decision else set()
    if "NCCL_MNNVL_ENABLE" in wanted and environ.get("NCCL_CUMEM_ENABLE") == "0":
        yield Finding(
            what="NCCL_CUMEM_ENABLE=0, and NCCL needs cuMem for NVLink across machines",
            why="NCCL_MNNVL_ENABLE=1, which the profile sets, makes it stop then",
            next="unset NCCL_CUMEM_ENABLE",
        )


def _memory(record: Record, decision: Decision | None) -> Iterable[Finding]:
    size = record.shared_memory_bytes
    if size is not None and size < LEAST_SHARED_MEMORY:
        short = decision is not None and short_of_shared_memory(gather([record]), decision.transport)
        yield Finding(
            what=f"/dev/shm has only {size / (1 << 20):.0f} MiB",
            why="NCCL without peer access and the processes of an engine exchange data there, and end with a "
            "bus error when it is full"
            if short
            else "ep_backend does not use it, and NCCL hardly does here; processes of an engine may exchange "
            "data there, and end with a bus error when it is full",
            next="docker run --ipc=host, or --shm-size=1g or more (Kubernetes: an emptyDir of medium Memory "
            "on /dev/shm); without a container: mount -o remount,size=50% /dev/shm",
            wrong=short,
        )


def _forced(decision: Decision | None) -> Iterable[Finding]:
    """A profile that was asked for and is not this machine's."""
    # Doctor looks at one machine, so that a profile for several is no misfit.
    misfit = [one for one in decision.misfit if not one.startswith("several_hosts")] if decision else []
    if decision is not None and misfit:
        yield Finding(
            what=f"EP_BACKEND_PROFILE asks for profile {decision.profile}, which would not have been chosen "
            f"here: {'; '.join(misfit)}",
            why="its settings are for other hardware, with which NCCL may hang, fail or be slow here",
            next="unset EP_BACKEND_PROFILE, then ep-backend doctor again",
        )


def _nccl(
    record: Record, decision: Decision | None, warm_up: WarmUp, environ: Mapping[str, str]
) -> Iterable[Finding]:
    directions = used_directions(record)
    words = {
        "hang": "NCCL hangs in its warm-up",
        "wrong": "NCCL sums wrong data",
        "crash": "NCCL does not start",
    }
    if warm_up.outcome in words:
        cure = nccl.cure(record, decision, directions, environ)
        yield Finding(
            what=f"{words[warm_up.outcome]}: {warm_up.why}",
            why="an engine does the same all-reduce while it starts"
            + (", and waits for ever without a word" if warm_up.outcome == "hang" else ""),
            next=cure
            if warm_up.outcome != "crash" or cure.startswith("peer access is not")
            else f"read the lines of the log; where they speak of peer access: {cure}",
        )
    if slow := nccl.slow(record, warm_up, directions, environ):
        yield Finding(
            what=slow,
            why=nccl.MEMCPY,
            next="compare: NCCL_SHM_USE_CUDA_MEMCPY=1 ep-backend doctor; export it if prefill matters more",
            wrong=False,
        )


def _boards(record: Record) -> Iterable[Finding]:
    used = set(record.used_gpus())
    names = gpu_names(record)
    gpus = [gpu for gpu in record.gpus if gpu.uuid in used]
    sleeping = [
        names[gpu.uuid]
        for gpu in gpus
        if gpu.nvlink_peer == "switch" and gpu.fabric_state in ("not started", "in progress")
    ]
    if sleeping:
        yield Finding(
            what=f"the NVLink fabric is not ready on {', '.join(sleeping)}",
            why="CUDA does not start on GPUs behind NVSwitches until the fabric manager has set them up",
            next="systemctl status nvidia-fabricmanager; its version must be the driver's",
        )
    mig = [names[gpu.uuid] for gpu in record.gpus if gpu.mig]
    if mig:
        yield Finding(
            what=f"MIG is switched on: {', '.join(mig)}",
            why="slices of a GPU have no peer access to others, and NVLink is off",
            next="nvidia-smi -mig 0 (as root, with no program on the GPU), if you want whole GPUs",
            wrong=False,
        )
    if any(gpu.virtualization == "vgpu" for gpu in gpus):
        yield Finding(
            what="a GPU is a vGPU",
            why="most vGPUs offer no peer access",
            next="pass whole GPUs through, if you can",
            wrong=False,
        )
    small = [
        names[gpu.uuid]
        for gpu in gpus
        if len(gpus) > 1
        and not gpu.nvlinks
        and gpu.bar1_bytes is not None
        and gpu.memory_bytes is not None
        and gpu.bar1_bytes < gpu.memory_bytes // 2
    ]
    if small:
        yield Finding(
            what=f"BAR1 is smaller than the memory of {', '.join(small)}",
            why="peers reach a GPU's memory over PCIe through BAR1, and only as much of it",
            next="switch on Resizable BAR (and Above 4G Decoding) in the BIOS",
            wrong=False,
        )
