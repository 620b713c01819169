"""Processors that transformers has for torchvision only, and videos: ours make the same of the same pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = {
    "lfm2_vl",
    "mistral3",
    "llava_pixtral",
    "llama4",
    "cohere2_vision",
    "gemma4",
    "glm4v",
    "qwen2_5_vl",
    "qwen3_vl",
}


@pytest.mark.slow
def test_inputs_are_those_of_the_torchvision_processors(tmp_path):
    """In a process of its own, which believes that torchvision is installed."""
    run = subprocess.run(
        [sys.executable, ROOT / "tests" / "support" / "torchvision_oracle.py", tmp_path],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    compared = [json.loads(line) for line in run.stdout.splitlines()]
    assert {one["name"] for one in compared} == NAMES and len(compared) == 27
    assert [one for one in compared if one["differs"]] == []
