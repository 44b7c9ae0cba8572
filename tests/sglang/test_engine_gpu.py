"""Greedy tokens through SGLang on GPUs: ep_backend against SGLang's own exchange, as the yardstick stock
against itself.

Needs SGLang and two GPUs, or with EP_TEST_SHARED_GPUS=1 one, on which it serves two ranks as two nodes. Where
FlashInfer is missing, set SGLANG_IS_FLASHINFER_AVAILABLE=0. Several of these may run side by side; ``-k``
with a layout's name shares its stock servers.
"""

import contextlib
import importlib.util

import gpus
import pytest
import random_models
import torch
import wide_models
from served_tokens import (
    FP8_LIMIT,
    LIMIT,
    NEW_TOKENS,
    TRAINED_EQUAL,
    TRAINED_LIMIT,
    Answer,
    differences,
    equal,
    groups_of_prompts,
    served,
    serving,
)

from ep_backend import reference
from ep_backend.bench.engines.sglang import FIRST_PORT, PORT_BLOCK, serve_command, serve_environment
from ep_backend.compat import STANDS_IN
from ep_backend.launch.server import Session

RANKS = 2  # of most cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.engine_long,
    pytest.mark.timeout(1800 if gpus.shared(RANKS) else 900),
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs SGLang"),
]


@pytest.fixture(autouse=True, scope="module")
def _gpu_for_each_rank():
    gpus.needs(RANKS)


DP = {"data_parallel_size": 2, "tensor_parallel_size": 1}
TP = {"data_parallel_size": 1, "tensor_parallel_size": 2}
DP_AND_TP = {"data_parallel_size": 2, "tensor_parallel_size": 2}
WITHOUT_DEEPGEMM = (("SGLANG_ENABLE_JIT_DEEPGEMM", "0"),)
OVERLAP = ("--enable-two-batch-overlap",)
COPIES = ("--enable-eplb", "--ep-num-redundant-experts", "4")
SPLIT = "a batch is computed as two overlapping halves"
# SGLang's own mode for DeepEP, for which it wants DeepGEMM; ranks wait for each other while that compiles.
DEEPEP = {
    "of": {**DP, "model": "wide fp8", "runner": "deep_gemm"},
    "backend": "deepep",
    "environ": (("EP_BACKEND_PROVIDE_DEEP_EP", "1"), ("EP_BACKEND_TIMEOUT_S", "300")),
    "says": STANDS_IN,
}

# ``of``: options of both servers; ``extra``, ``environ``: of ours, because stock does not know them or need
# not; ``transport``: ours, peer if not given.
CASES = {
    "dp attention": {"of": DP},
    "dp attention, without graphs": {"of": DP, "extra": ("--disable-cuda-graph",)},
    "dp attention, prompts in chunks": {"of": DP, "extra": ("--chunked-prefill-size", "128")},
    "dp attention, through host memory": {"of": DP, "transport": "host"},
    "dp attention, two-batch overlap": {"of": DP, "extra": OVERLAP, "says": SPLIT},
    "dp attention, two-batch overlap without graphs": {
        "of": DP,
        "extra": (*OVERLAP, "--disable-cuda-graph"),
        "says": SPLIT,
    },
    "dp attention, redundant experts": {"of": DP, "extra": COPIES},
    "dp attention, redundant experts that move": {
        "of": DP,
        "extra": (*COPIES, "--eplb-rebalance-num-iterations", "30"),
        "says": "rebalance end",
    },
    "tp attention": {"of": TP},
    "tp attention, two-batch overlap": {"of": TP, "extra": OVERLAP, "says": SPLIT},
    "tp attention, prompts in chunks": {"of": TP, "extra": ("--chunked-prefill-size", "64")},
    "shared experts, dp attention": {"of": {**DP, "model": "shared"}},
    "shared experts, tp attention": {"of": {**TP, "model": "shared"}},
    "block fp8, triton": {
        "of": {**DP, "model": "fp8", "environ": WITHOUT_DEEPGEMM},
        "says": "fp8_block128, at most",
    },
    "block fp8, deep_gemm": {
        "of": {**DP, "model": "fp8", "runner": "deep_gemm"},
        "says": "fp8_block128, at most",
    },
    "bf16, deep_gemm": {"of": {**DP, "runner": "deep_gemm"}},
    "trained, dp attention": {"of": {**DP, "model": "wide"}},
    "deepep, normal": {**DEEPEP, "extra": ("--deepep-mode", "normal")},
    # Prompts take the same way: as many tokens as SGLang dispatches in this mode.
    "deepep, low_latency": {
        **DEEPEP,
        "extra": ("--deepep-mode", "low_latency", "--chunked-prefill-size", "128"),
    },
    "deepep, auto": {**DEEPEP, "extra": ("--deepep-mode", "auto")},
    "deepep, auto, two-batch overlap": {**DEEPEP, "extra": OVERLAP},
    "deepep, auto, bf16": {
        **DEEPEP,
        "of": {**DP, "model": "wide", "runner": "deep_gemm"},
        "extra": ("--deepep-dispatcher-output-dtype", "bf16"),
    },
    "dp attention on groups of ranks": {"of": DP_AND_TP},
    "dp attention on groups of ranks, two-batch overlap": {"of": DP_AND_TP, "extra": OVERLAP, "says": SPLIT},
}


# Whether they are in fp8. They are sure of most tokens, which must be those of stock.
TRAINED = {"wide": False, "wide fp8": True}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A folder by the model's kind, and the groups of prompts for it."""
    written = {}
    kinds = {
        "plain": ("qwen3-30b-a3b", None),
        "shared": ("qwen1.5-moe-a2.7b", None),
        "fp8": ("qwen3-30b-a3b", "block"),
    }

    def get(kind):
        if kind not in written:
            folder = tmp_path_factory.mktemp(kind.replace(" ", "-"))
            if kind in TRAINED:
                written[kind] = wide_models.write(folder, fp8=TRAINED[kind])
            else:
                written[kind] = random_models.write(
                    folder, *kinds[kind], router_std=4.0, moe_intermediate_size=wide_models.EXPERTS
                )
        if kind in TRAINED:
            lines = wide_models.prompts()
            return written[kind], {"together": lines, "alone": lines[:1]}
        return written[kind], groups_of_prompts()

    return get


@pytest.fixture(scope="session")
def stock(tmp_path_factory, model):
    """What SGLang says by itself, from one server per set of options; it is asked twice."""
    answers = {}

    def get(model_kind="plain", **options):
        key = repr((model_kind, sorted(options.items())))
        if key not in answers:
            folder, prompts = model(model_kind)
            twice = {**prompts, **{f"{group} again": texts for group, texts in prompts.items()}}
            said, _ = served(tmp_path_factory.mktemp("stock"), twice, model=folder, backend="none", **options)
            answers[key] = {group: said[group] for group in prompts}
            print("stock against itself:")
            differences({group: said[f"{group} again"] for group in prompts}, answers[key])  # prints them
        return answers[key]

    return get


def split(of):
    """The model's kind, and the other options of a case."""
    return of.get("model", "plain"), {name: value for name, value in of.items() if name != "model"}


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_stock(tmp_path, model, stock, tiny_reference, name):
    case = CASES[name]
    kind, options = split(case["of"])
    ranks = options["data_parallel_size"] * options["tensor_parallel_size"]
    if ranks > max(gpus.FOUND, RANKS):
        pytest.skip(f"needs {ranks} GPUs")
    folder, prompts = model(kind)
    transport, backend = case.get("transport", "peer"), case.get("backend", "ep_backend")
    environ = (*options.get("environ", ()), *case.get("environ", ()), ("EP_BACKEND_TRANSPORT", transport))
    ours = {**options, "environ": environ, "extra": case.get("extra", ())}
    got, log = served(tmp_path, prompts, model=folder, backend=backend, **ours)
    if backend == "ep_backend":
        said = f"ep_backend: rank {{}} of {ranks}, transport {transport}"
        assert all(said.format(rank) in log for rank in range(ranks))
    assert "NOT AVAILABLE" not in log
    assert case.get("says", "") in log
    want = stock(kind, **options)
    print(f"{name}:")
    assert differences(got, want, limit_of(kind), mean=kind in TRAINED) == []
    if kind in TRAINED:
        assert equal(got, want) >= TRAINED_EQUAL
        # Stock must not be wrong itself, so that anything is equal to it.
        said = tiny_reference.greedy(wide_models.TINY, prompts["together"], NEW_TOKENS, "bfloat16")
        known = {"together": [Answer(record["tokens"], []) for record in said]}
        assert equal(known, want) >= TRAINED_EQUAL


def limit_of(kind):
    if kind in TRAINED:
        return TRAINED_LIMIT
    return FP8_LIMIT if kind == "fp8" else LIMIT


@pytest.mark.parametrize("name", ["dp attention", "block fp8, triton"])
def test_a_wrong_combine_is_noticed(tmp_path, model, stock, name):
    kind, options = split(CASES[name]["of"])
    folder, prompts = model(kind)
    scaled = ("EP_BACKEND_TEST_SCALE_COMBINE", "0.5")
    changed = {**options, "environ": (*options.get("environ", ()), scaled)}
    got, log = served(tmp_path, prompts, model=folder, backend="ep_backend", **changed)
    assert "THE MODEL'S OUTPUT IS WRONG" in log
    wrong = differences(got, stock(kind, **options), limit_of(kind))
    assert len(wrong) == sum(map(len, prompts.values())), "each prompt shows it"


def test_dispatch_quantises_as_sglang_does():
    """But for ties: SGLang multiplies with 448 / amax, dispatch divides by amax / 448."""
    from sglang.kernels.ops.quantization.fp8_kernel import sglang_per_token_group_quant_fp8

    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(5)).to(torch.bfloat16)
    rows, scales = (each.cpu() for each in sglang_per_token_group_quant_fp8(x.cuda(), 128))
    ours, our_scales = reference.quantize_fp8(x)  # dispatch is equal to it, bit by bit (tests/gpu)
    torch.testing.assert_close(scales, our_scales, rtol=1e-6, atol=0)
    steps = (rows.view(torch.uint8).int() - ours.view(torch.uint8).int()).abs()
    apart = (steps > 0).double().mean().item()
    print(f"{100 * apart:.3f} % of the elements are one step of e4m3 apart")
    assert steps.max() <= 1
    assert apart < 0.005


REFUSED = {
    "--enable-single-batch-overlap": ("--enable-single-batch-overlap",),
    "--speculative-algorithm": ("--speculative-algorithm", "NGRAM"),
    "does not take: use --moe-runner-backend triton": ("--moe-runner-backend", "flashinfer_cutlass"),
    "lower --chunked-prefill-size": ("--chunked-prefill-size", "65536"),
    "add --chunked-prefill-size 8192": ("--chunked-prefill-size", "-1"),
    "fp8 ones with 128x128 scales": ("--quantization", "fp8"),
}


def test_what_does_not_work_is_refused_before_serving(tmp_path, model):
    """By real command lines, all at once. The last one is known only when a layer is built."""
    if gpus.shared(RANKS):
        pytest.skip("the ranks of one command cannot share a GPU")
    folder, _ = model("plain")
    wrong = []
    with contextlib.ExitStack() as stack:
        running = {}
        for number, (sentence, extra) in enumerate(REFUSED.items()):
            asked = serving(folder, "ep_backend", extra=extra, **DP)
            port = FIRST_PORT - PORT_BLOCK * (1 + number)
            session = Session(
                serve_command(asked, port), serve_environment(asked), tmp_path / f"{number}.log"
            )
            running[sentence] = stack.enter_context(session)
        for sentence, session in running.items():
            status = session.wait(240)
            if status == 0 or sentence not in session.text():
                wrong.append(f"{sentence}: status {status}\n{session.tail(40)}")
    assert not wrong, "\n".join(wrong)
