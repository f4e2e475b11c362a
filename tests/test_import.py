import subprocess
import sys

MODULES = (
    "cnmix",
    "cnmix.checkpoint",
    "cnmix.core",
    "cnmix.inference",
    "cnmix.nn",
    "cnmix.plugins.precision",
    "cnmix.strategies",
)
OPTIONAL = (
    "lightning",
    "lightning_fabric",
    "pytorch_lightning",
    "rich",
    "typer",
    "omegaconf",
    "sklearn",
    "matplotlib",
    "scipy",
    "pandas",
    "transformers",
    "accelerate",
)


def run(code, *options):
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True)


def test_library_imports_no_optional_package():
    done = run(f"import {', '.join(MODULES)}, sys; print([n for n in {OPTIONAL!r} if n in sys.modules])", "-W", "error")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


NEEDS = {
    "cnmix.lightning": 'cnmix.lightning needs the package lightning: pip install "cnmix[recipes]" '
    "(for the package pytorch-lightning, import cnmix.pytorch_lightning)",
    "cnmix.pytorch_lightning": "cnmix.pytorch_lightning needs the package pytorch-lightning: pip install "
    '"cnmix[recipes]" (for the package lightning, import cnmix.lightning)',
    "cnmix.huggingface": 'cnmix.huggingface needs transformers and accelerate: pip install "cnmix[huggingface]"',
    "cnmix.cli": 'the command cnmix needs typer: pip install "cnmix[recipes]"',
}


def test_missing_packages_are_named():
    done = run(
        "import importlib, sys, cnmix\n"
        "for name in ('lightning', 'pytorch_lightning', 'transformers', 'typer'):\n"
        "    sys.modules.update({name: None, f'{name}.fabric': None})\n"
        f"for module in {list(NEEDS)}:\n"
        "    try: importlib.import_module(module)\n"
        "    except (ModuleNotFoundError, SystemExit) as error: print(error)\n"
    )
    assert done.stdout.splitlines() == list(NEEDS.values()), done.stderr


def test_recipe_without_omegaconf():
    done = run(
        "import sys; sys.modules['omegaconf'] = None\n"
        "from cnmix.plugins.precision import FixedPointPrecision as Plugin\n"
        "Plugin('O2', exclude=['head']); Plugin(recipe={})"
    )
    assert 'a recipe needs omegaconf: pip install "cnmix[recipes]"' in done.stderr.strip().splitlines()[-1]


def test_command_help_imports_no_training():
    done = run(
        "import sys; sys.argv = ['cnmix', '--help']; from cnmix.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "print([name for name in ('lightning', 'sklearn', 'omegaconf') if name in sys.modules])"
    )
    assert done.stdout.strip().splitlines()[-1] == "[]"
