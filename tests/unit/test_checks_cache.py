"""What is remembered of checks of peer access, and what makes them be done anew."""

import itertools
import multiprocessing
import os
import stat
import subprocess
import sys
import time

import msgspec
import pytest
from check_workers import (
    FINE,
    GPUS,
    LINKS,
    MEASURED,
    PAIRS_FINE,
    UUIDS,
    counted_results,
)

from ep_backend import checks
from ep_backend.checks import cache, supervise
from ep_backend.nvml import Gpu, Link


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return counted_results(monkeypatch, tmp_path)


def test_a_second_call_takes_what_is_known(machine):
    first, starts = machine()
    assert (len(first.directions), starts) == (6, 1)
    assert machine() == (first, 0)
    assert machine(among=()) == (first, 0)
    again, starts = machine(fresh=True)
    assert (again, starts) == (first, 1)


def test_only_what_is_asked_for_is_tried_and_it_adds_up(machine):
    found, starts = machine(among=())
    assert (found.directions, starts) == ((), 0)
    found, starts = machine(among=["GPU-a", "GPU-b"])
    assert (len(found.directions), starts) == (2, 1)
    assert machine(among=["GPU-b", "GPU-a", "GPU-elsewhere"])[1] == 0
    found, starts = machine()
    assert (len(found.directions), starts) == (6, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"driver": "590"},
        {"boot_id": "another"},
        {"gpus": (*GPUS[:2], Gpu(uuid="GPU-c", bus_id="00000000:99:00.0"))},
        {"gpus": (*GPUS[:2], msgspec.structs.replace(GPUS[2], nvlinks=4))},
        {"links": (*LINKS[:2], msgspec.structs.replace(LINKS[2], nvlink=True))},
        {"links": (*LINKS[:2], msgspec.structs.replace(LINKS[2], ancestor="PIX"))},
    ],
)
def test_another_driver_boot_or_topology_is_another_machine(machine, changes):
    assert machine()[1] == 1
    assert machine(**changes)[1] == 1
    assert machine(**changes)[1] == 0


def test_another_build_of_the_library_is_tried_anew(machine, monkeypatch, tmp_path):
    assert machine()[1] == 1
    other = tmp_path / "library.so"
    other.write_bytes(b"other")
    monkeypatch.setattr(cache, "LIBRARY", other)
    assert machine()[1] == 1


def test_without_a_boot_id_nothing_is_remembered(machine):
    assert machine(boot_id="")[1] == 1
    assert machine(boot_id="")[1] == 1


def test_a_failure_is_remembered_and_what_was_not_tried_is_tried_later(machine, monkeypatch):
    hang = "begin(pairs[0]); time.sleep(60)"
    found, _ = machine(among=["GPU-a", "GPU-b"], body="if len(pairs) == 2:\n  " + hang + "\n" + FINE)
    assert {direction.works for direction in found.directions} == {True, False}
    assert machine(among=["GPU-a", "GPU-b"])[1] == 0, "a machine with broken peer access pays once per boot"

    untried, _ = machine(gpus=GPUS[:2], body="out(type='note', text='no memory left')")
    assert {direction.works for direction in untried.directions} == {None}
    assert any("no memory left" in problem for problem in untried.problems)
    assert machine(gpus=GPUS[:2]) == (untried, 0), "other ranks do not try it again at once"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + checks.RETRY_S + 1)
    found, starts = machine(gpus=GPUS[:2])
    assert starts == 1
    assert {direction.works for direction in found.directions} == {True}


def test_orders_are_compared_once_for_each_group(machine, monkeypatch):
    first, starts = machine()
    assert (first.orders, starts) == ((MEASURED,), 1)
    assert machine() == (first, 0)
    assert machine(among=["GPU-a", "GPU-b"])[1] == 0, "two GPUs have one order"
    four = (*GPUS, Gpu(uuid="GPU-d"))
    more = (*LINKS, *(Link(a=a, b="GPU-d", nvlink=True) for a in UUIDS))
    found, _ = machine(gpus=four, links=more)
    found, starts = machine(gpus=four, links=more, among=UUIDS)
    assert (len(found.orders), starts) == (2, 1), "what directions are known need not be tried again"
    near = [("GPU-a", "GPU-b"), ("GPU-c", "GPU-d")]
    more = tuple(
        Link(a=a, b=b, nvlink=False, ancestor="PIX" if (a, b) in near else "PHB")
        for a, b in itertools.combinations([gpu.uuid for gpu in four], 2)
    )
    assert machine(gpus=four, links=more)[0].orders[0].group == 2
    joined = tuple(msgspec.structs.replace(link, nvlink=True) for link in LINKS)
    assert machine(links=joined)[0].orders == ()

    body = PAIRS_FINE + "if request['order']: out(type='note', text='no memory left')"
    untried, _ = machine(boot_id="another", body=body)
    assert untried.orders[0].problem == "not measured: no memory left"
    assert machine(boot_id="another")[1] == 0, "other ranks do not try it again at once"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + checks.RETRY_S + 1)
    assert machine(boot_id="another")[0].orders == (MEASURED,)
    hung, _ = machine(boot_id="third", body=PAIRS_FINE + "begin(('', '')); time.sleep(60)")
    monkeypatch.setattr(time, "time", lambda: now + 3 * checks.RETRY_S)
    assert machine(boot_id="third") == (hung, 0), "a broken machine pays once per boot"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"identity": 3}', b"\xff" * 100, b"null"])
def test_a_corrupt_file_is_no_error(machine, content):
    first, _ = machine()
    (file,) = machine.folder.glob("checks-*.json")
    file.write_bytes(content)
    assert machine() == (first, 1)
    assert machine() == (first, 0)


def test_files_that_are_none_of_ours(machine, tmp_path, monkeypatch):
    first, _ = machine()
    (file,) = machine.folder.glob("checks-*.json")
    elsewhere = tmp_path / "elsewhere.json"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    assert machine() == (first, 1), "links are not followed"
    assert not file.is_symlink()
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    assert machine(environ={**machine.environ, "TMPDIR": str(tmp_path / "missing" / "x")})[1] == 1


@pytest.mark.parametrize("bad", ["file", "open to all", "cannot be made"])
def test_a_cache_folder_that_cannot_be_used(machine, tmp_path, bad):
    place = tmp_path / "bad"
    if bad == "file":
        place.write_text("x")
    elif bad == "open to all":
        (place / "ep_backend").mkdir(parents=True)
        (place / "ep_backend").chmod(0o777)
    environ = {**machine.environ, "XDG_CACHE_HOME": str(place) if bad != "cannot be made" else "/proc/x"}
    spare = {**environ, "TMPDIR": str(tmp_path)}
    first, starts = machine(environ=spare)
    assert (len(first.directions), starts) == (6, 1)
    assert machine(environ=spare) == (first, 0), "temporary files take its place"
    nowhere = {**environ, "TMPDIR": "/proc/x"}
    assert machine(environ=nowhere) == (first, 1)
    assert machine(environ=nowhere) == (first, 1)


def test_the_cache_folder_is_found(tmp_path):
    home = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path / "tmp")}
    assert cache.folder(home) == tmp_path / ".cache" / "ep_backend"
    assert stat.S_IMODE((tmp_path / ".cache" / "ep_backend").stat().st_mode) == 0o700
    assert cache.folder({**home, "XDG_CACHE_HOME": str(tmp_path / "xdg")}) == tmp_path / "xdg" / "ep_backend"
    assert cache.folder({"TMPDIR": str(tmp_path)}) == tmp_path / f"ep_backend-{os.geteuid()}"


def test_a_relative_cache_folder_is_ignored(tmp_path, monkeypatch):
    """As specifications.freedesktop.org/basedir asks."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    home = {"HOME": str(tmp_path), "XDG_CACHE_HOME": "cache"}
    assert cache.folder(home) == tmp_path / ".cache" / "ep_backend"
    temporary = {"HOME": ".", "XDG_CACHE_HOME": "../cache", "TMPDIR": str(tmp_path)}
    assert cache.folder(temporary) == tmp_path / f"ep_backend-{os.geteuid()}"
    assert list((tmp_path / "here").iterdir()) == []


SLOW = "time.sleep(0.7)\n" + FINE


def _ask(results, queue):
    queue.put(results(body=SLOW))


def test_processes_that_start_at_once_try_it_out_once(machine):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_ask, args=(machine, queue)) for _ in range(3)]
    for process in processes:
        process.start()
    answers = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(30)
    assert all(len(found.directions) == 6 for found, _ in answers)
    (starts,) = machine.folder.parent.parent.glob("starts")
    assert starts.read_text() == "x"


def test_a_lock_that_is_never_given_back(machine):
    machine(among=["GPU-a", "GPU-b"])
    (file,) = machine.folder.glob("checks-*.json")
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, 2);"
         " print(flush=True); time.sleep(60)", str(file.with_suffix(".lock"))],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        holder.stdout.readline()
        begin = time.monotonic()
        found, starts = machine(deadline_s=0.5)
        assert time.monotonic() - begin < 20
        assert (len(found.directions), starts) == (2, 0), "what is known is taken"
        assert any("another process" in problem for problem in found.problems)
    finally:
        holder.kill()
        holder.wait()


def test_nothing_escapes(machine, monkeypatch):
    monkeypatch.setattr(supervise, "run", lambda *a, **k: 1 / 0)
    found, _ = machine()
    assert found.directions == ()
    assert "ZeroDivisionError" in found.problems[0]
