"""The simulated clock against what can be computed by hand; the plan; the SLURM script with a task number."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mech.errors import ExperimentError
from mech.scale.growth import grow, plan, stops_at

ROOT = Path(__file__).parents[2]


def test_workers_that_wait_for_nothing_are_linear():
    one, many = (grow([2.0], samples=10, workers=n, n_blocks=512) for n in (1, 64))
    assert one.pace == pytest.approx(5.0) and many.pace == pytest.approx(64 * 5.0)
    assert many.efficiency == pytest.approx(1.0) and many.busy == {"driver": 0.0, "store": 0.0}


def test_the_driver_limits_beyond_block_seconds_over_its_own():
    assert stops_at([2.0], driver=0.05, store=0.01) == 40
    found = {n: grow([1.0, 3.0], samples=10, workers=n, driver=0.05, store=0.01) for n in (8, 40, 512)}
    assert found[8].efficiency > 0.94 > found[40].efficiency > found[512].efficiency
    assert found[512].pace == pytest.approx(10 / 0.05, rel=0.01) and found[512].busy["driver"] > 0.99
    slow = grow([2.0], samples=10, workers=512, driver=0.01, store=0.1)
    assert slow.pace == pytest.approx(10 / 0.1, rel=0.01) and slow.busy["store"] > 0.99


def test_opening_models_costs_once():
    found = grow([2.0], samples=1, workers=2, opening=10.0, n_blocks=4)
    assert found.seconds == pytest.approx(14.0)
    with pytest.raises(ExperimentError):
        grow([], samples=1, workers=1)


def test_the_plan_is_what_its_parts_say():
    found = plan(1_000_000, forward=0.06, passes=1, conditions=51, heads=1152, gpus=64)
    assert found.forwards == 26_000_000 and found.gpu_hours == pytest.approx(26e6 * 0.06 / 3600)
    assert found.hours == pytest.approx(found.gpu_hours / 64 / 0.95) and found.blocks == 78_000
    assert found.parts_bytes == 500_000 * (2 * 1152 * 4 + 12) + 500_000 * 51 * 16 and found.samples_bytes == 100e9
    text = (ROOT / "docs" / "scale.md").read_text()
    assert "| GPU hours | 433 |" in text and f"{found.hours:.1f} h" in text and "5.0 GB" in text


def test_the_slurm_script_runs_a_worker(tmp_path):
    script = ROOT / "docs" / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    mine = tmp_path / "mech"
    mine.write_text(f"#!/bin/bash\nexec {sys.executable} -c 'from mech.cli import main; main()' \"$@\"\n")
    mine.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "7", "IDLE": "0.2",
                        "PYTHONPATH": str(ROOT), "BLOCKS": str(tmp_path / "blocks")}  # fmt: skip
    run = subprocess.run(["bash", script], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("worker 7 on ") and run.stdout.endswith("0 landed, 0 failed, 0 refused\n")
    del env["BLOCKS"]
    run = subprocess.run(["bash", script], env=env, capture_output=True, text=True, check=False)
    assert run.returncode != 0 and "set BLOCKS" in run.stderr
