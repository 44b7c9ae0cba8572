"""``ep-backend doctor`` on real GPUs: recognised, warmed up, and with peer access switched off."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def doctor(*arguments, **environ):
    ended = subprocess.run(
        [sys.executable, "-m", "ep_backend.cli", "doctor", "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environ},
    )
    assert "Traceback" not in ended.stderr, ended.stderr
    answer = json.loads(ended.stdout)
    assert ended.returncode == answer["status"]
    return answer


def test_all_gpus():
    answer = doctor()
    gpus = torch.cuda.device_count()
    assert answer["ranks"] == gpus
    assert answer["warm_up"]["outcome"] == "ok", answer["warm_up"]
    assert answer["status"] == 0, answer["findings"]
    times = {one["bytes"]: one["seconds"] for one in answer["warm_up"]["all_reduces"] if one["ranks"] == gpus}
    assert all(1e-6 < seconds < 1 for seconds in times.values())
    assert times[max(times)] > times[min(times)]
    halves = {gpus // 2} if gpus >= 4 and gpus % 2 == 0 else set()
    assert {one["ranks"] for one in answer["warm_up"]["all_reduces"]} == {gpus} | halves
    if answer["choice"]["transport"] == "peer":
        ours = [one["seconds"] for one in answer["expected"] if one["way"] == "peer"]
        assert ours
        assert all(seconds is not None and seconds > 5e-6 for seconds in ours)
    assert answer["comparisons"]


def test_two_of_them():
    answer = doctor("--ranks", "2")
    assert (answer["ranks"], answer["warm_up"]["ranks"]) == (2, 2)
    assert answer["warm_up"]["outcome"] == "ok", answer["warm_up"]


def test_peer_access_switched_off_by_hand():
    answer = doctor(EP_BACKEND_PEER_ACCESS="0")
    assert answer["choice"]["transport"] != "peer"
    assert answer["warm_up"]["outcome"] == "ok", answer["warm_up"]
    assert any("EP_BACKEND_PEER_ACCESS=0" in finding["what"] for finding in answer["findings"])


def test_a_deadline_that_is_too_short_is_a_hang():
    answer = doctor("--deadline", "1")
    assert (answer["status"], answer["warm_up"]["outcome"]) == (1, "hang")
    assert any("NCCL_P2P_DISABLE=1" in finding["next"] for finding in answer["findings"])
