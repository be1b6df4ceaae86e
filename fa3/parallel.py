"""The same work on many configs, in parallel processes with a progress bar."""

import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

from .terminal import progress


def cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_configs(function, configs, title, jobs=None):
    """[(config, what function(config) returned, or the exception it raised)], in the order of configs.

    function: importable by name; what it returns is pickled. jobs: processes, one a core by default.
    New processes are spawned, not forked: a fork of a process that has used CUDA, or has threads, is not safe.
    """
    configs = list(configs)
    jobs = min(jobs or cores(), len(configs))
    found = {}
    with progress(title, len(configs)) as step:
        if jobs <= 1:
            for i, config in enumerate(configs):
                found[i] = outcome(function, config)
                step()
        else:
            with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
                futures = {pool.submit(function, config): i for i, config in enumerate(configs)}
                for future in as_completed(futures):
                    found[futures[future]] = outcome(future.result)
                    step()
    return [(config, found[i]) for i, config in enumerate(configs)]


def outcome(function, *arguments):
    """What a function returns, or the exception that it raises."""
    try:
        return function(*arguments)
    except Exception as error:
        return error
