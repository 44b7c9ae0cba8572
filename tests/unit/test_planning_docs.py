"""docs/planning.md: its samples are what the commands print, its table of first batches what is planned."""

import re
from pathlib import Path

import pytest

from ep_backend import cli, profiles
from ep_backend.planning import model, predict
from ep_backend.planning.hardware import LINKS

PAGE = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
SAMPLES = re.findall(r"`ep-backend (plan [^`]+)`:\n\n```\n(.*?)```", PAGE, flags=re.DOTALL)
USAGE = [line for line in PAGE.split("```")[1].splitlines() if line.startswith("ep-backend")]
BATCHES = [1 << power for power in range(17)]


@pytest.mark.parametrize(("command", "shown"), SAMPLES, ids=[command for command, _ in SAMPLES])
def test_samples_are_what_the_commands_print(capsys, command, shown):
    assert cli.main(command.split()) == 0
    assert capsys.readouterr().out == shown


def test_there_are_samples_and_the_commands_on_top_run(capsys):
    assert len(SAMPLES) == 2
    named = [line.split()[1:] for line in USAGE if "path/to" not in line]
    assert len(named) == 2
    for arguments in named:
        assert cli.main(arguments) == 0
    assert capsys.readouterr().out


def first_batches(name, link, profile, gpus):
    """For each way of TP the first batch from which EP over NCCL is not slower, or "never"."""
    rows = predict.of_link(model.read(name), profile, LINKS[link], gpus, BATCHES, "bf16")
    seconds = {(row.way, row.tokens): row.seconds for row in rows}
    for way in dict.fromkeys(row.way for row in rows if row.way.startswith("TP")):
        loses = [count for count in BATCHES if seconds["EP over NCCL", count] > seconds[way, count]]
        later = [count for count in BATCHES if count > max(loses, default=0)]
        yield str(later[0]) if later else "never"


def test_the_table_of_first_batches():
    profile = profiles.find("pcie_blackwell", profiles.shipped())
    for name in ("qwen3-30b-a3b", "deepseek-v3"):
        for link in ("pcie5-host", "consumer", "consumer-memcpy"):
            cells = [cell for gpus in (2, 4, 8) for cell in first_batches(name, link, profile, gpus)]
            assert f"| {name}, `{link}` | {' | '.join(cells)} |" in PAGE
