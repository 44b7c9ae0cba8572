"""What doctor finds wrong, and what it advises: from made-up machines and numbers."""

import re

import msgspec
import pytest
from doctor_machines import (
    BROKEN,
    LARGE,
    PROFILES,
    SKIPPED,
    SMALL,
    bridges,
    cpus,
    examined,
    gpus,
    none,
    warmed,
)

from ep_backend import env, facts, nvml
from ep_backend.doctor import advice, expect, plan
from ep_backend.doctor.findings import find
from ep_backend.doctor.plan import AllReduces, Expected
from ep_backend.doctor.warmup import WarmUp
from ep_backend.planning import memory, model


def wrong(report):
    return [finding for finding in report.findings if finding.wrong]


def only(report, words):
    """The one thing that is wrong."""
    [finding] = wrong(report)
    assert words in finding.what
    assert finding.why
    assert finding.next
    assert report.status == 1
    return finding


@pytest.mark.parametrize("name", PROFILES)
def test_nothing_is_wrong_with_a_machine_of_each_profile(name):
    record, transport = PROFILES[name]
    report = examined(record)
    assert (report.decision.profile, report.decision.transport) == (name, transport)
    assert report.status == (name in BROKEN)


def test_broken_peer_access_names_the_pairs_and_the_cure():
    record = gpus(4, nvlink=none, works=lambda a, b: (a, b) != (2, 1), ancestor="PHB", iommu="translated")
    finding = only(examined(record), "the data check of peer access failed: GPU 2 -> GPU 1 (what arrived")
    assert "plug-in get NCCL_P2P_LEVEL=LOC; for other programs: export NCCL_P2P_LEVEL=PIX" in finding.next
    assert "NCCL_P2P_DISABLE=1" in finding.next
    assert "iommu=pt" in finding.next
    mended = only(examined(gpus(2, nvlink=none, works=none)), "failed").next
    assert "iommu" not in mended
    assert "engines with this library's plug-in get NCCL_P2P_LEVEL=LOC; for other programs: export" in mended
    assert finding.why.endswith("ep_backend uses transport mixed here")


@pytest.mark.parametrize(
    "record",
    [
        gpus(4, nvlink=bridges, works=lambda a, b: not bridges(a, b)),
        gpus(8, works=lambda a, b: {a, b} != {0, 1}),
        gpus(2, nvlink=none, works=none, ancestor="PIX"),
        gpus(2, nvlink=none, works=none, ancestor="LOC"),
        gpus(4, nvlink=none, works=none, ancestor="PHB", environment={"EP_BACKEND_PROFILE": "pcie_p2p"}),
        gpus(4, nvlink=none, works=bridges, ancestor="SYS"),
    ],
    ids=["NVLink pairs", "NVSwitch", "one switch", "one board", "forced", "partial"],
)
def test_no_cure_of_broken_peer_access_reaches_it(record):
    """Neither what an engine with the plug-in gets, nor what other programs are told to export first."""
    [finding] = [one for one in examined(record).findings if "data check of peer access failed" in one.what]
    named = re.findall(r"NCCL_P2P_LEVEL=(\w+)", finding.next)
    assert named[0] == "LOC"
    for level in named:
        again = examined(record, environ={"NCCL_P2P_LEVEL": level}).findings
        assert not [one for one in again if f"NCCL_P2P_LEVEL={level} makes NCCL use" in one.what], level
    assert ("PIX" in named) == (record.links[0].ancestor in ("PHB", "SYS"))
    assert "NCCL_P2P_DISABLE=1" in finding.next


def test_a_value_of_the_users_own_is_not_called_what_engines_get():
    record = gpus(2, nvlink=none, works=none, ancestor="PHB")
    report = examined(record, environ={"NCCL_P2P_LEVEL": "SYS"})
    assert not any("plug-in get" in one.next for one in report.findings)


def test_pairs_that_are_not_used_do_not_matter():
    record = gpus(4, nvlink=none, works=lambda a, b: 3 not in (a, b), visible=("GPU-0000", "GPU-0001"))
    assert not wrong(examined(record))


@pytest.mark.parametrize("level", ["", "SYS"])
def test_a_machine_without_peer_access_is_not_broken(level):
    record, _ = PROFILES["pcie_blackwell"]
    assert {(one.access, one.works) for one in record.directions} == {(False, False)}  # as the worker says
    report = examined(record, warmed(2), environ={"NCCL_P2P_LEVEL": level} if level else {})
    assert (report.decision.profile, report.status, report.findings) == ("pcie_blackwell", 0, ())
    assert "driver offers no peer access between GPU-0000 and GPU-0001" in report.decision.reason
    assert "data check" not in report.decision.reason


def test_access_between_some_pairs_only_is_not_broken():
    report = examined(gpus(4, nvlink=none, access=bridges, ancestor="PHB", rate=50e9, hcas=()))
    assert (report.decision.profile, report.status, report.findings) == ("pcie_partial", 0, ())
    assert "no peer access between GPU-0000 and GPU-0002, GPU-0000 and GPU-0003" in report.decision.reason


def test_no_access_beside_a_failed_check():
    record = gpus(3, nvlink=none, access=lambda a, b: 2 not in (a, b), works=none, ancestor="PHB")
    report = examined(record, environ={"NCCL_P2P_LEVEL": "SYS"})
    assert [one.what.split(":")[0] for one in wrong(report)] == [
        "the data check of peer access failed",
        "NCCL_P2P_LEVEL=SYS makes NCCL use peer access between GPUs where it does not work",
    ]
    assert "GPU 0 -> GPU 1, GPU 1 -> GPU 0 (what" in report.findings[0].what
    assert (
        "The data check of peer access failed between GPU-0000 and GPU-0001, and the driver offers no peer "
        "access between GPU-0000 and GPU-0002, GPU-0001 and GPU-0002."
    ) in report.decision.reason


def test_a_level_over_links_that_only_the_user_forbids():
    """EP_BACKEND_PEER_ACCESS=0: the probe makes every link count as failed; doctor's own checks passed."""
    record = gpus(2)
    vetoed = tuple(msgspec.structs.replace(link, nvlink=False, peer_works=False) for link in record.links)
    record = msgspec.structs.replace(record, links=vetoed, environment={"EP_BACKEND_PEER_ACCESS": "0"})
    assert not wrong(examined(record, environ={"NCCL_P2P_LEVEL": "SYS"}))


def test_peer_access_through_the_host():
    slow = gpus(2, nvlink=none, ancestor="PHB", rate=3.5e9)
    [finding] = examined(slow).findings
    assert not finding.wrong
    assert "slow between 2 ordered pairs: stores of GPU-0000 into GPU-0001 arrive at 3.5 GB/s" in finding.what
    assert not examined(gpus(2, nvlink=none, ancestor="PHB", rate=50e9)).findings
    # A rate is not judged where the width of the link is not known.
    assert not examined(gpus(2, nvlink=none, rate=3.5e9, gpu={"pcie_width": None})).findings


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("pcie_blackwell", True),
        ("pcie_partial", True),
        ("pcie_p2p", False),
        ("nvswitch", False),
        ("cpu", False),
    ],
)
def test_small_shared_memory_is_wrong_where_nccl_needs_it(name, wrong):
    """One rule for the finding and for the reason of the choice."""

    def told(size):
        report = examined(msgspec.structs.replace(PROFILES[name][0], shared_memory_bytes=size))
        return report, [one for one in report.findings if "/dev/shm" in one.what]

    report, [finding] = told(64 << 20)
    assert "/dev/shm has only 64 MiB" in finding.what
    assert "--ipc=host" in finding.next
    assert finding.wrong == ("/dev/shm has 64 MiB and NCCL may need more" in report.decision.reason) == wrong
    assert report.status == (wrong or name in BROKEN)
    assert not told(1 << 30)[1]
    assert not told(None)[1]


def test_the_environment():
    report = examined(cpus(), environ={"EP_BACKEND_TIMOUT_S": "3"})
    assert "did you mean 'EP_BACKEND_TIMEOUT_S'" in only(report, "EP_BACKEND_TIMOUT_S").what
    only(examined(cpus(), environ={"EP_BACKEND_TIMEOUT_S": "soon"}), "wanted a number")
    wish = {"EP_BACKEND_TRANSPORT": "per"}  # said once, though nothing can be chosen either
    only(examined(cpus(environment=wish), environ=wish), "did you mean 'peer'")
    [odd] = examined(cpus(), environ={"NCCL_P2P_LEVEL": "FAR"}).findings
    assert not odd.wrong
    assert "NCCL_P2P_LEVEL='FAR'" in odd.what


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("EP_BACKEND_TRANSPORT", "cpu", "it moves CPU tensors"),
        ("EP_BACKEND_PROFILE", "nvswich", "did you mean 'nvswitch'"),
        ("EP_BACKEND_PROFILE", "/nonexistent/own.toml", "there is no such file"),
        ("EP_BACKEND_PROFILE", __file__, "not valid TOML"),
    ],
)
def test_a_choice_that_cannot_be_made(name, value, words):
    record = gpus(2, environment={name: value}, device="GPU-0000")
    report = examined(record, SKIPPED, environ={name: value})
    finding = only(report, words)
    assert finding.what.startswith(name)
    assert finding.next == "correct or unset the variable that is named, then ep-backend doctor again"
    assert report.decision is None
    assert not report.expected


@pytest.mark.parametrize(
    ("changes", "kernels", "words"),
    [
        ({}, False, "has no CUDA kernels"),
        ({"versions": {"torch": "2.13.0+cpu"}, "visible": ()}, True, "built for CPUs only"),
        (
            {"problems": ("GPUs are present but NVML does not describe them, so",), "visible": ()},
            True,
            "links are not known",
        ),
        (
            {"gpu": {"nvlink_peer": "switch", "fabric_state": "in progress"}},
            True,
            "not ready on GPU 0, GPU 1",
        ),
    ],
)
def test_drivers_and_builds(changes, kernels, words):
    only(examined(gpus(2, **changes), kernels=kernels), words)


@pytest.mark.parametrize("name", ["nvswitch", "pcie_blackwell", "pcie_rdma", "nvlink_pairs"])
def test_no_transport_works_with_an_older_driver(name):
    record = msgspec.structs.replace(PROFILES[name][0], cuda_driver="12.8", driver="570.1")
    report = examined(record)
    assert report.decision is None
    finding = only(report, "driver 570.1 is too old")
    assert finding.next == "install driver 580 or newer"
    assert finding.why.endswith("so no transport can be chosen")
    asked = {"EP_BACKEND_TRANSPORT": "host"}
    first, second, *_ = wrong(examined(msgspec.structs.replace(record, environment=asked), environ=asked))
    assert first.what.startswith(
        "EP_BACKEND_TRANSPORT asks for transport 'host', but rank 0 has NVIDIA driver"
    )
    assert second.what == finding.what


def test_what_nothing_else_explains_is_a_finding_with_a_step_of_its_own():
    [finding] = find(cpus(), None, SKIPPED, {}, undecided="no hardware profiles at /x")
    assert finding.what == "no hardware profiles at /x"
    assert finding.next == "mend what is named, then ep-backend doctor again"


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        ({"mig": True}, "MIG is switched on: GPU 0, GPU 1"),
        ({"virtualization": "vgpu"}, "vGPU"),
        ({"bar1_bytes": 256 << 20}, "BAR1 is smaller"),
    ],
)
def test_boards_worth_a_note(gpu, words):
    report = examined(gpus(2, nvlink=none, rate=50e9, gpu=gpu))
    assert [words in finding.what for finding in report.findings] == [True]
    assert report.status == 0


def test_a_level_of_the_user_that_reaches_broken_pairs():
    record = gpus(2, nvlink=none, works=none, ancestor="PHB")

    def told(**environ):
        return [one.what for one in wrong(examined(record, environ=environ)) if "NCCL_P2P_LEVEL=" in one.what]

    assert len(told(NCCL_P2P_LEVEL="SYS")) == 1
    assert len(told(NCCL_P2P_LEVEL="PHB")) == 1
    assert not told(NCCL_P2P_LEVEL="PIX")
    assert not told(NCCL_P2P_LEVEL="SYS", NCCL_P2P_DISABLE="1")
    assert not told()


def test_cumem_off_where_nvlink_across_machines_needs_it():
    record, _ = PROFILES["nvl72"]
    only(examined(record, environ={"NCCL_CUMEM_ENABLE": "0"}), "NCCL_CUMEM_ENABLE=0")
    assert not wrong(examined(record, environ={"NCCL_CUMEM_ENABLE": "1"}))


def test_peer_access_switched_off_by_hand_is_worth_a_note():
    [finding] = examined(gpus(2), environ={"EP_BACKEND_PEER_ACCESS": "0"}).findings
    assert not finding.wrong
    assert "EP_BACKEND_PEER_ACCESS=0" in finding.what
    assert not examined(gpus(2), environ={"EP_BACKEND_PEER_ACCESS": "auto"}).findings


def test_what_is_wrong_comes_first():
    record = cpus(shared_memory_bytes=1 << 20)
    report = examined(record, environ={"NCCL_P2P_LEVEL": "FAR", "EP_BACKEND_BOGUS": "1"})
    assert [finding.wrong for finding in report.findings] == [True, False, False]


@pytest.mark.parametrize(
    ("ancestor", "levels"),
    [
        ("LOC", "PIX PXB PHB SYS"),  # two GPUs of one board: a switch joins them
        ("PIX", "PIX PXB PHB SYS"),
        ("PXB", "PXB PHB SYS"),
        ("PHB", "PHB SYS"),
        ("NODE", "PHB SYS"),  # to NCCL, the host bridges of a NUMA node are one
        ("SYS", "SYS"),
        ("", "SYS"),
        ("NVL", "NVL PIX PXB PHB SYS"),
    ],
)
def test_what_a_level_of_the_user_reaches(ancestor, levels):
    record = gpus(2, nvlink=lambda a, b: ancestor == "NVL", works=none, ancestor=ancestor)
    for level in ("", "FAR", *env.variable("NCCL_P2P_LEVEL").choices):
        said = [one.what for one in wrong(examined(record, environ={"NCCL_P2P_LEVEL": level}))]
        assert any(f"NCCL_P2P_LEVEL={level} makes" in one for one in said) == (level in levels.split()), level


def test_every_ancestor_has_a_distance():
    assert set(nvml._ANCESTORS.values()) == set(facts.DISTANCE)


@pytest.mark.parametrize("outcome", ["hang", "wrong", "crash"])
def test_a_failed_warm_up_without_peer_access_has_another_cause(outcome):
    failed = WarmUp(outcome=outcome, why="no end.", ranks=2)
    report = examined(PROFILES["pcie_blackwell"][0], failed)
    cure = only(report, "no end.").next
    assert "NCCL_P2P" not in cure
    for words in ("peer access is not the cause", "/dev/shm (65536 MiB", "NCCL_CUMEM_HOST_ENABLE=0 (https:"):
        assert words in cure
    assert "nccl/issues/1838" in cure
    assert "NCCL_DEBUG=INFO" in cure
    assert "newer driver" in cure
    assert not any("To serve" in one for one in report.advice)
    tried = examined(PROFILES["pcie_blackwell"][0], failed, environ={"NCCL_CUMEM_HOST_ENABLE": "0"})
    assert "NCCL_CUMEM" not in only(tried, "no end.").next


@pytest.mark.parametrize(
    ("name", "environ", "said"),
    [
        ("pcie_p2p", {}, "export NCCL_P2P_LEVEL=PIX (direct access only behind one PCIe switch), or"),
        ("nvswitch", {}, "export NCCL_P2P_DISABLE=1"),  # PIX keeps NVLink, so it would change nothing
        ("nvlink_pairs", {"NCCL_P2P_LEVEL": "SYS"}, "export NCCL_P2P_LEVEL=PIX"),
        ("pcie_p2p", {"NCCL_P2P_LEVEL": "PIX"}, "export NCCL_P2P_DISABLE=1"),
        ("nvlink_pairs", {}, "export NCCL_P2P_DISABLE=1"),  # at level NVL, which PIX would loosen
        ("pcie_p2p", {"NCCL_P2P_DISABLE": "1"}, "peer access is not the cause"),
        ("pcie_blackwell", {"NCCL_P2P_LEVEL": "SYS"}, "peer access is not the cause"),  # none is offered
    ],
)
def test_the_cure_of_a_hang_never_loosens_what_hung(name, environ, said):
    record, _ = PROFILES[name]
    hang = WarmUp(outcome="hang", why="no end.", ranks=len(record.gpus))
    report = examined(record, hang, environ=environ)
    [finding] = [one for one in report.findings if "hangs" in one.what]
    assert finding.next.startswith(said)
    assert not any("To serve" in one for one in report.advice)


def test_a_profile_that_is_forced_on_another_machine_is_wrong():
    for record in (cpus(), PROFILES["pcie_blackwell"][0]):
        forced = msgspec.structs.replace(record, environment={"EP_BACKEND_PROFILE": "pcie_p2p"})
        finding = only(examined(forced), "asks for profile pcie_p2p, which would not have been chosen here: ")
        assert "unset EP_BACKEND_PROFILE" in finding.next
    fits = msgspec.structs.replace(gpus(8), environment={"EP_BACKEND_PROFILE": "dgx"})
    assert not examined(fits).findings


def test_nccl_far_below_what_pcie_carries_without_peer_access():
    record, _ = PROFILES["pcie_blackwell"]

    def told(rate, machine=record, **environ):
        slow = warmed(2, lambda ranks, size: 39e-6 + size / rate)
        return [one for one in examined(machine, slow, environ=environ).findings if "NCCL moves" in one.what]

    [finding] = told(1.9e9)
    assert not finding.wrong
    assert finding.what == "NCCL moves 1.9 GB/s in large all-reduces, where PCIe carries 63 GB/s"
    assert "sglang/pull/39605" in finding.why
    assert "NCCL_SHM_USE_CUDA_MEMCPY=1 ep-backend doctor" in finding.next
    assert not told(28e9)
    assert not told(1.9e9, NCCL_SHM_USE_CUDA_MEMCPY="1")
    assert not told(1.9e9, PROFILES["pcie_p2p"][0])


def test_where_no_profile_fits_engines_are_started_with_this_librarys_own_arguments():
    report = examined(gpus(2, nvlink=none, works=lambda a, b: None))
    assert (report.decision.profile, report.decision.transport) == (None, "host")
    named = examined(PROFILES["pcie_blackwell"][0])
    serve = [one for one in report.advice if one.startswith("To serve")]
    assert serve == [one for one in named.advice if one.startswith("To serve")]
    assert len(serve) == 2


# --- advice ---


def expected(shape, **by_tokens):
    return [
        Expected(shape=shape.name, tokens=int(t[1:]), dtype="bf16", way="peer", seconds=s, basis="")
        for t, s in by_tokens.items()
    ]


def test_ep_against_tp_with_the_numbers():
    # 4 GPUs, 8 tokens each: 32 rows of 4096 bytes; 30 us each at any size.
    flat = AllReduces([(1, 30e-6), (1 << 30, 30e-6)])
    [one] = advice.compare(SMALL, 4, expected(SMALL, t8=20e-6), flat, None)
    assert (one.tp_s, one.tp_pp_s) == (pytest.approx(60e-6), None)
    [sentence] = advice.sentences([one])
    assert sentence == (
        "EP is faster than TP 4 for small at 8 tokens per GPU: at 8 its communication takes 0.96 ms per step "
        "(48 x 20.0 us), that of TP 4 2.88 ms per step (48 x 60.0 us): TP 4 takes 3.0 times as long, with "
        "the all-reduce of NCCL; an engine's own may be faster."
    )


def test_ep_slower_at_some_numbers_of_tokens_and_equal_at_others():
    flat = AllReduces([(1, 30e-6), (1 << 30, 30e-6)])
    times = expected(SMALL, t1=150e-6, t8=300e-6, t32=61e-6, t64=10e-6)
    said = advice.sentences(advice.compare(SMALL, 4, times, flat, None))
    assert [sentence.split(" for small")[0] for sentence in said] == [
        "EP is faster than TP 4",
        "EP is slower than TP 4",
        "EP and TP 4 are about equal",
    ]
    assert "at 1, 8 tokens per GPU: at 8 its communication takes 14.40 ms" in said[1]
    assert "EP takes 5.0 times as long." in said[1]
    assert "at 32 tokens per GPU" in said[2]


def test_halves_get_half_of_the_batch():
    steep = AllReduces([(1, 1e-12), (1 << 40, (1 << 40) * 1e-12)])
    [one] = advice.compare(SMALL, 8, expected(SMALL, t16=20e-6), steep, steep)
    assert one.tp_s == pytest.approx(2 * 8 * 16 * 4096e-12)
    assert one.tp_pp_s == pytest.approx(one.tp_s / 2)
    said = advice.sentences([one])
    assert [sentence.split(" for small")[0] for sentence in said] == [
        "EP is slower than TP 8",
        "EP is slower than TP 4 x PP 2",
    ]


def test_no_time_no_comparison():
    flat = AllReduces([(1, 30e-6)])
    assert advice.compare(SMALL, 4, expected(SMALL, t1=None), flat, None) == []
    assert advice.sentences([]) == []


def test_a_slow_link_turns_the_advice_round():
    """The whole way: the same all-reduces, EP over a fast and over a slow link."""

    def said(rate):
        record = gpus(4, nvlink=none, rate=rate)
        return " ".join(examined(record, warmed(4), shapes=(LARGE,), tokens=(128,)).advice)

    assert "EP is faster than TP 4 for large at 128" in said(350e9)
    assert "EP is slower than TP 4 for large at 128" in said(5e9)


def test_collective_is_compared_by_what_nccl_costs_at_least():
    record = msgspec.structs.replace(
        PROFILES["pcie_blackwell"][0], environment={"EP_BACKEND_TRANSPORT": "collective"}
    )
    report = examined(record, warmed(2), shapes=(LARGE,), tokens=(8,))
    [one] = report.comparisons
    times = report.warm_up.times(2)
    assert one.ep == "EP over NCCL"
    assert one.ep_s == plan.nccl_s(LARGE, 2, 8, "bf16", times)
    assert {one.basis.partition("; transport ")[2] for one in report.expected} == {
        expect.NO_FORMULA.removeprefix("transport ")
    }


def test_host_is_compared_by_its_own_time():
    record, _ = PROFILES["pcie_blackwell"]
    report = examined(record, warmed(2), shapes=(LARGE,), tokens=(8,))
    [one] = report.comparisons
    assert one.ep == "EP"
    assert one.ep_s == plan.host_s(LARGE, 2, 8, "bf16", bytes_per_s=33e9, latency_s=2.23e-6)
    assert not any(expect.NO_FORMULA in one.basis for one in report.expected)
    assert {one.way for one in report.expected} == {"host", "nccl"}


def test_sentences_about_host_say_that_its_time_is_of_another_machine_unless_it_is_such_a_machine():
    elsewhere = examined(PROFILES["pcie_blackwell"][0], warmed(2), shapes=(LARGE,)).advice
    about = [one for one in elsewhere if "TP 2" in one]
    assert about
    assert all(one.startswith(f"{advice.IF_HOST}: EP ") for one in about)
    doubt = [one for one in elsewhere if "EP over host was measured on a server only" in one]
    assert len(doubt) == 1
    assert elsewhere.index(doubt[0]) < elsewhere.index(about[0])
    there = examined(gpus(2, nvlink=none, access=none, gpu={"nvlinks": 18}), shapes=(LARGE,))
    assert there.decision.transport == "host"
    assert any(one.startswith("EP is") for one in there.advice)
    assert not any(advice.IF_HOST in one or "measured on a server only" in one for one in there.advice)


def test_host_memory_is_that_of_the_slowest_pcie_link():
    record, _ = PROFILES["pcie_blackwell"]

    def told(**gpu):
        changed = msgspec.structs.replace(record.gpus[0], **gpu)
        found = examined(msgspec.structs.replace(record, gpus=(changed, *record.gpus[1:])), tokens=(4096,))
        (ours, *_) = [one for one in found.expected if one.way == "host"]
        return ours, found

    full, _ = told()
    assert "model, not measured; host memory is taken to move 33.0 GB/s" in full.basis
    half, _ = told(pcie_generation=4)
    assert "16.5 GB/s" in half.basis
    assert half.seconds == pytest.approx(2 * full.seconds, rel=0.05)
    half, _ = told(pcie_width_now=8)
    assert "16.5 GB/s" in half.basis
    unknown, report = told(pcie_width=None)
    assert unknown.seconds is None
    assert unknown.basis.startswith("no expectation")
    assert "EP was not compared with TP: EP has no expected time here." in report.advice


@pytest.mark.parametrize(("gpu", "kept"), [({}, True), ({"pcie_width": 8}, False), ({"nvlinks": 0}, False)])
def test_host_is_called_checked_on_h200_with_the_same_pcie_link_only(gpu, kept):
    report = examined(gpus(2, nvlink=none, access=none, gpu={"nvlinks": 18, **gpu}), shapes=(LARGE,))
    assert {one.basis.startswith(plan.CHECKED) for one in report.expected if one.way == "host"} == {kept}


def said_of(name, machine, **more):
    report = examined(machine, shapes=(model.read(name),), tokens=(8,), **more)
    return [one for one in report.advice if name in one or "was not compared" in one]


@pytest.mark.parametrize(
    ("count", "left_out"),
    [
        (3, ["TP 3 left out: 32 attention heads cannot be split evenly over 3 GPUs.",
             "TP x PP 2 left out: 3 GPUs have no two equal halves."]),
        (6, ["TP 6 left out: 32 attention heads cannot be split evenly over 6 GPUs.",
             "TP 3 x PP 2 left out: 32 attention heads cannot be split evenly over 3."]),
    ],
)  # fmt: skip
def test_ways_of_tp_that_the_heads_forbid_are_left_out(count, left_out):
    assert said_of("qwen3-30b-a3b", gpus(count)) == [f"qwen3-30b-a3b: {line}" for line in left_out]
    heads = [one.split(" for qwen3")[0] for one in said_of("qwen3-30b-a3b", gpus(4))]
    assert heads == ["EP is faster than TP 4", "EP is faster than TP 2 x PP 2"]


def test_a_model_that_does_not_fit_is_not_compared():
    size, memory_bytes = model.read("deepseek-v3"), 141 << 30
    taken = {d: memory.expert_parallel(size, 2, d).total / 1e9 for d in plan.DTYPES}
    assert said_of("deepseek-v3", gpus(2)) == [
        "deepseek-v3 does not fit here with EP: on each GPU weights alone take "
        f"{taken['bf16']:.1f} GB in bf16 and {taken['fp8']:.1f} GB in fp8, and it has "
        f"{memory_bytes / 1e9:.1f} GB (10^9 bytes). No way of TP fits either.",
        "EP was not compared with TP: no model fits with EP.",
    ]
    first, *compared = said_of("deepseek-v3", gpus(8))
    assert first.startswith(
        "deepseek-v3 fits here with EP in fp8 only: on each GPU weights alone take 190.2 GB"
    )
    assert [one.split(" for deepseek")[0] for one in compared] == [
        "EP is faster than TP 8", "EP is faster than TP 4 x PP 2",
    ]  # fmt: skip
    # Attention is whole on each GPU with EP, and split with TP.
    small = gpus(8, gpu={"memory_bytes": int(90e9)})
    assert said_of("deepseek-v3", small)[0].endswith("It fits with TP 4 x PP 2 and TP 8.")
    unknown = said_of("deepseek-v3", gpus(2, gpu={"memory_bytes": None}))
    assert [one.split(" for deepseek")[0] for one in unknown] == ["EP is faster than TP 2"]


def test_engines_and_containers():
    words = examined(gpus(4)).advice
    assert any("vllm serve MODEL --data-parallel-size 4 --all2all-backend ep_backend" in one for one in words)
    assert not any("--ipc" in one for one in words)
    assert any("--ipc=host" in one for one in examined(gpus(4, container="docker")).advice)
    assert "EP was not compared with TP: no all-reduce was measured here." in examined(cpus()).advice
