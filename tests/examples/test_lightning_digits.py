"""The Lightning example in several processes: strategies, torchrun on two nodes, and a process that is killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from cnmix import checkpoint, inference

EXAMPLE = Path(__file__).parents[2] / "examples" / "lightning_digits.py"
_SECONDS = 240


def command(*arguments):
    return [sys.executable, "-W", "ignore", str(EXAMPLE), *map(str, arguments)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run(*arguments):
    return _run(command(*arguments))


def run_each(*runs):
    """Runs the example once for each list of arguments, in one process after another's imports."""
    runs = [[str(each) for each in arguments] for arguments in runs]
    code = f"import sys; sys.path.insert(0, {str(EXAMPLE.parent)!r}); import lightning_digits as example\n"
    return _run([sys.executable, "-W", "ignore", "-c", code + "".join(f"example.main({each})\n" for each in runs)])


def _run(arguments):
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=_SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def start(arguments, **options):
    return subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def wait(process):
    """Returns the exit status of a process, and what it printed."""
    printed = process.communicate(timeout=_SECONDS)[0].decode()
    return process.returncode, printed


def last(folder):
    """Returns the checkpoint that a run left last; None where there is none yet."""
    return max(folder.glob("*.ckpt"), key=lambda each: int(each.stem.split("=")[1]), default=None)


def saved(folder):
    return checkpoint.load(last(folder))


def same(a, b):
    return a["CnmixPlugin"] == b["CnmixPlugin"] and all(
        torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in a["state_dict"]
    )


def steps(checkpoint):
    return checkpoint["CnmixPlugin"]["models"][0]["modules"]["net.7"]["operands"]["input"]["step"]


@pytest.mark.filterwarnings("ignore")  # Lightning's, of folders and workers
def test_processes_that_lightning_spawns(tmp_path, example):
    """Model and plugin are pickled. Testing, which would spawn two more, is what ddp_fork does below."""
    script = example("lightning_digits")
    trainer = script.pl.Trainer(
        accelerator="cpu",
        strategy="ddp_spawn",
        devices=2,
        plugins=[script.CnmixPlugin()],
        max_epochs=1,
        callbacks=[script.ModelCheckpoint(tmp_path, filename="{epoch}")],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = script.DataLoader(script.handwriting.load()[0], 32, shuffle=True)
    with mock.patch.dict(os.environ, environment()):  # Lightning leaves addresses there
        trainer.fit(script.Digits(False, epochs=1, lr=0.05, seed=0), loader)
    assert steps(saved(tmp_path)) == 22


def children(process):
    """Returns the ids of the processes that a process started, and those that they started."""
    found, todo = [], [process]
    while todo:
        for task in Path(f"/proc/{todo.pop()}/task").glob("*/children"):
            started = [int(each) for each in task.read_text().split()]
            found += started
            todo += started
    return found


@pytest.mark.filterwarnings("ignore")  # Lightning's, of folders and workers
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="processes are found in /proc")
def test_a_process_that_is_killed_leaves_a_checkpoint_to_go_on_from(tmp_path, example):
    whole, killed, again, alone = (tmp_path / name for name in ("whole", "killed", "again", "alone"))
    both = ["--devices", 2, "--epochs", 3]
    running = start(command("--strategy", "ddp", *both, "--output", killed), start_new_session=True)
    try:
        began = time.monotonic()
        while last(killed) is None:
            assert running.poll() is None
            assert time.monotonic() - began < _SECONDS
            time.sleep(0.01)
        (second,) = [each for each in children(running.pid) if b"lightning_digits" in _command_line(each)]
        os.kill(second, signal.SIGKILL)
        assert wait(running)[0] != 0
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            wait(running)
    went_on = saved(killed)
    assert 1 <= went_on["epoch"] + 1 < 3
    resume = ["--resume", last(killed)]
    example("lightning_digits").main([str(each) for each in ["--epochs", 3, *resume, "--output", alone]])
    # One after the other in one process, which starts its two by forking: importing Lightning takes seconds.
    forked = ["--strategy", "ddp_fork", *both]
    printed = run_each([*forked, *resume, "--output", again], [*forked, "--output", whole])
    assert printed.count("test accuracy") == 2
    assert steps(saved(whole)) == 3 * 22
    assert same(saved(again), saved(whole))
    assert saved(alone)["epoch"] == 2


def _command_line(process):
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_nodes_under_torchrun(tmp_path):
    port, launched = _free_port(), []
    for node in range(2):
        torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1"]
        where = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
        example = command("--strategy", "ddp", "--nodes", 2, "--epochs", 1, "--output", tmp_path)[3:]
        launched.append(start([sys.executable, *torchrun, *where, *example]))
    codes, printed = zip(*(wait(each) for each in launched), strict=True)
    assert codes == (0, 0), "\n".join(printed)
    assert "test accuracy" in printed[0]
    assert "test accuracy" not in printed[1]
    assert saved(tmp_path)["global_step"] == 22


def test_every_process_saves_its_part(tmp_path, example):
    both = ["--strategy", "fsdp2", "--devices", 2]
    run(*both, "--shards", "--epochs", 1, "--output", tmp_path / "parts")
    assert last(tmp_path / "parts").is_dir()
    task = example("lightning_digits").Digits(sharded=True, epochs=1, lr=0.1, seed=0)
    integers = inference.prepare(task, last(tmp_path / "parts"))
    assert integers.net(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
