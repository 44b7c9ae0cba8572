"""Two network namespaces joined by a veth pair: two nodes on one machine. Needs to be root."""

import contextlib
import shutil
import subprocess

import pytest

LINK = "ep0"


def need_namespaces():
    """Skip the test where namespaces cannot be made."""
    for tool in ("unshare", "nsenter", "ip"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    tried = subprocess.run(["unshare", "-n", "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"network namespaces are not permitted: {tried.stderr.strip()}")


class Node:
    """A network namespace with one link to the other node; it ends with its process."""

    def __init__(self):
        # It says when it is inside: before that, "its" namespace is still ours.
        command = ["unshare", "-n", "sh", "-c", "echo inside; exec sleep 600"]
        self._holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._holder.stdout.readline() == "inside\n"
        self.pid = self._holder.pid

    def command(self, *words):
        """``words`` as a command that runs inside."""
        return ["nsenter", "-t", str(self.pid), "-n", *words]

    def ip(self, *words):
        subprocess.run(self.command("ip", *words), check=True)

    def end(self):
        self._holder.kill()
        self._holder.wait()


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
            node.ip("addr", "add", f"10.99.0.{number + 1}/24", "dev", LINK)
            node.ip("link", "set", "lo", "up")
            node.ip("link", "set", LINK, "up")
        yield nodes
