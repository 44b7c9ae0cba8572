"""What the plug-in does to vLLM, checked without an engine. Run by test_seam.py, once per version of vLLM's
sources.

vLLM's compiled modules may be missing. The file's name keeps it out of a plain collection: its cases change
vLLM for the whole process, and the first of them must see it unchanged.
"""

import importlib
import inspect
import pkgutil
import socket
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import get_args

import ep_backend_vllm
import pytest
import torch
import torch.distributed as dist
from ep_backend_vllm import NAME, seam
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.parallel import ParallelConfig
from vllm.platforms import current_platform

CPU = torch.device("cpu")
STOCK_NAMES = get_args(ParallelConfig.__dataclass_fields__["all2all_backend"].type)
STOCK_COMMUNICATOR = current_platform.get_device_communicator_cls()
PARALLEL = {"enable_expert_parallel": True, "tensor_parallel_size": 2, "data_parallel_size": 2}
SEQUENCE_PARALLEL = {
    name: ParallelConfig(all2all_backend=name, **PARALLEL).use_sequence_parallel_moe for name in STOCK_NAMES
}


@pytest.fixture(scope="module", autouse=True)
def _registered():
    assert NAME not in STOCK_NAMES
    before = set(sys.modules)
    ep_backend_vllm.register()
    ep_backend_vllm.register()
    loaded = {name for name in set(sys.modules) - before if name.startswith("vllm.")}
    assert not [name for name in loaded if "fused_moe" in name or "device_communicators" in name]
    assert "ep_backend" not in sys.modules, "registration must not load the library"


@pytest.fixture(scope="module")
def config():
    return VllmConfig(parallel_config=ParallelConfig(all2all_backend=NAME, **PARALLEL))


@pytest.fixture
def group(config):
    """vLLM's groups in one process, under a configuration that selects ep_backend."""
    from vllm.distributed import parallel_state

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    alone = VllmConfig()
    with set_current_vllm_config(alone):
        parallel_state.init_distributed_environment(
            world_size=1, rank=0, local_rank=0, distributed_init_method=address, backend="gloo"
        )
        parallel_state.initialize_model_parallel(1)
    with set_current_vllm_config(config):
        yield dist.group.WORLD
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def _use_all2all():
    """Later versions are told; earlier ones look into the configuration."""
    from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase

    return (
        {"use_all2all": True} if "use_all2all" in inspect.signature(DeviceCommunicatorBase).parameters else {}
    )


def test_name_is_accepted_by_the_configuration():
    assert ParallelConfig(all2all_backend=NAME).all2all_backend == NAME


def test_wrong_names_stay_rejected():
    with pytest.raises(ValueError, match="ep_backend"):
        ParallelConfig(all2all_backend="ep_backened")


def test_command_line_accepts_and_lists_the_name(capsys):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    assert parser.parse_args(["--all2all-backend", NAME]).all2all_backend == NAME
    with pytest.raises(SystemExit):
        parser.parse_args(["--all2all-backend", "ep_backened"])
    assert NAME in capsys.readouterr().err


@pytest.mark.parametrize("name", STOCK_NAMES)
def test_other_backends_see_no_change(name):
    parallel = ParallelConfig(all2all_backend=name, **PARALLEL)
    assert parallel.use_sequence_parallel_moe == SEQUENCE_PARALLEL[name]
    with set_current_vllm_config(VllmConfig()):
        assert current_platform.get_device_communicator_cls() == STOCK_COMMUNICATOR
    assert current_platform.get_device_communicator_cls() == STOCK_COMMUNICATOR


def test_sequence_parallel_moe_follows_tensor_and_data_parallel():
    assert ParallelConfig(all2all_backend=NAME, **PARALLEL).use_sequence_parallel_moe
    for lacking in (
        {"data_parallel_size": 1},
        {"tensor_parallel_size": 1},
        {"enable_expert_parallel": False},
    ):
        assert not ParallelConfig(all2all_backend=NAME, **{**PARALLEL, **lacking}).use_sequence_parallel_moe


def test_registration_never_raises(monkeypatch, caplog):
    def broken():
        raise RuntimeError("this vLLM is different")

    monkeypatch.setattr(seam, "open_seam", broken)
    ep_backend_vllm.register()
    assert "not available" in caplog.text


def test_unsupported_options_are_refused_with_a_sentence():
    parallel = ParallelConfig(all2all_backend=NAME, enable_dbo=True, **PARALLEL)
    with pytest.raises(ValueError, match="use --enable-dbo without"):
        VllmConfig(parallel_config=parallel)


def test_platform_s_communicator_is_wrapped_when_selected(config):
    from vllm.utils.import_utils import resolve_obj_by_qualname

    with set_current_vllm_config(config):
        name = current_platform.get_device_communicator_cls()
    wrapped = resolve_obj_by_qualname(name)
    assert wrapped is resolve_obj_by_qualname(name)
    assert issubclass(wrapped, resolve_obj_by_qualname(STOCK_COMMUNICATOR))


def test_overlapping_halves_get_metadata_of_their_own(monkeypatch):
    from vllm.v1.attention.backend import AttentionMetadataBuilder
    from vllm.v1.worker import utils

    class Builder:
        supports_update_block_table = True
        requires_block_table_width = False

        def __init__(self, *_):
            pass

    # What vLLM asks before it gives a half what another has built.
    assert "builder.supports_update_block_table" in _source_of("v1/worker/gpu_model_runner.py")
    assert not AttentionMetadataBuilder.supports_update_block_table
    create = utils.AttentionGroup.create_metadata_builders
    monkeypatch.setattr(utils.AttentionGroup, "create_metadata_builders", create)

    def take_over(backend, ubatching=True):
        """Whether the builders of a worker's attention group may take over what another has built."""
        parallel = SimpleNamespace(all2all_backend=backend, use_ubatching=ubatching)
        engine = SimpleNamespace(parallel_config=parallel)
        monkeypatch.setattr("vllm.config.get_current_vllm_config_or_none", lambda: engine)
        current_platform.get_device_communicator_cls()
        made = SimpleNamespace(get_builder_cls=lambda: Builder)
        group = utils.AttentionGroup(made, ["layer"], None, 0)
        group.create_metadata_builders(engine, CPU, num_metadata_builders=2)
        (answer,) = {builder.supports_update_block_table for builder in group.metadata_builders}
        return answer

    stand_in = ModuleType("ep_backend.compat.deep_ep")
    monkeypatch.setitem(sys.modules, "ep_backend.compat.deep_ep", stand_in)
    monkeypatch.setitem(sys.modules, "deep_ep", ModuleType("deep_ep"))  # DeepEP itself
    assert take_over("deepep_low_latency")
    assert take_over(NAME, ubatching=False)
    assert utils.AttentionGroup.create_metadata_builders is create
    monkeypatch.setitem(sys.modules, "deep_ep", stand_in)
    assert take_over("allgather_reducescatter")
    assert not take_over("deepep_low_latency")
    assert not take_over(NAME)
    assert take_over(NAME, ubatching=False)
    assert take_over("allgather_reducescatter")


def _source_of(file):
    import vllm

    return (Path(vllm.__file__).parent / file).read_text()


def test_manager_is_replaced_in_the_cpu_communicator(config, group):
    from ep_backend_vllm.manager import EpManager
    from vllm.utils.import_utils import resolve_obj_by_qualname

    communicator = resolve_obj_by_qualname(current_platform.get_device_communicator_cls())
    made = communicator(cpu_group=group, device=CPU, device_group=group, unique_name="ep:0", **_use_all2all())
    assert type(made.all2all_manager) is EpManager
    assert made.use_all2all
    with pytest.raises(ValueError, match="route by themselves"):
        made.all2all_manager.dispatch_router_logits(torch.zeros(1, 8), torch.zeros(1, 4))
    assert made.all2all_manager.scheduler_limit == config.scheduler_config.max_num_batched_tokens
    other = communicator(
        cpu_group=group, device=CPU, device_group=group, unique_name="dp:0", **_use_all2all()
    )
    assert other.all2all_manager is None


def test_cuda_graphs_need_a_transport_that_they_can_capture(group):
    from ep_backend_vllm.manager import EpManager

    manager = EpManager(group, device=CPU)
    fields = {"num_experts": 2, "top_k": 1, "hidden_size": 8, "max_tokens_per_rank": 1}
    manager.communicators.captures = True
    with pytest.raises(
        ValueError, match=r"cannot capture transport cpu: add --enforce-eager, or use .* Profile"
    ):
        manager.get_handle(fields)
    manager.communicators.captures = False
    assert manager.get_handle(fields).transport == "cpu"
    manager.destroy()


def test_a_base_that_rejects_unknown_names_never_sees_ours(group):
    """The CUDA communicator raises on names that it does not know."""
    from ep_backend_vllm import communicator
    from ep_backend_vllm.manager import EpManager
    from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase

    class Strict(DeviceCommunicatorBase):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if self.use_all2all:
                raise ValueError(f"Unknown all2all backend: {self.all2all_backend}")

    module = sys.modules[__name__]
    module.Strict = Strict
    derived = communicator._subclass(f"{__name__}.Strict")
    made = derived(group, CPU, group, "ep:0", **_use_all2all())
    assert type(made.all2all_manager) is EpManager
    with pytest.raises(ValueError, match="Unknown"):
        Strict(group, CPU, group, "ep:0", **_use_all2all())


def _import_fused_moe_modules():
    import vllm.model_executor.layers.fused_moe.oracle as oracle

    for module in pkgutil.iter_modules(oracle.__path__, oracle.__name__ + "."):
        importlib.import_module(module.name)


def test_prepare_finalize_is_replaced_wherever_it_was_imported(config, group):
    _import_fused_moe_modules()
    import vllm.model_executor.layers.fused_moe.all2all_utils as utils
    from ep_backend_vllm.install import install

    before = seam.marked(utils.maybe_make_prepare_finalize)
    install(config)
    install(config)
    holders = [
        module
        for module in list(sys.modules.values())
        if "maybe_make_prepare_finalize" in getattr(module, "__dict__", {})
        and module.__name__.startswith("vllm.")
    ]
    assert len(holders) > 5
    assert before or all(seam.marked(module.maybe_make_prepare_finalize) for module in holders)
    assert not seam.marked(utils.maybe_make_prepare_finalize.__wrapped__)


def test_prepare_finalize_is_ours_only_for_our_name(config, group):
    import vllm.model_executor.layers.fused_moe.all2all_utils as utils
    from ep_backend_vllm.install import install
    from ep_backend_vllm.prepare_finalize import EpPrepareAndFinalize

    install(config)
    asked = {}

    def get_handle(kwargs):
        asked.update(kwargs)
        return SimpleNamespace(world_size=2)

    manager = SimpleNamespace(
        device=torch.device("cpu"),
        rank=0,
        world_size=2,
        scheduler_limit=101,
        num_channels=1,
        get_handle=get_handle,
    )

    def layer(name, **parallel):
        parallel = {"all2all_backend": name, "use_all2all_kernels": True, "sp_size": 2, **parallel}
        parallel["use_passthrough_all2all"] = False
        return SimpleNamespace(
            moe_parallel_config=SimpleNamespace(**parallel),
            num_experts=8,
            experts_per_token=2,
            hidden_dim=64,
            in_dtype=torch.bfloat16,
            max_num_tokens=8,
        )

    make = utils.maybe_make_prepare_finalize
    made = make(layer(NAME), None, allow_new_interface=True, all2all_manager=manager)
    assert type(made) is EpPrepareAndFinalize
    assert made.num_dispatchers() == 2
    made.post_init_setup(SimpleNamespace(quant_config=None, expects_unquantized_inputs=False))
    assert asked["max_tokens_per_rank"] == 51, "a TP rank brings its share of the tokens"
    with pytest.raises(ValueError, match="--moe-backend"):
        make(layer(NAME), None, allow_new_interface=True, use_monolithic=True, all2all_manager=manager)

    asked.clear()
    assert make(layer(NAME, use_all2all_kernels=False), None) is None, "vLLM's answer for no exchange"
    with pytest.raises((AssertionError, AttributeError)):  # vLLM's own function, which wants a real engine
        make(layer("naive"), None)
    assert asked == {}


def test_our_prepare_finalize_has_vllm_s_interface():
    import vllm.model_executor.layers.fused_moe.modular_kernel as mk
    from ep_backend_vllm.prepare_finalize import EpPrepareAndFinalize

    assert not inspect.isabstract(EpPrepareAndFinalize)
    for method in ("prepare", "prepare_async", "finalize", "finalize_async"):
        base = getattr(mk.FusedMoEPrepareAndFinalizeModular, method)
        ours = getattr(EpPrepareAndFinalize, method)
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(base).parameters)


def test_layers_are_opaque_to_the_compiler_on_cpu(config, group):
    from ep_backend_vllm.install import install
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    install(config)

    def chosen(name, shared):
        parallel = SimpleNamespace(all2all_backend=name)
        moe = SimpleNamespace(moe_parallel_config=parallel)
        return MoERunner._select_forward(SimpleNamespace(moe_config=moe, _shared_experts=shared))

    assert chosen(NAME, None) is torch.ops.vllm.moe_forward
    assert chosen(NAME, object()) is torch.ops.vllm.moe_forward_shared
    assert chosen("naive", None) is not torch.ops.vllm.moe_forward


def test_deadline_becomes_short_when_the_worker_is_ready(monkeypatch, config, group):
    from ep_backend_vllm import install as installation
    from ep_backend_vllm.manager import EpManager

    class Worker:
        def compile_or_warm_up_model(self):
            return "warm"

    installation._watch_for_ready(Worker)
    installation._watch_for_ready(Worker)
    ready = []
    manager = SimpleNamespace(engine_is_ready=lambda: ready.append(True))
    monkeypatch.setattr(EpManager, "living", staticmethod(lambda: [manager]))
    assert Worker().compile_or_warm_up_model() == "warm"
    assert ready == [True]


def test_a_failed_exchange_is_raised_before_a_step_s_tokens_leave(monkeypatch, config, group):
    from ep_backend_vllm import install as installation
    from ep_backend_vllm.manager import EpManager

    class Worker:
        def execute_model(self, result):
            return result

        def sample_tokens(self, result):
            return result

    monkeypatch.setattr(installation.current_platform, "is_cpu", lambda: False)
    installation._check_after_steps(Worker)
    installation._check_after_steps(Worker)
    failures = []

    def check():
        if failures:
            raise RuntimeError(failures[0])

    monkeypatch.setattr(EpManager, "living", staticmethod(lambda: [SimpleNamespace(check=check)]))
    for step in (Worker().execute_model, Worker().sample_tokens):
        failures.clear()
        assert step("tokens") == "tokens"
        later = step(SimpleNamespace(get_output=lambda: "later tokens"))
        assert later.get_output() == "later tokens"
        failures.append("rank 1 stopped")
        assert step(None) is None, "nothing leaves yet"
        with pytest.raises(RuntimeError, match="rank 1 stopped"):
            step("tokens")
        with pytest.raises(RuntimeError, match="rank 1 stopped"):
            later.get_output()


def test_workers_have_the_steps_that_are_checked():
    import ast
    import importlib.util

    source = Path(importlib.util.find_spec("vllm.v1.worker.gpu_worker").origin).read_text()
    (worker,) = (
        node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Worker"
    )
    methods = {node.name for node in worker.body if isinstance(node, ast.FunctionDef)}
    assert {"execute_model", "sample_tokens", "compile_or_warm_up_model"} <= methods


def test_two_batch_overlap_passes_vllm_s_list_of_names():
    parallel = ParallelConfig(all2all_backend=NAME, enable_dbo=True, **PARALLEL)
    with seam._known_to_overlap(parallel):
        assert parallel.all2all_backend in STOCK_NAMES
    assert parallel.all2all_backend == NAME
    parallel.enable_dbo = False
    with seam._known_to_overlap(parallel):
        assert parallel.all2all_backend == NAME


def test_tokens_of_a_step_are_the_maximum_over_ranks(config):
    from ep_backend_vllm.step import tokens_per_rank
    from vllm.forward_context import DPMetadata, override_forward_context

    assert tokens_per_rank(512) == 512, "outside a step every rank takes the maximum"
    metadata = DPMetadata(torch.tensor([3, 7], dtype=torch.int32))
    with override_forward_context(SimpleNamespace(dp_metadata=metadata)):
        assert tokens_per_rank(512) == 7
        with metadata.sp_local_sizes(2):
            assert tokens_per_rank(512) == 4, "shares of 7 tokens over 2 TP ranks are 4 and 3"
    with override_forward_context(SimpleNamespace(dp_metadata=None)):
        assert tokens_per_rank(512) == 512
