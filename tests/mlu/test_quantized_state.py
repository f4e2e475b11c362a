"""Files made by hand with the documented keys, and what is wrong in others."""

import io
import math

import pytest
import torch
from torch import nn

from cnmix.torch_mlu.core.mlu_quantize import quantize_dynamic_mlu


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def loaded(state, model):
    made = quantize_dynamic_mlu(model)
    assert str(made.load_state_dict(state)) == "<All keys matched successfully>"
    return made


def by_hand(**constants):
    """A file as the vendor's package writes it, for one Linear of 3 inputs and 2 outputs."""
    return {
        "fc.weight": torch.tensor([[1.0, -0.5, 0.25], [0.125, 2.0, 0.0]]),
        "fc.bias": torch.tensor([1.0, -1.0]),
        "fc.use_symmetry": torch.ones(1, dtype=torch.int64),
        **{f"fc.{name}": value for name, value in constants.items()},
    }


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


HAND_MADE = {
    "int8": ({"scale": torch.tensor([63.5, 63.5]), "quantized_mode": int32(1)}, (1, 2)),
    "int16": ({"scale": torch.tensor([16000.0, 16000.0]), "quantized_mode": int32(2)}, (2, 2)),
    "int8 per channel, generated": (
        {
            "scale": torch.tensor([63.5, 0.0]),
            "quantized_mode": int32(1),
            "scale_weight_per_channel": torch.tensor([127.0, 63.5]),
            "quantized_by_channel": torch.ones(1, dtype=torch.int64),
        },
        (3, 4),
    ),
    "int16 per channel, loaded": (
        {"scale": torch.tensor([16000.0, 0.0, 32767.0, 16383.5]), "quantized_mode": int32(4)},
        (4, 4),
    ),
    "widths and positions": ({"scale": torch.tensor([8.0, 8.0]), "quantized_mode": int32(-5, -5)}, None),
}


class _Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        return self.fc(x)


@pytest.mark.parametrize("kind", HAND_MADE)
def test_files_made_by_hand_load_and_compute(kind):
    constants, expected = HAND_MADE[kind]
    state = by_hand(**constants)
    run = loaded(saved(state), _Named())
    x = torch.tensor([[1.0, 0.5, -2.0], [0.0, 1.0, 1.0]])
    y = run.to("mlu")(x.to("mlu")).cpu()
    assert torch.allclose(y, nn.functional.linear(x, state["fc.weight"], state["fc.bias"]), atol=0.1)
    again = run.cpu().state_dict()
    if expected is not None:
        assert (again["fc.quantized_mode"].item(), again["fc.scale"].numel()) == expected
    else:
        assert again["fc.quantized_mode"].tolist() == [-5, -5]
        assert torch.equal(y, nn.functional.linear(x, state["fc.weight"], state["fc.bias"]))  # all of it is on the grid
    assert {*again} == {"fc.weight", "fc.bias", "fc.use_symmetry", "fc.scale", "fc.quantized_mode"}


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        ("int8", {"scale": None}, 'Missing key.*"fc.scale"'),
        ("int8", {"quantized_mode": None}, 'Missing key.*"fc.quantized_mode"'),
        ("int8", {"use_symmetry": None}, 'Missing key.*"fc.use_symmetry"'),
        ("int8", {"weight": None}, 'Missing key.*"fc.weight"'),
        ("int8", {"scales": torch.ones(2)}, 'Unexpected key.*"fc.scales"'),
        ("int8", {"use_symmetry": torch.zeros(1)}, "fc.use_symmetry must be 1"),
        ("int8", {"quantized_mode": int32(5)}, r"fc.quantized_mode must be one of 1, 2, 3, 4.*got \[5\]"),
        ("int8", {"quantized_mode": torch.tensor([1.5])}, r"fc.quantized_mode must have whole numbers, got \[1.5\]"),
        ("int8", {"quantized_mode": torch.tensor([math.inf])}, "fc.quantized_mode must have whole numbers"),
        (
            "int8",
            {"quantized_mode": int32(3)},
            "fc.scale must have 4 values for 2 channels and .* 3, got 2",
        ),
        ("int8", {"scale": torch.ones(3)}, "fc.scale must have 2 values .* got 3"),
        ("int8", {"scale": torch.ones(2, 1)}, r"fc.scale must be a tensor of one dimension, got shape \(2, 1\)"),
        ("int8", {"scale": torch.tensor([0.0, 1.0])}, "fc.scale must have positive numbers, got 0.0 at index 0"),
        ("int8", {"scale": torch.tensor([1.0, math.nan])}, "fc.scale must have positive numbers, got nan at index 1"),
        ("int8", {"weight": torch.ones(2, 4)}, "size mismatch for fc.weight"),
        ("int8", {"bias": torch.ones(3)}, "size mismatch for fc.bias"),
        ("int8 per channel, generated", {"quantized_by_channel": None}, "fc.quantized_by_channel is missing"),
        ("int8 per channel, generated", {"scale_weight_per_channel": None}, "fc.scale_weight_per_channel is missing"),
        (
            "int8 per channel, generated",
            {"scale_weight_per_channel": torch.ones(3)},
            "fc.scale_weight_per_channel must have 2 values for 2 channels.*got 3",
        ),
        ("int8 per channel, generated", {"quantized_mode": int32(3)}, "fc.quantized_mode be 1 or 2"),
        ("int8 per channel, generated", {"quantized_by_channel": torch.zeros(1)}, "fc.quantized_by_channel must be 1"),
        ("widths and positions", {"scale": torch.tensor([8.0, 12.0])}, "fc.scale must have two widths"),
        ("widths and positions", {"quantized_mode": int32(0, 200)}, r"positions in \[-128, 127\]"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(base, change, message):
    state = {**by_hand(**HAND_MADE[base][0]), **{f"fc.{name}": value for name, value in change.items()}}
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(RuntimeError, match=message):
        quantize_dynamic_mlu(_Named()).load_state_dict(state)


def test_without_strict_what_a_file_lacks_is_let_be():
    run = quantize_dynamic_mlu(_Named())
    run.load_state_dict(_Named().state_dict(), strict=False)
    with pytest.raises(RuntimeError, match=r"'fc' has no scales to compute with on mlu:0: load the state_dict"):
        run.to("mlu")(torch.ones(1, 3).to("mlu"))
    found = run.load_state_dict(by_hand(scale=torch.ones(2)), strict=False)
    assert found.missing_keys == ["fc.quantized_mode"]


def test_a_conv3d_has_no_scales_per_channel():
    model = nn.Sequential(nn.Conv3d(1, 2, 1))
    state = {
        **model.state_dict(),
        "0.use_symmetry": torch.ones(1, dtype=torch.int64),
        "0.scale": torch.tensor([1.0, 0.0, 1.0, 1.0]),
        "0.quantized_mode": int32(3),
    }
    with pytest.raises(RuntimeError, match=r"0\.quantized_mode 3 .* Conv3d"):
        quantize_dynamic_mlu(model).load_state_dict(state)
