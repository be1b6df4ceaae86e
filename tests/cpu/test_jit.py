"""The disk cache without a GPU: kernels are compiled for Hopper, kept, found again, and rebuilt when they are damaged."""

import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from fa3 import jit
from fa3.kernels.configs import ForwardConfig
from fa3.plan import shipped

SMALL = ForwardConfig(head_dim=64, tile_m=128, tile_n=32)  # compiles in under a second

CHILD = """
import json, sys
from fa3 import jit
from fa3.kernels.configs import ForwardConfig

print("ready", flush=True)
sys.stdin.readline()
assert callable(jit.get(ForwardConfig(head_dim=64, tile_m=128, tile_n=32)))
print(json.dumps(jit.stats()))
"""


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache directory of the test's own, and no kernels in memory."""
    for name in ("FA3_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FA3_CACHE_DIR", str(tmp_path / "cache"))
    jit.clear()
    jit.fingerprint.cache_clear()
    yield tmp_path / "cache"
    jit.clear()
    jit.fingerprint.cache_clear()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A directory with SMALL's kernel, which another process compiled."""
    directory = tmp_path_factory.mktemp("compiled")
    assert finish(start_child(directory)) == (1, 0)
    return directory


def start_child(directory):
    environment = {name: value for name, value in os.environ.items() if name != "FA3_CACHE"}
    environment["FA3_CACHE_DIR"] = str(directory)
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    child = subprocess.Popen([sys.executable, "-c", CHILD], env=environment, **pipes)
    line = child.stdout.readline()
    assert line == "ready\n", line + child.stderr.read()
    return child


def finish(child):
    """(kernels compiled, kernels read from disk) by a child that was waiting."""
    stdout, stderr = child.communicate("go\n", timeout=120)
    assert child.returncode == 0, stderr
    stats = json.loads(stdout.splitlines()[-1])
    return stats["compiled"], stats["disk_hits"]


def fetch(config=SMALL):
    """(kernels compiled, kernels read from disk) by one jit.get of a config that isn't in memory."""
    jit.clear()
    before = jit.stats()
    assert callable(jit.get(config))
    after = jit.stats()
    return after["compiled"] - before["compiled"], after["disk_hits"] - before["disk_hits"]


def files(directory, pattern="*"):
    return sorted(p.name for p in directory.rglob(pattern) if p.is_file())


def test_memory_then_disk_then_compile(cache):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert fetch() == (1, 0)
        before, kernel = jit.stats(), jit.get(SMALL)
        assert jit.get(SMALL) is kernel and jit.stats()["memory_hits"] == before["memory_hits"] + 2
        assert fetch() == (0, 1)
    assert not [w for w in caught if "fa3" in str(w.message)]
    assert files(cache, "*.fa3") == [f"{jit.key(SMALL)}.fa3"]
    assert not files(cache, "*.o")


def test_another_process_reads_what_one_compiled(compiled, monkeypatch):
    assert finish(start_child(compiled)) == (0, 1)
    monkeypatch.setenv("FA3_CACHE_DIR", str(compiled))
    assert fetch() == (0, 1)  # this process names the kernel alike


def test_processes_started_together_compile_once(cache):
    children = [start_child(cache) for _ in range(4)]
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    found = [finish(child) for child in children]
    assert sorted(found) == [(0, 1), (0, 1), (0, 1), (1, 0)]
    assert len(files(cache, "*.fa3")) == 1 and not files(cache, "*.o")


def test_threads_compile_once():
    before, kernels = jit.stats()["compiled"], []
    threads = [threading.Thread(target=lambda: kernels.append(jit.get(SMALL))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kernels) == 4 and len(set(map(id, kernels))) == 1
    assert jit.stats()["compiled"] == before + 1


DAMAGE = {
    "half": lambda good: good[: len(good) // 2],
    "empty": lambda good: b"",
    "last byte missing": lambda good: good[:-1],
    "foreign": lambda good: b"not a kernel\n" * 5000,
    "one bit": lambda good: good[:1000] + bytes([good[1000] ^ 1]) + good[1001:],
    "of an older format": lambda good: good[:-1] + b"0",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_dropped_and_rebuilt(damage, compiled, cache):
    shutil.copytree(compiled, cache)
    path = cache / f"{jit.key(SMALL)}.fa3"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    bad = path.read_bytes()
    with pytest.warns(UserWarning, match=f"damaged.*{path.name}"):
        assert fetch() == (1, 0)
    assert path.read_bytes() != bad
    assert fetch() == (0, 1)


def test_cache_switched_off(cache, compiled, monkeypatch):
    monkeypatch.setenv("FA3_CACHE_DIR", str(compiled))
    monkeypatch.setenv("FA3_CACHE", "0")
    before = files(compiled)
    assert jit.cache_dir() is None
    assert fetch() == (1, 0)  # though the kernel is there
    assert files(compiled) == before


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_unwritable_directory_costs_a_warning(place, tmp_path, monkeypatch):
    """A file stands where the directory should be: root can't write there either."""
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FA3_CACHE_DIR", str(tmp_path / place))
    with pytest.warns(UserWarning, match=str(tmp_path / place)):
        assert fetch() == (1, 0)
    assert (tmp_path / "file").read_text() == "in the way"


def test_full_disk_costs_a_warning_and_leaves_no_part_of_a_file(cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jit.os, "replace", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert fetch() == (1, 0)
    assert not files(cache, "*.fa3") and not files(cache, "*.o")


def test_a_kernel_that_does_not_compile_leaves_nothing(cache, monkeypatch):
    def broken(config):
        raise RuntimeError("no such instruction")

    with monkeypatch.context() as patch:
        patch.setattr(jit, "compile", broken)
        with pytest.raises(RuntimeError, match="no such instruction"):
            jit.get(SMALL)
    assert not files(cache, "*.fa3")
    assert fetch() == (1, 0)


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert jit.cache_dir() == tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert jit.cache_dir() == tmp_path / "cache"  # $FA3_CACHE_DIR goes first
    monkeypatch.delenv("FA3_CACHE_DIR")
    assert jit.cache_dir() == tmp_path / "xdg" / "fa3"
    monkeypatch.setenv("FA3_CACHE_DIR", "~/kernels")
    assert jit.cache_dir() == Path.home() / "kernels"
    monkeypatch.delenv("FA3_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert jit.cache_dir() == Path.home() / ".cache" / "fa3"


def test_xdg_directory_is_used(monkeypatch, tmp_path):
    monkeypatch.delenv("FA3_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert fetch() == (1, 0)
    assert files(tmp_path / "xdg" / "fa3", "*.fa3") == [f"{jit.key(SMALL)}.fa3"]


# What a key depends on.


def key_now(config=SMALL):
    jit.fingerprint.cache_clear()
    return jit.key(config)


def test_every_config_has_a_key_of_its_own():
    configs = shipped() + [SMALL, replace(SMALL, lse=not SMALL.lse)]
    assert len({jit.key(c) for c in configs}) == len(set(configs))
    assert jit.key(SMALL) == jit.key(replace(SMALL))


def test_key_follows_the_kernels_sources(monkeypatch, tmp_path):
    before = key_now()
    copy = shutil.copytree(jit.kernel_sources(), tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(jit, "kernel_sources", lambda: str(copy))
    assert key_now() == before  # where the sources are doesn't matter, nor what is not source
    source = next(iter((copy / "parts").glob("*.py")))
    source.write_text(source.read_text() + "\n# changed\n")
    changed = key_now()
    assert changed != before
    (copy / "parts" / "new.py").write_text("")
    assert key_now() not in (before, changed)


@pytest.mark.parametrize("package", ["nvidia-cutlass-dsl", "apache-tvm-ffi", "nvidia-cutlass-dsl-libs-cu13"])
def test_key_follows_the_compilers_versions(package, monkeypatch):
    before, real = key_now(), jit.version
    monkeypatch.setattr(jit, "version", lambda name: "0.0.1" if name == package else real(name))
    assert key_now() != before


def test_key_follows_the_architecture(monkeypatch):
    before = key_now()
    monkeypatch.setattr(jit, "ARCHITECTURE", "sm_100a")
    assert key_now() != before
