"""Checks a built wheel: tag, symbols, and an installation in an environment of its own, outside the checkout.

usage: wheel_check.py WHEEL TORCH_INDEX   (any Python 3.10 or later; makes a virtual environment)
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ABSENT = re.compile(r"^_?Py[A-Z_]")  # CPython's symbols
FOREIGN_LIBRARIES = re.compile(r"libpython|libcudart|libc10|libtorch_python|libtorch_cuda|libnccl")


def run(*command: str | Path, ok: bool = True, **options) -> str:
    """Standard output and error of a command; raises if it fails (ok) or succeeds (not ok)."""
    done = subprocess.run(
        [str(part) for part in command],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        **options,
    )
    if (done.returncode == 0) != ok:
        raise AssertionError(f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout}")
    return done.stdout


class Check:
    def __init__(self, wheel: Path, index: str, folder: Path) -> None:
        self.wheel, self.index, self.folder = wheel, index, folder
        self.python = folder / "env" / "bin" / "python"
        with zipfile.ZipFile(wheel) as archive:
            self.names = archive.namelist()
            self.metadata = next(archive.read(n).decode() for n in self.names if n.endswith("/WHEEL"))
            archive.extractall(folder / "unpacked")
        self.library = folder / "unpacked" / "ep_backend" / "libep_backend.so"
        self.options = {"cwd": folder, "env": {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}}

    def tag_serves_every_python(self) -> None:
        assert self.wheel.name.endswith("-py3-none-linux_x86_64.whl"), self.wheel.name
        assert "Tag: py3-none-linux_x86_64" in self.metadata, self.metadata

    def contents(self) -> None:
        libraries = [name for name in self.names if name.endswith(".so")]
        assert libraries == ["ep_backend/libep_backend.so"], libraries
        tops = {name.split("/")[0] for name in self.names}
        wanted = {"ep_backend", "ep_backend_vllm", "ep_backend_sglang"}
        assert {top for top in tops if not top.endswith(".dist-info")} == wanted, tops
        sources = {f"ep_backend/configs/{file.name}" for file in (HERE.parent / "configs").glob("*.toml")}
        carried = {name for name in self.names if name.startswith("ep_backend/configs/")}
        assert sources, "no profile in configs/"
        assert carried == sources, (carried, sources)

    def no_python_symbols(self) -> None:
        symbols = [
            line.split()[-1] for line in run("nm", "-D", "--undefined-only", self.library).splitlines()
        ]
        assert any("torch" in symbol for symbol in symbols), (
            "nm shows no symbol of torch: is this the library?"
        )
        python = [symbol for symbol in symbols if ABSENT.match(symbol)]
        assert not python, python
        needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", self.library))
        assert "libtorch_cpu.so" in needed, needed
        assert not [name for name in needed if FOREIGN_LIBRARIES.match(name)], needed

    def installs_no_torch(self) -> None:
        venv.create(self.folder / "env", with_pip=True)
        report = self.folder / "report.json"
        pip = (self.python, "-m", "pip", "--disable-pip-version-check")
        run(*pip, "install", "--dry-run", "--report", report, self.wheel, **self.options)
        names = {item["metadata"]["name"].lower() for item in json.loads(report.read_text())["install"]}
        assert "ep-backend" in names, names
        assert not {n for n in names if n == "torch" or n == "triton" or n.startswith("nvidia")}, names
        run(*pip, "install", self.wheel, **self.options)

    def says_what_to_do_without_torch(self) -> None:
        said = run(self.python, "-c", "from ep_backend import Communicator", ok=False, **self.options)
        assert "PyTorch" in said.splitlines()[-1], said
        assert "pip install torch" in said.splitlines()[-1], said

    def loads_with_torch(self) -> None:
        version = re.search(r"^TORCH_VERSION := (.*)$", (HERE.parent / "Makefile").read_text(), re.MULTILINE)
        assert version is not None
        run(self.python, HERE / "install_cpu_torch.py", version.group(1), self.index, **self.options)
        program = (
            "import ep_backend, ep_backend_sglang, ep_backend_vllm, torch\n"
            "from importlib import resources\n"
            "from ep_backend._native import ops\n"
            "from ep_backend import Communicator, EpConfig\n"
            "folder = resources.files('ep_backend') / 'configs'\n"
            "print(ep_backend.__file__, [file.name for file in folder.iterdir()])"
        )
        said = run(self.python, "-c", program, **self.options)
        assert str(self.folder) in said, said
        assert "cpu.toml" in said, said

    def commands_work(self) -> None:
        command = self.folder / "env" / "bin" / "ep-backend"
        said = run(command, "env", **self.options)
        assert "EP_BACKEND_TIMEOUT_S" in said, said
        json.loads(run(command, "env", "--json", **self.options))
        assert "bench" in run(command, "--help", **self.options)
        program = (
            "from importlib.metadata import entry_points\n"
            "groups = ('vllm.general_plugins', 'sglang.srt.plugins')\n"
            "print([point.value for group in groups for point in entry_points(group=group)])"
        )
        listed = run(self.python, "-c", program, **self.options)
        assert "ep_backend_vllm:register" in listed, listed
        assert "ep_backend_sglang:register" in listed, listed


def main() -> int:
    wheel, index = Path(sys.argv[1]).resolve(), sys.argv[2]
    passed = failed = 0
    with tempfile.TemporaryDirectory(prefix="ep-wheel-") as folder:
        check = Check(wheel, index, Path(folder))
        steps: list[Callable[[], None]] = [
            check.tag_serves_every_python,
            check.contents,
            check.no_python_symbols,
            check.installs_no_torch,
            check.says_what_to_do_without_torch,
            check.loads_with_torch,
            check.commands_work,
        ]
        for step in steps:
            start = time.monotonic()
            try:
                step()
                passed += 1
                result = "ok"
            except Exception as error:
                failed += 1
                result = f"FAILED: {error}"
            print(f"{step.__name__} ({time.monotonic() - start:.1f} s): {result}", flush=True)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
