"""Samples per second against workers: one and two measured here, more by a simulated clock on the measured blocks.

    python benchmarks/scale.py                      # two minutes on two cores

A worker is a process of ``mech work`` with one thread; the driver computes nothing. Block times are those the workers
recorded in their parts. What a block costs the driver (cutting, digests, packing, polling) and the store (a part with
its checksum, synced) is measured separately, on blocks that compute nothing. With these three the clock runs 8, 64 and
512 workers, for blocks as long as measured here and for blocks of twenty seconds, the default.
"""

import argparse
import subprocess
import sys
import tempfile
import time

import numpy as np
import xarray as xr
from record import record

import mech
from mech.data.samples import Samples
from mech.scale import per_sample
from mech.scale.executors import Here
from mech.scale.folder import Folder
from mech.scale.growth import grow, stops_at
from mech.scale.run import WANTED, Run, driving
from mech.scale.work import ABOUT

BATCH, BATCHES = 16, 4


@per_sample("nothing")
def nothing(model, samples: Samples, *, batch_size: int = 8) -> xr.Dataset:
    """A measurement that costs nothing to compute: what is left are the costs of driver and store."""
    values = np.zeros((len(samples), len(model.cfg.attention_layers), model.cfg.n_heads))
    ids = [sample.id for sample in samples]
    return xr.Dataset({"ram": (("example", "layer", "head"), values)}, {"example": ids})


def with_workers(n: int, samples: Samples, model: mech.HookedMLLM) -> tuple[float, list[float]]:
    """Samples per second of n warm workers, and the seconds of every block."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", "from mech.cli import main; main()", "work", folder, "--linger", "5", "-q"]
        workers = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(n)]
        with mech.on_folder(folder, works=False, batches=BATCHES, threads=1):
            mech.retrieval_attention_mass(model, samples[: BATCH * BATCHES * n], batch_size=BATCH)  # opens the models
            started = time.perf_counter()
            mech.retrieval_attention_mass(model, samples, batch_size=BATCH)
            took = time.perf_counter() - started
        for worker in workers:
            worker.wait()
        place = Folder(folder)
        parts = [place.part(key) for key in place.keys("parts")]
        return len(samples) / took, [part.attrs[ABOUT]["seconds"] for part in parts if part is not None]


def overheads(samples: Samples, model: mech.HookedMLLM) -> tuple[float, float]:
    """Seconds that a block costs the driver, and the store."""
    with tempfile.TemporaryDirectory() as folder:
        place = Folder(folder)
        with driving(Run(place, Here(place, publish=True), batches=BATCHES)) as run:
            started = time.perf_counter()
            run.measure(nothing.measure, model, samples, {"batch_size": BATCH})
            whole = (time.perf_counter() - started) / run.seen.ended
        part = place.part(place.keys("parts")[0])
        assert part is not None
        started = time.perf_counter()
        for i in range(20):
            place.land(f"timed{i}", part)
        return whole, (time.perf_counter() - started) / 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=768)
    parser.add_argument("--model", default="reference:llava-s")
    given = parser.parse_args()
    model = mech.HookedMLLM.from_pretrained(given.model)
    samples = mech.haystacks("grounding", n=given.samples, seed=0)
    pace, blocks = {}, []
    for n in (1, 2):
        pace[n], seconds = with_workers(n, samples, model)
        blocks = blocks or seconds
    driver, store = overheads(samples, model)
    print(f"measured: {pace[1]:.1f} samples/s with one worker, {pace[2]:.1f} with two")
    print(f"a block of {BATCH * BATCHES} samples: {sum(blocks) / len(blocks):.2f} s; "
          f"driver {1000 * driver:.1f} ms, store {1000 * store:.1f} ms")  # fmt: skip
    times = {"as measured": blocks, f"of {WANTED:g} s": [WANTED]}
    clock: dict[str, dict[int, float]] = {}
    for name, seconds in times.items():
        per_block = BATCH * BATCHES * (sum(seconds) / len(seconds)) / (sum(blocks) / len(blocks))
        stop = stops_at(seconds, driver=driver, store=store)
        print(f"blocks {name}: more than {stop} workers add nothing")
        clock[name] = {"stops_at": stop}
        for n in (1, 2, 8, 64, 512):
            found = grow(seconds, samples=round(per_block), workers=n, driver=driver, store=store)
            limit = max(found.busy, key=lambda who: found.busy[who])
            print(f"  {n:4} workers: {found.pace:10.1f} samples/s, {found.efficiency:6.1%} of linear "
                  f"({limit} busy {found.busy[limit]:.0%})")  # fmt: skip
            clock[name][n] = round(found.pace, 1)
    record(
        "scale_two_workers", round(pace[2] / pace[1], 3), unit="x", compared_with="one worker, the driver idle",
        what="samples each second of two `mech work` processes", samples_a_second=pace, clock=clock,
        driver_ms=round(1000 * driver, 2), store_ms=round(1000 * store, 2),
    )  # fmt: skip


if __name__ == "__main__":
    main()
