"""Checks the CUDA code in a built wheel: every architecture is there, nothing is a system-scope atomic or a
reduction over links, and every kernel that stores by bulk copies has the fences for it.

usage: cuda_check.py WHEEL   (installs NVIDIA's disassemblers, 6 MB, into build/cuda-tools)

The protocol signals with plain stores, because atomics on a peer's memory do not work on every machine; rows
stored by bulk copies must have landed before their flag is stored (docs/protocol.md).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "build" / "cuda-tools"
DISASSEMBLERS = ("cuobjdump", "nvdisasm")  # 13.2 reads what 13.0 writes; there is none of 13.0
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
ARCHITECTURES = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}
PTX = {"sm_120"}
# SASS, for example ATOMG.E.ADD.STRONG.SYS; PTX, for example atom.add.acq_rel.sys.global.u32.
SYSTEM_ATOMIC = re.compile(
    r"\b(ATOM|ATOMG|RED|REDG)\.[\w.]*\bSYS\b|\b(atom|red)\.[\w.:]*\bsys\b"
    r"|\b(UBLKRED|UTMAREDG|LDGMC)\b|\b(cp\.reduce\.async|multimem)\b"  # these reach peers too
)
SAMPLES = {  # what nvcc 13.0 emits for each, so that the expression above is known to find it
    "@P0 ATOMG.E.ADD.STRONG.SYS PT, R7, desc[UR4][R2.64], R9 ;": True,
    "ATOMG.E.CAS.64.STRONG.SYS PT, R8, [R4], R8, R10 ;": True,
    "RED.E.ADD.STRONG.SYS [R2.64+0xc], R5 ;": True,
    "REDG.E.ADD.STRONG.SYS desc[UR4][R2.64+0xc], R5 ;": True,
    "atom.global.sys.cas.b64 %rd10, [%rd6], 1, 2;": True,
    "red.release.sys.global.add.u32 [%rd2], 1;": True,
    "UBLKRED.G.S.ADD.F32.RN [UR6], [UR4], UR5 ;": True,
    "REDG.E.ADD.F32.FTZ.RN.STRONG.SYS desc[UR4][R2.64], R5 ;": True,  # multimem.red
    "LDGMC.E.ADD.F32.RN.STRONG.SYS R5, [R2.64+URZ] ;": True,
    "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%rd1], [%r1], %r2;": True,
    "multimem.st.relaxed.sys.global.f32 [%rd1], %f1;": True,
    "UBLKCP.G.S [UR6], [UR4], UR5 ;": False,
    "cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r1], %r2;": False,
    "ATOMG.E.ADD.STRONG.GPU PT, R3, desc[UR6][R2.64], R5 ;": False,
    "ST.E.STRONG.SYS desc[UR4][R2.64+0xc], R5 ;": False,
    "MEMBAR.SC.SYS ;": False,
    "atom.global.cta.add.u32 %r3, [%rd7], 1;": False,
    "st.release.sys.global.u32 [%0], 1;": False,
}

BULK_STORE = "UBLKCP.G.S"
# What a kernel with bulk stores needs somewhere, and what each is for.
BULK_FENCES = {
    r"FENCE\.VIEW\.ASYNC\.G": "fence.proxy.async.global, behind the flags that allowed the stores",
    r"FENCE\.VIEW\.ASYNC\.S": "fence.proxy.async.shared, between ordinary use of shared memory and copies",
    r"UTMACMDFLUSH": "cp.async.bulk.commit_group",
    r"DEPBAR\.LE SB0, 0x0": "cp.async.bulk.wait_group 0, before the flag",
    r"MEMBAR\.\w+\.SYS": "fence.acq_rel.sys, before the flag",
}


def unfenced(function: str) -> list[str]:
    """What is missing in the disassembly of a kernel that stores by bulk copies; nothing in others."""
    if BULK_STORE not in function:
        return []
    return [what for pattern, what in BULK_FENCES.items() if not re.search(pattern, function)]


def tool(*command: str | Path) -> str:
    binaries = TOOLS / "nvidia" / "cu13" / "bin"
    environment = os.environ | {"PATH": f"{binaries}:{os.environ['PATH']}"}
    return subprocess.run(
        [binaries / command[0], *command[1:]], check=True, text=True, capture_output=True, env=environment
    ).stdout


def check(library: Path) -> None:
    for line, wanted in SAMPLES.items():
        assert bool(SYSTEM_ATOMIC.search(line)) == wanted, line
    found = set(re.findall(r"\.(sm_\w+)\.cubin", tool("cuobjdump", "--list-elf", library)))
    assert found == ARCHITECTURES, f"machine code for {sorted(found)}, wanted {sorted(ARCHITECTURES)}"
    found = set(re.findall(r"\.(sm_\w+)\.ptx", tool("cuobjdump", "--list-ptx", library)))
    assert found == PTX, f"PTX for {sorted(found)}, wanted {sorted(PTX)}"
    sass = tool("cuobjdump", "-sass", library)
    code = sass + tool("cuobjdump", "-ptx", library)
    functions = sass.split("Function : ")[1:]
    kernels = len(functions)
    assert kernels >= len(ARCHITECTURES), f"only {kernels} functions were disassembled"
    atomics = [line.strip() for line in code.splitlines() if SYSTEM_ATOMIC.search(line)]
    assert not atomics, "system-scope atomics:\n" + "\n".join(atomics[:10])
    bulk = [function for function in functions if BULK_STORE in function]
    assert bulk, "no kernel stores by bulk copies, or they are called something else"
    for function in bulk:
        assert unfenced(function) == [], f"{function.split()[0]} lacks {'; '.join(unfenced(function))}"
        for pattern in BULK_FENCES:  # each is looked for
            assert unfenced(re.sub(pattern, "", function)), pattern
    print(
        f"{kernels} functions for {sorted(ARCHITECTURES)}, PTX for {sorted(PTX)}, no system-scope atomic; "
        f"{len(bulk)} with bulk stores, all fenced"
    )


def main() -> None:
    if not (TOOLS / "nvidia").is_dir():
        subprocess.run(
            [
                *PIP,
                "install",
                "-q",
                "--target",
                TOOLS,
                *(f"nvidia-cuda-{tool}==13.2.*" for tool in DISASSEMBLERS),
            ],
            check=True,
        )
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(sys.argv[1]) as archive:
        check(Path(archive.extract("ep_backend/libep_backend.so", folder)))


if __name__ == "__main__":
    main()
