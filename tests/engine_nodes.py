"""An engine on two nodes that are one machine: two commands, so that ranks of an engine can share a GPU."""

import time
from concurrent.futures import ThreadPoolExecutor

import gpus

from ep_backend.launch.server import Session

ADDRESS = "127.0.0.1"
# NCCL refuses two ranks of one host on one GPU. It believes in hosts of these names, and sends by sockets.
HOSTS = ("first", "second")
SOCKETS = (("NCCL_NET", "Socket"), ("NCCL_SOCKET_IFNAME", "lo"), ("GLOO_SOCKET_IFNAME", "lo"))
# On one GPU auto chooses another transport. Ranks that take turns compile for long while the others wait.
OURS = (("EP_BACKEND_TRANSPORT", "peer"), ("EP_BACKEND_TIMEOUT_S", "300"))


def wanted(serving):
    """Whether this can be served only so: there are two ranks, and one GPU that they share."""
    return serving.device == "cuda" and serving.ranks == len(HOSTS) and gpus.shared(serving.ranks)


def environ(node):
    """Of the node's processes; what a test sets should come after it."""
    return (("NCCL_HOSTID", HOSTS[node]), *SOCKETS, *OURS)


def environ_apart(node, ranks):
    """The same for two nodes of so many ``ranks`` each to ep_backend, too. On GPUs of their own if there are
    enough."""
    first = ranks * node if ranks * len(HOSTS) <= gpus.FOUND else 0
    visible = ",".join(map(str, range(first, first + ranks)))
    return (*environ(node), ("EP_BACKEND_NODE", HOSTS[node]), ("CUDA_VISIBLE_DEVICES", visible))


def server(engine, first, second, folder, until=""):
    """A server of ``engine``, a module of ep_backend.bench.engines, whose nodes are served as ``first`` and
    ``second`` say; ``until`` as in `Nodes`."""
    serving = engine.Server(first, folder, print)
    command, variables = engine.serve_command(second, second.port), engine.serve_environment(second)
    serving.session = Nodes(serving.session, Session(command, variables, folder / "second.log"), until)
    return serving


class Nodes(Session):
    """The session of the first node, with that of the second one, which is started before it.

    The first is started when the second has said ``until``; it must do so within two minutes.
    """

    def __init__(self, first, second, until):
        self.command, self.log = first.command, first.log
        self._first, self._second, self._until = first, second, until

    def __enter__(self):
        try:
            self._second.__enter__()
            deadline = time.monotonic() + 120
            while self._until not in self._second.text():
                if self._second.returncode() is not None or time.monotonic() > deadline:
                    raise self._second.error(f"the second node has not said {self._until!r}")
                time.sleep(0.2)
            self._first.__enter__()
        except BaseException:
            self.stop()
            raise
        return self

    def returncode(self):
        """Of the node that has ended, None while both run."""
        first = self._first.returncode()
        return self._second.returncode() if first is None else first

    def stop(self):
        with ThreadPoolExecutor() as both:  # a node that is left alone takes long to end
            list(both.map(Session.stop, (self._first, self._second)))

    def text(self):
        return self._first.text() + self._second.text()

    def tail(self, lines):
        return f"{self._first.tail(lines)}\n--- the second node\n{self._second.tail(lines)}"
