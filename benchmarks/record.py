"""How figures are measured and written down.

    with one_thread():
        times = interleaved({"plain": run_plain, "ours": run_ours}, seconds=20)
    record("idle", ratio(times, "ours", "plain"), what="a hooked model without hooks", unit="x", bar="<= 1.02",
           compared_with="the same forward without mech")

Runs that are compared take turns in one process, and a ratio is the median of the ratios of neighbouring turns: a
machine that slows down halfway slows both. ``record`` adds the figure to ``benchmarks/results.json`` under its name,
with the machine, the versions, the date and the command, and leaves the other names unchanged; the table in
``docs/benchmarks.md`` is written anew.
"""

import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results.json", ROOT / "docs" / "benchmarks.md"
PACKAGES = ("torch", "transformers", "transformer-lens")


@contextmanager
def one_thread() -> Iterator[None]:
    """Without gradients and on one thread; both are restored afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)


def interleaved(
    runs: Mapping[str, Callable[[], Any]], seconds: float = 15.0, least: int = 3, most: int = 41
) -> dict[str, list[float]]:
    """Seconds of every run, turn by turn: one turn to warm up, then as many as fit into ``seconds``."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    began = time.perf_counter()
    for turn in range(most):
        if turn >= least and time.perf_counter() - began > seconds:
            break
        # Every other turn in reverse, so that no run always follows the same one.
        for name in list(runs) if turn % 2 else reversed(list(runs)):
            start = time.perf_counter()
            runs[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - start)
    return taken


def ratio(taken: Mapping[str, list[float]], over: str, under: str) -> float:
    """The median over turns of ``over / under``."""
    return statistics.median(a / b for a, b in zip(taken[over], taken[under], strict=True))


def added_memory(target: Callable[..., Callable[[], Any]], *args: Any) -> float:
    """MiB of resident memory that a run takes at its peak above what was in use before, in a fresh process.

    ``target(*args)`` prepares and returns the run. Linux only: it resets the high-water mark of the process.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_peak, args=(there, target, args))
    process.start()
    there.close()
    try:
        return here.recv()
    finally:
        process.join()


def _peak(pipe: Any, target: Callable[..., Callable[[], Any]], args: tuple) -> None:
    with one_thread():
        run = target(*args)
        Path("/proc/self/clear_refs").write_text("5")
        before = _high_water()
        run()
        pipe.send(_high_water() - before)


def _high_water() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def record(
    name: str,
    value: float,
    *,
    what: str,
    unit: str,
    compared_with: str,
    bar: str = "",
    path: Path = RESULTS,
    **details: Any,
) -> None:
    """Record a figure under its name, and print it with its bar (such as ``"<= 1.02"``)."""
    entry = {
        "value": round(float(value), 4),
        "unit": unit,
        "compared_with": compared_with,
        "bar": bar,
        "what": what,
        **details,
        "machine": machine(),
        "versions": {package: version(package) for package in PACKAGES},
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[name] = entry
    known = dict(sorted(known.items()))
    path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    if path == RESULTS:
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(page[: page.index("| name |")] + table(known), encoding="utf-8")
    print(f"{name:28} {entry['value']:>9} {unit:8} {_verdict(value, bar):18} {compared_with}", flush=True)


def _verdict(value: float, bar: str) -> str:
    if not bar:
        return ""
    return f"{bar} {'met' if met(value, bar) else 'NOT MET'}"


def met(value: float, bar: str) -> bool:
    """Whether a figure meets its bar."""
    sign, limit = bar.split()
    return value <= float(limit) if sign == "<=" else value >= float(limit)


def machine() -> str:
    """The processor, and how many of its threads were used."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch with CUDA"
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} thread"


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """All figures as a Markdown table."""
    lines = ["| name | what | value | bar | compared with | date | machine |", "|---|---|---|---|---|---|---|"]
    for name, entry in results.items():
        verdict = _verdict(entry["value"], entry["bar"])
        cells = (f"`{name}`", entry["what"], f"{entry['value']} {entry['unit']}", verdict,
                 entry["compared_with"], entry["date"], entry["machine"])  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
