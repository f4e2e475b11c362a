import pytest
import torch
from torch import nn

import cnmix
import cnmix.debug


def compared(device: str) -> tuple[cnmix.debug.Comparison, cnmix.debug.Suggestion]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.MultiheadAttention(8, 2), nn.Linear(8, 4))
    draw = torch.randn((5, 8, 8), generator=torch.Generator().manual_seed(0))
    model, x = _Net(model).to(device), draw.to(device)
    cnmix.initialize(model, None, "O1", max_bitwidth=8)
    suggestion = cnmix.debug.sensitivity(model, x).suggest()
    return cnmix.debug.compare(model, x), suggestion


class _Net(nn.Module):
    def __init__(self, parts: nn.Sequential) -> None:
        super().__init__()
        self.conv, self.attention, self.last = parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return self.last(self.attention(x, x, x)[0])


def test_debugging_says_of_the_card_what_it_says_of_the_cpu() -> None:
    (on_cpu, rules), (on_card, card_rules) = compared("cpu"), compared("mlu")
    assert {row.name: row.bits for row in on_card.rows} == {row.name: row.bits for row in on_cpu.rows}
    assert on_card.gradient == pytest.approx(on_cpu.gradient, rel=1e-2)
    for one, other in zip(on_card.rows, on_cpu.rows, strict=True):
        assert one.own.worst == pytest.approx(other.own.worst, rel=1e-2)
    assert (card_rules.mappings, card_rules.macs_after) == (rules.mappings, rules.macs_after)


def test_nan_on_the_card_is_found() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to("mlu")
    cnmix.initialize(model, None, "O1")
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with (
        pytest.raises(FloatingPointError, match="NaN in weight of '1', in the forward pass"),
        cnmix.debug.detect_nonfinite(model),
    ):
        model(torch.ones(2, 4, device="mlu"))
