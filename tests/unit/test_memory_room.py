"""How much memory files say is left: of the machine and of control groups, in both of their versions."""

import math

import pytest

from ep_backend.surroundings import memory_room

MIB = 1 << 20
MACHINE = {"proc/meminfo": f"MemTotal: {8000 * 1024} kB\nMemAvailable: {4000 * 1024} kB\n"}


def second(folder, limit, used, files=0):
    """Files of a control group, version 2."""
    stat = f"anon 5\nactive_file {files // 4}\ninactive_file {files - files // 4}\n"
    return {
        f"{folder}/memory.max": str(limit),
        f"{folder}/memory.current": str(used),
        f"{folder}/memory.stat": stat,
    }


def first(folder, limit, used, files=0):
    """Version 1; names without total_ leave inner groups out."""
    stat = f"active_file 7\ninactive_file 7\ntotal_active_file {files}\ntotal_inactive_file 0\n"
    return {
        f"{folder}/memory.limit_in_bytes": str(limit),
        f"{folder}/memory.usage_in_bytes": str(used),
        f"{folder}/memory.stat": stat,
    }


GROUP = "sys/fs/cgroup"
OLD = "sys/fs/cgroup/memory"
INSIDE = {"proc/self/cgroup": "0::/\n"}
SERVICE = {"proc/self/cgroup": "0::/system.slice/engine\n"}
OLD_SERVICE = {"proc/self/cgroup": "5:cpu,cpuacct:/engine\n4:memory:/box/engine\n0::/\n"}


@pytest.mark.parametrize(
    ("files", "free", "limit"),
    [
        ({}, math.inf, "this machine"),
        ({"proc/meminfo": "MemAvailable: many kB\n"}, math.inf, "this machine"),
        (MACHINE, 4000 * MIB, "this machine"),
        # a container sees its own group as the top
        ({**MACHINE, **INSIDE, **second(GROUP, 1000 * MIB, 300 * MIB)}, 700 * MIB, "control group"),
        ({**MACHINE, **INSIDE, **second(GROUP, 1000 * MIB, 300 * MIB, 80 * MIB)}, 780 * MIB, "control group"),
        ({**MACHINE, **INSIDE, **second(GROUP, "max", 300 * MIB)}, 4000 * MIB, "this machine"),
        ({**MACHINE, **INSIDE, **second(GROUP, 9000 * MIB, 300 * MIB)}, 4000 * MIB, "this machine"),
        # an outer group may be tighter, and so may an inner one
        (
            {
                **SERVICE,
                **second(f"{GROUP}/system.slice", 500 * MIB, 400 * MIB),
                **second(f"{GROUP}/system.slice/engine", 900 * MIB, 400 * MIB),
            },
            100 * MIB,
            "control group system.slice",
        ),
        ({**SERVICE, **second(f"{GROUP}/system.slice/engine", 9, 4)}, 5, "control group engine"),
        ({**OLD_SERVICE, **MACHINE, **first(f"{OLD}/box", 70, 30, 5)}, 45, "control group box"),
        ({**OLD_SERVICE, **MACHINE, **first(OLD, 70, 30)}, 40, "control group memory"),  # the host's path
        ({**OLD_SERVICE, **MACHINE, **first(OLD, "x", 30)}, 4000 * MIB, "this machine"),
    ],
)
def test_memory_room(tmp_path, files, free, limit):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    room = memory_room(tmp_path)
    assert room.free == free
    assert room.limit.startswith(limit)
