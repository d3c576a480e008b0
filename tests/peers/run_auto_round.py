"""Run auto-round on a list of jobs, with plain rounding. Executed by the interpreter of auto-round's own environment.

Usage: python run_auto_round.py JOBS.json

JOBS.json is a list of objects. Of a job, `model` and `out` are folders; `route` is "auto" (the default: auto-round
chooses, model-free where that can do it) or "regular"; `bf16` says what auto-round shall believe of this CPU (its
regular route casts models to bfloat16 where it can and to float32 where it cannot; without the key it finds out by
itself). All other keys are handed to `AutoRound`, except `name`, which is ours; `format` goes to saving as well.

Prints one line of JSON for each job as it ends: name, ok, seconds, and error if it failed. What a job itself prints
goes to OUT.log. Every job runs in its own fork, because state is shared between runs inside one process.
"""

import gc
import json
import multiprocessing
import os
import shutil
import sys
import time
import traceback
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from types import SimpleNamespace

FORK = multiprocessing.get_context("fork")
OURS = ("name", "model", "out", "route", "bf16")


def run(job: dict[str, object]) -> None:
    """Quantize one model; its files end up directly in the job's `out` whatever the route."""
    from auto_round import AutoRound
    from auto_round.compressors import model_free
    from auto_round.utils.device_manager import CpuARDevice

    # Its workers are new interpreters, ten seconds each for a model of a megabyte; a fork computes the same.
    model_free.mp = SimpleNamespace(get_context=lambda _: FORK)

    if "bf16" in job:
        CpuARDevice.supports_bf16 = lambda self: bool(job["bf16"])
    options = {key: value for key, value in job.items() if key not in OURS}
    if job.get("route") == "regular":
        options["disable_model_free"] = True
    out = Path(str(job["out"]))
    shutil.rmtree(out, ignore_errors=True)
    compressor = AutoRound(str(job["model"]), iters=0, disable_opt_rtn=True, device_map="cpu", **options)
    _, folder = compressor.quantize_and_save(str(out), format=str(job.get("format", "auto_round")))
    folder = Path(str(folder))
    if folder.resolve() != out.resolve():  # the regular route writes to a folder of its own inside `out`
        for file in folder.iterdir():
            file.rename(out / file.name)
        folder.rmdir()


def run_logged(job: dict[str, object], sender: Connection) -> None:
    """Carry out a job with its output in a log file, and send how it went."""
    work = Path(f"{job['out']}.work")  # auto-round leaves a folder in the current directory
    work.mkdir(parents=True, exist_ok=True)
    os.chdir(work)
    with Path(f"{job['out']}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    start = time.monotonic()
    result: dict[str, object] = {"name": job["name"], "ok": True}
    try:
        run(job)
    except Exception as error:  # whatever it is, it is the result of this job
        traceback.print_exc()
        result |= {"ok": False, "error": f"{type(error).__name__}: {error}"}
    sender.send(result | {"seconds": round(time.monotonic() - start, 1)})


def main(jobs_path: str) -> None:
    import auto_round.compressors.model_free  # noqa: F401  every fork inherits this import, which takes seconds
    import torch

    torch.set_num_threads(1)  # the jobs share the cores
    gc.freeze()  # auto-round collects garbage after each layer; nothing that was imported is garbage
    waiting: list[dict[str, object]] = json.loads(Path(jobs_path).read_text())
    running: dict[Connection, tuple[dict[str, object], ForkProcess]] = {}
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            job = waiting.pop(0)
            receiver, sender = FORK.Pipe(duplex=False)
            process = FORK.Process(target=run_logged, args=(job, sender))
            process.start()
            sender.close()
            running[receiver] = (job, process)
        for ready in wait(list(running)):
            assert isinstance(ready, Connection)
            job, process = running.pop(ready)
            try:
                result = ready.recv()
            except EOFError:
                result = {"name": job["name"], "ok": False, "error": "the process died"}
            process.join()
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
