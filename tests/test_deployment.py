import re
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from cnmix import inference
from cnmix.evaluation import evaluate, restore
from cnmix.inference import OfflineModel
from cnmix.recipe import load_data, load_recipe
from cnmix.training import run_recipe

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SMALL = ["seeds=[0]", "epochs=1", "threads=1", "model.args.channels=2", "batch_size=512"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    recipe = load_recipe(RECIPES / "digits.yaml", [*SMALL, f"output={folder}"])
    return run_recipe(recipe, "digits", compare=True, progress=False)[0]


@pytest.fixture
def file(run_folder, command, tmp_path):
    code, _, error = command("export", run_folder, "--output", tmp_path / "net.cambricon", "--batch", 3)
    assert (code, error) == (0, "")
    return tmp_path / "net.cambricon"


def test_export_beside_the_checkpoint(run_folder, command):
    code, output, error = command("export", run_folder, "--core-version", "mlu270", "--core-number", 4)
    assert (code, error) == (0, "")
    (written,) = run_folder.rglob("*.cambricon")
    assert written == run_folder / "O1-seed0" / "model.cambricon"
    model = OfflineModel(written)
    assert (model.name, model.core_version, model.core_number, model.batch_size) == ("Net", "MLU270", 4, 1)
    assert re.search(rf"sha256 {model.digest}\nRun it: cnmix infer {written}", output)
    written.unlink()


def test_the_other_forms(run_folder, command, tmp_path):
    code, output, error = command("export", run_folder, "--output", tmp_path / "net.cambricon", "--onnx", "--vendor")
    assert (code, error) == (0, "")
    for suffix in ("cambricon", "onnx", "pth"):
        assert re.search(rf"net\.{suffix}: [\d,]+ bytes", output)
    assert "conv1.quantized_mode" in torch.load(tmp_path / "net.pth", weights_only=True)
    assert (tmp_path / "net.onnx").stat().st_size > 0


def test_offline_gives_what_the_integer_model_gives(run_folder, file):
    saved, recipe, net = restore(run_folder / "O1-seed0" / "model.pt")
    _, test = load_data(recipe)
    images = torch.stack([test[i][0] for i in range(3)])
    with torch.no_grad():
        assert torch.equal(inference.load(net, saved)(images), OfflineModel(file)(images))


def test_fused_integers_evaluate_as_prepared_ones(run_folder, command):
    code, output, _ = command("eval", run_folder / "O1-seed0")
    assert code == 0
    saved, recipe, net = restore(run_folder / "O1-seed0" / "model.pt")
    accuracy, _ = evaluate(inference.prepare(net, saved), load_data(recipe)[1])
    assert f"{accuracy:.2%}" in output.splitlines()[-2].split("│")[-2]


def test_infer_describes_and_times(file, command):
    code, output, error = command("infer", file, "--repeat", 2)
    assert (code, error) == (0, "")
    model = OfflineModel(file)
    for expected in (
        "Offline model Net",
        "x: float32 (3, 1, 8, 8)",
        "float32 (3, 10)",
        f"{model.size:,} bytes",
        f"sha256 {model.digest}",
        "Run on random input",
    ):
        assert expected in output
    assert re.search(r"Throughput\(fps\): \d+\.\d\d\nLatency\(ms\): \d+\.\d{3}\n", output)


def test_infer_on_files(file, command, tmp_path):
    x = torch.randn(3, 1, 8, 8)
    numpy.save(tmp_path / "x.npy", x.numpy())
    torch.save(x, tmp_path / "x.pt")
    save_file({"x": x}, tmp_path / "x.safetensors")
    expected = OfflineModel(file)(x)
    for kind in ("npy", "pt", "safetensors"):
        code, output, error = command("infer", file, "--input", f"x.{kind}", "--output", "y.safetensors")
        assert (code, error) == (0, "")
        assert "random" not in output
        (y,) = load_file(tmp_path / "y.safetensors").values()
        assert torch.equal(y, expected)
    assert command("infer", file, "--input", "x.npy", "--output", "y.npy")[0] == 0
    assert numpy.array_equal(numpy.load(tmp_path / "y.npy"), expected.numpy())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "small.npy"], r"'Net' takes float32 \(3, 1, 8, 8\), got float32 \(2,\)"),
        (["--input", "objects.npy"], "objects.npy|allow_pickle"),
        (["--input", "broken.safetensors"], r"broken\.safetensors is no safetensors file"),
        (["--input", "broken.pt"], r"broken\.pt holds no plain tensors"),
        (["--input", "x.txt"], r"x\.txt must end in \.npy, \.pt or \.safetensors"),
        (["--input", "none.npy"], "No such file"),
        (["--output", "y.txt"], r"y\.txt must end in \.safetensors, or in \.npy"),
        (["--sha256", "0" * 64], "not the one asked for"),
    ],
)
def test_infer_refuses(file, command, tmp_path, arguments, message):
    numpy.save(tmp_path / "small.npy", numpy.zeros(2, numpy.float32))
    numpy.save(tmp_path / "objects.npy", numpy.array([{}]), allow_pickle=True)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    (tmp_path / "broken.pt").write_bytes(b"nothing")
    code, _, error = command("infer", file, *arguments)
    assert code == 2
    assert len(error.strip().splitlines()) == 1
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("where", "arguments", "message"),
    [
        ("O0-seed0", [], "has no checkpoint that was trained in fixed point"),
        (".", ["--batch", 0], "--batch must be at least 1"),
        (".", ["--core-version", "MLU999"], "there is no card 'MLU999'"),
        (".", ["--core-version", "MLU220", "--core-number", 99], "an MLU220 has 1 to 4 cores"),
        ("none", [], "no such file|No such file|there is no"),
    ],
)
def test_export_refuses(run_folder, command, where, arguments, message):
    code, _, error = command("export", run_folder / where, *arguments)
    assert code == 2
    assert len(error.strip().splitlines()) == 1
    assert re.search(message, error), error
    assert not list(run_folder.rglob("*.cambricon"))


def test_export_needs_one_checkpoint(run_folder, command):
    (run_folder / "more").mkdir()
    (run_folder / "more" / "model.pt").write_bytes((run_folder / "O1-seed0" / "model.pt").read_bytes())
    code, _, error = command("export", run_folder, "--module", RECIPES / "digits.py")
    assert code == 2
    assert re.search(r"has 2 checkpoints: give one of them, as .*O1-seed0.model\.pt", error)


def test_a_transformer_from_training_to_files(command, tmp_path):
    pytest.importorskip("onnxruntime", reason="agreement with onnxruntime needs onnxruntime")
    small = ["seeds=[0]", "epochs=1", "threads=1", "model.args.width=16", "model.args.depth=1", "data.args.stride=2048"]
    recipe = load_recipe(RECIPES / "text.yaml", [*small, "data.args.test_share=0.02", f"output={tmp_path}"])
    folder = run_recipe(recipe, "text", progress=False)[0]
    (checkpoint,) = folder.rglob("model.pt")
    saved, recipe, net = restore(checkpoint)
    _, test = load_data(recipe)
    model = inference.load(net, saved)
    accuracy, _ = evaluate(model, test)
    code, output, error = command("eval", folder)
    assert (code, error) == (0, "")
    assert f"{accuracy:.2%}" in output.splitlines()[-2].split("│")[-2]
    arguments = ("--output", tmp_path / "net.cambricon", "--batch", 2, "--onnx", "--vendor")
    code, _, error = command("export", folder, *arguments)
    assert code == 0, error
    tokens = torch.stack([test[i][0] for i in range(2)])
    torch.save(tokens, tmp_path / "x.pt")
    assert command("infer", tmp_path / "net.cambricon", "--input", "x.pt", "--output", "y.npy")[0] == 0
    with torch.no_grad():
        expected = model(tokens)
    assert numpy.array_equal(numpy.load(tmp_path / "y.npy"), expected.numpy())
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"tokens": tokens.numpy()})
    largest = expected.abs().max().item()
    assert numpy.abs(found - expected.numpy()).max() < 0.05 * largest  # an integer may be another beside a tie
    state = torch.load(tmp_path / "net.pth", weights_only=True)
    assert "blocks.0.query.quantized_mode" in state
