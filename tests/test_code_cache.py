"""The compiler's files: what a killed process or a full disk has left of one is compiled again, with the same bits."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pyrovae.inference.tracing import code_cache
from pyrovae.inference.tracing.code_cache import fresh, verified


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of whole files in a cache of this test's own."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path / "pyrovae"


def compile_into_cache(*names: str) -> Path:
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"whole {name}")
    return folder


def test_files_of_whole_compilations_stay_and_all_others_go(cache: Path) -> None:
    with verified():
        assert compile_into_cache("ab/one.so", "ab/two.so", "cd/three.cpp", "cd/four.py") == cache
    (cache / "ab/two.so").write_text("wh")
    (cache / "cd/three.cpp").write_text("")
    (cache / "cd/four.py").write_text("WHOLE cd/four.py")  # of the same size
    (cache / "cd/five.so").write_text("of a process that was killed")
    (cache / "ab/link").symlink_to("/")
    with verified():
        assert {str(p.relative_to(cache)) for p in cache.rglob("*") if not p.is_dir()} == {"ab/one.so", "whole.json"}
    (cache / "whole.json").write_text("{")
    with verified():
        assert not (cache / "ab/one.so").exists()


def test_what_a_failure_leaves_is_not_whole(cache: Path) -> None:
    with verified():
        compile_into_cache("ab/one.so")

    def interrupted() -> None:
        with verified():
            compile_into_cache("ab/two.so")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with verified():
        assert (cache / "ab/one.so").exists()
        assert not (cache / "ab/two.so").exists()


def test_an_empty_folder_is_tried_last_and_its_success_is_a_verdict_on_the_other(cache: Path) -> None:
    with verified():
        compile_into_cache("ab/one.so")
    with pytest.raises(RuntimeError), fresh():
        raise RuntimeError("it cannot be compiled, which says nothing about the files")
    with verified():
        assert (cache / "ab/one.so").exists()
    with fresh():
        folder = compile_into_cache("ab/one.so")
        assert folder.parent == cache.parent
        assert folder != cache
    assert not folder.exists()
    with verified():
        assert not (cache / "ab/one.so").exists()


def test_the_callers_cache_is_its_own_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import codecache

    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    before = {**os.environ}, codecache._HEADER_DIR
    with verified():
        os.environ["TRITON_CACHE_DIR"] = "elsewhere"
        assert codecache._HEADER_DIR.startswith(str(cache))
    assert ({**os.environ}, codecache._HEADER_DIR) == before


SCRIPT = """
    import torch
    from pyrovae.inference.tracing.compiler import compile_graph
    from pyrovae.inference.tracing.recording import trace

    class Sums(torch.nn.Module):
        def forward(self, x):
            return x.exp().sum(1).log()

    x = torch.rand(50, 333, generator=torch.Generator().manual_seed(0))
    print("compiling", flush=True)
    print(compile_graph(trace(Sums(), x))(x).sum().item().hex())
"""


@pytest.mark.slow
def test_killed_while_compiling_and_damaged_afterwards_gives_the_same_bits(cache: Path) -> None:
    """Through the compiler itself: a process group is killed once a library is begun; then files are cut."""
    environment = {**os.environ, "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}

    def start() -> subprocess.Popen:
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True, start_new_session=True)

    killed = start()
    while killed.poll() is None and not list(cache.rglob("*.cpp")):
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    assert "0x" not in killed.communicate()[0]
    for source in cache.rglob("*.cpp"):  # as the linker leaves it
        source.with_suffix(".so").touch()

    whole, _ = start().communicate()
    assert "0x" in whole
    libraries = list(cache.rglob("*.so"))
    assert libraries
    assert all(path.stat().st_size for path in libraries)
    for path in (*libraries, *cache.rglob("*.py")):
        os.truncate(path, path.stat().st_size // 2)
    assert start().communicate()[0] == whole
    assert code_cache.read_record(cache) == code_cache.files(cache)
