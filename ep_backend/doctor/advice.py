"""Expert parallelism against tensor parallelism on this machine, from the times of what they send. Pure.

Only communication is compared, per layer and step, for N = W T tokens on W GPUs:

- EP: attention is data-parallel and sends nothing, so one dispatch + combine with T tokens per GPU.
- TP: two all-reduces of N rows of bf16 over W GPUs, one after attention and one after the experts.
- TP x PP: the machine in two halves, each with half of the layers, and the batch in two halves that take
  turns: two all-reduces of N / 2 rows over W / 2 GPUs. What the halves hand over, once a step, is left out.

docs/doctor.md says what that leaves out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from ep_backend.doctor.plan import NCCL_TOO_FAST, AllReduces, Expected, Shape, row_bytes
from ep_backend.probe import Record
from ep_backend.select import Decision

# vLLM has one for small messages over NVLink.
CAVEAT = "with the all-reduce of NCCL; an engine's own may be faster"
OVER_NCCL = "EP over NCCL"
# Before sentences about EP over transport host, where nothing like the machine was measured.
IF_HOST = "If the model of host memory, which is from a server with H200, holds here"
SAME = 0.1  # a difference below this share is none: the times of EP are a model


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds per layer with ``tokens`` per GPU; None: not known. ``ep``: what EP is called."""

    shape: str
    layers: int
    ep: str = "EP"
    tokens: int
    ranks: int
    ep_s: float
    tp_s: float
    tp_pp_s: float | None


def tensor_s(shape: Shape, tokens: float, all_reduces: AllReduces) -> float:
    """Seconds that a layer's two all-reduces of ``tokens`` rows of bf16 take."""
    _, row = row_bytes(shape.hidden, "bf16")
    return 2 * all_reduces(tokens * row)


def equal(way: str, seconds: float, other_s: float) -> bool:
    """Whether ``way``, which has the shorter time, is not to be called faster: the difference is small, or
    within what the model of EP over NCCL is known to be too fast."""
    share = NCCL_TOO_FAST if way.startswith(OVER_NCCL) else SAME
    return other_s - seconds <= share * other_s


def tokens_of(numbers: Sequence[int]) -> str:
    """ "1, 8 tokens"."""
    words = ", ".join(str(number) for number in numbers)
    return f"{words} token{'' if list(numbers) == [1] else 's'}"


def compare(
    shape: Shape,
    ranks: int,
    expected: Sequence[Expected],
    all_reduces: AllReduces,
    in_halves: AllReduces | None,
    ep: str = "EP",
) -> list[Comparison]:
    """One for each number of tokens of ``expected`` (of this shape, one dtype, one way) that has a time."""
    return [
        Comparison(
            shape=shape.name,
            layers=shape.layers,
            ep=ep,
            tokens=one.tokens,
            ranks=ranks,
            ep_s=one.seconds,
            tp_s=tensor_s(shape, ranks * one.tokens, all_reduces),
            tp_pp_s=None if in_halves is None else tensor_s(shape, ranks * one.tokens / 2, in_halves),
        )
        for one in expected
        if one.seconds is not None
    ]


def sentences(comparisons: Sequence[Comparison], impossible: Collection[str] = ()) -> list[str]:
    """What to make of the comparisons of one shape: for each rival that is not ``impossible`` one sentence
    where EP is faster, one where it is slower, with the numbers of the largest difference."""
    if not comparisons:
        return []
    ranks = comparisons[0].ranks
    rivals = {
        f"TP {ranks}": [(one, one.tp_s) for one in comparisons],
        f"TP {ranks // 2} x PP 2": [(one, one.tp_pp_s) for one in comparisons if one.tp_pp_s is not None],
    }
    return [
        words
        for rival, pairs in rivals.items()
        if rival not in impossible
        for words in _against(rival, pairs)
    ]


def if_host(words: Sequence[str], ep: str) -> list[str]:
    """``words``, those about ``ep`` with IF_HOST before them."""
    return [
        f"{IF_HOST}: {one[0].lower() if one[1].islower() else one[0]}{one[1:]}" if ep in one else one
        for one in words
    ]


def apart(*ways: str) -> str:
    """What is called about equal."""
    known = any(way.startswith(OVER_NCCL) for way in ways)
    more = f"; EP over NCCL is planned up to {NCCL_TOO_FAST:.0%} too fast" if known else ""
    return f"less than {SAME:.0%} apart{more}"


# This library's own arguments, where no profile fits to name them: the transport works without one.
OWN_ARGUMENTS = {
    "vllm": ("--all2all-backend ep_backend", "--enable-expert-parallel"),
    "sglang": ("--moe-a2a-backend ep_backend", "--moe-runner-backend triton"),
}


def of_engines(record: Record, decision: Decision, ranks: int, starts: bool = True) -> list[str]:
    """How to start an engine here, unless NCCL failed, as it would in an engine (``starts`` False)."""
    found = []
    for engine, title, command in (
        ("vllm", "vLLM", f"vllm serve MODEL --data-parallel-size {ranks}"),
        (
            "sglang",
            "SGLang",
            f"python -m sglang.launch_server --model-path MODEL --tp-size {ranks} --dp-size {ranks} "
            "--enable-dp-attention",
        ),
    ):
        arguments = [f"{a.name} {a.value}".strip() for a in decision.engine if a.engine == engine]
        if decision.profile is None and record.used_gpus():
            arguments = list(OWN_ARGUMENTS[engine])
        if arguments and ranks > 1 and starts:
            found.append(" ".join([f"To serve with {title}: {command}", *arguments]))
    if record.container:
        found.append(
            "This is a container: ranks in several containers of one machine share memory only if all are "
            "started with --ipc=host --network=host; otherwise transport collective is used."
        )
    return found


def _against(rival: str, pairs: Sequence[tuple[Comparison, float]]) -> list[str]:
    faster: list[tuple[Comparison, float]] = []
    slower: list[tuple[Comparison, float]] = []
    same: list[Comparison] = []
    for one, other in pairs:
        first, (least, most) = (one.ep if one.ep_s < other else rival), sorted((one.ep_s, other))
        if equal(first, least, most):
            same.append(one)
        else:
            (faster if one.ep_s < other else slower).append((one, other))
    found = []
    if faster:
        one, other = max(faster, key=lambda case: case[1] / case[0].ep_s)
        shown = _numbers("faster", rival, [case for case, _ in faster], one, other)
        found.append(f"{shown}: {rival} takes {other / one.ep_s:.1f} times as long, {CAVEAT}.")
    if slower:
        one, other = max(slower, key=lambda case: case[0].ep_s / case[1])
        shown = _numbers("slower", rival, [case for case, _ in slower], one, other)
        found.append(f"{shown}: {one.ep} takes {one.ep_s / other:.1f} times as long.")
    if same:
        one = same[0]
        tokens = tokens_of([case.tokens for case in same])
        found.append(
            f"{one.ep} and {rival} are about equal for {one.shape} at {tokens} per GPU ({apart(one.ep)})."
        )
    return found


def _numbers(word: str, rival: str, cases: Sequence[Comparison], one: Comparison, other: float) -> str:
    tokens = tokens_of([case.tokens for case in cases])
    ours, theirs = (
        f"{_ms(seconds * one.layers)} per step ({one.layers} x {_us(seconds)})"
        for seconds in (one.ep_s, other)
    )
    return (
        f"{one.ep} is {word} than {rival} for {one.shape} at {tokens} per GPU: at {one.tokens} its "
        f"communication takes {ours}, that of {rival} {theirs}"
    )


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
