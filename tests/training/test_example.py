"""The example that trains the tiny model: two ranks with half of the experts each have one rank's losses."""

import sys
from pathlib import Path

import pytest
from harness import ranks

pytest.importorskip("transformers")
EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_moe"
STEPS = 8


def curve(group=None, device="cpu"):
    sys.path.insert(0, str(EXAMPLE))
    try:
        from train import Options
        from train_ep import train
    finally:
        sys.path.remove(str(EXAMPLE))
    options = Options(
        out=Path(), steps=STEPS, warmup=2, batch_tokens=256, sequence=64, layers=2, experts=8, expert_size=32
    )
    return train(options, 2, group, device)


def curve_job(rank, group, parallel):
    return curve(group if parallel else None)


def test_loss_curve_of_one_rank():
    alone = ranks(1).run(curve_job, False, timeout=300)[0]
    first, second = ranks(2).run(curve_job, True, timeout=300)
    assert first == second
    assert len(alone) == STEPS
    assert alone[-1] < alone[0] - 0.5, "it must learn, or curves say nothing"
    assert first == pytest.approx(alone, abs=1e-3)
