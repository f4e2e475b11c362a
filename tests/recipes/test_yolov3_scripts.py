import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import cnmix
import cnmix.torch_mlu
from cnmix.inference import OfflineModel, prepare


@pytest.fixture(scope="module")
def trained(yolov3, tmp_path_factory):
    settings = ["model.width=0.01", "model.image_size=64", "data.train_images=8", "data.test_images=4"]
    settings += ["epochs=1", "batch_size=4", "threads=1", f"output={tmp_path_factory.mktemp('runs')}"]
    return yolov3.train.main(settings)


class TestTrain:
    def test_leaves_a_run(self, yolov3, trained):
        folder = trained
        names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        pictures = {f"pictures/{number:02}.png" for number in range(4)}
        assert names == {"settings.yaml", "metrics.csv", "results.json", "yolov3.pt", *pictures}
        saved = cnmix.checkpoint.load(folder / "yolov3.pt")
        model = yolov3.train.build_model(OmegaConf.create(saved["settings"]))
        prepare(model, saved)
        assert model(torch.rand(1, 3, 64, 64)).isfinite().all()

    @pytest.mark.parametrize(
        ("argument", "message"),
        [("epoch=3", "epoch=3: Key 'epoch'"), ("epochs=0", "epochs must be an integer"), ("data.part=a", "Key 'part'")],
    )
    def test_refused(self, yolov3, argument, message):
        with pytest.raises(ValueError, match=message):
            yolov3.train.read_settings([argument])


@pytest.fixture
def card():
    cnmix.torch_mlu.install(cards=1, strict=False, card_name="MLU370")
    yield
    cnmix.torch_mlu.install(cards=0, strict=False, card_name="MLU370")


@pytest.mark.usefixtures("card")
def test_compare(yolov3, trained, capsys):
    yolov3.compare.main(trained / "yolov3.pt", images=4, batch_size=2)
    lines = capsys.readouterr().out.splitlines()
    rows = ["float32", "integers", "integers, fused", "integers, offline", "int8, calibrated"]
    assert [line[:18].strip() for line in lines[1:6]] == rows
    assert lines[6] == "integers operator by operator, fused and offline: the same bits"


class TestVendorsScript:
    @pytest.fixture
    def run(self, yolov3, trained, tmp_path, capsys):
        def run(line):
            places = ["--model_path", str(trained / "yolov3.pt"), "--quantized_model_path", str(tmp_path)]
            run.found = yolov3.test.run(yolov3.test.parse([*line.split(), *places]))
            return dict(part.split(": ") for part in capsys.readouterr().out.splitlines())

        return run

    def test_on_the_host(self, run, tmp_path):
        printed = run(f"--image_number 4 --batch_size 2 --compute_map true --run_mode true --pictures {tmp_path}/seen")
        assert list(printed) == ["Mean AP", "Mean AP (overlap 0.5)", "Throughput(fps)", "Latency(ms)"]
        assert all(float(value) >= 0 for value in printed.values())
        assert len(list((tmp_path / "seen").iterdir())) == 4

    @pytest.mark.usefixtures("card")
    @pytest.mark.filterwarnings("ignore:qconfig_spec. firstconv with a mean of 0:UserWarning")
    @pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated:DeprecationWarning")
    @pytest.mark.parametrize("mode", [1, 4])
    def test_to_the_card(self, run, tmp_path, monkeypatch, mode):
        monkeypatch.chdir(tmp_path)
        options = f"--quantized_mode {mode} --image_number 2"
        assert run(f"{options} --quantization true") == {
            "quantized": str(tmp_path / f"yolov3_{['', 'int8', '', '', 'c_int16'][mode]}.pth")
        }
        options += " --batch_size 2 --conf_thres 0"
        on_card = f"{options} --mlu true --half_input 1 --core_number 4"
        assert list(run(f"{on_card} --run_mode true")) == ["Throughput(fps)", "Latency(ms)"]
        eager = run.found
        assert sum(map(len, eager)) > 0
        if mode == 4:  # scales for each channel, operator by operator
            return
        printed = run(f"{on_card} --jit true --save_offline_model true --core_version MLU270")
        assert printed == {"offline model": "yolov3.cambricon"}
        fused = run.found
        seen = tmp_path / "seen"
        printed = run(f"{options} --offline yolov3.cambricon --compute_map true --run_mode true --pictures {seen}")
        assert list(printed) == ["Mean AP", "Mean AP (overlap 0.5)", "Throughput(fps)", "Latency(ms)"]
        assert all(map(torch.equal, eager, fused))
        assert all(map(torch.equal, fused, run.found))
        assert len(list(seen.iterdir())) == 2
        model = OfflineModel("yolov3.cambricon")
        assert (model.batch_size, model.core_number, model.core_version) == (2, 4, "MLU270")
        with pytest.raises(ValueError, match="takes --batch_size 2, not 1"):
            run("--offline yolov3.cambricon --image_number 2")

    def test_offline_imports_no_model(self, yolov3, tmp_path):
        script = Path(yolov3.test.__file__)
        code = (
            f"import runpy, sys; sys.path.insert(0, {str(script.parent)!r}); sys.argv[1:] = ['--offline', 'none']\n"
            f"try: runpy.run_path({str(script)!r}, run_name='__main__')\n"
            "except SystemExit as error: print(error, {'model', 'train', 'torch_mlu'} & set(sys.modules))"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.endswith("there is no offline model none set()\n")

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("--image_number 5 --batch_size 2", "--image_number 5 is no multiple of --batch_size 2"),
            ("--mlu perhaps", "true or false, not 'perhaps'"),
            ("--save_offline_model true", "--save_offline_model needs --mlu true --jit true"),
            ("--quantization true --mlu true", "--quantization computes on the host"),
            ("--quantization true --compute_map true", "--compute_map is for a model that infers"),
            ("--offline a.cambricon --mlu true", "--offline runs a file, with no model"),
            ("--quantized_mode 5", "--quantized_mode is one of 0 to 4, not 5"),
        ],
    )
    def test_refused(self, yolov3, capsys, line, message):
        with pytest.raises(SystemExit):
            yolov3.test.parse(line.split())
        assert message in capsys.readouterr().err
