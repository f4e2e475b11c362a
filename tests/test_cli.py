import re
import shutil
from pathlib import Path

import pytest
import torch

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SMALL = ["seeds=[0]", "epochs=1", "threads=1", "model.args.channels=2", "batch_size=512"]
KINDS = ["truncated", "text", "empty", "list", "foreign", "pickle", "misfit", "missing"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from cnmix.recipe import load_recipe
    from cnmix.training import run_recipe

    folder = tmp_path_factory.mktemp("trained")
    return run_recipe(load_recipe(RECIPES / "digits.yaml", [*SMALL, f"output={folder}"]), "digits", progress=False)[0]


def refused(result, message):
    code, _, error = result
    lines = error.strip().splitlines()
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0]), lines[0]
    assert not Path("runs").exists()


def test_train_and_eval(command):
    code, output, error = command("train", RECIPES / "digits.yaml", *SMALL, "--compare")
    assert (code, error) == (0, "")
    folder = re.search(r"Kept in (\S+)", output)[1]
    assert re.fullmatch(r"runs/digits/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(_\d+)?", folder)
    for expected in ("Operands after the last O1 run", "grad_output", "float32 (O0)", f"cnmix eval {folder}"):
        assert expected in output
    code, output, error = command("eval", folder)
    assert (code, error) == (0, "")
    assert re.search(r"O0 .* 0 .*%.* – ", output)
    assert re.search(r"O1 .* 0 .*%.*%", output)


def test_levels(command):
    train = ["train", RECIPES / "digits.yaml", *SMALL, "seeds=[0,1]"]
    code, output, error = command(*train, "--levels", "O0, O2,O3")
    assert (code, error) == (0, "")
    assert "Operands after the last O3 run" in output
    assert re.search(r"seed +┃ +┃ float32 \(O0\) ┃ +O2 ┃ +O3 ┃", output)
    for row, number in (("accuracy", r"\d+\.\d\d%"), ("loss", r"\d\.\d{4}"), ("seconds", r"\d+\.\d")):
        assert len(re.findall(rf"│ {row} +│ +{number} │ +{number} │ +{number} │", output)) == 3
    assert re.search(r"│ mean │ accuracy │", output)
    assert {path.parent.name for path in Path("runs").rglob("model.pt")} == {
        f"{level}-seed{seed}" for level in ("O0", "O2", "O3") for seed in (0, 1)
    }


def test_levels_that_end_in_float32(command):
    code, output, _ = command("train", RECIPES / "digits.yaml", *SMALL, "--levels", "O1,O0")
    assert code == 0
    assert "Operands" not in output
    assert "cnmix eval" in output
    code, output, _ = command("train", RECIPES / "digits.yaml", *SMALL, "--levels", "O0")
    assert code == 0
    assert "cnmix eval" not in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--levels", "O1,O4"], "unknown opt_level 'O4': this version has O0, O1, O2, O3"),
        (["--levels", "o1"], "did you mean 'O1'"),
        (["--levels", ""], "unknown opt_level ''"),
        (["--levels", "O1,O1"], "--levels names a level twice: O1,O1"),
        (["--levels", "O0,O1", "--compare"], "drop --compare, and put O0 among them"),
        (["--levels", "O1,O3", "cnmix.bitwidth=16"], "'O3' cannot take the recipe's settings: bitwidth 16 is over"),
        (["--levels", "O2", "cnmix.exclude=[conv3]"], "no module is called 'conv3'"),
    ],
)
def test_bad_levels(command, arguments, message):
    refused(command("train", RECIPES / "digits.yaml", *SMALL, *arguments), message)


def test_resume(command, trained):
    code, output, _ = command(
        "train", RECIPES / "digits.yaml", *SMALL, "epochs=2", "--resume", trained / "O1-seed0" / "last.ckpt"
    )
    assert code == 0
    assert "Kept in" in output


def test_config(command):
    code, output, error = command("config")
    assert (code, error) == (0, "")
    assert output.strip()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train", "--help"], ["eval", "--help"]])
def test_help(command, arguments):
    code, output, error = command(*arguments)
    assert code in (0, 2)
    assert "Usage" in output + error
    assert "Traceback" not in output + error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["epoch=1"], "unknown recipe key 'epoch': did you mean 'epochs'"),
        (["cnmix.bitwith=8"], "did you mean 'bitwidth'"),
        (["cnmix.treshold=0.1"], "did you mean 'threshold'"),
        (["cnmix.opt_level=o1"], "did you mean 'O1'"),
        (["cnmix.bitwidth=9"], "bitwidth must be one of 8, 16, 31"),
        (["cnmix.exclude=[conv3]"], "no module is called 'conv3': did you mean 'conv[12]'"),
        (["model.name=Nett"], "did you mean 'Net'"),
        (["model.args.chanels=3"], "did you mean 'channels'"),
        (["model.args.dropout=2"], "dropout must be a number from 0 to below 1, got 2"),
        (["data.name=laod"], "did you mean 'load'"),
        (["data.args.test_shar=0.3"], "did you mean 'test_share'"),
        (["optimizer.name=SDG"], "did you mean 'SGD'"),
        (["optimizer.args.lr_=0.1"], "did you mean 'lr'"),
        (["optimizer.args.lr=fast"], "."),
        (["scheduler.args.Tmax=3"], "did you mean 'T_max'"),
        (["scheduler.name=CosineAnealingLR"], "did you mean 'CosineAnnealingLR'"),
        (["module=digit.py"], "digit.py is missing"),
        (["epochs=x"], "epochs: .*'x'"),
        (["epochs=0"], "epochs must be at least 1"),
        (["epochs"], "form key=value"),
        (["seeds=[99999999999999999999]"], "seed"),
        (["threads=0"], "threads must be at least 1, got 0"),
        (["model.args=[1]"], "model.args"),
        (["model.name=F"], "."),
    ],
)
def test_bad_override(command, overrides, message):
    refused(command("train", RECIPES / "digits.yaml", *SMALL, *overrides), message)


def test_bad_recipe_file(command, tmp_path):
    refused(command("train", "nothing.yaml"), "there is no recipe nothing.yaml")
    refused(command("train", "no[bold]thing[/x].yaml"), r"there is no recipe no\[bold\]thing\[/x\].yaml")
    refused(command("train", tmp_path), "there is no recipe")
    (tmp_path / "broken.yaml").write_text("epochs: [1\n")
    refused(command("train", "broken.yaml"), "broken.yaml")
    shutil.copy(RECIPES / "digits.yaml", tmp_path)
    refused(command("train", "digits.yaml"), r"digits.py is missing")


def test_output_that_is_a_file(command, tmp_path):
    (tmp_path / "taken").write_text("")
    refused(command("train", RECIPES / "digits.yaml", *SMALL, "output=taken"), "taken")


def test_mnist_without_data(command):
    refused(command("train", RECIPES / "mnist.yaml"), "MNIST is missing 4 of 4 files")


def bad_checkpoint(kind, folder, trained):
    good, last = trained / "O1-seed0" / "model.pt", trained / "O1-seed0" / "last.ckpt"
    bad = {name: folder / f"{name}.pt" for name in KINDS}
    bad["truncated"].write_bytes(last.read_bytes()[:-2000])
    bad["text"].write_text("hello\nworld\n")
    bad["empty"].write_bytes(b"")
    torch.save([1, 2], bad["list"])
    torch.save({"state_dict": {}, "cnmix": {}, "recipe": {}}, bad["foreign"])
    torch.save({"state_dict": Path("x")}, bad["pickle"])
    saved = torch.load(good, weights_only=True)
    saved["state_dict"].pop("fc2.bias")
    torch.save(saved, bad["misfit"])
    return bad[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_bad_checkpoint_to_evaluate(command, trained, tmp_path, kind):
    refused(command("eval", bad_checkpoint(kind, tmp_path, trained)), f"{kind}.pt")


def test_folder_without_checkpoints(command, tmp_path):
    refused(command("eval", tmp_path), "there is no model.pt")


@pytest.mark.parametrize("kind", KINDS)
def test_bad_checkpoint_to_resume_from(command, trained, tmp_path, kind):
    bad = bad_checkpoint(kind, tmp_path, trained)
    refused(command("train", RECIPES / "digits.yaml", *SMALL, "--resume", bad), f"{kind}.pt")


def test_resume_from_the_wrong_run(command, trained):
    last, model = trained / "O1-seed0" / "last.ckpt", trained / "O1-seed0" / "model.pt"
    train = ["train", RECIPES / "digits.yaml", *SMALL]
    refused(command(*train, "--compare", "--resume", last), r"give one seed \(seeds=\[0\]\) and no --compare")
    refused(command(*train, "seeds=[0,1]", "--resume", last), "goes on with one run")
    refused(command(*train, "--levels", "O1", "--resume", last), "goes on with one run.*no --compare or --levels")
    refused(command(*train, "--resume", model), "last.ckpt|model.pt")


def test_resume_another_network(command, trained):
    last = trained / "O1-seed0" / "last.ckpt"
    refused(command("train", RECIPES / "digits.yaml", *SMALL, "model.args.channels=3", "--resume", last), "last.ckpt")


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("level", ["O0", "O2", "O3"])
def test_resume_at_another_level(command, trained, level):
    last = trained / "O1-seed0" / "last.ckpt"
    result = command("train", RECIPES / "digits.yaml", *SMALL, f"cnmix.opt_level={level}", "--resume", last)
    refused(result, f"trained at O1 and not {level}")


def test_an_interrupt_says_what_was_kept_and_how_to_go_on(command, monkeypatch):
    from lightning.pytorch.callbacks import ModelCheckpoint

    saved, original = [], ModelCheckpoint.on_validation_end

    def interrupt_after_an_epoch(self, *arguments):
        if saved:
            raise KeyboardInterrupt
        original(self, *arguments)
        saved.append(True)

    monkeypatch.setattr(ModelCheckpoint, "on_validation_end", interrupt_after_an_epoch)
    code, output, _ = command("train", RECIPES / "digits.yaml", *SMALL, "epochs=3")
    assert code == 130
    last = re.search(r"kept in \S+; go on with --resume (\S+) seeds=\[0\] cnmix.opt_level=O1", output)[1]
    assert Path(last).is_file()
    assert command("eval", Path(last).parents[1])[0] == 0


def test_a_diverged_run_says_so(command):
    code, output, _ = command("train", RECIPES / "digits.yaml", *SMALL, "optimizer.args.lr=1e30")
    assert code == 0
    assert "test loss not finite: training diverged" in output
    assert re.search(r"│ loss +│ +– │", output)
    results = next(Path("runs").rglob("results.json")).read_text()
    assert '"test_loss": null' in results


def test_version(command):
    assert command("--version")[:2] == (0, "0.1.0\n")
