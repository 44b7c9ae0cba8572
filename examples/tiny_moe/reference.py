"""Greedy tokens by transformers' own forward pass, with the gap between the best two logits at each step.

    python examples/tiny_moe/reference.py --dtype float32 --json reference.json

The gap tells a near tie from an error: where another engine's token differs, the gap there must be small.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PROMPTS = HERE / "prompts.txt"


def read_prompts(path: Path | str = PROMPTS) -> list[str]:
    """Return the prompts of a file: one a line, empty lines skipped, no space at either end."""
    return [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def greedy(
    model_dir: Path | str, prompts: Sequence[str], new_tokens: int = 64, dtype: str = "float32"
) -> list[dict[str, Any]]:
    """Continue each prompt by ``new_tokens`` greedy tokens, on the CPU; end-of-text does not stop it.

    Every step is a whole forward pass over the sequence so far, without a cache: slow and plain.

    Args:
        model_dir: folder with config, weights and tokenizer; nothing is downloaded.
        prompts: texts; each is run alone, so that no padding enters.
        new_tokens: tokens to add to each prompt, at least 1.
        dtype: "float32", "bfloat16" or "float16"; of weights and arithmetic.

    Returns:
        One record per prompt: ``prompt``, ``prompt_tokens`` and ``tokens`` (lists of ids), ``text`` (of the
        new tokens), ``gaps`` (best logit minus second best, one per new token, in logit units) and
        ``runner_up`` (ids of the second best).

    Raises:
        ValueError: unknown dtype, no new tokens, an empty prompt, or more tokens than positions.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise ValueError(f"dtype is {dtype!r}, wanted one of {', '.join(dtypes)}")
    if new_tokens < 1:
        raise ValueError(f"new_tokens is {new_tokens}, wanted at least 1")
    tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=dtypes[dtype], local_files_only=True)
    model.eval()
    positions = model.config.max_position_embeddings

    records = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        if not ids or len(ids) + new_tokens > positions:
            raise ValueError(f"prompt {prompt!r} has {len(ids)} tokens, wanted 1 to {positions - new_tokens}")
        tokens: list[int] = []
        gaps: list[float] = []
        runner_up: list[int] = []
        for _ in range(new_tokens):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids + tokens]), use_cache=False).logits[0, -1].float()
            (best, second), (token, other) = (pair.tolist() for pair in logits.topk(2))
            tokens.append(token)
            gaps.append(best - second)
            runner_up.append(other)
        records.append(
            {
                "prompt": prompt,
                "prompt_tokens": ids,
                "tokens": tokens,
                "text": tokenizer.decode(tokens),
                "gaps": gaps,
                "runner_up": runner_up,
            }
        )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=HERE, help="folder of the model [this folder]")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="one prompt a line [prompts.txt here]")
    parser.add_argument("--new-tokens", type=int, default=64, help="[64]")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, help="threads of the arithmetic [torch's choice]")
    parser.add_argument("--json", type=Path, help="file to write; the text goes to the terminal either way")
    options = parser.parse_args()

    import torch
    import transformers

    if options.threads:
        torch.set_num_threads(options.threads)
    records = greedy(options.model, read_prompts(options.prompts), options.new_tokens, options.dtype)
    for record in records:
        print(f"{record['prompt']}|{record['text']}\n    smallest gap {min(record['gaps']):.4f}\n")
    if options.json:
        result = {
            "command": sys.argv,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "dtype": options.dtype,
            "new_tokens": options.new_tokens,
            "results": records,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
