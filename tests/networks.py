"""Two network namespaces joined by a veth pair: two nodes on one machine. Needs to be root."""

import contextlib
import ctypes
import os
import shutil
import subprocess

import pytest

LINK = "ep0"
ADDRESSES = ("10.99.0.1", "10.99.0.2")
"""Of the nodes, on the link."""


def need_namespaces():
    """Skip the test where namespaces cannot be made."""
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    tried = subprocess.run(["unshare", "-n", "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"network namespaces are not permitted: {tried.stderr.strip()}")


class Node:
    """A network namespace with one link to the other node; it ends with this process at the latest."""

    def __init__(self):
        # It says when it is inside: before that, "its" namespace is still ours.
        command = ["unshare", "-n", "sh", "-c", "echo inside; exec cat"]
        pipe = subprocess.PIPE
        self._holder = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        assert self._holder.stdout.readline() == "inside\n"
        self.pid = self._holder.pid

    def command(self, *words):
        """``words`` as a command that runs inside."""
        return ["nsenter", "-t", str(self.pid), "-n", *words]

    @contextlib.contextmanager
    def inside(self):
        """The calling thread is inside meanwhile, and so is what it starts."""
        with open("/proc/thread-self/ns/net") as outside, open(f"/proc/{self.pid}/ns/net") as inside:
            _enter(inside)
            try:
                yield
            finally:
                _enter(outside)

    def ip(self, *words):
        subprocess.run(self.command("ip", *words), check=True)

    def end(self):
        self._holder.kill()
        self._holder.wait()


def link_bytes():
    """Bytes that have left the calling thread's node through the link, with all headers."""
    with open("/proc/thread-self/net/dev") as lines:
        fields = next(line for line in lines if line.strip().startswith(f"{LINK}:")).split(":")[1].split()
    return int(fields[8])


def _enter(namespace):
    """os.setns of Python 3.12."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace.fileno(), 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextlib.contextmanager
def two_nodes():
    """Two `Node`s that reach each other."""
    with contextlib.ExitStack() as stack:
        nodes = []
        for _ in range(2):
            nodes.append(Node())
            stack.callback(nodes[-1].end)
        here, there = nodes
        here.ip("link", "add", LINK, "type", "veth", "peer", "name", LINK, "netns", str(there.pid))
        for number, node in enumerate(nodes):
            node.ip("addr", "add", f"{ADDRESSES[number]}/24", "dev", LINK)
            node.ip("link", "set", "lo", "up")
            node.ip("link", "set", LINK, "up")
        yield nodes
