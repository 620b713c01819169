"""Kill a tiny study again and again: a program of its own, because it forks before torch has started a thread.

    python killed_study.py FOLDER KILLS SEED     -> {"kills": 25, "studies": 2, "summaries": [...]} on standard output

Every round forks a driver (a study inside ``mech.on_folder``) and a worker (``mech work``), and kills the driver, the
worker or both with SIGKILL after a random time. A study that ends before all kills are spent is followed by another.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

import mech
from mech.scale.work import work
from mech.study import Settings, study

TINY = Settings(
    n_find=4, n_test=4, n_other=4, n_maps=1, n_causal=0, n_gating=0, n_forms=0, n_random=1, n_control=1, fractions=(1,),
    other_fractions=(1,),
    methods=("mean", "resample"), shares=(), batch_size=2,
)  # fmt: skip


def drive(folder):
    with mech.on_folder(folder / "blocks", batches=1, threads=1):
        study(folder, ["reference:llava-s"], ["grounding"], settings=TINY)


def join(folder):
    while not (folder / "blocks" / "runs").is_dir():
        time.sleep(0.01)
    work(str(folder / "blocks"), pause=0.02, linger=5.0)


def forked(task, folder):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            os.dup2(2, 1)
            task(folder)
            code = 0
        finally:
            os._exit(code)
    return child


def stopped(child):
    """Kill a child, whether it is there or not, and collect it."""
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def one_round(folder, seconds, victim):
    """Whether the driver came to its end, and whether something was killed."""
    driver, worker = forked(drive, folder), forked(join, folder)
    stop, status = time.monotonic() + seconds, None
    while time.monotonic() < stop and status is None:
        time.sleep(0.01)
        done, code = os.waitpid(driver, os.WNOHANG)
        status = code if done else None
    killed = status is None
    if killed:
        for child in {"driver": [driver], "worker": [worker], "both": [driver, worker]}[victim]:
            stopped(child)
        if victim == "worker":  # the driver goes on alone
            _, status = os.waitpid(driver, 0)
        else:
            time.sleep(0.1)  # the worker goes on alone
    stopped(worker)
    if status not in (None, 0):
        raise SystemExit(f"the driver ended with {status}")
    return status == 0, killed


def numbers(folder):
    """The summary without what is of its moment."""
    summary = json.loads((folder / "summary.json").read_text())
    return {key: value for key, value in summary.items() if key not in ("provenance", "mech_checksum")}


def main(folder, kills, seed):
    rng, spent, found = random.Random(seed), 0, []
    while spent < kills or not found:
        here = folder / str(len(found))
        done = False
        while not done:
            seconds = rng.uniform(0.2, 2.5) if spent < kills else float("inf")
            done, killed = one_round(here, seconds, rng.choice(("driver", "worker", "both")))
            spent += killed
        found.append(numbers(here))
    print(json.dumps({"kills": spent, "studies": len(found), "summaries": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
