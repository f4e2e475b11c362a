"""The file that a recorder writes."""

import copy
import gc
import json
import math

import pytest
import torch
from small_net import Net
from torch import nn
from torch.nn import functional as F

import cnmix
from cnmix import kernels
from cnmix.kernels.profiling import listeners
from cnmix.nn import quantizer_sets
from cnmix.telemetry import STATISTICS, Recorder, record


class Calling(Net):
    """Multiplies by a function too, which comes to be a product when it is first called."""

    def forward(self, x):
        y = super().forward(x)
        return y @ F.softmax(y, 1).t()


def trained(kind=Net, steps=12, level="O1", first=0, nan_at=None, model=None, each=lambda step, model: None, **options):
    torch.manual_seed(0)
    if model is None:
        model, _ = cnmix.initialize(kind(), opt_level=level, steps_per_epoch=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    recorder = record(model, first_step=first, **options) if options else None
    for step in range(first, first + steps):
        x = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(step))
        if step == nan_at:
            x[0, 0, 0, 0] = math.nan
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        each(step, model)
        if step != nan_at:
            optimizer.step()
        if recorder is not None:
            recorder.step(loss=loss)
    if recorder is not None:
        recorder.close()
    return model


def read(folder):
    lines = [json.loads(line) for line in (folder / "telemetry.jsonl").read_text().splitlines()]
    return lines, lambda kind: [line for line in lines if line["kind"] == kind]


def test_every_kind_of_line(tmp_path):
    model = trained(path=tmp_path / "run", every_n_steps=5)
    lines, of = read(tmp_path / "run")
    assert lines[0] == {
        "kind": "run", "version": 1, "cnmix": cnmix.__version__, "torch": str(torch.__version__),
        "threads": torch.get_num_threads(), "level": "O1", "every_n_steps": 5, "steps_per_epoch": 10, "first_step": 0,
    }  # fmt: skip
    operands = of("operand")
    assert [line["id"] for line in operands] == list(range(9))
    assert [line["module"] for line in operands[::3]] == ["conv", "fc1", "fc2"]
    assert operands[2] == {
        "kind": "operand", "id": 2, "module": "conv", "operand": "grad_output", "product": "convolution", "bits": 8,
        "max_bitwidth": 31, "threshold": 0.03,
    }  # fmt: skip
    quantizers = [quantizer for _, each in quantizer_sets(model) for _, quantizer in each]
    for line, quantizer in zip(operands, quantizers, strict=True):
        own = [each for each in of("decision") if each["id"] == line["id"]]
        assert len(own) == quantizer.state.updates
        assert (own[0]["step"], own[0]["at"], own[0]["reason"]) == (0, 0, "first")
        last = own[-1]
        assert (last["bits"][1], last["position"][1]) == (quantizer.state.bits, quantizer.state.position)
        assert last["errors"][str(quantizer.state.bits)] == quantizer.state.error
        assert quantizer.listener is None
        assert not quantizer.look_next
    assert [line["step"] for line in of("time")] == [0, 5, 10]
    assert [(line["first"], line["last"]) for line in of("steps")] == [(1, 4), (6, 9), (11, 11)]
    for line in of("time"):
        parts = [line[name] for name in ("quantize", "product", "adapt", "other")]
        assert all(part >= 0 for part in parts)
        assert line["seconds"] == pytest.approx(sum(parts))
    convolution, linears = 4 * 4 * 16 * 9, 4 * (64 * 8 + 8 * 3)
    assert [sum(line["macs"].values()) for line in of("time")] == [2 * convolution + 3 * linears] * 3
    assert all(
        bits in ("8x8", "8x16", "16x16", "8x31", "16x31", "31x31") for line in of("time") for bits in line["macs"]
    )
    assert of("time")[0]["adapt"] > 0
    assert [line["step"] for line in of("metrics")] == list(range(12))
    assert listeners() == ()


def test_samples_are_what_the_operands_were(tmp_path):
    seen = {}

    def note(step, model):
        seen[step] = (model.fc1.weight.detach().clone(), model.fc1.quantizers.weight.state_dict())

    model = trained(path=tmp_path, every_n_steps=4, each=note)
    _, of = read(tmp_path)
    own = [line for line in of("sample") if line["id"] == 4]
    assert [line["step"] for line in own] == [0, 4, 8]
    assert len(of("sample")) == 27
    for line in own:
        x, state = seen[line["step"]]
        quantized = kernels.quantize_measured(x, state["bits"], state["position"])[0]
        shares = kernels.shares(x, quantized)
        assert (line["bits"], line["position"]) == (state["bits"], state["position"])
        assert (line["interval"], line["error"]) == (state["interval"], state["error"])
        assert (line["saturation"], line["underflow"]) == shares
        assert line["scale"] == 2.0 ** state["position"]
        error = x.double() - quantized.values.double() * 2.0 ** state["position"]
        assert line["snr"] == pytest.approx(10 * math.log10(x.double().square().sum() / error.square().sum()), rel=1e-5)
        exponents = x[x != 0].abs().log2().floor().int()
        histogram = line["histogram"]
        assert histogram["first"] == exponents.min()
        assert histogram["counts"] == torch.bincount((exponents - exponents.min()).flatten()).tolist()
        assert histogram["zeros"] == 0
    assert model is not None


def test_recording_changes_nothing(tmp_path):
    plain, recorded = trained(), trained(path=tmp_path, every_n_steps=2)
    assert all(map(torch.equal, plain.state_dict().values(), recorded.state_dict().values()))
    assert cnmix.state_dict(plain) == cnmix.state_dict(recorded)


def test_functions_are_recorded_from_their_first_call(tmp_path):
    model = trained(Calling, steps=3, path=tmp_path, every_n_steps=2)
    _, of = read(tmp_path)
    names = {line["id"]: line["module"] for line in of("operand")}
    function = [name for name in names.values() if "forward+" in name]
    assert len(function) == 3
    assert function[0] in dict(quantizer_sets(model))
    firsts = [line for line in of("decision") if names[line["id"]] in function and line["reason"] == "first"]
    assert [line["step"] for line in firsts] == [0, 0, 0]
    assert {line["step"] for line in of("sample") if names[line["id"]] in function} == {2}  # they came after the asking
    copied = copy.deepcopy(model)  # and a model that is recorded is copied without its recorder
    with record(model, tmp_path / "again"):
        assert copy.deepcopy(model).function_products.on_make is None
    assert copied.function_products.on_make is None


def test_rules_choose_operands_statistics_and_steps(tmp_path):
    rules = [
        {"modules": "fc*", "operands": "weight", "statistics": ["snr", "scale"], "every_n_steps": 3},
        {"types": "Conv2d", "statistics": "histogram", "start": 4, "stop": 9, "every_n_steps": 2},
        {"modules": ["fc2"], "operands": ["weight"], "statistics": ["saturation"], "every_n_steps": 6},
    ]
    trained(path=tmp_path, every_n_steps=5, rules=rules)
    _, of = read(tmp_path)
    found = {}
    for line in of("sample"):
        names = frozenset(line) - {"kind", "step", "id", "bits", "position", "interval", "error"}
        found.setdefault(line["id"], {})[line["step"]] = set(names)
    assert found[4] == {step: {"snr", "scale"} for step in (0, 3, 6, 9)}
    assert found[7] == {step: {"snr", "scale"} | ({"saturation"} if step % 6 == 0 else set()) for step in (0, 3, 6, 9)}
    assert [found[number] for number in (0, 1, 2)] == [{step: {"histogram"} for step in (4, 6, 8)}] * 3
    assert set(found) == {0, 1, 2, 4, 7}
    assert {line["step"] for line in of("time")} == {0, 3, 4, 5, 6, 8, 9, 10}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"modules": "fc3"}], "no module is called 'fc3': did you mean 'fc2'"),
        ([{"types": "Linaer"}], "no module is of the class 'Linaer': did you mean 'Linear'"),
        ([{"operand": "input"}], "unknown name in a telemetry rule: 'operand': did you mean 'operands'"),
        ([{"operands": "inputs"}], "unknown operand in a rule: 'inputs': did you mean 'input'"),
        (
            [{"statistics": ["histogramm"]}],
            "statistic in a telemetry rule: 'histogramm': did you mean 'histogram'",
        ),
        ([{"every_n_steps": 0}], "every_n_steps must be a whole number of steps, at least 1, got 0"),
        ([{"start": -1}], "start must be a whole number of steps, at least 0, got -1"),
        ([{"start": 5, "stop": 5}], "stop must come after its start 5, got 5"),
        ({"modules": "fc1"}, "must be a list of mappings"),
        (["fc1"], "a telemetry rule is a mapping"),
    ],
)
def test_wrong_rules_are_refused(tmp_path, rules, message):
    with pytest.raises((TypeError, ValueError), match=message.replace("[", r"\[")):
        record(Net(), tmp_path / "run", rules=rules)
    assert not (tmp_path / "run").exists()


def test_nan_is_recorded_once_with_its_step(tmp_path, caplog):
    trained(path=tmp_path, nan_at=6, every_n_steps=3)
    lines, of = read(tmp_path)
    assert {line["step"] for line in of("nonfinite")} == {6}
    assert of("nonfinite")[0]["id"] == 0
    assert len({line["id"] for line in of("nonfinite")}) == len(of("nonfinite")) == 6  # weights stay finite
    assert "the run's first NaN or infinity: input of 'conv', in step 6" in caplog.text
    assert of("metrics")[6]["loss"] is None
    broken = next(line for line in of("sample") if (line["id"], line["step"]) == (0, 6))
    assert [broken[name] for name in ("saturation", "underflow", "snr", "histogram")] == [None] * 4
    assert not any("NaN" in json.dumps(line) for line in lines)


def test_a_killed_run_leaves_whole_lines_and_is_gone_on_with(tmp_path):
    model, _ = cnmix.initialize(Net(), opt_level="O1", steps_per_epoch=10)
    recorder = Recorder(model, tmp_path / "a.jsonl", every_n_steps=3)
    for step in range(5):
        recorder.begin_step(step)
        model(torch.randn(2, 1, 6, 6)).sum().backward()
        recorder.end_step()
    with pytest.raises(RuntimeError, match="another recorder records this model"):
        record(model, tmp_path)
    lines = [json.loads(line) for line in recorder.file.read_text().splitlines()]  # nobody closed it
    assert max(line.get("step", 0) for line in lines) == 3
    recorder.close()
    with open(recorder.file, "a") as file:
        file.write('{"kind": "deci')
    with record(model, recorder.file, first_step=4, every_n_steps=3) as second:
        model(torch.randn(2, 1, 6, 6)).sum().backward()
        second.step()
        model(torch.randn(2, 1, 6, 6)).sum().backward()
        second.step()
    text = recorder.file.read_text().splitlines()
    assert text.count('{"kind": "deci') == 1
    resumed = [json.loads(line) for line in text[text.index('{"kind": "deci') + 1 :]]
    assert resumed[0]["first_step"] == 4
    assert [(line["first"], line["last"]) for line in resumed if line["kind"] == "steps"] == [(4, 5)]
    assert not [line for line in resumed if line["kind"] == "time"]  # 6 is the next, as in a run that never stopped


def test_several_ranks_write_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    model, _ = cnmix.initialize(Net(), opt_level="O1")
    recorder = record(model, tmp_path / "run")
    recorder.step(loss=1.0)
    recorder.close()
    assert not (tmp_path / "run").exists()
    assert all(quantizer.listener is None for _, each in quantizer_sets(model) for _, quantizer in each)


def test_a_float_model_has_its_times(tmp_path):
    trained(level="O0", path=tmp_path, every_n_steps=5, steps=6)
    lines, of = read(tmp_path)
    assert {line["kind"] for line in lines} == {"run", "time", "steps", "metrics"}
    assert (lines[0]["level"], lines[0]["steps_per_epoch"]) == ("O0", None)
    for line in of("time"):
        assert (line["quantize"], line["product"], line["adapt"], line["macs"]) == (0, 0, 0, {})


def test_accumulated_batches_are_one_step(tmp_path):
    model, _ = cnmix.initialize(Net(), opt_level="O1", steps_per_epoch=10)
    with Recorder(model, tmp_path, every_n_steps=2) as recorder:
        for step in range(4):
            recorder.begin_step(step)
            for _ in range(3):
                model(torch.randn(2, 1, 6, 6)).sum().backward()
            recorder.end_step()
    _, of = read(tmp_path)
    assert [line["step"] for line in of("sample")] == [0] * 9 + [2] * 9
    conv = [line for line in of("decision") if line["id"] == 0]
    assert [(line["step"], line["at"]) for line in conv][:7] == [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4), (1, 5), (2, 6)]


def test_operands_with_a_position_for_each_entry_are_sampled(tmp_path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(4, 4)

        def forward(self, x):
            y = self.project(x)
            return y @ y.transpose(1, 2)

    model, _ = cnmix.initialize(Attention(), opt_level="O1", per_entry=True)
    with record(model, tmp_path, every_n_steps=1) as recorder:
        for _ in range(2):
            model(torch.randn(3, 5, 4) * torch.tensor([1.0, 30.0, 900.0])[:, None, None]).sum().backward()
            recorder.step()
    _, of = read(tmp_path)
    names = {line["id"]: line["module"] for line in of("operand")}
    found = [line for line in of("sample") if "matmul" in names[line["id"]] and line["step"] == 1]
    assert len(found) == 3
    assert all(set(STATISTICS) <= set(line) for line in found)
    assert all(line["snr"] > 30 for line in found[:2])


def test_recurrent_layers_are_sampled(tmp_path):
    model, _ = cnmix.initialize(nn.LSTM(4, 6), opt_level="O1")
    with record(model, tmp_path, every_n_steps=1) as recorder:
        for _ in range(2):
            model(torch.randn(5, 3, 4))[0].sum().backward()
            recorder.step()
    _, of = read(tmp_path)
    assert {line["id"] for line in of("sample") if line["step"] == 1} == set(range(6))
    assert all(line["quantize"] > 0 < line["product"] for line in of("time"))


def test_a_recorder_that_cannot_begin_leaves_the_model_free(tmp_path):
    model, _ = cnmix.initialize(Calling(), opt_level="O1")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        record(model, tmp_path / "file" / "run")
    record(model, tmp_path).close()


def test_two_recorders_of_functions_alone(tmp_path):
    class Multiplies(nn.Module):
        def forward(self, x):
            return x @ x.t()

    model, _ = cnmix.initialize(Multiplies(), opt_level="O1")
    with record(model, tmp_path), pytest.raises(RuntimeError, match="another recorder records this model"):
        record(model, tmp_path / "other")


def test_steps_that_never_ended(tmp_path):
    model, _ = cnmix.initialize(Net(), opt_level="O1", steps_per_epoch=10)
    recorder = Recorder(model, tmp_path, every_n_steps=2)
    for step in range(2):  # the first is sampled, and left before its backward pass
        recorder.begin_step(step)
        model(torch.randn(2, 1, 6, 6)).sum()
    assert listeners() == ()
    recorder.end_step()
    recorder.begin_step(2)
    assert len(listeners()) == 1
    with pytest.raises(ValueError, match="a metric cannot be called step or kind"):
        recorder.end_step(step=2)
    recorder.flush()
    _, of = read(tmp_path)
    assert [(line["first"], line["last"]) for line in of("steps")] == []  # they come with the next sample
    assert of("time") == of("sample") == []
    del recorder, model
    gc.collect()
    assert listeners() == ()
