"""Every model of the matrix, from a checkpoint of training to integers: eager as prepared, and fused as eager."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import cnmix
from cnmix.inference import fuse, load, prepare

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from zoo import CASES, loss_of

# What torch.export says no to, or makes something else of, and what the message must name.
STAY_EAGER = {
    "mixtral-eager": "'model.model.layers.0.mlp.experts'",  # loops over the experts that were hit
    "mixtral-grouped": "computes other numbers than the model does",  # multiplies otherwise where it is compiled
    "lstm": "'model.lstm'",  # packed sequences: how many rows a time step has is known with the lengths
}


class Predicting(nn.Module):
    """Takes the tensors of a batch one by one, and returns what the model predicts, or its loss."""

    def __init__(self, model, batch):
        super().__init__()
        self.model, self.names = model, list(batch)
        self.train(model.training)

    def forward(self, *tensors):
        if hasattr(self.model, "predict"):
            return tuple(self.model.predict(tensors[0]))
        output = self.model(**dict(zip(self.names, tensors, strict=True)))
        return (output if isinstance(output, torch.Tensor) else output.logits,)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", CASES)
def test_integer_model(name):
    case = CASES[name]
    model, batch = case.build(), case.batch()
    optimizer = torch.optim.AdamW(model.parameters(), case.learning_rate)
    cnmix.initialize(model, optimizer, steps_per_epoch=20)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    data = copy.deepcopy({"state_dict": model.state_dict(), "cnmix": cnmix.state_dict(model)})
    inputs = tuple(batch.values())
    integers, prepared = Predicting(load(case.build(), data), batch), Predicting(prepare(case.build(), data), batch)
    normalizes = any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in model.modules())
    with torch.no_grad():
        expected = integers(*inputs)
        for a, b in zip(expected, prepared(*inputs), strict=True):
            # Rounding differs by a bit behind a batch norm, and with it now and then an integer.
            assert torch.allclose(a, b, atol=0.02 * b.abs().max().item(), rtol=0) if normalizes else torch.equal(a, b)
    if name in STAY_EAGER:
        with pytest.raises(ValueError, match=STAY_EAGER[name]):
            fuse(integers, *inputs)
        return
    fused = fuse(integers, *inputs)
    others = tuple(1.5 * x.flip(0) if x.is_floating_point() else x.flip(0) for x in inputs)
    for each in (inputs, others):
        with torch.no_grad():
            expected = integers(*each)
        assert all(torch.equal(a, b) for a, b in zip(expected, fused(*each), strict=True))
    assert not any(step.operator.startswith(("aten.mm", "aten.bmm", "aten.conv")) for step in fused.first.program.steps)
