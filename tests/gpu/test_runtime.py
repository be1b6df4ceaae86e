"""How calls live with CUDA and with each other: graphs, streams, threads, devices, host cost, and the kernel cache.

The cache is tested in child processes, each a first call in a fresh interpreter. The tests named test_time_* measure
time: run them alone (`-k time -n 0`) when the number itself matters.
"""

import concurrent.futures
import fcntl
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time

import pytest
import torch

from fa3 import flash_attn_func
from fa3.reference import attention

masks = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def inputs(batch, seqlen, heads, heads_kv, d, device="cuda"):
    draw = lambda h: torch.randn(batch, seqlen, h, d, device=device, dtype=torch.bfloat16)
    return draw(heads), draw(heads_kv), draw(heads_kv)


@pytest.fixture
def alone(tmp_path_factory):
    """One test with this fixture runs at a time, over all of pytest-xdist's workers."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    with open(shared / "alone.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# Graphs, streams, threads, devices.


@masks
def test_graph_replays_with_new_contents(causal):
    options = dict(causal=causal, return_attn_probs=True)
    static = inputs(2, 1000, 8, 2, 128)
    flash_attn_func(*static, **options)  # compiled and loaded before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = flash_attn_func(*static, **options)
        twice, _ = flash_attn_func(out, *static[1:], **options)  # a second call in the graph, on the first one's O
    for replays in (1, 1, 2, 5):
        for x, new in zip(static, inputs(2, 1000, 8, 2, 128)):
            x.copy_(new)
        for x in (out, lse, twice):
            x.fill_(float("nan"))
        for _ in range(replays):
            graph.replay()
        want, want_lse = flash_attn_func(*static, **options)
        assert torch.equal(out, want) and torch.equal(lse, want_lse)
        assert torch.equal(twice, flash_attn_func(want, *static[1:], **options)[0])
        truth, _ = attention(*static, causal=causal, out_dtype=torch.float32)
        torch.testing.assert_close(out.float(), truth, rtol=2e-2, atol=2e-2)


@masks
def test_graph_replayed_beside_eager_calls(causal):
    """A replay on one stream and calls on another, at once, share nothing that they write."""
    tensors = inputs(2, 1000, 8, 2, 128)
    want = flash_attn_func(*tensors, causal=causal)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flash_attn_func(*tensors, causal=causal)
    side, wrong = torch.cuda.Stream(), torch.zeros(2, dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    for _ in range(200):
        with torch.cuda.stream(side):
            graph.replay()
            wrong[0] += (out != want).sum()
        wrong[1] += (flash_attn_func(*tensors, causal=causal) != want).sum()
    torch.cuda.synchronize()
    assert wrong.tolist() == [0, 0]


@masks
def test_side_stream(causal):
    """The kernel waits for what its own stream did before, and for no other stream."""
    fresh = inputs(2, 300, 4, 4, 64)
    want = flash_attn_func(*fresh, causal=causal)
    stale = [torch.zeros_like(x) for x in fresh]
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        flash_attn_func(*stale, causal=causal)  # so that the stream owns memory, and allocating waits for nothing
    torch.cuda.synchronize()

    torch.cuda._sleep(1_000_000_000)  # half a second in which the default stream gets nothing done
    blocked = torch.cuda.Event()
    blocked.record()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # a kernel on any other stream would read the zeros
        for x, new in zip(stale, fresh):
            x.copy_(new)
        out = flash_attn_func(*stale, causal=causal)
        arrived = torch.empty_like(out, device="cpu").copy_(out)  # waits for the side stream alone
    assert not blocked.query(), "the default stream wasn't busy, so this test has shown nothing"
    assert torch.equal(arrived, want.cpu())
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def calls_in_threads(jobs, iterations):
    """Numbers of wrong elements, one a job (inputs, options), of jobs that run at once, each on a stream of its own."""
    expected = [flash_attn_func(*tensors, **options) for tensors, options in jobs]
    torch.cuda.synchronize()
    start = threading.Barrier(len(jobs), timeout=60)

    def work(job, want):
        tensors, options = job
        with torch.cuda.stream(torch.cuda.Stream()):
            wrong = torch.zeros((), dtype=torch.int64, device="cuda")
            start.wait()
            for _ in range(iterations):
                wrong += (flash_attn_func(*tensors, **options) != want).sum()
            return wrong.item()

    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(work, jobs, expected))


def test_two_threads():
    one_kernel = [(inputs(2, 333, 8, 2, 128), dict(causal=True)), (inputs(1, 1024, 4, 4, 128), dict(causal=True))]
    two_kernels = [(inputs(2, 333, 8, 2, 128), dict(causal=True)), (inputs(3, 777, 3, 1, 64), dict(softmax_scale=0.3))]
    for jobs in (one_kernel, two_kernels):
        assert calls_in_threads(jobs, iterations=300) == [0, 0]


@masks
def test_inference_mode(causal):
    tensors = inputs(2, 300, 4, 2, 64)
    want, want_lse = flash_attn_func(*tensors, causal=causal, return_attn_probs=True)
    with torch.inference_mode():
        inside = [x.clone() for x in tensors]
        for args in (tensors, inside):
            out, lse = flash_attn_func(*args, causal=causal, return_attn_probs=True)
            assert out.is_inference() and torch.equal(out, want) and torch.equal(lse, want_lse)


def test_current_device_is_left_as_it_was():
    """On the last GPU, which with two or more isn't the current one; a call follows its inputs."""
    last = torch.cuda.device_count() - 1
    tensors = inputs(2, 300, 4, 2, 64, device=f"cuda:{last}")
    with torch.cuda.device(0):
        for _ in range(3):
            out, lse = flash_attn_func(*tensors, causal=True, return_attn_probs=True)
            assert torch.cuda.current_device() == 0
        home = flash_attn_func(*(x.to("cuda:0") for x in tensors), causal=True)
        assert torch.cuda.current_device() == 0
    assert out.device == lse.device == tensors[0].device
    assert torch.equal(out.cpu(), home.cpu())
    want = attention(*tensors, causal=True, out_dtype=torch.float32)[0]
    torch.testing.assert_close(out.float(), want, rtol=2e-2, atol=2e-2)


def test_time_of_a_call_on_the_host(alone):
    """At most 40 µs to enqueue a call: the clock stops before the GPU is waited for, and the queue never fills."""
    q, k, v = inputs(1, 16, 1, 1, 64)
    costs = []
    for _ in range(31):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            flash_attn_func(q, k, v)
        costs.append((time.perf_counter() - start) / 200 * 1e6)
    torch.cuda.synchronize()
    assert statistics.median(costs) <= 40, f"µs a call, by chunk of 200: {[round(c, 1) for c in costs]}"


# The kernel cache.

CHILD = """
import json, signal, sys, threading, time
signal.alarm(240)  # a child that hangs dies, and its test fails
import torch, fa3, fa3.jit
from fa3.reference import attention

words = sys.argv[1:]
q = torch.randn(2, 256, 4, 64, device="cuda", dtype=torch.bfloat16)
torch.cuda.synchronize()
if "wait" in words:
    print("ready", flush=True)
    sys.stdin.readline()
outs = []
start = time.perf_counter()
if "threads" in words:
    threads = [threading.Thread(target=lambda: outs.append(fa3.flash_attn_func(q, q, q))) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
else:
    outs.append(fa3.flash_attn_func(q, q, q))
torch.cuda.synchronize()
seconds = time.perf_counter() - start
stats = fa3.jit.stats()
fa3.flash_attn_func(q, q, q)
again = fa3.jit.stats()
want = attention(q, q, q, out_dtype=torch.float32)[0]
print(json.dumps(dict(
    seconds=seconds, calls=len(outs), errors=[(out - want).abs().max().item() for out in outs],
    compiled=stats["compiled"], disk_hits=stats["disk_hits"],
    compiled_again=again["compiled"] - stats["compiled"], read_again=again["disk_hits"] - stats["disk_hits"],
)))
"""


def environment(**cache):
    """This process's environment and import path, without its cache settings, with these."""
    settings = ("FA3_CACHE", "FA3_CACHE_DIR", "XDG_CACHE_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in settings}
    return {**kept, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **{k: str(v) for k, v in cache.items()}}


def start_child(*words, stderr=subprocess.PIPE, **cache):
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True)
    return subprocess.Popen([sys.executable, "-c", CHILD, *words], env=environment(**cache), **pipes)


def report(child):
    """What the child found, once it has ended well; with its stderr where that was piped."""
    stdout, stderr = child.communicate()
    assert child.returncode == 0, stderr or "see the child's file of errors"
    found = json.loads(stdout.splitlines()[-1])
    assert max(found["errors"]) < 0.05, found
    assert found["compiled_again"] == found["read_again"] == 0, found  # the next call found the kernel in memory
    return {**found, "stderr": stderr}


def first_call(*words, **cache):
    """Seconds, compilations and files read of a first call in a new process with these cache settings."""
    return report(start_child(*words, **cache))


def kernels_in(directory):
    return sorted(directory.rglob("*.fa3"))


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A cache directory that holds the child's kernel."""
    directory = tmp_path_factory.mktemp("warm") / "not" / "there" / "yet"
    found = first_call(FA3_CACHE_DIR=directory)
    assert (found["compiled"], found["disk_hits"]) == (1, 0)
    assert len(kernels_in(directory)) == 1
    return directory


@pytest.fixture
def own(warm, tmp_path):
    """A copy of the warm cache directory for a test to spoil."""
    return shutil.copytree(warm, tmp_path / "cache")


def fastest(limit, directories):
    """The shortest first call over these cache directories; stops at the first within the limit."""
    seconds = []
    for directory in directories:
        seconds.append(first_call(FA3_CACHE_DIR=directory)["seconds"])
        if seconds[-1] <= limit:
            break
    return min(seconds)


def test_time_of_a_cold_first_call(alone, tmp_path):
    """5 s to compile and run, after imports; of three tries, since other workers share the CPU."""
    assert fastest(5, [tmp_path / str(i) for i in range(3)]) <= 5


def test_time_of_a_first_call_in_a_second_process(alone, warm):
    assert fastest(0.3, [warm] * 3) <= 0.3


def test_second_process_compiles_nothing(warm):
    found = first_call(FA3_CACHE_DIR=warm)
    assert (found["compiled"], found["disk_hits"]) == (0, 1)
    assert str(warm) not in found["stderr"]  # no complaint about the cache


def test_sixteen_processes_compile_once(alone, tmp_path):
    directory = tmp_path / "cache"
    errors = [open(tmp_path / f"{i}.txt", "w+") for i in range(16)]
    children = [start_child("wait", stderr=error, FA3_CACHE_DIR=directory) for error in errors]
    try:
        for i, child in enumerate(children):
            ready = child.stdout.readline()
            assert ready == "ready\n", (tmp_path / f"{i}.txt").read_text()
        for child in children:
            child.stdin.write("go\n")
            child.stdin.flush()
        for i, child in enumerate(children):
            child.wait()
            assert child.returncode == 0, (tmp_path / f"{i}.txt").read_text()
        found = [report(child) for child in children]
    finally:
        for child in children:
            child.kill()
        for error in errors:
            error.close()
    assert sum(f["compiled"] for f in found) == 1
    assert all(f["compiled"] + f["disk_hits"] == 1 for f in found)
    assert len(kernels_in(directory)) == 1


def test_threads_of_one_process_compile_once(tmp_path):
    found = first_call("threads", FA3_CACHE_DIR=tmp_path)
    assert (found["calls"], found["compiled"], len(kernels_in(tmp_path))) == (4, 1, 1)


def test_cache_switched_off_reads_and_writes_nothing(own):
    before = {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}
    found = first_call(FA3_CACHE="0", FA3_CACHE_DIR=own)
    assert (found["compiled"], found["disk_hits"]) == (1, 0)
    assert {path: path.read_bytes() for path in own.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("damage", ["half", "empty", "foreign"])
def test_damaged_file_is_rebuilt(own, damage):
    (file,) = kernels_in(own)
    good = file.read_bytes()
    bad = {"half": good[: len(good) // 2], "empty": b"", "foreign": b"not a kernel\n" * 5000}[damage]
    file.write_bytes(bad)
    found = first_call(FA3_CACHE_DIR=own)
    assert (found["compiled"], found["disk_hits"]) == (1, 0)
    assert kernels_in(own) == [file] and file.read_bytes() != bad
    found = first_call(FA3_CACHE_DIR=own)
    assert (found["compiled"], found["disk_hits"]) == (0, 1)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_unwritable_directory_costs_a_warning(tmp_path, place):
    """A file stands where the directory should be: root can't write there either."""
    (tmp_path / "file").write_text("in the way")
    found = first_call(FA3_CACHE_DIR=tmp_path / place)
    assert found["compiled"] == 1
    assert "warn" in found["stderr"].lower() and str(tmp_path / place) in found["stderr"]
    assert (tmp_path / "file").read_text() == "in the way"


def cache_dir(**cache):
    code = "import fa3.jit; print(fa3.jit.cache_dir())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(**cache), capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_cache_dir_follows_the_environment(tmp_path):
    xdg, own = tmp_path / "xdg", tmp_path / "own"
    assert cache_dir(XDG_CACHE_HOME=xdg).startswith(str(xdg))
    assert cache_dir(XDG_CACHE_HOME=xdg, FA3_CACHE_DIR=own).startswith(str(own))
    assert cache_dir(FA3_CACHE="0", FA3_CACHE_DIR=own) == "None"
