import copy

import pytest
import torch
from torch import nn

from cnmix.torch_mlu.core.mlu_quantize import quantize_dynamic_mlu
from cnmix.torch_mlu.core.quantized.fuse_modules import fuse_modules
from cnmix.torch_mlu.core.quantized.modules import MLUConv2d


def model():
    torch.manual_seed(0)
    made = nn.Sequential()
    made.add_module("body", nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()))
    made.add_module("flat", nn.Flatten())
    made.add_module("head", nn.Linear(16, 5))
    made.add_module("norm", nn.BatchNorm1d(5))
    for _ in range(3):
        made(torch.randn(8, 3, 4, 4))  # statistics of the norms
    return made.eval()


GROUPS = [["body.0", "body.1", "body.2"], ["head", "norm"]]


def test_the_folded_model_computes_the_same():
    float_model, x = model(), torch.randn(2, 3, 4, 4)
    before = copy.deepcopy(float_model.state_dict())
    fused = fuse_modules(float_model, GROUPS)
    assert torch.allclose(fused(x), float_model(x), atol=1e-5)
    assert isinstance(fused.body[1], nn.Identity)
    assert isinstance(fused.norm, nn.Identity)
    assert type(fused.body[2]) is nn.ReLU
    assert all(torch.equal(value, before[name]) for name, value in float_model.state_dict().items())
    assert type(quantize_dynamic_mlu(fused).body[0]) is MLUConv2d


def test_in_place_and_one_list_of_names():
    float_model = model()
    assert fuse_modules(float_model, ["body.0", "body.1"], inplace=True) is float_model
    assert isinstance(float_model.body[1], nn.Identity)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([["body.0", "body.7"]], "no module 'body.7'"),
        ([["body.0"]], "names of a product"),
        ([["body.2", "body.1"]], "'body.2' must be a Conv or a Linear, is ReLU"),
        ([["body.0", "body.2"]], "'body.2' must be a BatchNorm, is ReLU"),
    ],
)
def test_what_cannot_be_folded_is_named(groups, message):
    float_model = model()
    with pytest.raises(ValueError, match=message):
        fuse_modules(float_model, [["head", "norm"], *groups], inplace=True)
    assert isinstance(float_model.norm, nn.BatchNorm1d)


def test_a_model_that_trains_is_refused():
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        fuse_modules(model().train(), GROUPS)
    float_model = model()
    float_model.norm = nn.BatchNorm1d(5, track_running_stats=False).eval()
    with pytest.raises(ValueError, match="no running statistics"):
        fuse_modules(float_model, GROUPS)
