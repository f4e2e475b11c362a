"""``torch_mlu.core.mlu_model`` and ``torch.mlu``."""

from typing import Any

import pytest
import torch
from torch import nn

import cnmix.torch_mlu
import cnmix.torch_mlu.core.mlu_model as ct
from cnmix.torch_mlu.settings import settings

# What existing scripts call, by the study of their sources.
NAMES = [
    "init",
    "is_initialized",
    "is_available",
    "set_device",
    "current_device",
    "device_count",
    "device_of",
    "device",
    "Device",
    "get_device_properties",
    "get_device_capability",
    "get_device_name",
    "synchronize",
    "current_stream",
    "default_stream",
    "current_queue",
    "default_queue",
    "Queue",
    "Stream",
    "Event",
    "empty_cache",
    "empty_cached_memory",
    "memory_allocated",
    "memory_reserved",
    "memory_cached",
    "max_memory_allocated",
    "max_memory_reserved",
    "max_memory_cached",
    "manual_seed",
    "manual_seed_all",
    "is_mlu_tensor",
    "mlu_device",
    "enable_floating_point_calculation",
    "is_using_floating_device",
    "get_running_mode",
    "get_device",
    "to",
    "set_memory_strategy",
    "memory_debug",
    "pin_memory",
    "is_pinned",
    "_jit_override_can_fuse_on_mlu",
    "set_cnml_enabled",
    "set_core_number",
    "set_core_version",
    "set_input_format",
    "set_quantized_bitwidth",
    "save_as_cambricon",
    "stream",
    "FloatTensor",
    "LongTensor",
    "HalfTensor",
    "ByteTensor",
    "DoubleTensor",
    "IntTensor",
    "ShortTensor",
    "CharTensor",
    "BoolTensor",
    "amp",
]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_that_scripts_call_exists_in_both_places(name: str) -> None:
    assert getattr(ct, name) is getattr(torch.mlu, name)


def test_the_module_is_torch_mlu_and_documents_itself() -> None:
    assert torch.mlu is ct
    missing = [name for name in ct.__all__ if not getattr(ct, name).__doc__]
    assert not missing


class TestCards:
    def test_the_device_has_the_current_cards_number_once_a_tensor_is_there(self) -> None:
        assert ct.mlu_device() == torch.device("mlu")
        assert ct.mlu_device().index is None
        assert torch.zeros(1, device=ct.mlu_device()).device == torch.device("mlu:0")
        ct.set_device(1)
        try:
            assert torch.zeros(1, device="mlu").device.index == ct.current_device() == ct.get_device() == 1
        finally:
            ct.set_device(0)

    @pytest.mark.parametrize("device", [None, -1])
    def test_no_card_and_offline_generation_change_nothing(self, device: int | None) -> None:
        ct.set_device(device)
        assert ct.current_device() == 0
        with ct.device(device):
            assert ct.current_device() == 0

    @pytest.mark.parametrize("device", [1, "mlu:1", torch.device])
    def test_a_card_is_current_within_with(self, device: Any) -> None:
        device = device("mlu", 1) if device is torch.device else device
        with ct.device(device):
            assert ct.current_device() == 1
        with ct.device_of(torch.zeros(1, device="mlu:1")):
            assert ct.current_device() == 1
        with ct.device_of(torch.zeros(1)):
            assert ct.current_device() == 0
        assert ct.current_device() == 0

    def test_what_names_no_card_is_refused(self) -> None:
        with pytest.raises(RuntimeError, match=r"no card mlu:2: this process has 2 .*--cards"):
            ct.set_device(2)
        with pytest.raises(RuntimeError, match="no card mlu:5"):
            torch.zeros(1, device="mlu:5")
        with pytest.raises(RuntimeError, match="no card mlu:5"):
            torch.zeros(1).to("mlu:5")
        with pytest.raises(ValueError, match="expected an MLU, got cpu"):
            ct.get_device_name("cpu")
        with pytest.raises(TypeError, match=r"got 1\.5"):
            ct.get_device_name(1.5)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("name", "floating"), [("MLU220", 0), ("mlu270", 0), ("MLU290", 0), ("MLU370-X8", 1), ("MLU590", 1)]
    )
    def test_cards_have_their_properties(self, name: str, floating: int) -> None:
        cnmix.torch_mlu.install(card_name=name)
        properties = ct.get_device_properties(0)
        assert properties.name == ct.get_device_name() == name.upper()[:6]
        assert properties.total_memory == ct.mem_get_info()[1] > 0
        assert properties.cluster_count * properties.core_num_per_cluster == settings().card.cores
        assert ct.get_device_capability() == (properties.major, properties.minor)
        assert ct.is_using_floating_device() is bool(floating)
        ct.enable_floating_point_calculation(not floating)
        assert ct.is_using_floating_device() is not bool(floating)

    def test_another_card_forgets_what_was_set_for_the_one_before(self) -> None:
        ct.enable_floating_point_calculation(False)
        cnmix.torch_mlu.install(card_name="MLU370")
        assert ct.is_using_floating_device()

    def test_numbers_and_names_of_cards_are_checked(self) -> None:
        with pytest.raises(ValueError, match=r"no card 'MLU100': take one of MLU220"):
            cnmix.torch_mlu.install(card_name="MLU100")
        with pytest.raises(ValueError, match="0 to 64 emulated cards, not 65"):
            cnmix.torch_mlu.install(cards=65)

    def test_without_cards_none_is_available(self) -> None:
        cnmix.torch_mlu.install(cards=0)
        assert not ct.is_available()
        assert not torch.is_mlu_available()
        assert ct.device_count() == 0


class TestQueues:
    def test_queues_are_numbered_and_entered(self) -> None:
        assert ct.current_queue() == ct.default_queue() == ct.current_stream()
        queue = ct.Queue()
        assert queue != ct.default_queue()
        assert queue.device == torch.device("mlu:0")
        with ct.stream(queue):
            assert ct.current_queue() == queue
        with queue, ct.stream(None):
            assert ct.current_stream() == queue
        assert ct.current_queue().queue == 0
        queue.synchronize()
        ct.current_queue(1).synchronize()
        ct.synchronize()
        assert ct.current_queue(1).device.index == 1
        assert queue.query()

    def test_a_queue_made_current_stays(self) -> None:
        queue = ct.Queue("mlu:0")
        ct.set_stream(queue)
        assert ct.current_queue() == queue
        ct.set_stream(ct.default_queue())

    def test_events_tell_milliseconds_and_microseconds(self) -> None:
        from torch_mlu.core.device.notifier import Notifier

        queue = ct.Queue()
        begin, end = torch.mlu.Event(enable_timing=True), ct.Event()
        begin.record(queue)
        end.place()
        queue.wait_event(begin)
        queue.wait_stream(ct.current_queue())
        assert queue.record_event().query()
        end.synchronize()
        end.wait()
        assert begin.hardware_time(end) == pytest.approx(1000 * begin.elapsed_time(end))
        assert 0 <= begin.elapsed_time(end) < 60_000
        with pytest.raises(RuntimeError, match=r"before place\(\) was called"):
            Notifier().elapsed_time(end)


class TestMemory:
    def test_what_tensors_take_is_counted_for_their_card(self) -> None:
        before = ct.memory_allocated(), ct.memory_allocated(1)
        ct.reset_peak_memory_stats()
        x = torch.zeros(1024, device="mlu:0")
        assert ct.memory_allocated() == ct.memory_reserved("mlu:0") == before[0] + 4096
        y = x + 1
        assert ct.max_memory_allocated() == ct.max_memory_cached() == before[0] + 8192
        del x, y
        assert ct.memory_allocated() == before[0]
        assert ct.max_memory_allocated() == before[0] + 8192
        assert ct.memory_stats()["allocated_bytes.all.peak"] == before[0] + 8192
        assert ct.memory_allocated(1) == before[1]
        assert "MLU370, emulated" in ct.memory_summary()
        ct.empty_cache()
        ct.empty_cached_memory()
        ct.set_memory_strategy(True)
        ct.memory_debug()

    def test_pinned_memory_is_the_hosts(self) -> None:
        x = torch.arange(4.0)
        pinned = ct.pin_memory(x)
        assert ct.is_pinned(pinned)
        assert not ct.is_pinned(x)
        assert torch.equal(pinned, x)
        assert pinned.device.type == "cpu"


def test_the_cards_draw_what_the_host_draws() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    ct.manual_seed(3)
    assert torch.equal(torch.rand(4, device="mlu").cpu(), expected)
    torch.mlu.manual_seed_all(3)
    state = ct.get_rng_state()
    first = torch.rand(2, device="mlu")
    ct.set_rng_state(state)
    assert torch.equal(first, torch.rand(2, device="mlu"))
    assert ct.initial_seed() == 3
    own = torch.Generator("mlu").manual_seed(3)
    assert torch.equal(torch.rand(4, device="mlu", generator=own).cpu(), expected)


@pytest.mark.parametrize("foreach", [False, True])
def test_an_optimizer_moves_with_its_state(foreach: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    optimizer = torch.optim.Adam(model.parameters(), foreach=foreach)
    model(x).sum().backward()
    optimizer.step()
    model.to(ct.mlu_device())
    assert ct.to(optimizer, torch.device("mlu")) is optimizer
    assert all(value.is_mlu for state in optimizer.state.values() for value in state.values())
    optimizer.zero_grad()
    model(x.mlu()).sum().backward()
    optimizer.step()
    ct.to(optimizer, "cpu")
    assert not any(value.is_mlu for state in optimizer.state.values() for value in state.values())


class TestTypedTensors:
    def test_they_make_tensors_on_the_card(self) -> None:
        made = torch.mlu.FloatTensor([1, 2])
        assert made.type() == "torch.mlu.FloatTensor"
        assert made.is_mlu
        assert isinstance(made, torch.mlu.FloatTensor)
        assert not isinstance(made, torch.mlu.HalfTensor)
        assert not isinstance(made.cpu(), torch.mlu.FloatTensor)
        assert torch.mlu.LongTensor(2, 3).shape == (2, 3)

    def test_they_convert(self) -> None:
        x = torch.randn(3)
        for wanted in (torch.mlu.HalfTensor, "torch.mlu.HalfTensor"):
            assert x.type(wanted).type() == "torch.mlu.HalfTensor"  # type: ignore[arg-type]


class TestOldNames:
    def test_they_are_remembered(self) -> None:
        import torch_mlu

        ct.set_cnml_enabled(False)
        assert ct.get_running_mode() == "CNNL"
        ct.set_cnml_enabled(True)
        assert ct.get_running_mode() == "CNML"
        ct.set_core_number(4)
        ct.set_core_version("MLU270")
        ct.set_input_format(0)
        ct.set_quantized_bitwidth(16)
        ct.save_as_cambricon("yolov3")
        found = settings()
        assert (found.core_number, found.core_version, found.product_bits, found.offline_model) == (
            4,
            "MLU270",
            16,
            "yolov3",
        )
        ct.set_core_version("MLU290")
        ct.set_core_number(64)
        torch_mlu._MLUC._set_quantized_bitwidth(31)
        assert settings().product_bits == 31
        ct.save_as_cambricon("")
        ct._jit_override_can_fuse_on_mlu(False)

    def test_what_makes_no_sense_is_refused(self) -> None:
        ct.set_core_version("MLU370")
        with pytest.raises(ValueError, match="32 cores to take, not 33"):
            ct.set_core_number(33)
        with pytest.raises(ValueError, match="no card 'MLU100'"):
            ct.set_core_version("MLU100")
        with pytest.raises(ValueError, match="not 7"):
            ct.set_input_format(7)
        with pytest.raises(ValueError, match="not 4"):
            ct.set_quantized_bitwidth(4)


def test_fusion_of_gates_is_switched_for_the_converted_layers() -> None:
    fusion = torch.backends.mlufusion  # type: ignore[attr-defined]
    layer = nn.Sequential(nn.LSTM(4, 3))
    cnmix.initialize(layer, None, opt_level="O1")
    assert fusion.enabled
    assert layer[0].fused
    with fusion.flags(False):
        assert not fusion.enabled
        assert not layer[0].fused
    assert fusion.set_flags(False) == (True,)
    assert not layer[0].fused
    fusion.enabled = True
    assert layer[0].fused


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_products_are_lowered_and_losses_are_not(self, dtype: torch.dtype) -> None:
        model, x = nn.Linear(3, 2).mlu(), torch.randn(4, 3, device="mlu")
        with torch.autocast("mlu", dtype=dtype):
            y = model(x)
            assert y.dtype == dtype
            assert torch.softmax(y, -1).dtype == torch.float32
        with torch.mlu.amp.autocast(dtype=dtype):
            assert model(x).dtype == dtype

    def test_gradients_are_scaled(self) -> None:
        model, x = nn.Linear(3, 2).mlu(), torch.randn(4, 3, device="mlu")
        optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.mlu.amp.GradScaler(init_scale=8.0)
        before = model.weight.detach().clone()
        with torch.mlu.amp.autocast():
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 8
        assert not torch.equal(before, model.weight)
        model.weight.grad.fill_(float("inf"))  # type: ignore[union-attr]
        scaler.scale(model(x).mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 4


def test_pytorchs_own_names_know_the_card(capfd: pytest.CaptureFixture[str]) -> None:
    from torch.mlu.amp import GradScaler, autocast

    assert (GradScaler, autocast) == (torch.mlu.amp.GradScaler, torch.mlu.amp.autocast)
    for kwargs in ({"use_mlu": True}, {"use_device": "mlu"}):
        with torch.autograd.profiler.profile(**kwargs) as profiled:
            torch.ones(2, device="mlu") + 1
        assert any(each.key == "aten::add" for each in profiled.key_averages())
        assert "aten::add" in profiled.key_averages().table()
    assert "Exception" not in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore:.*set_default_tensor_type")
@pytest.mark.parametrize("by_name", [True, False])
def test_the_default_tensor_type(by_name: bool) -> None:
    try:
        torch.set_default_tensor_type("torch.mlu.HalfTensor" if by_name else torch.mlu.HalfTensor)
        assert (str(torch.zeros(1).device), torch.zeros(1).dtype) == ("mlu:0", torch.float16)
    finally:
        torch.set_default_tensor_type("torch.FloatTensor" if by_name else torch.FloatTensor)
    assert (str(torch.zeros(1).device), torch.zeros(1).dtype) == ("cpu", torch.float32)
