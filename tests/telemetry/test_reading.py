import json
import math

import pytest
from synthetic_run import write_training

from cnmix.telemetry.reading import find_trainings, name_apart, read_training

RUN = {"kind": "run", "version": 1, "first_step": 0, "level": "O1"}
OPERAND = {
    **{"kind": "operand", "id": 0, "module": "fc", "operand": "input", "product": "matmul"},
    **{"bits": 8, "max_bitwidth": 31, "threshold": 0.01},
}
DECISION = {
    **{"kind": "decision", "id": 0, "reason": "first", "errors": {"8": 0.02, "16": None}, "bits": [8, 16]},
    **{"position": [None, -3], "outcome": "widened", "interval": 4, "interval_reason": "range moves"},
}


def decision(step, **changes):
    return {**DECISION, "step": step, "at": step, **changes}


def write(folder, *lines, end=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "telemetry.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    return folder


def logged(folder):
    return [json.loads(line) for line in (folder / "telemetry.jsonl").read_text().splitlines()]


def test_every_line_is_read(tmp_path):
    folder = write_training(tmp_path, ["conv1", "fc"], steps=60, steps_per_epoch=20, every=25)
    training, lines = read_training(folder), logged(folder)
    names = {line["id"]: (line["module"], line["operand"]) for line in lines if line["kind"] == "operand"}
    assert [(each.module, each.operand) for each in training.operands] == list(names.values())
    for number, operand in enumerate(training.operands):
        own = [line for line in lines if line.get("id") == number]
        decisions = [line for line in own if line["kind"] == "decision"]
        assert len(operand.decisions) == len(decisions) > 5
        for each, line in zip(operand.decisions, decisions, strict=True):
            assert (each.step, each.reason, each.outcome, each.interval) == tuple(
                line[key] for key in ("step", "reason", "outcome", "interval")
            )
            assert each.errors == {int(bits): error for bits, error in line["errors"].items()}
            assert [*each.bits] == line["bits"]
            assert [*each.position] == line["position"]
        samples = [line for line in own if line["kind"] == "sample"]
        assert [(each.step, each.snr, each.underflow) for each in operand.samples] == [
            (line["step"], line["snr"], line["underflow"]) for line in samples
        ]
        assert [list(each.histogram.counts) for each in operand.samples] == [
            line["histogram"]["counts"] for line in samples
        ]
    times = [line for line in lines if line["kind"] == "time"]
    assert [(each.step, each.seconds) for each in training.times] == [(line["step"], line["seconds"]) for line in times]
    assert [each.parts["adapt"] for each in training.times] == [line["adapt"] for line in times]
    assert [sum(each.macs.values()) for each in training.times] == [sum(line["macs"].values()) for line in times]
    assert training.steps == (0, 59)
    assert set(training.curves) == {"test_accuracy", "test_loss", "train_loss"}


def test_a_resumed_training(tmp_path):
    sample = {"kind": "sample", "id": 0, "step": 9, "bits": 8, "position": -3}
    lines = [RUN, OPERAND, decision(0), decision(9), sample, {"kind": "nonfinite", "step": 9, "id": 0}]
    lines += [
        {"kind": "steps", "first": 1, "last": 4, "seconds": 1.0},
        {"kind": "steps", "first": 5, "last": 9, "seconds": 1.0},
    ]
    lines += [{"kind": "metrics", "step": 4, "loss": 2.0}, {"kind": "metrics", "step": 9, "loss": 1.0}]
    # The second part numbers the operands anew.
    other = {**OPERAND, "id": 1, "module": "head"}
    again = [{**RUN, "first_step": 5}, {**OPERAND, "id": 1}, {**other, "id": 0}, decision(6, id=1, interval=7)]
    training = read_training(write(tmp_path, *lines, *again))
    assert [each.module for each in training.operands] == ["fc", "head"]
    assert [(each.step, each.interval) for each in training.operands[0].decisions] == [(0, 4), (6, 7)]
    assert not training.operands[0].samples
    assert not training.operands[0].nonfinite
    assert [each.last for each in training.stretches] == [4]
    assert training.curves == {"loss": [(4, 2.0)]}
    assert training.resumed == [5]


def test_a_killed_training(tmp_path):
    folder = write(tmp_path, RUN, OPERAND, decision(0), {"kind": "of the future"}, end='{"kind": "decis')
    training = read_training(folder)
    assert training.unreadable == 1
    assert len(training.operands[0].decisions) == 1
    assert training.operands[0].decisions[0].error is None  # there was none at the width that was taken


def test_macs_of_a_pair_are_one(tmp_path):
    time = {"kind": "time", "step": 0, "seconds": 1, "macs": {"8x16": 1, "16x8": 2, "31x8": 3}}
    assert read_training(write(tmp_path, RUN, time)).times[0].macs == {"8×16": 3, "8×31": 3}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{**RUN, "version": 2}], "line 1, .*: it is of version 2, which a newer cnmix reads"),
        ([RUN, decision(0)], "line 2, .*: there is no operand 0 above it"),
        ([RUN, OPERAND, {"kind": "decision", "id": 0, "step": 1}], "line 3, .*KeyError"),
        ([RUN, [1]], "line 2, .*TypeError"),
    ],
)
def test_files_of_others_are_refused(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        read_training(write(tmp_path, *lines))


def test_metrics_of_others_are_refused(tmp_path):
    write(tmp_path, RUN)
    (tmp_path / "metrics.csv").write_text("epoch,step,loss\n0,1,high\n")
    with pytest.raises(ValueError, match=r"metrics\.csv"):
        read_training(tmp_path)


def test_metrics(tmp_path):
    write(tmp_path, RUN)
    (tmp_path / "metrics.csv").write_text(
        "cnmix/fc/input/bits,epoch,loss,score,step\n8,0,1.5,,3\n,0,nan,0.5,7\n8,1,0.5,inf,9\n"
    )
    curves = read_training(tmp_path).curves
    assert curves.keys() == {"loss", "score"}
    assert str(curves["loss"]) == "[(3, 1.5), (7, nan), (9, 0.5)]"
    assert curves["score"] == [(7, 0.5), (9, math.inf)]


def test_metrics_of_a_resumed_training(tmp_path):
    write(tmp_path, RUN)
    (tmp_path / "metrics.csv").write_text("epoch,loss,step\n0,3,4\n1,2,9\n2,1,14\n1,2.5,9\n2,1.5,14\n")
    assert read_training(tmp_path).curves == {"loss": [(4, 3.0), (9, 2.5), (14, 1.5)]}


def test_metrics_of_a_loop_that_diverges(tmp_path):
    write(tmp_path, RUN, {"kind": "metrics", "step": 0, "loss": 1.0}, {"kind": "metrics", "step": 50, "loss": None})
    assert str(read_training(tmp_path).curves) == "{'loss': [(0, 1.0), (50, nan)]}"


def test_names_can_be_drawn(tmp_path):
    training = read_training(write(tmp_path, RUN, {**OPERAND, "module": "a\x00\x1b\n\ud800層 b"}))
    assert training.operands[0].module == "a����層 b"


def test_a_file_in_which_nothing_can_be_read(tmp_path):
    write(tmp_path, end="a letter\nto you\n")
    with pytest.raises(ValueError, match="not what cnmix writes: no line says of which training it is"):
        read_training(tmp_path)


def test_runs_of_baselines_alone(tmp_path):
    for seed in (0, 1):
        write_training(tmp_path / f"O0-seed{seed}", [], steps=40, seed=seed, level="O0")
        trainings, baselines = find_trainings(tmp_path)
        assert len(trainings) == seed + 1
        assert not baselines


def test_baselines_have_the_same_seed(tmp_path):
    for seed in (0, 1):
        write_training(tmp_path / f"O1-seed{seed}", ["fc"], steps=40, seed=seed)
        write_training(tmp_path / f"O0-seed{seed}", [], steps=40, seed=seed, level="O0")
    trainings, baselines = find_trainings(tmp_path)
    assert [(each.label, each.level, each.seed) for each in trainings] == [
        ("O1-seed0", "O1", "0"),
        ("O1-seed1", "O1", "1"),
    ]
    assert {seed: each.folder.name for seed, each in baselines.items()} == {"0": "O0-seed0", "1": "O0-seed1"}
    trainings, baselines = find_trainings(tmp_path / "O1-seed1")
    assert [each.folder.name for each in trainings] == ["O1-seed1"]
    assert baselines["1"].curves


def test_a_baseline_needs_no_telemetry(tmp_path):
    write_training(tmp_path / "O1-seed0", ["fc"], steps=40)
    write_training(tmp_path / "O0-seed0", [], steps=40, level="O0")
    (tmp_path / "O0-seed0" / "telemetry.jsonl").unlink()
    assert find_trainings(tmp_path)[1]["0"].curves["test_loss"]


def test_folders_without_telemetry(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        find_trainings(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"has no telemetry\.jsonl of a training"):
        find_trainings(tmp_path)


def test_labels_are_as_short_as_they_can_be(tmp_path):
    folders = ["a/x/O1-seed0", "a/y/O1-seed0", "a/y/O2-seed0"]
    trainings = [read_training(write(tmp_path / folder, RUN)) for folder in folders]
    name_apart(trainings)
    assert [each.label for each in trainings] == ["x/O1-seed0", "y/O1-seed0", "O2-seed0"]


def test_what_to_look_at_first(tmp_path):
    operands = [{**OPERAND, "id": number, "module": name} for number, name in enumerate("abcde")]
    lines = [
        decision(0, id=0, bits=[8, 8], errors={"8": 0.001}, outcome="kept"),
        decision(0, id=1, bits=[8, 8], errors={"8": 0.02}, outcome="over"),
        decision(0, id=2),
        {"kind": "nonfinite", "id": 3, "step": 2},
        decision(0, id=4, bits=[8, 8], errors={"8": 0.009}, outcome="kept"),
    ]
    training = read_training(write(tmp_path, RUN, *operands, *lines))
    assert [each.module for each in training.most_interesting(5)] == ["d", "b", "c", "e", "a"]
    assert len(training.most_interesting(2)) == 2
