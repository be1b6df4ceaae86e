"""config -> compiled kernel: from memory, else from the disk cache, else compiled (and then cached).

A cached kernel is a file <key>.fa3: an object file, then the SHA-256 of it, then a mark. The key hashes everything that
decides the code: the config, the kernels' sources, the versions of the DSL, its CUDA code generator and TVM FFI, and the
architecture. Files appear whole (written beside, then renamed); a lock file per key lets one process compile while the
others wait for the result.

Environment: FA3_CACHE_DIR (else $XDG_CACHE_HOME/fa3, else ~/.cache/fa3); FA3_CACHE=0 turns the disk cache off.
"""

import ctypes
import fcntl
import hashlib
import os
import sys
import tempfile
import threading
import warnings
from contextlib import contextmanager
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import cutlass.cute as cute
from cutlass.cute.runtime import find_runtime_libraries, load_module

ARCHITECTURE = "sm_90a"
SYMBOL = "fa3_kernel"  # the name a kernel is exported under
MARK = b"fa3 kernel 1"  # last bytes of a cache file; the number changes with the file's format
DIGEST = hashlib.sha256().digest_size

_kernels = {}
_lock = threading.Lock()
_config_locks = {}
_stats = {"compiled": 0, "disk_hits": 0, "memory_hits": 0}


def get(config):
    """The kernel of a config: a callable that takes torch tensors and launches on torch's current stream."""
    kernel = _kernels.get(config)
    if kernel is not None:
        _stats["memory_hits"] += 1
        return kernel
    with _lock:
        config_lock = _config_locks.setdefault(config, threading.Lock())
    with config_lock:  # threads that want the same kernel wait for the first; others go on
        if config not in _kernels:
            _kernels[config] = _from_disk_or_compiled(config)
    return _kernels[config]


def stats():
    """How often this process compiled a kernel, read one from disk, and had one in memory."""
    return dict(_stats)


def clear():
    """Forgets the kernels in memory (not those on disk)."""
    _kernels.clear()


def compile(config, *options):
    """Compiles a config with the DSL, for Hopper, with or without a GPU; options are the DSL's own compiler options."""
    kernel = kernel_of(config)
    return cute.compile(
        kernel, *kernel.fake_arguments(), options=" ".join(("--enable-tvm-ffi", f"--gpu-arch {ARCHITECTURE}", *options))
    )


def kernel_of(config):
    """The kernel object, uncompiled, that a config describes."""
    from .kernels.backward import BackwardKernel
    from .kernels.backward_wide import WideBackwardKernel
    from .kernels.forward import ForwardKernel

    backward = WideBackwardKernel if getattr(config, "wide", False) else BackwardKernel
    return {"forward": ForwardKernel, "backward": backward}[config.family](config)


def _from_disk_or_compiled(config):
    directory = cache_dir()
    if directory is None:
        return _compiled(config)
    path = directory / f"{key(config)}.fa3"
    kernel = _load(path)
    if kernel is not None:
        return kernel
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _process_lock(path.with_suffix(".lock")):
            kernel = _load(path)  # another process may have finished it meanwhile
            if kernel is None:
                kernel = _compiled(config)
                _save(kernel, path)
            return kernel
    except OSError as error:
        warnings.warn(f"fa3 can't cache compiled kernels in {directory} ({error}); set FA3_CACHE_DIR", stacklevel=2)
        return kernel if kernel is not None else _compiled(config)


def _compiled(config):
    _stats["compiled"] += 1
    return compile(config)


def cache_dir():
    """The disk cache's directory, or None where FA3_CACHE=0 turns it off."""
    if os.environ.get("FA3_CACHE", "1") == "0":
        return None
    if os.environ.get("FA3_CACHE_DIR"):
        return Path(os.environ["FA3_CACHE_DIR"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "fa3"


def key(config):
    """The name of a config's kernel in the disk cache."""
    return hashlib.sha256(f"{config!r}\n{fingerprint()}".encode()).hexdigest()[:32]


@lru_cache
def fingerprint():
    """Everything beside the config that decides the compiled code, as text."""
    sources = Path(kernel_sources())
    lines = [ARCHITECTURE, f"code generator {code_generator()}"]
    for path in sorted(sources.rglob("*.py")):
        lines.append(f"{path.relative_to(sources)} {hashlib.sha256(path.read_bytes()).hexdigest()}")
    dsl = "nvidia-cutlass-dsl"
    for package in (dsl, f"{dsl}-libs-base", f"{dsl}-libs-cu12", f"{dsl}-libs-cu13", "apache-tvm-ffi"):
        lines.append(f"{package} {version(package)}")
    return "\n".join(lines)


def code_generator():
    """The file of the DSL's compiler that is in use: it ships one for each CUDA major version and picks by the driver."""
    return Path(sys.modules["cutlass._mlir._mlir_libs._cutlass_ir"].__file__).name


def kernel_sources():
    """The directory of the kernels' sources."""
    from . import kernels

    return os.path.dirname(kernels.__file__)


def version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _load(path):
    """The kernel in a cache file; None where there is no file, or one that is cut off or not ours: that one is removed."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if not intact(content):
        warnings.warn(f"fa3 dropped the damaged cache file {path}; the kernel is compiled again", stacklevel=2)
        path.unlink(missing_ok=True)
        return None
    _load_runtime()
    kernel = getattr(load_module(str(path), enable_tvm_ffi=True), SYMBOL)
    _stats["disk_hits"] += 1
    return kernel


def intact(content):
    """Whether a cache file's content is what _save wrote: not cut off, and not something else."""
    end = len(content) - len(MARK)
    body, digest, mark = content[: end - DIGEST], content[end - DIGEST : end], content[end:]
    return mark == MARK and hashlib.sha256(body).digest() == digest


def _save(kernel, path):
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".o")
    os.close(handle)
    try:
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's 0600 would shut out others who share the directory
        kernel.export_to_c(temporary, SYMBOL)
        body = Path(temporary).read_bytes()
        with open(temporary, "ab") as file:
            file.write(hashlib.sha256(body).digest() + MARK)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


@lru_cache
def _umask():
    """The process's file mode mask, read where it stands: os.umask() could only change it."""
    with open("/proc/self/status") as file:
        return next((int(line.split()[1], 8) for line in file if line.startswith("Umask:")), 0o022)


@lru_cache
def _load_runtime():
    """The DSL's runtime libraries, their symbols visible to the kernels that are loaded after them."""
    return [ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL) for path in find_runtime_libraries(enable_tvm_ffi=True)]


@contextmanager
def _process_lock(path):
    try:
        file = open(path, "a")
    except PermissionError:  # another user's lock file: reading it is enough to lock it
        file = open(path)
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
