"""The widened tiny model against the tiny model, by transformers on the CPU."""

import json

import torch
import wide_models

HIDDEN, EXPERTS = 512, 128


def test_a_widened_model_says_the_same(tmp_path, tiny_reference):
    folder = wide_models.write(tmp_path, hidden=HIDDEN, experts=EXPERTS)
    want, got = (tiny_reference.greedy(m, wide_models.prompts()[:2], 16) for m in (wide_models.TINY, folder))
    assert [record["tokens"] for record in got] == [record["tokens"] for record in want]


def test_fp8_is_the_same_model_in_blocks(tmp_path):
    from safetensors.torch import load_file

    plain = load_file(wide_models.write(tmp_path / "a", hidden=HIDDEN, experts=EXPERTS) / "model.safetensors")
    folder = wide_models.write(tmp_path / "b", hidden=HIDDEN, experts=EXPERTS, fp8=True)
    blocks = load_file(folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    scale = blocks[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    torch.testing.assert_close(
        blocks[name].float() * scale, plain[name].float(), rtol=2**-3, atol=scale.max().item() * 2**-8
    )
