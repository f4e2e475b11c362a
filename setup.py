"""Builds the optional compiled kernels, and takes the recipes along; everything else is in pyproject.toml."""

import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py


class BuildNative(build_ext):
    """Compiles with OpenMP where the compiler has it, and without where it has not.

    The extension is optional: where no compiler is found, the installation goes on without it.
    """

    def build_extension(self, ext: Extension) -> None:
        """Tries with OpenMP first."""
        if sys.platform == "win32":  # the sources use GCC's and Clang's intrinsics and attributes
            return
        plain_compile, plain_link = list(ext.extra_compile_args), list(ext.extra_link_args)
        try:
            ext.extra_compile_args = [*plain_compile, "-fopenmp"]
            ext.extra_link_args = [*plain_link, "-fopenmp"]
            super().build_extension(ext)
        except Exception:
            ext.extra_compile_args, ext.extra_link_args = plain_compile, plain_link
            super().build_extension(ext)


class BuildWithRecipes(build_py):
    """Copies the recipes into the package, where ``cnmix recipes`` finds them; an editable installation has none."""

    def run(self) -> None:
        """Copies them beside the modules."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "cnmix", "recipes")
            shutil.rmtree(target, ignore_errors=True)  # what an earlier build has left
            # The files of MANIFEST.in, and not what somebody's runs have left beside them.
            for file in Path("recipes").rglob("*"):
                if file.suffix in (".md", ".py", ".yaml"):
                    copy = target / file.relative_to("recipes")
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, copy)


native = "cnmix/kernels/native"
sources = (
    *("processor", "memory", "quantize", "layout", "digits", "panels", "product", "batch", "depthwise"),
    *("plan", "fused_product", "fused_depthwise", "fused_elements"),
)
headers = (
    *("common", "avx512", "rounding", "windows", "panels", "product", "tiles", "scratch"),
    *("plan", "chain", "fused_tiles"),
)
setup(
    cmdclass={"build_ext": BuildNative, "build_py": BuildWithRecipes},
    ext_modules=[
        Extension(
            "cnmix.kernels.native._native",
            [f"{native}/{name}.cpp" for name in sources],
            depends=[f"{native}/{name}.h" for name in headers],
            # No contraction to fused multiply-add: a product and a sum round separately, as the reference defines. The
            # last two change no value; without them floor is not vectorized.
            extra_compile_args=[
                *("-std=c++17", "-O3", "-fvisibility=hidden", "-ffp-contract=off"),
                *("-fno-math-errno", "-fno-trapping-math"),
            ],
            language="c++",
            optional=True,
        )
    ],
)
