"""What `ep-backend plan` computes, for the tests of the pages that show it."""

from ep_backend import profiles
from ep_backend.planning import predict
from ep_backend.planning.hardware import LINKS

BATCHES = [1 << power for power in range(13)]
PROFILES = {profile.name: profile for profile in profiles.shipped()}


def seconds(of, gpus, tokens, link="pcie5-host", profile="pcie_blackwell", dtype="bf16"):
    """By way and number of tokens; ``of``: an `ep_backend.planning.model.Model`."""
    rows = predict.of_link(of, PROFILES[profile], LINKS[link], gpus, tokens, dtype)
    return {(row.way, row.tokens): row.seconds for row in rows}
