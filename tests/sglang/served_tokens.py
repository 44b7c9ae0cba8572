"""What a model says through SGLang: several servers may do this side by side on the same GPUs."""

import json
import statistics
import urllib.request
from dataclasses import dataclass, replace

import engine_nodes
import random_models

from ep_backend.bench.engines import sglang
from ep_backend.bench.engines.base import Serving
from ep_backend.bench.engines.sglang import DERIVED_PORTS, Server
from ep_backend.launch.server import ServerError, open_local

NEW_TOKENS = 16
COMPARED = 8
"""So many of stock's likeliest tokens are looked at in each step."""
ASKED = 32
"""As many are asked for: what is among the likeliest there may be further down here."""
LIMIT = 0.15
"""Largest mean difference of their log-probabilities, and of the log-probabilities that stock gives to our
token and its own. Computed on a CPU, first tokens of the models here (`router_std` 4) differ by at most 0.06
when partial sums are rounded to bf16 in seven other ways, and by at least 0.63 when combine is halved."""
FP8_LIMIT = 0.4
"""The same with fp8 experts, 0.18 and 0.73: every row that was rounded otherwise is quantised otherwise."""
TRAINED_LIMIT = 0.8
"""The same with the trained model, but the mean over prompts: most of its eight likeliest tokens are unlikely
ones, and sums rounded at random change a prompt by up to 1.26, the mean by 0.21 to 0.46; a halved combine
does by 2.06 (benchmarks/rounding.py, fp8). Its greedy tokens stay the same but when combine is halved."""
TRAINED_EQUAL = 0.75
"""Of the trained model's prompts, the part whose tokens must all be those of stock."""
LOG_LINES = 40

OPTIONS = [
    "--attention-backend",
    "triton",
    "--sampling-backend",
    "pytorch",
    "--grammar-backend",
    "none",
    "--disable-custom-all-reduce",
    "--disable-radix-cache",
    "--max-total-tokens",
    "16384",
    # Of what is free at the start: others may use these GPUs, too.
    "--mem-fraction-static",
    "0.5",
    "--cuda-graph-max-bs-decode",
    "8",
    "--cuda-graph-backend-prefill",
    "disabled",
    "--mm-feature-transport",
    "cpu",
    "--skip-server-warmup",
]
ENVIRON = (
    # Servers that start at the same moment take memory while one of them looks at it.
    ("SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK", "false"),
    # Kernels for all sizes would take minutes.
    ("SGLANG_JIT_DEEPGEMM_PRECOMPILE", "0"),
)


def groups_of_prompts():
    """Requests that are made one after the other, each of several prompts that are answered at once."""
    words = random_models.prompts()
    some_long = [" ".join([*words[n:], *words[:n]]) for n in (0, 3)]  # 232 words each
    # One prompt alone leaves every other data-parallel rank without tokens.
    return {"together": words, "alone": words[2:3], "alone, long": some_long[:1], "long": some_long}


def serving(model, backend, runner="triton", extra=(), environ=(), **changes):
    options = {"device": "cuda", "dtype": "bfloat16", "max_num_seqs": 8, **changes}
    return Serving(
        model=model,
        backend=backend,
        extra=(*OPTIONS, "--moe-runner-backend", runner, *extra),
        environ=(*ENVIRON, *environ),
        **options,
    )


def server_of(asked, folder):
    return on_two_nodes(asked, folder) if engine_nodes.wanted(asked) else Server(asked, folder, print)


def on_two_nodes(asked, folder):
    """A server with a node for each of its two ranks.

    Each node looks whether the ports of the first are free on its own machine, so the second does before
    the first takes them.
    """
    port = Server.choose_port()
    meeting = f"{engine_nodes.ADDRESS}:{port + DERIVED_PORTS[2]}"
    nodes = [
        replace(
            asked,
            port=port + 2 * rank,  # and one more for NCCL
            extra=(*asked.extra, "--nnodes", "2", "--node-rank", str(rank), "--dist-init-addr", meeting),
            environ=(*engine_nodes.environ(rank), *asked.environ),
        )
        for rank in range(2)
    ]
    return engine_nodes.server(sglang, *nodes, folder, until="server_args=ServerArgs(")


def served(folder, prompts, **options):
    """Answers per group and prompt, and the server's log."""
    server = server_of(serving(**options), folder)
    try:
        with server:
            answers = {group: ask(server, texts) for group, texts in prompts.items()}
            return answers, server.session.text()
    except (ServerError, OSError):
        print(f"--- the last {LOG_LINES} lines of {server.session.log}")
        print(server.session.tail(LOG_LINES))
        raise


@dataclass(frozen=True)
class Answer:
    """``likely``: for each new token, log-probabilities of the ASKED likeliest ones there."""

    tokens: list[int]
    likely: list[dict[int, float]]


def ask(server, texts):
    body = {
        "text": texts,
        "return_logprob": True,
        "top_logprobs_num": ASKED,
        "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
    }
    request = urllib.request.Request(
        f"{server.url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with open_local(request, timeout=240) as answer:
        return [read_answer(each["meta_info"]) for each in json.load(answer)]


def read_answer(said):
    """Of what SGLang says about a prompt: lists of (log-probability, token, text)."""
    tokens = [token for _, token, *_ in said["output_token_logprobs"]]
    likely = [{token: logprob for logprob, token, *_ in step} for step in said["output_top_logprobs"]]
    assert len(tokens) == len(likely) == NEW_TOKENS
    assert {len(step) for step in likely} == {ASKED}
    return Answer(tokens, likely)


def difference(ours, theirs):
    """Mean difference of the log-probabilities of stock's likeliest tokens. Those that we find less likely
    than all that were asked for count as if they were as likely as the last of these."""
    likeliest = sorted(theirs, key=theirs.get, reverse=True)[:COMPARED]
    least = min(ours.values())
    return statistics.fmean(abs(ours.get(token, least) - theirs[token]) for token in likeliest)


def common_steps(ours, theirs):
    """How many new tokens follow the same text: up to the first that is another one."""
    same = [a == b for a, b in zip(ours.tokens, theirs.tokens, strict=True)]
    return same.index(False) + 1 if False in same else NEW_TOKENS


def equal(got, want):
    """The part of all prompts that have the same tokens."""
    same = [a.tokens == b.tokens for group in got for a, b in zip(got[group], want[group], strict=True)]
    return statistics.fmean(same)


def differences(got, want, limit=LIMIT, *, mean=False):
    """What is wrong, a sentence for each prompt: other probabilities of the first token (a prompt step) or
    on average of the later ones (decode steps), or another token that is less likely for stock than its own
    by more than ``limit``. ``mean``: probabilities are judged by the mean over a group's prompts. Prints how
    far they are apart."""
    wrong = []
    for group, answers in got.items():
        firsts, laters = [], []
        for number, (ours, theirs) in enumerate(zip(answers, want[group], strict=True)):
            steps = common_steps(ours, theirs)
            first, *later = [difference(ours.likely[n], theirs.likely[n]) for n in range(steps)]
            firsts.append(first)
            laters.append(statistics.fmean(later or [0.0]))
            there, token, wanted = theirs.likely[steps - 1], ours.tokens[steps - 1], theirs.tokens[steps - 1]
            less = there[wanted] - there.get(token, float("-inf"))
            said = None
            if not mean and max(first, laters[-1]) > limit:
                said = f"log-probabilities differ by {first:.3f}, later by {laters[-1]:.3f}"
            elif less > limit:
                said = f"token {steps} is {token}, {less:.3f} less likely than {wanted}"
            wrong += [f"{group}, prompt {number}: {said}"] if said else []
        of_firsts, of_laters = statistics.fmean(firsts), statistics.fmean(laters)
        if mean and max(of_firsts, of_laters) > limit:
            wrong.append(f"{group}: log-probabilities differ by {of_firsts:.3f}, later by {of_laters:.3f}")
        equal = [ours.tokens == theirs.tokens for ours, theirs in zip(answers, want[group], strict=True)]
        print(
            f"{group}: {sum(equal)} of {len(equal)} prompts are equal to the last of {NEW_TOKENS} tokens; "
            f"log-probabilities of the {COMPARED} likeliest differ by at most {max(firsts):.4f} for first "
            f"tokens, {max(laters):.4f} for later ones, by {of_firsts:.4f} and {of_laters:.4f} on average"
        )
    return wrong
