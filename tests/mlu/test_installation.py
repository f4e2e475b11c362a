"""How the emulation comes into a process, and that it comes only where it was asked for."""

import importlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from cnmix.torch_mlu import card, installation
from cnmix.torch_mlu.card import build, sources

library = importlib.import_module("cnmix.torch_mlu.card.library")  # the package has a function of this name


def python(source: str, *arguments: str, folder: Path | None = None) -> str:
    """Runs a program in a Python of its own and returns what it prints."""
    command = [sys.executable, "-W", "error", *arguments, "-c", textwrap.dedent(source)]
    found = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def test_nothing_changes_in_a_process_that_did_not_ask() -> None:
    printed = python("""
        import torch
        def names():
            return [set(vars(each)) for each in (torch, torch.Tensor, torch.nn.Module, torch.backends)]
        before = names()
        import sys
        finders = list(sys.meta_path)
        import cnmix, cnmix.torch_mlu
        from cnmix.torch_mlu import installation
        assert not cnmix.torch_mlu.is_installed()
        assert names() == before
        assert sys.meta_path == finders
        for text in ("mlu", "mlu:0"):
            try:
                torch.device(text)
            except RuntimeError:
                continue
            raise SystemExit("there is a device mlu")
        try:
            import torch_mlu
        except ModuleNotFoundError:
            print("as before")
    """)
    assert printed == "as before"


def test_importing_cnmix_does_not_load_it() -> None:
    printed = python("import sys, cnmix; print([name for name in sys.modules if name.startswith('cnmix.torch_mlu')])")
    assert printed == "[]"


def test_the_vendors_names_are_the_same_modules() -> None:
    import torch_mlu
    import torch_mlu.core.device.notifier
    import torch_mlu.core.mlu_model as ct

    import cnmix.torch_mlu.core.mlu_model

    assert torch_mlu is cnmix.torch_mlu
    assert ct is cnmix.torch_mlu.core.mlu_model is torch_mlu.core.mlu_model
    assert ct.__name__ == "cnmix.torch_mlu.core.mlu_model"
    assert ct.__spec__ is not None
    assert ct.__spec__.name == "cnmix.torch_mlu.core.mlu_model"
    assert torch_mlu.core.device.notifier.Notifier is ct.Notifier
    with pytest.raises(ModuleNotFoundError, match=r"torch_mlu\.nothing"):
        import torch_mlu.nothing
    with pytest.raises(AttributeError, match=r"'torch_mlu' has no attribute 'nothing'"):
        torch_mlu.nothing  # noqa: B018
    with pytest.raises(AttributeError, match=r"'torch_mlu.core' has no attribute 'nothing'"):
        torch_mlu.core.nothing  # noqa: B018


def test_installing_again_changes_what_is_given() -> None:
    import cnmix.torch_mlu.settings

    cnmix.torch_mlu.install(3)
    cnmix.torch_mlu.install(strict=True)
    found = cnmix.torch_mlu.settings.settings()
    assert (found.cards, found.strict, found.card.name) == (3, True, "MLU370")
    assert sum(isinstance(finder, installation._Finder) for finder in sys.meta_path) == 1


def test_the_vendors_own_package_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "torch_mlu").mkdir()
    (tmp_path / "torch_mlu" / "__init__.py").write_text("vendor = True\n")
    printed = python(
        """
        import cnmix.torch_mlu
        try:
            cnmix.torch_mlu.install()
        except RuntimeError as error:
            print(error)
        import torch, torch_mlu
        assert torch_mlu.vendor and not hasattr(torch, "mlu")
        """,
        folder=tmp_path,
    )
    assert "the vendor's torch_mlu is installed" in printed
    assert str(tmp_path / "torch_mlu" / "__init__.py") in printed


def test_a_folder_of_that_name_is_not_the_vendors_package(tmp_path: Path) -> None:
    (tmp_path / "torch_mlu").mkdir()
    python(
        """
        import torch_mlu
        import cnmix.torch_mlu
        cnmix.torch_mlu.install()
        import torch_mlu
        assert torch_mlu is cnmix.torch_mlu
        """,
        folder=tmp_path,
    )


def test_a_module_that_a_script_made_is_not_the_vendors_package() -> None:
    python("""
        import sys, types
        sys.modules["torch_mlu"] = types.ModuleType("torch_mlu")
        import cnmix.torch_mlu
        cnmix.torch_mlu.install()
        import torch_mlu
        assert torch_mlu is cnmix.torch_mlu
    """)


def test_what_cannot_be_had_changes_nothing() -> None:
    printed = python("""
        import os, torch, cnmix.torch_mlu
        for arguments in ({"cards": 65}, {"card_name": "MLU100"}):
            try:
                cnmix.torch_mlu.install(**arguments)
            except ValueError as error:
                print(error)
        os.environ["MLU_VISIBLE_DEVICES"] = ",".join(map(str, range(65)))
        try:
            cnmix.torch_mlu.install()
        except ValueError as error:
            print(error)
        print(cnmix.torch_mlu.is_installed(), hasattr(torch, "mlu"), hasattr(torch.Tensor, "mlu"))
    """)
    assert printed.count("0 to 64 emulated cards, not 65") == 2
    assert "no card 'MLU100'" in printed
    assert printed.splitlines()[-1] == "False False False"


def test_threads_import_the_vendors_names_at_once() -> None:
    import threading

    import torch_mlu

    names = [
        "core.mlu_model",
        "core.mlu_quantize",
        "core.device.notifier",
        "core.amp",
        "logs",
        "core.quantized.qscheme",
    ]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(10):
            for name in names:
                sys.modules.pop(f"torch_mlu.{name}", None)
            threads = [threading.Thread(target=importlib.import_module, args=(f"torch_mlu.{name}",)) for name in names]
            for each in threads:
                each.start()
            for each in threads:
                each.join()
            for name in names:
                module = sys.modules[f"torch_mlu.{name}"]
                assert module.__name__ == module.__spec__.name == f"cnmix.torch_mlu.{name}"
                assert module.__package__ == f"cnmix.torch_mlu.{name}".rpartition(".")[0]
                assert not hasattr(module, "__path__")
    finally:
        sys.setswitchinterval(interval)
    assert torch_mlu.core.mlu_model is sys.modules["torch_mlu.core.mlu_model"]


def test_another_private_use_device_is_left_alone() -> None:
    printed = python("""
        import torch, cnmix.torch_mlu
        torch.utils.rename_privateuse1_backend("npu")
        try:
            cnmix.torch_mlu.install()
        except RuntimeError as error:
            print(error)
    """)
    assert printed == "PyTorch's one private-use device is 'npu' in this process: run without it"


def test_settings_come_from_the_environment() -> None:
    printed = python("""
        import os
        os.environ.update(MLU_VISIBLE_DEVICES="0,1,2", CNMIX_STRICT_DEVICE="1", DEFAULT_MLU_DEVICE_NAME="MLU290")
        import torch, cnmix.torch_mlu
        from cnmix.torch_mlu.settings import settings
        try:
            settings()
        except RuntimeError as error:
            print(error)
        cnmix.torch_mlu.install()
        print(settings().cards, settings().strict, torch.mlu.get_device_name(), torch.mlu.is_using_floating_device())
    """)
    first, second = printed.splitlines()
    assert first == "the emulated torch_mlu is not in place: call cnmix.torch_mlu.install() first"
    assert second == "3 True MLU290 False"


def test_without_a_compiler_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler was found: install g\+\+ or clang\+\+.* variable CXX"):
        build()
    monkeypatch.setenv("CXX", "nothing -O3")
    with pytest.raises(RuntimeError, match=r"no compiler 'nothing', which the environment variable CXX names"):
        build()


def test_sources_that_do_not_compile_are_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'error: no such header' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"{compiler} -with arguments")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(
        RuntimeError, match=r"broken -with arguments could not compile .* card's memory.cpp[\s\S]*no such header"
    ):
        build()
    assert [each.name for each in (tmp_path / "cnmix").iterdir()] == ["card.lock"]


def test_what_is_compiled_serves_without_a_compiler_from_a_folder_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiled = build()
    (tmp_path / "cnmix").mkdir()
    (tmp_path / "cnmix" / compiled.name).write_bytes(b"")
    (tmp_path / "cnmix").chmod(0o555)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build() == tmp_path / "cnmix" / compiled.name
    assert [each.name for each in (tmp_path / "cnmix").iterdir()] == [compiled.name]


def test_a_broken_file_in_the_cache_is_compiled_again(tmp_path: Path) -> None:
    compiled = build()
    (tmp_path / "cnmix").mkdir()
    (tmp_path / "cnmix" / compiled.name).write_bytes(b"cut off")
    printed = python(
        f"""
        import os, shutil
        os.environ["XDG_CACHE_HOME"] = {str(tmp_path)!r}
        from cnmix.torch_mlu.card import sources
        def compile(command):
            if "-shared" in command:
                shutil.copy({str(compiled)!r}, command[command.index("-o") + 1])
        sources._errors = compile
        import torch, cnmix.torch_mlu
        cnmix.torch_mlu.install()
        print(torch.zeros(1, device="mlu").device)
        """
    )
    assert printed == "mlu:0"


def test_a_file_in_the_cache_that_stays_broken_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "card-0.so").write_bytes(b"cut off")
    monkeypatch.setattr(library, "build", lambda: tmp_path / "card-0.so")
    with pytest.raises(RuntimeError, match=r"cannot be loaded: .* Delete .*card-0\.so, or set XDG_CACHE_HOME"):
        library._load()


def test_a_user_without_a_home_has_a_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = sources._writable(sources._users_cache())
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o077 == 0


def test_where_it_cannot_run_the_error_says_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.os, "name", "nt")
    with pytest.raises(RuntimeError, match="runs on Linux and macOS"):
        build()


def test_what_pytorch_refuses_at_registration_is_an_error_of_pythons() -> None:
    with pytest.raises(RuntimeError, match="could be registered once"):
        card.library().register()


def test_the_backward_pass_runs_on_the_callers_thread() -> None:
    import threading

    threads = []
    x = torch.ones(2, device="mlu", requires_grad=True)
    x.register_hook(lambda gradient: threads.append(threading.get_ident()))
    (x * 2).sum().backward()
    assert threads == [threading.get_ident()]
