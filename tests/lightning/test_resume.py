import logging

import pytest
import torch
from hosts import BATCHES, PACKAGES, Host, loader, operands, same, steps_seen
from torch import nn


def fit(host, tmp_path, plugin, name="run.ckpt", **options):
    task, running = host.Task(), host.trainer(tmp_path, plugin, **options)
    running.fit(task, loader())
    running.save_checkpoint(tmp_path / name)
    return task


def test_resume_is_bit_exact(host, tmp_path):
    whole = host.Task()
    host.trainer(tmp_path, host.Plugin(), max_epochs=4).fit(whole, loader())
    first = host.trainer(tmp_path, host.Plugin(), max_epochs=2)
    first.fit(host.Task(), loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = host.Task(seed=8)
    host.trainer(tmp_path, host.Plugin(), max_epochs=4).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert same(whole, resumed)
    assert operands(whole) == operands(resumed)
    assert len({operand["bits"] for module in operands(whole).values() for operand in module.values()}) > 1


def test_resume_without_the_plugin(host, tmp_path):
    first = host.trainer(tmp_path, host.Plugin())
    first.fit(host.Task(), loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    plain = host.Task(seed=8)
    host.trainer(tmp_path, None, max_epochs=2).fit(plain, loader(), ckpt_path=tmp_path / "a.ckpt")
    assert type(plain.fc) is nn.Linear


def test_plugin_resumes_from_a_plain_checkpoint(host, tmp_path):
    first = host.trainer(tmp_path, None)
    first.fit(host.Task(), loader())
    first.save_checkpoint(tmp_path / "plain.ckpt")
    task = host.Task(seed=8)
    host.trainer(tmp_path, host.Plugin(), max_epochs=2).fit(task, loader(), ckpt_path=tmp_path / "plain.ckpt")
    assert steps_seen(task) == {BATCHES}


@pytest.mark.parametrize(("first", "second"), [PACKAGES, PACKAGES[::-1]])
def test_resume_under_the_other_package(tmp_path, first, second):
    first, second = Host(first), Host(second)
    whole = fit(first, tmp_path, first.Plugin(), "whole.ckpt", max_epochs=3)
    fit(first, tmp_path, first.Plugin(), max_epochs=1)
    resumed = second.Task(seed=8)
    second.trainer(tmp_path, second.Plugin(), max_epochs=3).fit(resumed, loader(), ckpt_path=tmp_path / "run.ckpt")
    assert same(whole, resumed)
    assert operands(whole) == operands(resumed)


def test_resume_at_another_level(host, tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="cnmix")
    fitted = fit(host, tmp_path, host.Plugin("O1", max_bitwidth=16))
    widths = {operand["bits"] for module in operands(fitted).values() for operand in module.values()}
    assert widths == {8, 16}

    def resume(plugin):
        task = host.Task(seed=8)
        host.trainer(tmp_path, plugin, max_epochs=2).fit(task, loader(), ckpt_path=tmp_path / "run.ckpt")
        return task

    assert steps_seen(resume(host.Plugin("O2"))) == {2 * BATCHES}
    with pytest.raises(ValueError, match=r"is saved at int16, over max_bitwidth 8: raise it"):
        resume(host.Plugin("O3"))
    assert caplog.text == ""
    assert type(resume(host.Plugin("O0")).fc) is nn.Linear
    assert "left, as opt_level 'O0' is float32 throughout" in caplog.text
    with pytest.raises(ValueError, match="the state has 'fc', which the model does not compute in fixed point"):
        resume(host.Plugin("O1", exclude=["fc"]))


def test_resume_from_the_baseline(host, tmp_path, caplog):
    fit(host, tmp_path, host.Plugin("O0"))
    task = host.Task(seed=8)
    host.trainer(tmp_path, host.Plugin(), max_epochs=2).fit(task, loader(), ckpt_path=tmp_path / "run.ckpt")
    assert steps_seen(task) == {BATCHES}
    assert "it is of a float32 run, so operands start anew" in caplog.text


def test_loss_scale_given_anew(host, tmp_path, caplog):
    fit(host, tmp_path, host.Plugin(loss_scale="dynamic"))
    plugin = host.Plugin(loss_scale=16)
    host.trainer(tmp_path, plugin, max_epochs=2).fit(host.Task(), loader(), ckpt_path=tmp_path / "run.ckpt")
    assert "the loss scale starts anew, at 16" in caplog.text
    assert plugin.state_dict()["loss_scalers"] == []


def test_state_is_plain_data(host, tmp_path):
    recipe = {"rules": [{"types": "Conv2d", "width": 16}]}
    fit(host, tmp_path, host.Plugin("O2", activation_dtype="float16", recipe=recipe))
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert saved["CnmixPlugin"]["models"][0]["modules"]["conv"]["settings"]["input"]["bitwidth"] == 16
