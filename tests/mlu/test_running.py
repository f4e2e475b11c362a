"""``cnmix run``: a script, a module, and the processes below it, with the emulation in place."""

import os
import shutil
from pathlib import Path

import pytest
from scripts import run

from cnmix.torch_mlu.running import environment


@pytest.fixture
def script(tmp_path: Path):
    def write(source: str, name: str = "script.py") -> str:
        (tmp_path / name).write_text(source)
        return name

    return write


def test_a_script_runs_as_it_would_by_itself(tmp_path: Path, script) -> None:
    name = script(
        "import sys, torch\n"
        "print(torch.is_mlu_available())\n"  # before torch_mlu is imported, as scripts do
        "import torch_mlu.core.mlu_model as ct\n"
        "import helper\n"  # beside the script
        "print(torch.ones(1).to('mlu').device, ct.device_count(), ct.get_device_name())\n"
        "print(sys.argv, __name__, helper.found)\n"
        "sys.exit(7)\n"
    )
    script("found = True\n", "helper.py")
    found = run(tmp_path, "--cards", "2", "--card", "MLU270", name, "--cards", "-m", "x y")
    argv = f"['{name}', '--cards', '-m', 'x y'] __main__ True"
    assert found.stdout.splitlines() == ["True", "mlu:0 2 MLU270", argv], found.stderr
    assert found.returncode == 7


def test_the_vendors_module_may_be_imported_before_torch(tmp_path: Path, script) -> None:
    found = run(tmp_path, script("import torch_mlu, torch\nprint(torch.zeros(1, device='mlu').device)\n"))
    assert found.stdout == "mlu:0\n", found.stderr


def test_a_module_runs(tmp_path: Path, script) -> None:
    script("import sys, torch\nprint(torch.is_mlu_available(), sys.argv[1:])\n", "tool.py")
    found = run(tmp_path, "-m", "tool", "--strict-device")
    assert found.stdout == "True ['--strict-device']\n", found.stderr


def test_a_failing_script_shows_its_own_traceback(tmp_path: Path, script) -> None:
    found = run(tmp_path, script("import torch\nraise ValueError('mine')\n"))
    assert found.returncode == 1
    assert found.stderr.startswith("Traceback (most recent call last):\n")
    assert found.stderr.endswith("ValueError: mine\n")


def test_strictness_reaches_the_script(tmp_path: Path, script) -> None:
    name = script("import torch\ntorch.ones(2).to('mlu') + torch.ones(2)\n")
    assert run(tmp_path, name).returncode == 0
    found = run(tmp_path, "--strict-device", name)
    assert found.returncode == 1
    assert "RuntimeError" in found.stderr
    assert "host" in found.stderr


SPAWNING = """
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

def work(rank, port):
    assert torch.is_mlu_available()  # afresh in this process, before torch_mlu
    import torch_mlu.core.mlu_model as ct
    dist.init_process_group("cncl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    ct.set_device(rank)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3).to(ct.mlu_device())
    model = torch.nn.parallel.DistributedDataParallel(model, device_ids=[rank])
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(rank)).to("mlu")
    model(x).square().mean().backward()
    gradient = model.module.weight.grad
    assert gradient.device == torch.device("mlu", rank), gradient.device
    every = [torch.zeros_like(gradient) for _ in range(2)]
    dist.all_gather(every, gradient)
    assert torch.equal(*every)
    summed = torch.full((2,), rank + 1.0, device="mlu")
    dist.all_reduce(summed)
    assert summed.tolist() == [3, 3] and summed.is_mlu
    dist.broadcast(summed, 1)
    scattered = torch.zeros(1, device="mlu")
    dist.scatter(scattered, [torch.tensor([float(i)], device="mlu") for i in range(2)] if rank == 0 else None, src=0)
    assert scattered.item() == rank
    gathered = torch.zeros(1, 2, device="mlu")
    dist.all_gather_into_tensor(gathered, torch.full((1, 1), rank + 1.0, device="mlu"))
    assert gathered.tolist() == [[1, 2]]
    normalize_all(rank)
    dist.barrier()
    dist.destroy_process_group()

def normalize_all(rank):  # over both processes, as one does on the host that has all rows
    x = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(5))
    weights = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(6))
    rows = slice(0, 2) if rank == 0 else slice(2, 6)
    whole, here = torch.nn.BatchNorm1d(3), torch.nn.SyncBatchNorm(3).mlu()
    torch.nn.init.uniform_(whole.weight, generator=torch.Generator().manual_seed(7))
    here.load_state_dict(whole.state_dict())
    for module, x, weights in ((whole, x, weights), (here, x[rows].mlu(), weights[rows].mlu())):
        leaf = x.detach().requires_grad_()
        y = module(leaf)
        (y * weights).sum().backward()
        if x.is_cpu:
            expected = y.detach()[rows], leaf.grad[rows]
    torch.testing.assert_close(y.detach().cpu(), expected[0])
    torch.testing.assert_close(leaf.grad.cpu(), expected[1])
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(here, name).cpu(), getattr(whole, name))
    for name in ("weight", "bias"):
        gradient = getattr(here, name).grad
        dist.all_reduce(gradient)
        torch.testing.assert_close(gradient.cpu(), getattr(whole, name).grad)

if __name__ == "__main__":
    import socket
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port,), nprocs=2)
    print("done")
"""


def test_spawned_processes_have_it_and_average_gradients_with_cncl(tmp_path: Path, script) -> None:
    found = run(tmp_path, "--cards", "2", script(SPAWNING))
    assert found.stdout == "done\n", found.stderr
    assert "Time stats" not in found.stderr


def test_what_the_script_starts_has_it(tmp_path: Path, script) -> None:
    child = "import torch; print(torch.is_mlu_available())"
    found = run(tmp_path, script(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])\n"))
    assert found.stdout == "True\n", found.stderr


def test_the_environments_own_sitecustomize_runs_too(tmp_path: Path, script) -> None:
    script("import builtins\nbuiltins.customized = True\n", "sitecustomize.py")
    name = script("import torch\nprint(customized, torch.is_mlu_available())\n")
    found = run(tmp_path, name, PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert found.stdout == "True True\n", found.stderr


def test_a_script_without_torch_loads_none(tmp_path: Path, script) -> None:
    found = run(tmp_path, script("import sys\nprint('torch' in sys.modules, 'cnmix' in sys.modules)\n"))
    assert found.stdout == "False False\n", found.stderr


def test_the_vendors_own_package_serves(tmp_path: Path, script) -> None:
    (tmp_path / "vendor" / "torch_mlu").mkdir(parents=True)
    (tmp_path / "vendor" / "torch_mlu" / "__init__.py").write_text("vendor = True\n")
    name = script("import torch, torch_mlu\nprint(torch_mlu.vendor, hasattr(torch, 'mlu'))\n")
    paths = os.pathsep.join([str(tmp_path / "vendor"), os.environ.get("PYTHONPATH", "")])
    found = run(tmp_path, name, PYTHONPATH=paths)
    assert found.stdout == "True False\n"
    assert "the vendor's torch_mlu is installed" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--card", "MLU100"], "there is no card 'MLU100': take one of MLU220"),
        (["--cards", "100"], "0 to 64 emulated cards, not 100"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, script, arguments: list[str], message: str) -> None:
    found = run(tmp_path, *arguments, script("print('ran')\n"))
    assert found.returncode == 2
    assert message in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1
    assert "ran" not in found.stdout


def test_who_asks_whether_there_is_a_torch_does_not_hide_it(tmp_path: Path, script) -> None:
    name = script(
        "import importlib.util\n"
        "spec = importlib.util.find_spec('torch')\n"  # as many packages do before they import it
        "print(spec.name, spec.loader.get_filename().endswith('__init__.py'))\n"
        "import torch\n"
        "print(torch.is_mlu_available(), type(torch.__spec__.loader).__name__)\n"
    )
    found = run(tmp_path, name)
    assert found.stdout.splitlines() == ["torch True", "True SourceFileLoader"], found.stderr


FOREIGN = """
import os, subprocess, sys
env = {**os.environ, "CNMIX_TORCH_MLU": "/another/prefix", "PYTHONPATH": os.environ["PYTHONPATH"].split(os.pathsep)[0]}
subprocess.run([sys.executable, "-S", "-c", '''
import sys
sys.path.append("foreign")
import sitecustomize  # as site does, without the packages of this environment
import torch
print(torch.here)
'''], env=env, check=True)
"""


def test_another_python_without_cnmix_has_its_torch(tmp_path: Path, script) -> None:
    (tmp_path / "foreign").mkdir()
    script("here = True\n", "foreign/torch.py")
    found = run(tmp_path, script(FOREIGN))
    assert found.stdout == "True\n", found.stderr
    assert found.stderr.count("\n") == 1
    assert "no emulated torch_mlu in" in found.stderr
    assert "No module named 'cnmix'" in found.stderr


def test_a_package_of_that_name_beside_the_script_serves(tmp_path: Path, script) -> None:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "torch_mlu.py").write_text("own = True\n")
    (folder / "script.py").write_text("import torch, torch_mlu\nprint(torch_mlu.own, hasattr(torch, 'mlu'))\n")
    found = run(tmp_path, "project/script.py")
    assert found.stdout == "True False\n", found.stderr
    assert "it serves, not the emulation" in found.stderr
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "expected"), [(None, []), ("", []), ("/a", ["/a"]), ("/a:", ["/a", ""]), (":/a", ["", "/a"])]
)
def test_the_python_path_stays_behind_the_startup_folder(
    monkeypatch: pytest.MonkeyPatch, given: str | None, expected: list[str]
) -> None:
    if given is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", given.replace(":", os.pathsep))
    startup, *others = environment()["PYTHONPATH"].split(os.pathsep)
    assert Path(startup, "sitecustomize.py").exists()
    assert others == expected
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([startup, *others]))
    assert environment()["PYTHONPATH"].count(startup) == 1


def test_two_versions_of_it_in_the_path_do_not_chase_each_other(tmp_path: Path, script) -> None:
    other = tmp_path / "other version"
    shutil.copytree(environment()["PYTHONPATH"].split(os.pathsep)[0], other)
    script("import builtins\nbuiltins.customized = True\n", "sitecustomize.py")
    name = script("import torch\nprint(customized, torch.is_mlu_available())\n")
    paths = os.pathsep.join([str(other), str(tmp_path), os.environ.get("PYTHONPATH", "")])
    found = run(tmp_path, name, PYTHONPATH=paths)
    assert found.stdout == "True True\n", found.stderr
    assert not found.stderr


def test_a_card_that_the_environment_names_is_checked_first(tmp_path: Path, script) -> None:
    found = run(tmp_path, script("print('ran')\n"), DEFAULT_MLU_DEVICE_NAME="MLU100")
    assert found.returncode == 2
    assert found.stderr.strip().startswith("error: there is no card 'MLU100'")


def test_the_mnist_guide_trains_saves_quantizes_loads_and_infers(tmp_path: Path) -> None:
    example = Path(__file__).parents[2] / "examples" / "mlu_mnist.py"
    found = run(tmp_path, str(example), "--epochs", "4", "--save", "saved")
    assert found.returncode == 0, found.stderr
    accuracies = [float(line.rpartition(": ")[2].rstrip("%")) for line in found.stdout.splitlines()]
    assert len(accuracies) == 6  # trained, its checkpoint in float, and four ways of quantizing that
    assert accuracies[0] > 80
    assert max(accuracies) - min(accuracies) < 3
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"model.pth", "quantized.pth"}
