import copy

import pytest
import torch
import zoo
from torch import Tensor

import cnmix
import cnmix.debug


def loss(output):
    return output if isinstance(output, Tensor) else output.loss


@pytest.mark.parametrize("name", ["bert-sdpa", "llama-eager", "mixtral-grouped", "whisper", "mamba", "resnet", "yolo"])
def test_comparison_is_with_the_plain_model(name):
    case = zoo.CASES[name]
    model, batch = case.build(), case.batch()
    plain = copy.deepcopy(model)
    cnmix.initialize(model, None, "O1", max_bitwidth=8)
    torch.manual_seed(1)
    compared = cnmix.debug.compare(model, loss=loss, **batch)
    found = []
    for each in (model, plain):
        torch.manual_seed(1)
        zoo.loss_of(each, batch).backward()
        found.append(torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None]).double())
    by_hand = float((found[0] - found[1]).norm() / found[1].norm())
    assert compared.gradient == pytest.approx(by_hand, rel=1e-2)
    assert compared.float_loss == pytest.approx(float(zoo.loss_of(plain, batch).detach()), rel=1e-4)
    assert all(0 < row.own.worst < 0.5 for row in compared.rows)
