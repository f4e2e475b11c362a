"""Training with cnmix on the card: the same bits as the same run on the host."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import cnmix
from cnmix.adaptive import OperandQuantizer
from cnmix.nn import quantizer_sets


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Pieces(nn.Module):
    """A model that calls functions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 24)
        self.table = nn.Parameter(random(8, 6, seed=5))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.first(x).chunk(3, -1)
        y = F.scaled_dot_product_attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), is_causal=True).squeeze(1)
        scores = torch.einsum("bik,bjk->bij", y, k)
        return torch.softmax(scores, -1) @ y @ self.table


class Networks(nn.Module):
    """A recurrent network over rows of several lengths."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.network = kind(6, 8, **options)

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, torch.tensor([5, 4, 2]), enforce_sorted=False)
        return self.network(packed)[0].data + self.network(x)[1][0].mean()


class Steps(nn.Module):
    """A loop over a cell."""

    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.cell = kind(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        for step in x:
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=True)[0]


class Twice(nn.Module):
    """Two inputs from one."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x, x.flip(-1))


FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 3)), (4, 8)),
    "linear in three dimensions": (lambda: nn.Linear(8, 3, bias=False), (2, 4, 8)),
    "bilinear": (Twice, (4, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding="valid"), (2, 4, 9)),
    "conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3)
        ),
        (2, 3, 8, 8),
    ),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="circular"), (2, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3), (1, 2, 5, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), (2, 4, 5, 5)),
    "unbatched": (lambda: nn.Conv2d(3, 8, 3), (3, 8, 8)),
    "lstm": (lambda: Networks(nn.LSTM, num_layers=2, bidirectional=True, dropout=0.2), (5, 3, 6)),
    "lstm with projections": (lambda: Networks(nn.LSTM, proj_size=4), (5, 3, 6)),
    "gru": (lambda: Networks(nn.GRU, bidirectional=True), (5, 3, 6)),
    "rnn": (lambda: Networks(nn.RNN, nonlinearity="relu"), (5, 3, 6)),
    "lstm cell": (lambda: Steps(nn.LSTMCell), (4, 3, 6)),
    "gru cell": (lambda: Steps(nn.GRUCell), (4, 3, 6)),
    "functions": (Pieces, (2, 5, 8)),
    "multi-head attention": (lambda: SelfAttention(8, 2, dropout=0.1, batch_first=True), (2, 5, 8)),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), (2, 5, 8)),
}
# Of float networks PyTorch computes the cells of a device otherwise than those of the host, which rounds differently.
FLOAT_DIFFERS = {"lstm", "lstm with projections", "gru", "rnn", "lstm cell", "gru cell"}

Run = tuple[list[Any], dict[str, Tensor], dict[str, Any]]


def train(
    device: str,
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    steps: int = 4,
    optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
    forward: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x),
    **options: Any,
) -> Run:
    """Trains a model; returns losses and norms of gradients, its weights, and what cnmix knows."""
    torch.manual_seed(0)
    model = make().to(device)
    optimizer: Any = optimizer_class(model.parameters(), lr=0.01)
    model, optimizer = cnmix.initialize(model, optimizer, **options)
    seen: list[Any] = []
    for step in range(steps):
        x = random(*shape, seed=step).to(device).requires_grad_()
        y = forward(model, x)
        assert y.device.type == device
        loss = y.float().square().mean()
        optimizer.zero_grad()
        with cnmix.scale_loss(loss, optimizer) as scaled:
            scaled.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert x.grad is not None
        seen += [loss.item(), norm.item(), x.grad.cpu()]
    for _, parameter in model.named_parameters():
        assert parameter.device.type == device
        assert parameter.grad is None or parameter.grad.device.type == device
    for state in optimizer.state.values():
        assert state["exp_avg"].device.type == device if "exp_avg" in state else True
    return seen, {name: value.cpu() for name, value in model.state_dict().items()}, _newest(cnmix.state_dict())


def _newest(state: dict[str, Any]) -> dict[str, Any]:
    """Leaves out models of earlier runs that are not collected yet."""
    return {**state, "models": state["models"][-1], "loss_scalers": state["loss_scalers"][-1]}


def assert_same(a: Run, b: Run) -> None:
    for mine, other in zip(a[0], b[0], strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)  # float16 overflows
    assert all(torch.equal(a[1][name], b[1][name]) for name in a[1])
    assert a[2] == b[2]


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_to_the_hosts_bits(family: str, level: str) -> None:
    make, shape = FAMILIES[family]
    if level == "O0" and family in FLOAT_DIFFERS:
        on_card, on_host = (train(device, make, shape, opt_level=level) for device in ("mlu", "cpu"))
        assert on_card[0][::3] == pytest.approx(on_host[0][::3], rel=1e-4)
        return
    assert_same(*(train(device, make, shape, opt_level=level) for device in ("mlu", "cpu")))


@pytest.mark.parametrize("family", ["conv2d", "lstm", "functions"])
def test_float16_with_a_loss_scale(family: str) -> None:
    options = {"opt_level": "O2", "activation_dtype": "float16", "loss_scale": "dynamic"}
    assert_same(*(train(device, *FAMILIES[family], **options) for device in ("mlu", "cpu")))


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("family", ["conv2d", "lstm", "functions"])
def test_the_model_may_move_after_it_was_initialized(family: str, level: str) -> None:
    make, shape = FAMILIES[family]
    found = []
    for first in ("device", "cnmix"):
        torch.manual_seed(0)
        model = make()
        if first == "device":
            model.to("mlu")
        cnmix.initialize(model, None, opt_level=level)
        model.to("mlu")
        torch.manual_seed(1)
        for step in range(3):
            model(random(*shape, seed=step).to("mlu")).sum().backward()
        found.append([parameter.grad.cpu() for parameter in model.parameters()])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("family", ["linear", "conv2d", "lstm", "functions"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(family: str, reentrant: bool) -> None:
    def repeated(model: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=reentrant)

    runs = [train(device, *FAMILIES[family], forward=repeated) for device in ("mlu", "cpu")]
    assert_same(*runs)


@pytest.mark.parametrize("rounding", ["stochastic", "half_away"])
def test_other_roundings(rounding: str) -> None:
    assert_same(*(train(device, *FAMILIES["conv2d"], rounding=rounding) for device in ("mlu", "cpu")))


def test_an_overflow_skips_the_step() -> None:
    found = []
    for device in ("mlu", "cpu"):
        torch.manual_seed(0)
        model = nn.Linear(4, 2).to(device)
        model, optimizer = cnmix.initialize(
            model, torch.optim.SGD(model.parameters(), lr=0.1), opt_level="O2", loss_scale="dynamic"
        )
        before = copy.deepcopy(model.state_dict())
        with cnmix.scale_loss(model(random(3, 4).to(device)).sum() * torch.inf, optimizer) as scaled:
            scaled.backward()
        optimizer.step()
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        found.append(cnmix.state_dict()["loss_scalers"][-1])
    assert found[0] == found[1]


def test_products_that_share_an_input_quantize_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            return torch.stack([part(x) for part in self.parts]).sum(0)

    quantized: list[OperandQuantizer] = []
    original = OperandQuantizer.__call__

    def counted(quantizer: OperandQuantizer, *args: Any, **options: Any) -> Any:
        quantized.append(quantizer)
        return original(quantizer, *args, **options)

    model = Shared().to("mlu")
    cnmix.initialize(model, None, opt_level="O3")
    inputs = {id(quantizers.input) for _, quantizers in quantizer_sets(model)}
    model(random(4, 8).to("mlu").requires_grad_()).sum().backward()
    model.eval()
    monkeypatch.setattr(OperandQuantizer, "__call__", counted)
    model(random(4, 8, seed=1).to("mlu").requires_grad_())
    assert sum(id(each) in inputs for each in quantized) == 1


def test_weights_written_behind_torchs_back_are_seen() -> None:
    model = nn.Linear(4, 2, bias=False).to("mlu")
    cnmix.initialize(model, None, opt_level="O3")
    model.eval()
    x = random(3, 4).to("mlu")
    first = model(x)
    model.weight.data.mul_(2)
    assert torch.equal(model(x), first * 2)
    with torch.no_grad():
        model.weight.zero_()
    assert not model(x).any()


@pytest.mark.parametrize("where", ["input", "weight"])
def test_host_and_card_do_not_mix(where: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    cnmix.initialize(model, None, opt_level="O1")
    x = random(3, 4)
    if where == "weight":
        model[1].to("mlu")
    else:
        x = x.to("mlu")
    with pytest.raises(RuntimeError, match=f"'{int(where == 'weight')}' got tensors on cpu and mlu:0"):
        model(x)


def test_two_cards_do_not_mix() -> None:
    model = nn.Linear(4, 4).to("mlu:0")
    cnmix.initialize(model, None, opt_level="O1")
    with pytest.raises(RuntimeError, match="got tensors on mlu:0 and mlu:1"):
        model(random(3, 4).to("mlu:1"))


@pytest.mark.parametrize("family", ["functions", "lstm"])
def test_operands_of_functions_and_states_do_not_mix(family: str) -> None:
    if family == "lstm":
        model: nn.Module = nn.LSTM(6, 8).to("mlu")
        arguments: tuple[Any, ...] = (random(5, 3, 6).to("mlu"), (torch.zeros(1, 3, 8), torch.zeros(1, 3, 8)))
    else:

        class Product(nn.Module):
            def forward(self, a: Tensor, b: Tensor) -> Tensor:
                return a @ b

        model, arguments = Product(), (random(3, 4).to("mlu").requires_grad_(), random(4, 3))
    cnmix.initialize(model, None, opt_level="O1")
    with pytest.raises(RuntimeError, match="got tensors on cpu and mlu:0"):
        model(*arguments)


def test_another_card() -> None:
    model = nn.Linear(4, 4).to("mlu:1")
    cnmix.initialize(model, None, opt_level="O1")
    y = model(random(3, 4).to("mlu:1"))
    y.sum().backward()
    assert str(y.device) == str(model.weight.grad.device) == "mlu:1"


def test_a_default_device_is_not_taken_for_what_kernels_make() -> None:
    make, shape = FAMILIES["functions"]
    torch.set_default_device("mlu")
    try:
        on_card = train("mlu", lambda: copy.deepcopy(made), shape) if (made := _on_host(make)) else None
    finally:
        torch.set_default_device(None)
    assert on_card is not None
    assert_same(on_card, train("cpu", lambda: copy.deepcopy(made), shape))


def _on_host(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("cpu"):
        torch.manual_seed(0)
        return make()
