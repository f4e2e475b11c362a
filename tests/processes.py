"""Two processes that train together, kept for all tests of a session: starting one takes seconds."""

import multiprocessing
import queue
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_SECONDS = 180


class Processes:
    """Runs a function in every process at once, on a gloo group.

    Args:
        size: number of processes.
    """

    def __init__(self, size: int = 2) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        self._requests = [context.Queue() for _ in range(size)]
        self._answers = [context.Queue() for _ in range(size)]
        self._processes = [
            context.Process(target=_serve, args=(rank, size, store, requests, answers), daemon=True)
            for rank, (requests, answers) in enumerate(zip(self._requests, self._answers, strict=True))
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Calls ``function(rank, *args)`` in every process; returns what each returned, raises what one raised."""
        for requests in self._requests:
            requests.put((function, args))
        results, failures = [], []
        for rank, answers in enumerate(self._answers):
            try:
                failure, result = answers.get(timeout=_SECONDS)
            except queue.Empty:
                failure, result = f"rank {rank} did not answer", None
            results.append(result)
            failures += [] if failure is None else [failure]
        if failures:
            raise RuntimeError("\n".join(failures))
        return results

    def stop(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(rank: int, size: int, store: str, requests: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
    while True:
        function, args = requests.get()
        try:
            answers.put((None, function(rank, *args)))
        except BaseException:
            answers.put((traceback.format_exc(), None))
