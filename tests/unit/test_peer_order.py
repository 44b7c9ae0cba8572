"""Which order of stores is decided for transport peer, from the records of made-up machines."""

import msgspec
import pytest
from machines import partial_machine, pcie_machine, with_orders

from ep_backend.errors import EpConfigError
from ep_backend.select import decide


@pytest.mark.parametrize(
    ("measured", "order"),
    [
        ([], "together"),
        ([(10e9, 10.9e9)] * 4, "together"),
        ([(10e9, 11.1e9)] * 4, "staggered"),
        ([(4e9, 12e9)], "staggered"),
        ([(4e9, 12e9), (10e9, 10e9)], "together"),
        ([(4e9, 12e9), (10e9, 15e9)], "staggered"),
        ([(None, None)] * 4, "together"),
    ],
)
def test_the_faster_order_of_stores_is_chosen_and_all_ranks_that_measured_it_must_say_so(measured, order):
    decision = decide(with_orders(pcie_machine(4), *measured))
    assert (decision.transport, decision.peer_order) == ("peer", order)
    assert ("Order of stores" in decision.reason) == (order == "staggered")
    if len(measured) == 2 and order == "staggered":
        assert "4 GPUs, all at the same time, each store 15.0 GB/s rank after rank" in decision.reason
        assert "and 10.0 GB/s to all in turn." in decision.reason


def test_an_order_that_was_measured_between_other_gpus_says_nothing():
    records = with_orders(pcie_machine(4), (4e9, 12e9))
    assert decide(records[:3]).peer_order == "together"


def test_ranks_behind_a_switch_store_to_one_switch_at_a_time():
    def machine(group):
        records = partial_machine(4)
        links = tuple(msgspec.structs.replace(link, peer_works=True) for link in records[0].links)
        records = [msgspec.structs.replace(record, links=links) for record in records]
        return with_orders(records, (4e9, 12e9), group=group)

    assert (decide(machine(2)).peer_order, decide(machine(2)).peer_group) == ("staggered", 2)
    decision = decide(machine(1))
    assert (decision.peer_order, decision.peer_group) == ("together", 1), "measured between other groups"
    assert decide(machine(2)[::2]).peer_group == 1


def test_only_transport_peer_has_an_order():
    records = with_orders(pcie_machine(4), (4e9, 12e9))
    assert decide(records, "host").peer_order == "together"


def test_the_users_order_of_stores():
    def decided(order, *measured):
        environment = {"EP_BACKEND_PEER_ORDER": order}
        return decide(with_orders(pcie_machine(4, environment=environment), *measured))

    for wanted in ("together", "staggered"):
        decision = decided(wanted, (4e9, 12e9))
        assert decision.peer_order == wanted
        assert f"Order of stores: {wanted}, by EP_BACKEND_PEER_ORDER." in decision.reason
    assert decided("auto", (4e9, 12e9)).peer_order == "staggered"
    with pytest.raises(EpConfigError, match="wanted one of auto, together, staggered"):
        decided("pull")
