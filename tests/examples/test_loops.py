"""The scripts of docs/loops: what they print, that resuming changes no bit, and runs from the command line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cnmix

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CHECKPOINTS = {
    "plain_pytorch": "epoch-{}.pt",
    "huggingface_trainer": "checkpoint-{}",
    "accelerate_loop": "epoch-{}",
}
STEPS = {"huggingface_trainer": 4}  # in an epoch, where checkpoints are counted in steps
QUICK = ["--batch-size", "128", "--accumulate", "3"]


def checkpoint(name, folder, epoch):
    return folder / CHECKPOINTS[name].format(epoch * STEPS.get(name, 1))


def contents(path):
    """Returns what a checkpoint, a file or a folder, holds of weights, optimizer and what the script registered."""
    if path.is_file():
        return torch.load(path, weights_only=True)
    files = sorted(file for pattern in ("*.safetensors", "optimizer.*", "custom_*") for file in path.glob(pattern))
    return {file.name: load_file(file) if file.suffix == ".safetensors" else torch.load(file) for file in files}


def same(ours, theirs):
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(same(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


def percentages(text):
    return [float(each) for each in re.findall(r"([\d.]+)%", text)]


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_resuming_is_bit_equal(example, tmp_path, capsys, name, level):
    main = example(name).main
    options = [*QUICK, "--epochs", "3", "--opt-level", level]
    main([*options, "--output", str(tmp_path / "whole")])
    first = percentages(capsys.readouterr().out)
    resume = str(checkpoint(name, tmp_path / "whole", 1))
    main([*options, "--output", str(tmp_path / "resumed"), "--resume", resume])
    assert percentages(capsys.readouterr().out) == first
    whole, resumed = (contents(checkpoint(name, tmp_path / folder, 3)) for folder in ("whole", "resumed"))
    assert len(whole) >= 2
    assert same(whole, resumed)


def run(*command, **environment):
    """Runs a command in a process of its own, with one thread; returns what it printed."""
    path = os.pathsep.join([str(EXAMPLES.parent), str(EXAMPLES)])
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


SCRIPTS = """
import os, runpy, sys
folder, *scripts = sys.argv[1:]
for script in scripts:
    sys.argv = [script, "--epochs", "2", "--batch-size", "64", "--output", f"{folder}/{os.path.basename(script)}"]
    print(f"== {script}")
    runpy.run_path(script, run_name="__main__")
"""


def test_as_scripts(tmp_path):
    """One process runs all, as importing their libraries takes longer than training; first what imports least."""
    names = ("plain_pytorch", "accelerate_loop", "huggingface_trainer")
    printed = run("-c", SCRIPTS, tmp_path, *(EXAMPLES / f"{name}.py" for name in names))
    of_each = printed.split("== ")[1:]
    assert len(of_each) == len(names)
    for text in of_each:
        floats, integers = percentages(text)
        assert floats > 50
        assert integers == pytest.approx(floats, abs=2)


@pytest.mark.parametrize("name", ["plain_pytorch", "accelerate_loop"])
def test_nothing_left_to_train(example, tmp_path, name):
    example(name).main([*QUICK, "--epochs", "1", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="has trained 1 epochs: ask for more with --epochs"):
        example(name).main(["--epochs", "1", "--resume", str(checkpoint(name, tmp_path, 1))])


def test_a_compiled_model_trains_to_the_same_checkpoint(example, tmp_path):
    main = example("plain_pytorch").main
    for folder, options in (("plain", []), ("compiled", ["--compile", "eager"])):
        main([*QUICK, "--epochs", "1", "--output", str(tmp_path / folder), *options])
    plain, compiled = (contents(tmp_path / folder / "epoch-1.pt") for folder in ("plain", "compiled"))
    assert same(plain, compiled)


RANK = """
import os, sys
import cnmix, handwriting, plain_pytorch, torch
nets, build = [], handwriting.build_model
handwriting.build_model = lambda: nets.append(build()) or nets[-1]
plain_pytorch.main(sys.argv[2:])
found = nets[0].state_dict(), cnmix.state_dict(nets[0])
torch.save(found, f"{sys.argv[1]}/rank-{os.environ['RANK']}.pt")
"""


def test_two_processes_go_on_from_a_checkpoint_of_one_and_end_with_the_same_weights(example, tmp_path):
    example("plain_pytorch").main([*QUICK, "--epochs", "1", "--output", str(tmp_path)])
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, script, tmp_path]
    printed = run(*launch, *QUICK, "--epochs", 2, "--output", tmp_path, "--resume", tmp_path / "epoch-1.pt")
    assert len(percentages(printed)) == 2  # one rank reports
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1)]
    assert ranks[0][1] == ranks[1][1]
    assert same(ranks[0][0], ranks[1][0])
    assert same(ranks[0][0], contents(tmp_path / "epoch-2.pt")["state_dict"])
    assert not same(ranks[0][0], contents(tmp_path / "epoch-1.pt")["state_dict"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate_with_a_dynamic_loss_scale(net, batch, same_weights, accumulate):
    """As docs/loops/accelerate.md says to: initialized after prepare, accelerator.backward within scale_loss."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    models = []
    for accelerated in (False, True):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        if accelerated:
            model, optimizer = accelerator.prepare(model, optimizer)
        cnmix.initialize(model, optimizer, "O2", activation_dtype="float16")
        for seed in range(8):
            x, y = batch(seed)
            if accelerated:
                with accelerator.accumulate(model):
                    loss = torch.nn.functional.cross_entropy(model(x), y)
                    with cnmix.scale_loss(loss, optimizer) as scaled_loss:
                        accelerator.backward(scaled_loss)
                    optimizer.step()
                    optimizer.zero_grad()
            else:
                loss = torch.nn.functional.cross_entropy(model(x), y) / accumulate
                with cnmix.scale_loss(loss, optimizer) as scaled_loss:
                    scaled_loss.backward()
                if (seed + 1) % accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()
        models.append(model)
    assert same_weights(*models)
    scale = cnmix.state_dict()["loss_scalers"][-1][0]["scale"]
    assert scale <= 2**16
