"""Killed at random moments, a study goes on and ends in the same summary."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "killed_study.py"


@pytest.mark.slow
def test_a_study_killed_at_25_moments_ends_in_the_same_summary(tmp_path):
    root = str(SCRIPT.parents[2])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    call = [sys.executable, str(SCRIPT), str(tmp_path)]
    run = subprocess.run([*call, "25", "7"], capture_output=True, text=True, env=env, timeout=600, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert found["kills"] == 25 and found["studies"] >= 1
    still = [*call[:2], str(tmp_path / "calm"), "0", "7"]
    calm = subprocess.run(still, capture_output=True, text=True, env=env, check=True)
    (quiet,) = json.loads(calm.stdout)["summaries"]
    assert len(quiet["models"]["llava-s"]["domains"]["grounding"]["ranking"]) == 48
    for summary in found["summaries"]:
        assert summary == quiet
