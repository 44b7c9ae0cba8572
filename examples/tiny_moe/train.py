"""Train the tiny MoE language model of this folder: tokenizer, weights and the record of the run.

    python examples/tiny_moe/train.py --out /tmp/tiny_moe

One CPU core is enough. The seed is fixed; another Python, torch or CPU still gives other weights.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from corpus import Document, documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
RECORD = "training.json"
HELD_OUT_EVERY = 20  # every 20th document is never trained on


@dataclass(frozen=True, kw_only=True)
class Options:
    out: Path
    start_from: Path | None = None  # a folder written earlier: skip the running text
    steps: int = 1600  # on running text
    opening_steps: int = 700  # then, on sequences that begin where a paragraph begins
    opening_peak: float = 0.5  # factor of the learning rates of these
    batch_tokens: int = 2048  # tokens of a step
    sequence: int = 512  # tokens of a sequence; half as many until the last quarter of the steps (cheaper)
    matrix_learning_rate: float = 0.02  # of the matrices inside the layers (Muon)
    learning_rate: float = 4e-3  # of embedding, routers and norms (AdamW)
    warmup: int = 50  # steps
    weight_decay: float = 0.02
    balance: float = 0.002  # weight of the load-balancing loss; small, so that routing stays skewed
    layers: int = 4
    experts: int = 16
    top_k: int = 4
    expert_size: int = 64  # intermediate size of one expert
    vocabulary: int = 1024
    seed: int = 0
    threads: int = 1
    report_every: int = 50  # steps


def parse_options() -> Options:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--start-from", type=Path, help="folder of a model to go on with, on openings only")
    for name, default in asdict(Options(out=Path())).items():
        if name not in ("out", "start_from"):
            flag = f"--{name.replace('_', '-')}"
            parser.add_argument(flag, type=type(default), default=default, help=f"[{default}]")
    return Options(**vars(parser.parse_args()))


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be encoded, and decoding gives it back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=PAD)


def make_model(options: Options, tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,  # one block of the fp8 block quantisation
        head_dim=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=options.layers,
        num_experts=options.experts,
        num_experts_per_tok=options.top_k,
        moe_intermediate_size=options.expert_size,
        intermediate_size=options.top_k * options.expert_size,  # of dense layers: there are none
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        tie_word_embeddings=True,
        max_position_embeddings=options.sequence,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")  # twice as fast here as a loop over the experts
    return model


class Running:
    """Documents one after the other, in a new order for each pass over the text, cut into sequences."""

    def __init__(self, encoded: list[list[int]], options: Options) -> None:
        self._encoded = encoded
        self._size = options.batch_tokens
        self._generator = torch.Generator().manual_seed(options.seed)
        self._stream: list[int] = []

    def next(self, length: int) -> torch.Tensor:
        """Return int64 [batch_tokens / length, length]."""
        while len(self._stream) < self._size:
            order = torch.randperm(len(self._encoded), generator=self._generator).tolist()
            self._stream += [token for index in order for token in self._encoded[index]]
        taken, self._stream = self._stream[: self._size], self._stream[self._size :]
        return torch.tensor(taken).view(-1, length)


class Openings:
    """Sequences that begin where a paragraph begins, as a prompt does; else a short prompt is foreign."""

    def __init__(self, encoded: list[list[int]], newline: int, options: Options) -> None:
        self._stream = torch.tensor([token for document in encoded for token in document])
        ends = ((self._stream == newline) | (self._stream == encoded[0][-1])).nonzero().flatten()
        follows = ends[ends + options.sequence < len(self._stream)] + 1
        # A document ends with a newline and the end-of-text token: the latter opens nothing.
        self._starts = follows[self._stream[follows] != encoded[0][-1]]
        self._size = options.batch_tokens
        self._generator = torch.Generator().manual_seed(options.seed + 1)
        self._order: list[int] = []

    def next(self, length: int) -> torch.Tensor:
        """Return int64 [batch_tokens / length, length]."""
        count = self._size // length
        while len(self._order) < count:
            self._order += torch.randperm(len(self._starts), generator=self._generator).tolist()
        taken, self._order = self._order[:count], self._order[count:]
        return torch.stack([self._stream[start : start + length] for start in self._starts[taken].tolist()])


def schedule(step: int, steps: int, warmup: int) -> float:
    """Return the factor of the learning rates: a linear warm-up, then a cosine down to a fiftieth."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal (K. Jordan 2024), for matrices and stacks of matrices.

    Few tokens have to do here, and it gains more per step than Adam. torch's own takes no stacks of experts.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.95, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                average = state.setdefault("average", torch.zeros_like(weight))
                average.lerp_(weight.grad, 1 - group["momentum"])
                update = self._orthogonal(weight.grad.lerp(average, group["momentum"]))
                rows, columns = weight.shape[-2:]
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    @staticmethod
    def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
        """Five Newton-Schulz steps: the singular values come near 1, the singular vectors stay."""
        wide = matrix.shape[-2] <= matrix.shape[-1]
        x = matrix if wide else matrix.mT
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x if wide else x.mT


def make_optimizers(model: Qwen3MoeForCausalLM, options: Options) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embedding, routers and norms."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        inner = parameter.dim() > 1 and "embed" not in name and "mlp.gate.weight" not in name
        (matrices if inner else others).append(parameter)
    return [
        Muon(matrices, lr=options.matrix_learning_rate, weight_decay=options.weight_decay),
        torch.optim.AdamW(others, lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Mean over layers of experts * sum(share of slots * mean probability); 1 when the load is even.

    transformers' own ``aux_loss`` pools the layers: one may use four experts only while the sum looks even.
    """
    losses = []
    for logits in router_logits:
        experts = logits.shape[-1]
        probability = logits.float().softmax(dim=-1)
        chosen = probability.topk(top_k, dim=-1).indices.flatten()
        share = torch.bincount(chosen, minlength=experts) / len(chosen)
        losses.append(experts * (share * probability.mean(dim=0)).sum())
    return torch.stack(losses).mean()


@torch.no_grad()
def evaluate(
    model: Qwen3MoeForCausalLM, encoded: list[list[int]], sequence: int
) -> tuple[float, list[list[float]]]:
    """Return the mean loss per token (nats) and, by layer, each expert's share of the routed slots."""
    model.eval()
    config = model.config
    loads = torch.zeros(config.num_hidden_layers, config.num_experts)
    total, count = 0.0, 0
    stream = torch.tensor([token for document in encoded for token in document])
    for piece in stream.split(sequence):
        if len(piece) < 2:
            continue
        out = model(input_ids=piece[None], output_router_logits=True)
        loss = torch.nn.functional.cross_entropy(out.logits[0, :-1].float(), piece[1:], reduction="sum")
        total, count = total + float(loss), count + len(piece) - 1
        for layer, logits in enumerate(out.router_logits):
            chosen = logits.topk(config.num_experts_per_tok, dim=-1).indices.flatten()
            loads[layer] += torch.bincount(chosen, minlength=config.num_experts)
    model.train()
    loads /= loads.sum(dim=1, keepdim=True)
    return total / count, [[round(share, 4) for share in layer] for layer in loads.tolist()]


@dataclass(frozen=True)
class Stage:
    name: str
    batches: Running | Openings
    steps: int
    peak: float  # factor of the learning rates

    def length(self, step: int, options: Options) -> int:
        """Return the tokens of a sequence: short ones cost less and teach the same until late."""
        if isinstance(self.batches, Openings):
            return options.sequence // 4
        return options.sequence if 4 * step >= 3 * self.steps else options.sequence // 2


def train(model: Qwen3MoeForCausalLM, stage: Stage, held_out: list[list[int]], options: Options) -> None:
    optimizers = make_optimizers(model, options)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] * stage.peak for group in groups]
    start, recent = time.monotonic(), 0.0
    for step in range(stage.steps):
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * schedule(step, stage.steps, options.warmup)
        tokens = stage.batches.next(stage.length(step, options))
        out = model(input_ids=tokens, output_router_logits=True)
        loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        (loss + options.balance * balance_loss(out.router_logits, options.top_k)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        recent += loss.item() / options.report_every
        if (step + 1) % options.report_every == 0:
            seconds = time.monotonic() - start
            speed = (step + 1) * options.batch_tokens / seconds
            line = f"{stage.name}: step {step + 1}/{stage.steps}  loss {recent:.3f}"
            line += f"  {speed:.0f} tokens/s  {seconds:.0f} s"
            if (step + 1) % (5 * options.report_every) == 0:
                loss_now, load = evaluate(model, held_out, options.sequence)
                line += f"  held-out loss {loss_now:.3f}  load / mean"
                line += "".join(f" {min(s) * len(s):.2f}-{max(s) * len(s):.2f}" for s in load)
            print(line, flush=True)
            recent = 0.0


def save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights (bf16), config and tokenizer so that transformers 4 and 5 both read them."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config["num_experts"] = model.config.num_experts  # the name that transformers 4 and vLLM know
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    _write_json(out / "config.json", config)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # transformers 5 writes a class that 4 does not have
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.max_position_embeddings,
    }
    _write_json(out / "tokenizer_config.json", settings)
    _write_json(
        out / "generation_config.json",
        {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "do_sample": False},
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    texts: list[Document] = documents()
    test = texts[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    learn = [document for document in texts if document not in test]
    if options.start_from:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.start_from)
    else:
        tokenizer = train_tokenizer([document.text for document in learn], options.vocabulary)
    train_ids, test_ids = (
        [[*tokenizer.encode(d.text), tokenizer.eos_token_id] for d in part] for part in (learn, test)
    )
    model = make_model(options, tokenizer)
    if options.start_from:
        model.load_state_dict(Qwen3MoeForCausalLM.from_pretrained(options.start_from).state_dict())
    sizes = {
        "documents": len(learn),
        "characters": sum(len(d.text) for d in learn),
        "tokens": sum(map(len, train_ids)),
        "held_out_documents": len(test),
        "held_out_characters": sum(len(d.text) for d in test),
        "held_out_tokens": sum(map(len, test_ids)),
    }
    print(f"corpus: {sizes}\nparameters: {model.num_parameters()}", flush=True)
    stage_seconds: dict[str, int] = {}
    if options.start_from:
        stage_seconds = json.loads((options.start_from / RECORD).read_text())["stage_seconds"]
    newline = tokenizer.convert_tokens_to_ids("\u010a")  # how byte-level BPE writes a line feed
    stages = [
        Stage("running text", Running(train_ids, options), options.steps, 1.0),
        Stage("openings", Openings(train_ids, newline, options), options.opening_steps, options.opening_peak),
    ]
    for stage in stages[1:] if options.start_from else stages:
        start = time.monotonic()
        train(model, stage, test_ids, options)
        stage_seconds[stage.name] = round(time.monotonic() - start)

    model = model.to(torch.bfloat16)
    save(model, tokenizer, options.out)
    loss, load = evaluate(model.float(), test_ids, options.sequence)  # weights as saved, arithmetic in fp32
    train_loss, _ = evaluate(model, train_ids[::HELD_OUT_EVERY], options.sequence)
    characters_per_token = sizes["held_out_characters"] / sizes["held_out_tokens"]
    record = {
        "options": {k: v for k, v in asdict(options).items() if k not in ("out", "start_from")},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "corpus": sizes,
        "parameters": model.num_parameters(),
        "stage_seconds": stage_seconds,
        "training_loss": round(train_loss, 4),
        "held_out_loss": round(loss, 4),
        "held_out_perplexity": round(math.exp(loss), 2),
        "held_out_bits_per_character": round(loss / math.log(2) / characters_per_token, 3),
        "expert_load": load,
    }
    _write_json(options.out / RECORD, record)
    print(f"held-out loss {loss:.4f}, perplexity {math.exp(loss):.2f}; training text: loss {train_loss:.4f}")
    for layer, shares in enumerate(load):
        mean = 1 / len(shares)
        print(f"layer {layer}: load / mean  " + " ".join(f"{share / mean:.2f}" for share in shares))


if __name__ == "__main__":
    main()
