"""The schema of hardware profiles and its loader."""

import copy
import datetime
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import cpu_rank

from ep_backend import env, profiles
from ep_backend.errors import EpConfigError
from ep_backend.select import apply_env, decide

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
VALID = {
    "name": "box",
    "aliases": ["crate"],
    "description": "A box.",
    "recognition": {"order": 5, "require": {"gpus": "all", "hca": True}, "source": "here"},
    "transport": {"inside": ["peer", "collective"], "across": ["collective"], "source": "here"},
    "environment": {"NCCL_IB_SL": {"value": "3", "why": "because", "source": "here"}},
    "engine": {"vllm": {"--max-num-seqs": {"value": "4", "why": "because", "source": "here"}}},
    "sm_budget": {"sms": 24, "source": "here"},
    "conditional": [
        {
            "when": {"cuda_driver_below": "13.0"},
            "environment": {"NCCL_CUMEM_HOST_ENABLE": {"value": "0", "why": "because", "source": "here"}},
        }
    ],
}
DELETE = object()


def changed(path, value):
    """A copy of VALID with the value at ``path`` (keys and indices) replaced, added or deleted."""
    data = copy.deepcopy(VALID)
    place = data
    for step in path[:-1]:
        place = place[step]
    if value is DELETE:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return data


def test_the_valid_profile_is_valid():
    profile = profiles.from_dict(VALID, "box.toml")
    assert profile.names == ("box", "crate")
    assert profile.environment["NCCL_IB_SL"].value == "3"
    assert profile.conditional[0].when.cuda_driver_below == "13.0"
    with pytest.raises(AttributeError):
        profile.name = "other"


SETTING = {"value": "1", "why": "w", "source": "s"}
MISTAKES = [
    # unknown keys, with the nearest valid one
    (["transprot"], {}, "unknown key 'transprot'; did you mean 'transport'?"),
    (["transport", "insde"], [], "transport: unknown key 'insde'; did you mean 'inside'?"),
    (["recognition", "require", "nvlinks"], "all", "recognition.require: unknown key 'nvlinks'"),
    (["environment", "NCCL_IB_SL", "reason"], "x", "environment.NCCL_IB_SL: unknown key 'reason'"),
    (["conditional", 0, "wen"], {}, "conditional[0]: unknown key 'wen'; did you mean 'when'?"),
    (["engine", "vlm"], {}, "engine: unknown key 'vlm'; did you mean 'vllm'?"),
    # wrong types and missing keys
    (["name"], 3, "name: expected text in quotes, got `int`"),
    (["name"], DELETE, "missing required field `name`"),
    (["transport"], DELETE, "missing required field `transport`"),
    (["recognition", "order"], "5", "recognition.order: expected `int`, got `str`"),
    (["recognition", "require", "hca"], 1, "recognition.require.hca: expected `bool"),
    (["environment", "NCCL_IB_SL", "value"], 3,
     "environment.NCCL_IB_SL.value: expected text in quotes, got `int`"),
    (["environment", "NCCL_IB_SL", "source"], DELETE,
     "environment.NCCL_IB_SL: missing required field `source`"),
    (["environment", "NCCL_IB_SL"], "3", "environment.NCCL_IB_SL: expected a table, got `str`"),
    (["engine", "vllm", "--max-num-seqs", "value"], 4,
     "engine.vllm.--max-num-seqs.value: expected text in quotes, got `int`"),
    (["conditional", 0, "environment", "NCCL_CUMEM_HOST_ENABLE", "why"], DELETE,
     "conditional[0].environment.NCCL_CUMEM_HOST_ENABLE: missing required field `why`"),
    (["aliases"], ["crate", 3], "aliases[1]: expected text in quotes, got `int`"),
    (["conditional"], {"when": {}}, "conditional: expected `array`"),
    # values
    (["recognition", "require", "gpus"], "al", "gpus: unknown value 'al'; did you mean 'all'?"),
    (["recognition", "require"], {}, "recognition.require: is empty"),
    (["conditional", 0, "when", "peer_level"], "PBX", "peer_level: unknown value 'PBX'; did you mean 'PXB'?"),
    (["transport", "inside"], ["pear"], "transport.inside: unknown transport 'pear'; did you mean 'peer'?"),
    (["transport", "inside"], [], "transport.inside: needs at least one"),
    (["transport", "across"], ["collective", "collective"], "transport.across: a transport is listed twice"),
    (["environment", "NCCL_IBSL"], SETTING, "environment.NCCL_IBSL: NCCL_IBSL is not a registered"),
    (["environment", "NCCL_IBSL"], SETTING, "did you mean 'NCCL_IB_SL'?"),
    (["environment", "NCCL_IB_SL", "value"], "99", "environment.NCCL_IB_SL: NCCL_IB_SL='99' is not usable"),
    (["environment", "EP_BACKEND_TIMEOUT_S"], SETTING, "steers ep_backend itself"),
    (["environment", "NCCL_IB_SL", "source"], " ", "environment.NCCL_IB_SL.source: must not be empty"),
    (["engine", "vllm", "max_num_seqs"], SETTING, "engine.vllm: 'max_num_seqs' is not an argument"),
    (["conditional", 0, "environment", "NCCL_CUMEM_HOST_ENABLE", "why"], "",
     "conditional[0].environment.NCCL_CUMEM_HOST_ENABLE.why: must not be empty"),
    (["sm_budget", "sms"], 0, "sm_budget.sms: 0 is out of range"),
    (["description"], "", "description: must not be empty"),
    (["name"], "auto", "'auto' is no usable name"),
    (["name"], "My Box", "'My Box' is no usable name"),
    (["aliases"], ["box"], "a name is given twice"),
    (["conditional", 0, "when", "cuda_driver_below"], "13.x", "[0].when.cuda_driver_below: '13.x'"),
    # combinations that cannot be
    (["transport", "inside"], ["hier"], "means nothing inside one"),
    (["transport", "across"], ["host"], "memory of one host"),
    (["transport", "inside"], ["cpu"], "'cpu' moves CPU tensors"),
    (["recognition", "require"], {"gpus": "none"}, "'peer' needs GPUs"),
    (["transport", "across"], ["mixed"], "memory of one host"),
    (["recognition", "require"], {"gpus": "none", "nvlink": "all"}, "links between GPUs where"),
    (["recognition", "require"], {"gpus": "none", "several_gpus": True}, "links between GPUs where"),
    (["conditional", 0, "when"], {"nccl_at_least": "2.28", "nccl_below": "2.28.0"}, "below 2.28.0"),
    (["conditional", 0, "environment"], {}, "conditional[0]: has no effect"),
    (["environment"], {"NCCL_P2P_DISABLE": SETTING, "NCCL_P2P_LEVEL": {**SETTING, "value": "PIX"}},
     "NCCL_P2P_LEVEL means nothing while NCCL_P2P_DISABLE is 1"),
    *((["conditional", 0, "when"], when, f"conditional[0].when: {words}") for when, words in (
        ({"several_gpus": False, "peer_access": "some"}, "without several_gpus there are no pairs"),
        ({"several_gpus": False, "nvlink": "all"}, "without several_gpus there are no pairs"),
        ({"several_gpus": False, "pcie_switch": "some"}, "without several_gpus there are no pairs"),
        ({"several_gpus": False, "peer_level": "LOC"}, "without several_gpus there are no pairs"),
        ({"peer_access": "all", "peer_level": "LOC"}, "peer_level cannot be 'LOC' while"),
        ({"peer_access": "none", "peer_level": "PXB"}, "peer_level cannot be 'PXB' while"),
        ({"peer_access": "some", "peer_level": "SYS"}, "peer_level cannot be 'SYS' while"),
        ({"nvlink": "none", "fabric": True}, "a fabric joins GPUs by NVLink"),
    )),
    (["recognition", "require"], {"peer_access": "none"}, "transport.inside: 'peer' needs"),
    (["recognition", "require"], {"peer_access": "some"}, "transport.inside: 'peer' needs"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value", "message"), MISTAKES)
def test_every_mistake_names_file_key_and_remedy(path, value, message):
    with pytest.raises(EpConfigError) as error:
        profiles.from_dict(changed(path, value), "box.toml")
    assert str(error.value).startswith("box.toml: ")
    assert message in str(error.value)


@pytest.mark.parametrize(("first", "second"), [("DISABLE", "LEVEL"), ("LEVEL", "DISABLE")])
def test_a_block_must_not_contradict_what_it_adds_to(first, second):
    """The level and the switch that makes it meaningless, one for all machines and one under a condition."""
    setting = {"DISABLE": SETTING, "LEVEL": {**SETTING, "value": "PIX"}}
    data = changed(["environment"], {f"NCCL_P2P_{first}": setting[first]})
    data["conditional"][0]["environment"] = {f"NCCL_P2P_{second}": setting[second]}
    words = r"conditional\[0\].environment: NCCL_P2P_LEVEL means nothing while NCCL_P2P_DISABLE is 1"
    with pytest.raises(EpConfigError, match=words):
        profiles.from_dict(data, "box.toml")
    data["environment"]["NCCL_P2P_DISABLE"] = SETTING
    data["environment"].pop("NCCL_P2P_LEVEL", None)
    data["conditional"][0]["environment"] = {"NCCL_P2P_DISABLE": {**SETTING, "value": "0"},
                                             "NCCL_P2P_LEVEL": setting["LEVEL"]}  # fmt: skip
    assert profiles.from_dict(data, "box.toml"), "the block takes the switch back"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NCCL_SOCKET_IFNAME", "=eth0"),
        ("NCCL_IB_HCA", "=mlx5_0:1,mlx5_1:1"),
        ("NCCL_IB_GID_INDEX", "3"),
        ("NCCL_PROTO", "^LL128"),
        ("NCCL_ALGO", "Ring"),
        ("NCCL_SHM_DISABLE", "1"),
        ("GLOO_SOCKET_IFNAME", "eth0"),
    ],
)
def test_what_a_site_sets_is_set_and_known_as_ours(tmp_path, name, value):
    file = tmp_path / "own.toml"
    setting = f'[environment.{name}]\nvalue = "{value}"\nwhy = "w"\nsource = "s"\n'
    file.write_text(OWN.format(name="mine", aliases="") + setting)
    environ = {}
    assert apply_env(decide([cpu_rank()], requested_profile=str(file)), environ) == ()
    assert environ[name] == value
    assert env.applied(environ) == {name: value}


def two_blocks(first, second, disable="1"):
    """VALID with a level under one condition, and the switch that makes it meaningless under another."""
    level = {"when": first, "environment": {"NCCL_P2P_LEVEL": {**SETTING, "value": "PIX"}}}
    switch = {"when": second, "environment": {"NCCL_P2P_DISABLE": {**SETTING, "value": disable}}}
    return changed(["conditional"], [level, VALID["conditional"][0], switch])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"hca": True}, {"peer_access": "none"}),
        ({"peer_access": "none"}, {"peer_access": "none"}),
        ({"peer_access": "some"}, {"peer_level": "PIX"}),
        ({"several_gpus": False}, {"nvlink": "none"}),
        ({"gpus": "none"}, {"peer_access": "none", "several_gpus": False}),
        ({"cuda_driver_below": "13.0"}, {"cuda_driver_at_least": "12.8"}),
        ({"nccl_at_least": "2.9"}, {"nccl_at_least": "2.28", "nccl_below": "3"}),
    ],
)
def test_two_blocks_that_can_hold_together_must_not_contradict_each_other(first, second):
    words = (
        r"box.toml: conditional\[0\] and conditional\[2\] can hold together: NCCL_P2P_LEVEL means nothing "
        "while NCCL_P2P_DISABLE is 1; keep one of them"
    )
    for one, other in ((first, second), (second, first)):
        with pytest.raises(EpConfigError, match=words):
            profiles.from_dict(two_blocks(one, other), "box.toml")
        assert profiles.from_dict(two_blocks(one, other, disable="0"), "box.toml")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"hca": True}, {"hca": False}),
        ({"peer_access": "all"}, {"peer_access": "some", "hca": True}),
        ({"peer_access": "none"}, {"peer_level": "PXB"}),
        ({"several_gpus": False}, {"peer_access": "all"}),
        ({"gpus": "none"}, {"peer_access": "some"}),
        ({"gpus": "none"}, {"several_gpus": True}),
        ({"cuda_driver_below": "13.0"}, {"cuda_driver_at_least": "13"}),
        ({"nccl_below": "2.9"}, {"nccl_at_least": "2.10", "nccl_below": "3"}),
    ],
)
def test_blocks_that_never_hold_together_may_differ(first, second):
    for one, other in ((first, second), (second, first)):
        assert profiles.from_dict(two_blocks(one, other), "box.toml")


@pytest.mark.parametrize(
    "condition",
    [
        {"several_gpus": False, "peer_access": "none", "nvlink": "none"},
        {"several_gpus": False, "nvlink": "none", "fabric": True},
        {"peer_access": "all", "peer_level": "PIX"},
        {"peer_access": "some", "peer_level": "LOC"},
        {"peer_access": "some", "peer_level": "PHB"},
        {"peer_access": "none", "peer_level": "LOC"},
        {"nvlink": "some", "fabric": True},
    ],
)
def test_combinations_that_can_be(condition):
    assert profiles.from_dict(changed(["conditional", 0, "when"], condition), "box.toml")


@pytest.mark.parametrize("data", [None, 3, "text", [], [VALID]])
def test_what_is_no_table_is_refused(data):
    with pytest.raises(EpConfigError, match=r"box\.toml: "):
        profiles.from_dict(data, "box.toml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'name = "a\n', "line 1"),
        (b"\xff\xfe", "not valid TOML"),
        (b"x = " + b"[" * 100_000, "box.toml"),
        (b"x = " + b"9" * 5000, "box.toml"),
        (b"x = 2020-13-40", "box.toml"),
        (b"", "missing required field"),
    ],
)
def test_broken_files(content, message):
    with pytest.raises(EpConfigError, match=message):
        profiles.loads(content, "box.toml")


def test_shipped_profiles_are_valid_and_complete():
    known = profiles.shipped()
    assert [profile.name for profile in known] == [
        "cpu",
        "nvl72",
        "nvswitch",
        "nvlink_pairs",
        "pcie_rdma",
        "pcie_p2p",
        "pcie_partial",
        "pcie_blackwell",
    ]
    orders = [profile.recognition.order for profile in known if profile.recognition]
    assert len(set(orders)) == len(orders) == len(known), "each is recognised, at its own place in the order"
    for file, content in profiles.shipped_files():
        assert file == f"{profiles.loads(content, file).name}.toml"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("cpu", "cpu"),
        ("nvl72", "nvl72"),
        ("mnnvl", "nvl72"),
        ("nvswitch", "nvswitch"),
        ("dgx", "nvswitch"),
        ("hgx", "nvswitch"),
        ("nvlink_pairs", "nvlink_pairs"),
        ("pcie_rdma", "pcie_rdma"),
        ("pcie_p2p", "pcie_p2p"),
        ("pcie_partial", "pcie_partial"),
        ("pcie_blackwell", "pcie_blackwell"),
        ("pcie_no_p2p", "pcie_blackwell"),
        ("workstation_blackwell", "pcie_blackwell"),
    ],
)
def test_aliases(name, found):
    assert profiles.find(name, profiles.shipped()).name == found
    assert profiles.load(name)[1:] == (found, True)


def test_unknown_name():
    with pytest.raises(EpConfigError, match="no hardware profile 'nvswich'; did you mean 'nvswitch'"):
        profiles.load("nvswich")
    with pytest.raises(EpConfigError, match=r"'bogus' \(known: auto, cpu, dgx, "):
        profiles.load("bogus")
    with pytest.raises(EpConfigError, match="'atuo'; did you mean 'auto'"):
        profiles.load("atuo")
    with pytest.raises(EpConfigError, match=r"'bogus' \(known: cpu, "):
        profiles.find("bogus", profiles.shipped())


def test_load_auto():
    assert (
        profiles.load("auto")
        == profiles.load(" ")
        == (
            profiles.shipped(),
            "auto",
            False,
        )
    )


OWN = """
name = "{name}"
aliases = [{aliases}]
description = "Mine."
[transport]
inside = ["collective"]
across = ["collective"]
source = "me"
"""


def test_a_users_file_is_added(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(OWN.format(name="mine", aliases=""))
    known, name, forced = profiles.load(str(file))
    assert (name, forced) == ("mine", True)
    assert len(known) == len(profiles.shipped()) + 1


def test_a_users_file_that_says_how_it_is_recognised_is_not_forced(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(
        OWN.format(name="mine", aliases="")
        + '[recognition]\norder = 500\nrequire = { nvlink = "all" }\nsource = "me"\n'
    )
    known, name, forced = profiles.load(str(file))
    assert (name, forced) == ("mine", False)
    assert [profile.name for profile in known][-1] == "mine"


def test_a_users_file_replaces_a_shipped_profile(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(OWN.format(name="cpu", aliases=""))
    known, name, _ = profiles.load(str(file))
    assert profiles.find(name, known).description == "Mine."
    assert len(known) == len(profiles.shipped())


def test_a_users_file_must_not_claim_a_name_of_another(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(OWN.format(name="mine", aliases='"hgx"'))
    with pytest.raises(EpConfigError, match="both claim the name 'hgx'"):
        profiles.load(str(file))


def test_files_that_cannot_be_read(tmp_path):
    for path in ("/nonexistent/own.toml", str(tmp_path) + "/", "/dev/zero", "a\0b.toml"):
        with pytest.raises(EpConfigError):
            profiles.load(path)
    big = tmp_path / "big.toml"
    big.write_bytes(b"#" * (2 << 20))
    with pytest.raises(EpConfigError, match="larger than"):
        profiles.load(str(big))


def test_digest_follows_content_and_never_raises(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(OWN.format(name="mine", aliases=""))
    first = profiles.digest(str(file))
    assert first != profiles.digest("auto") == profiles.digest("nvswitch")
    file.write_text(OWN.format(name="mine", aliases="") + "\n")
    assert profiles.digest(str(file)) not in (first, profiles.digest("auto"))
    assert "no such file" in profiles.digest("/nonexistent/own.toml")


@pytest.mark.parametrize(
    ("low", "high"), [("12.9", "13.0"), ("2.9", "2.28"), ("2.28", "2.28.3"), ("2.28.3", "2.28.10")]
)
def test_versions_are_compared_as_numbers(low, high):
    assert profiles.version(low) < profiles.version(high)
    assert profiles.version("13") == profiles.version("13.0")


# --- nothing that TOML can express may end in anything but a Profile or an EpConfigError ---

scalars = (
    st.text(max_size=12) | st.integers() | st.floats() | st.booleans()
    | st.datetimes(timezones=st.none() | st.just(datetime.timezone.utc)) | st.dates() | st.times()
)  # fmt: skip
keys = ("NCCL_IB_SL", "when", "inside", "across", "value", "source", "why", "vllm", "sms")
words = st.sampled_from([*profiles.Profile.__struct_fields__, *profiles.Condition.__struct_fields__, *keys])
values = st.recursive(
    scalars | words,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(words | st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


def check(load, data):
    """``load`` must give a profile, or an error that names the file. Anything else escapes from here."""
    message = ""
    try:
        result = load(data, "fuzz.toml")
    except EpConfigError as error:
        message = str(error)
    assert message.startswith("fuzz.toml: ") or isinstance(result, profiles.Profile)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(words | st.text(max_size=8), values, max_size=6))
def test_fuzz_arbitrary_tables(data):
    check(profiles.from_dict, data)


def paths(data, prefix=()):
    """Every place in a nested table."""
    steps = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for step, inner in steps:
        yield (*prefix, step)
        yield from paths(inner, (*prefix, step))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(paths(VALID), key=str)), values | st.just(DELETE))
def test_fuzz_one_change_of_a_valid_profile(path, value):
    check(profiles.from_dict, changed(list(path), value))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([content for _, content in profiles.shipped_files()]), st.data())
def test_fuzz_bytes_of_shipped_files(content, data):
    at = data.draw(st.integers(0, len(content)))
    cut = data.draw(st.integers(0, 20))
    mutated = content[:at] + data.draw(st.binary(max_size=6)) + content[at + cut :]
    check(profiles.loads, mutated)


@pytest.mark.parametrize("profile", profiles.shipped(), ids=lambda profile: profile.name)
def test_the_table_in_the_documentation(profile):
    [row] = re.findall(rf"^\| `{profile.name}` (\|.*) \|$", PAGE, flags=re.MULTILINE)
    aliases, _, inside, across, sets = (re.findall("`([^`]+)`", cell) for cell in row.split("|")[1:])
    assert tuple(aliases) == profile.aliases
    for wishes, said in ((profile.transport.inside, inside), (profile.transport.across, across)):
        # The last is always collective, which the page says once; alone it is named.
        assert tuple(said) == (wishes if wishes == ("collective",) else without_last(wishes))
    blocks = [profile, *profile.conditional]
    settings = {(name, one.value) for block in blocks for name, one in block.environment.items()}
    assert {tuple(one.split("=")) for one in sets if "=" in one} <= settings
    assert {word for one in sets for word in one.split("=")} == {word for pair in settings for word in pair}


def without_last(wishes):
    return wishes[:-1] if wishes[-1] == "collective" else wishes


def test_the_example_in_the_documentation_is_valid():
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    assert profiles.loads(example.encode(), "example").names == ("my_box", "mybox")
