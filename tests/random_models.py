"""Small models with random weights of a size at which every layer matters to what the model says.

`--shape` leaves weights to the engine, whose random ones are so small that experts change no token. These are
scaled by their fan-in, so a layer adds about as much as it is given; and they may be fp8 checkpoints, which
the trained tiny model is too narrow for.
"""

import json

import torch

from ep_backend.bench.engines import models

PROMPTS = 8
FP8_MAX = 448.0
TINY_SCALE = 2.0**-100  # of blocks that are zero
SIZES = {
    "hidden_size": 1024,
    "head_dim": 128,
    "moe_intermediate_size": 640,  # DeepGEMM takes more than 512
    "intermediate_size": 1280,
    "num_attention_heads": 8,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "max_position_embeddings": 512,
}
LAYERS = 4
LOGIT_STD = 3.0


PER_TOKEN = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
            "input_activations": {
                "num_bits": 8,
                "type": "float",
                "strategy": "token",
                "symmetric": True,
                "dynamic": True,
            },
        }
    },
    "ignore": ["lm_head", "re:.*mlp.gate$"],
}


def write(folder, architecture, fp8=None, router_std=1.0, **sizes):
    """A model folder; ``architecture`` is a name of ep_backend.bench.engines.models, ``sizes`` replace some
    of SIZES. Returns it.

    ``router_std``: of the router's logits. With 1 the last expert that a token takes weighs a tenth and is
    often nearly tied with the next: rounding swaps them, and the model says something else. With 4 it
    weighs a hundredth.

    ``fp8``: "block" (weights with a scale per 128x128, rows quantised per 1x128 as they come) or "token" (a
    scale per output channel, rows quantised with one scale each).
    """
    from safetensors.torch import save_file  # tests are collected where it is missing, too

    known = models.ARCHITECTURES[architecture]
    config = {**known.config, **SIZES, **sizes}
    if "shared_expert_intermediate_size" in config:
        config["shared_expert_intermediate_size"] = 1280
    small = models.Architecture(layers=LAYERS, config=config, unquantised=known.unquantised)
    shape = models.Shape(text=architecture, architecture=small, layers=LAYERS, fp8=fp8 == "block")
    models.write(shape, folder)
    if fp8 == "token":
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**written, "quantization_config": PER_TOKEN}))
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for name, size in sizes_of(config):
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones(size, dtype=torch.bfloat16)
            continue
        weight = torch.randn(size, generator=generator)
        if "embed_tokens" not in name and len(size) == 2:
            weight *= size[1] ** -0.5
        if name == "lm_head.weight":
            weight *= LOGIT_STD
        if name.endswith("mlp.gate.weight"):
            weight *= router_std
        if fp8 is None or not name.endswith("_proj.weight"):
            tensors[name] = weight.to(torch.bfloat16)
        elif fp8 == "block":
            tensors[name], tensors[f"{name}_scale_inv"] = quantised(
                weight, models.FP8_BLOCK, models.FP8_BLOCK
            )
        else:
            tensors[name], tensors[f"{name}_scale"] = quantised(weight, 1, size[1])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def prompts():
    """Random words of the tokenizer, 8 to 50 of them."""
    generator, vocabulary = torch.Generator().manual_seed(11), SIZES["vocab_size"]
    return [
        " ".join(f"t{word}" for word in torch.randint(2, vocabulary, (8 + 6 * n,), generator=generator))
        for n in range(PROMPTS)
    ]


def sizes_of(config):
    """Names and shapes of a Qwen2-MoE or Qwen3-MoE checkpoint."""
    hidden, wide = config["hidden_size"], config["moe_intermediate_size"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    heads = {
        "q": config["num_attention_heads"],
        "k": config["num_key_value_heads"],
        "v": config["num_key_value_heads"],
    }
    qwen3 = config["model_type"] == "qwen3_moe"
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}{norm}.weight", (hidden,)
        for name, count in heads.items():
            yield f"{at}self_attn.{name}_proj.weight", (count * head, hidden)
            if not qwen3:
                yield f"{at}self_attn.{name}_proj.bias", (count * head,)
        yield f"{at}self_attn.o_proj.weight", (hidden, heads["q"] * head)
        if qwen3:
            yield f"{at}self_attn.q_norm.weight", (head,)
            yield f"{at}self_attn.k_norm.weight", (head,)
        yield f"{at}mlp.gate.weight", (config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            yield from _mlp(f"{at}mlp.experts.{expert}.", hidden, wide)
        if not qwen3:
            yield from _mlp(f"{at}mlp.shared_expert.", hidden, config["shared_expert_intermediate_size"])
            yield f"{at}mlp.shared_expert_gate.weight", (1, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def _mlp(at, hidden, wide):
    yield f"{at}gate_proj.weight", (wide, hidden)
    yield f"{at}up_proj.weight", (wide, hidden)
    yield f"{at}down_proj.weight", (hidden, wide)


def quantised(weight, high, wide):
    """[N, K] -> e4m3 [N, K], and float32 [N / high, K / wide] scales to multiply its blocks with."""
    rows, columns = weight.shape
    blocks = weight.view(rows // high, high, columns // wide, wide)
    scales = (blocks.abs().amax((1, 3)) / FP8_MAX).clamp_min(TINY_SCALE)
    quantised = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return quantised.view(rows, columns), scales
