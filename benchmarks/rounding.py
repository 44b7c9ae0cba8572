"""How far rounding alone leads the trained tiny model (examples/tiny_moe) astray, on a CPU, in PyTorch.

    python benchmarks/rounding.py --json FILE

A right exchange may round elsewhere than the engine's default does: the weighted results of a token's experts
are rounded one by one and added in bf16, or weighted after they were rounded, in float32 (low latency). The
model is computed with either, in bf16 and with linear layers and experts in block fp8, by two ranks; greedy
tokens and log-probabilities are compared. So a difference in an engine can be told from an error, of which
results that are halved are one. For first tokens a rank's sums are also rounded at random, up or down, the
more often the nearer that is: what any other place or order of rounding may do.
"""

import argparse
import json
import platform
import shlex
import statistics
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from ep_backend.bench.arguments import output_file
from ep_backend.cli.provenance import provenance

TINY = Path(__file__).parents[1] / "examples" / "tiny_moe"
NEW_TOKENS, LIKELIEST, RANKS = 64, 8, 2
AT_RANDOM = 60  # times
BLOCK, E4M3_MAX = 128, 448.0


def in_fp8(x):
    """float32 [..., n] with the values that fp8 and a scale per block of 128 (or of n) can say."""
    width = BLOCK if x.shape[-1] % BLOCK == 0 else x.shape[-1]
    blocks = x.float().unflatten(-1, (-1, width))
    scales = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-10) / E4M3_MAX
    return ((blocks / scales).to(torch.float8_e4m3fn).float() * scales).flatten(-2)


def weights_in_fp8(weight):
    """The same of weights, with a scale per 128x128."""
    out = weight.float().clone()
    for part in (p for rows in out.split(BLOCK) for p in rows.split(BLOCK, 1)):
        scale = part.abs().max().clamp(min=1e-10) / E4M3_MAX
        part.copy_((part / scale).to(torch.float8_e4m3fn).float() * scale)
    return out


def rounded_at_random(x, generator):
    """bfloat16; ``x``: float32."""
    bits = x.view(torch.int32)
    more = torch.randint(2**16, x.shape, generator=generator, dtype=torch.int32)
    return (bits + more & ~0xFFFF).view(torch.float32).bfloat16()


class Numbers:
    """What all layers look up."""

    fp8 = False
    sums = "default"
    random = torch.Generator()


class Linear(torch.nn.Module):
    def __init__(self, weight, numbers):
        super().__init__()
        self._weight, self._fp8, self._numbers = weight.float(), weights_in_fp8(weight), numbers

    def exact(self, x):
        """float32."""
        return in_fp8(x) @ self._fp8.T if self._numbers.fp8 else x.float() @ self._weight.T

    def forward(self, x):
        return self.exact(x).bfloat16()


class Experts(torch.nn.Module):
    """In the place of a layer's router and experts: each rank holds half of them, one after the other."""

    def __init__(self, block, config, numbers):
        super().__init__()
        self._router, self._top_k, self._numbers = block.gate.weight.data, config.num_experts_per_tok, numbers
        self._normed = config.norm_topk_prob
        gates_and_ups = [pair.chunk(2) for pair in block.experts.gate_up_proj.data]
        self._gate = [Linear(gate, numbers) for gate, _ in gates_and_ups]
        self._up = [Linear(up, numbers) for _, up in gates_and_ups]
        self._down = [Linear(down, numbers) for down in block.experts.down_proj.data]

    def forward(self, hidden):
        x = hidden.flatten(0, -2)
        logits = (x.float() @ self._router.float().T).bfloat16().float()
        weights, ids = logits.softmax(-1).topk(self._top_k, -1)
        if self._normed:
            weights = weights / weights.sum(-1, keepdim=True)
        results = torch.zeros(*ids.shape, x.shape[1])
        for expert, down in enumerate(self._down):
            token, k = (ids == expert).nonzero(as_tuple=True)
            gate, up = self._gate[expert](x[token]), self._up[expert](x[token])
            results[token, k] = down.exact(torch.nn.functional.silu(gate.float()).bfloat16() * up)
        owner = ids // (len(self._down) // RANKS)
        parts = [self._sum(results, weights * (owner == rank)) for rank in range(RANKS)]
        return sum(part.float() for part in parts).bfloat16().view(hidden.shape)

    def _sum(self, results, weights):
        """One rank's part of each token."""
        if self._numbers.sums == "default":
            total = torch.zeros_like(results[:, 0], dtype=torch.bfloat16)
            for part in (results * weights[..., None]).bfloat16().unbind(1):
                total = total + part
            return total
        if self._numbers.sums == "at random":
            return rounded_at_random((results * weights[..., None]).sum(1), self._numbers.random)
        total = (results.bfloat16().float() * weights[..., None]).sum(1)
        return (total / 2 if self._numbers.sums == "halved" else total).bfloat16()


def load(numbers):
    model = AutoModelForCausalLM.from_pretrained(
        str(TINY), dtype=torch.bfloat16, local_files_only=True
    ).eval()
    for layer in model.model.layers:
        layer.mlp = Experts(layer.mlp, model.config, numbers)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Linear(getattr(layer.self_attn, name).weight.data, numbers))
    return model


@torch.no_grad()
def greedy(model, ids, steps=NEW_TOKENS):
    """Tokens, gaps between the two best logits, log-probabilities of all tokens at the first step."""
    tokens, gaps, first = [], [], None
    for _ in range(steps):
        logits = model(input_ids=torch.tensor([ids + tokens]), use_cache=False).logits[0, -1].float()
        best, second = logits.topk(2).values.tolist()
        first = logits.log_softmax(-1) if first is None else first
        tokens.append(int(logits.argmax()))
        gaps.append(best - second)
    return tokens, gaps, first


def first_apart(first, wanted):
    """Differences of the log-probabilities of the likeliest tokens."""
    likeliest = wanted.topk(LIKELIEST).indices
    return (first[likeliest] - wanted[likeliest]).abs()


def compared_at_random(model, asked, want, numbers):
    """For each time: the mean difference of first log-probabilities of every prompt."""
    times = []
    for seed in range(AT_RANDOM):
        numbers.random.manual_seed(seed)
        firsts = [greedy(model, ids, steps=1)[2] for ids in asked]
        apart = [first_apart(first, wanted[2]) for first, wanted in zip(firsts, want, strict=True)]
        times.append([round(float(each.mean()), 3) for each in apart])
    return times


def compared(got, want):
    """Of one prompt."""
    (tokens, _, first), (wanted, gaps, wanted_first) = got, want
    step = next((n for n, pair in enumerate(zip(tokens, wanted, strict=True)) if pair[0] != pair[1]), None)
    apart = first_apart(first, wanted_first)
    return {
        "differs_from_token": step,
        "gap_there": None if step is None else round(gaps[step], 3),
        "first_log_probabilities_apart_mean": round(float(apart.mean()), 3),
        "first_log_probabilities_apart_most": round(float(apart.max()), 3),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=output_file, metavar="FILE")
    args = parser.parse_args()
    numbers = Numbers()
    model, tokenizer = load(numbers), AutoTokenizer.from_pretrained(str(TINY), local_files_only=True)
    prompts = [line for line in (TINY / "prompts.txt").read_text().splitlines() if line.strip()]
    asked = [tokenizer.encode(prompt) for prompt in prompts]
    results = []
    for numbers.fp8 in (False, True):
        numbers.sums = "default"
        want = [greedy(model, ids) for ids in asked]
        for numbers.sums in ("low latency", "halved"):
            each = [compared(greedy(model, ids), wanted) for ids, wanted in zip(asked, want, strict=True)]
            equal = sum(one["differs_from_token"] is None for one in each)
            gap = max((one["gap_there"] or 0.0 for one in each), default=0.0)
            apart = max(one["first_log_probabilities_apart_mean"] for one in each)
            name = "block fp8" if numbers.fp8 else "bf16"
            results.append({"format": name, "sums": numbers.sums, "equal": equal, "prompts": each})
            print(
                f"{name}, {numbers.sums}: {equal} of {len(each)} equal, gap {gap}, apart {apart}", flush=True
            )
        numbers.sums = "at random"
        times = compared_at_random(model, asked, want, numbers)
        results.append({"format": name, "sums": numbers.sums, "first_log_probabilities_apart_means": times})
        of_all = sorted(statistics.fmean(each) for each in times)
        print(
            f"{name}, at random: apart {min(map(min, times))} to {max(map(max, times))}, "
            f"mean of all prompts {of_all[0]:.3f} to {of_all[-1]:.3f}",
            flush=True,
        )
    if args.json:
        document = {
            **provenance(),
            "command": shlex.join(["python", *sys.argv]),
            "machine": {"device": "cpu", "system": platform.platform()},
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "results": results,
        }
        args.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
