import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cnmix.recipe import load_recipe
from cnmix.shipped import find_recipe, shipped_recipes

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
ALL = {file.stem for file in RECIPES.glob("*.yaml")} | {"yolov3"}


def test_every_recipe_is_listed():
    recipes = shipped_recipes()
    assert set(recipes) == ALL
    assert list(recipes) == sorted(recipes)
    for recipe in recipes.values():
        assert 20 < len(recipe.description) < 160, recipe.name
        assert "\n" not in recipe.description
    assert recipes["mnist"].data == "folder=data/mnist"
    assert recipes["digits"].data == ""
    assert recipes["bert"].data.endswith("weights=data/bert-base-uncased")
    assert recipes["yolov3"].file == RECIPES / "yolov3" / "train.py"


@pytest.mark.parametrize("name", sorted(ALL - {"yolov3"}))
def test_tiny_is_there_where_it_is_said_to_be(name):
    if shipped_recipes()[name].tiny:
        assert load_recipe(name, tiny=True) != load_recipe(name)
    else:
        with pytest.raises(ValueError, match="has no tiny settings"):
            load_recipe(name, tiny=True)


def test_a_name_is_enough(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("digits", ["epochs=3"]) == load_recipe(RECIPES / "digits.yaml", ["epochs=3"])
    Path("digits").write_text("")
    assert find_recipe(Path("digits")) == Path("digits")  # one's own comes first
    with pytest.raises(FileNotFoundError, match="no recipe digit: `cnmix recipes` lists those that come with cnmix"):
        find_recipe(Path("digit"))
    with pytest.raises(FileNotFoundError, match="there is no recipe folder/text"):
        find_recipe(Path("folder/text"))
    with pytest.raises(ValueError, match=r"yolov3 has a script of its own: python .*train.py"):
        find_recipe(Path("yolov3"))


def test_command(command):
    code, output, error = command("recipes")
    assert (code, error) == (0, "")
    for name in ALL:
        assert re.search(rf"│ {name} +│", output), name
    code, output, error = command("recipes", "copy", "digits")
    assert (code, error) == (0, "")
    assert output.splitlines() == ["digits.yaml", "digits.py", "Train it: cnmix train digits.yaml"]
    for file in ("digits.yaml", "digits.py"):
        assert Path(file).read_bytes() == (RECIPES / file).read_bytes()


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_copy_is_whole(name, command, tmp_path):
    code, output, _ = command("recipes", "copy", name, "own/folder")
    assert code == 0
    *files, last = output.splitlines()
    copied = {str(each.relative_to(tmp_path)) for each in Path(tmp_path, "own").rglob("*") if each.is_file()}
    assert set(files) == copied
    assert last.endswith(files[0])
    # Whatever a copied file imports of the recipes was copied too.
    originals = {file.stem for file in RECIPES.rglob("*.py")}
    here = {Path(file).stem for file in files if file.endswith(".py")}
    for file in (Path(file) for file in files if file.endswith(".py")):
        tree = ast.parse(file.read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert imported & originals <= here
    if files[0].endswith(".yaml"):
        assert Path(load_recipe(files[0]).module).is_relative_to(tmp_path)


def test_a_copy_takes_no_file_from_anyone(command):
    assert command("recipes", "copy", "digits")[0] == 0
    assert command("recipes", "copy", "digits")[0] == 0  # the same again
    Path("digits.py").write_text("mine")
    Path("digits.yaml").unlink()
    code, _, error = command("recipes", "copy", "digits")
    assert code == 2
    assert error.strip() == "error: another file is there: digits.py; nothing was copied"
    assert Path("digits.py").read_text() == "mine"
    assert not Path("digits.yaml").exists()
    Path("bert.py").mkdir()
    assert "another file is there: bert.py" in command("recipes", "copy", "bert")[2]


def test_unknown_name(command):
    code, _, error = command("recipes", "copy", "digit")
    assert code == 2
    assert error.strip() == "error: unknown recipe 'digit': did you mean 'digits'?"


def test_an_installed_package_has_them(tmp_path):
    # What goes into a wheel, without the compiled part.
    build = [sys.executable, "-W", "ignore", "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "build_py"]
    subprocess.run([*build, "--build-lib", str(tmp_path / "lib")], cwd=ROOT, check=True, capture_output=True)
    script = "from cnmix import shipped; print(*(each.file for each in shipped.shipped_recipes().values()))"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "lib"), "CNMIX_NATIVE": "0"}
    process = [sys.executable, "-c", script]
    found = subprocess.run(process, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    files = {Path(file).resolve().relative_to(tmp_path.resolve() / "lib/cnmix/recipes") for file in found.split()}
    assert files == {recipe.file.relative_to(RECIPES) for recipe in shipped_recipes().values()}


def test_tiny_on_the_command_line(command):
    code, _, error = command("train", "digits", "--tiny")
    assert code == 2
    assert error.strip().endswith("digits.yaml has no tiny settings")
    sizes = ["data.args.train=64", "data.args.test=8", "data.args.digits=3", "model.args.width=8", "epochs=1"]
    code, output, error = command("train", "translation", "--tiny", "threads=1", *sizes)
    assert (code, error) == (0, "")
    assert re.search(r"Kept in runs/translation/", output)
