"""What a model says through SGLang: several servers may do this side by side on the same GPUs."""

import json
import urllib.request

import random_models

from ep_backend.bench.engines.base import Serving
from ep_backend.bench.engines.sglang import Server
from ep_backend.launch.server import ServerError, open_local

NEW_TOKENS = 16
LOGPROB_GAP = 0.15
"""Largest difference of a first token's log-probability; stock differed from itself by 0.11 with another
model on 4 H200."""
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


def served(folder, prompts, **options):
    """Per group and prompt: new tokens and the first one's log-probability. Also the server's log."""
    server = Server(serving(**options), folder, print)
    try:
        with server:
            answers = {group: ask(server, texts) for group, texts in prompts.items()}
            return answers, server.session.log.read_text(errors="replace")
    except (ServerError, OSError):
        print(f"--- the last {LOG_LINES} lines of {server.session.log}")
        print(server.session.tail(LOG_LINES))
        raise


def ask(server, texts):
    body = {
        "text": texts,
        "return_logprob": True,
        "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
    }
    request = urllib.request.Request(
        f"{server.url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with open_local(request, timeout=240) as answer:
        answers = json.load(answer)
    steps = [each["meta_info"]["output_token_logprobs"] for each in answers]
    assert all(len(each) == NEW_TOKENS for each in steps)
    return [([token for _, token, *_ in each], each[0][0]) for each in steps]


def differences(got, want):
    """What is wrong: another first token than at a near tie, or another probability of it."""
    wrong = []
    for group, answers in got.items():
        gaps = []
        for number, (ours, theirs) in enumerate(zip(answers, want[group], strict=True)):
            (tokens, logprob), (wanted, wanted_logprob) = ours, theirs
            gap = abs(logprob - wanted_logprob)
            gaps.append(gap)
            if tokens[0] == wanted[0] and gap > LOGPROB_GAP:
                wrong.append(f"{group}, prompt {number}: {logprob:.3f} instead of {wanted_logprob:.3f}")
            if tokens[0] != wanted[0] and gap > LOGPROB_GAP / 2:
                wrong.append(f"{group}, prompt {number}: token {tokens[0]} instead of {wanted[0]}")
        whole = sum(tokens == wanted for (tokens, _), (wanted, _) in zip(answers, want[group], strict=True))
        print(
            f"{group}: {whole} of {len(answers)} prompts are equal to the last of {NEW_TOKENS} tokens, "
            f"first log-probabilities differ by at most {max(gaps):.4f}"
        )
    return wrong
