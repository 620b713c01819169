"""How long a click takes in the explorer, in a real browser, from the click to what it changes on the page.

    python benchmarks/explorer.py                # needs the extra 'explore', selenium and Chromium

Every kind of click is done ``--clicks`` times, each time on something else, on two reference models; what is recorded
is the slower model's median. ``first paint`` and the bytes of the page are printed beside them.
"""

import argparse
import statistics
import sys
import threading
import time

from record import ROOT, record

import mech
from mech.explorer.engine import Engine
from mech.explorer.server import address, listening, server_of

sys.path.insert(0, str(ROOT / "tests" / "support"))

MODELS = ("reference:llava-s", "reference:qwen-s")
BAR = 300  # ms
# What is clicked the n-th time, and when it is done; `main` is the explorer.
CLICKS = {
    "sample": ("main.querySelectorAll('.samples button')[n % 12].click()", "main.dataset.view"),
    "head": ("main.querySelector(`.map [data-head=L${n % 6}H${(n * 5 + 1) % 8}]`).click()", "main.querySelector('.answering .heat')"),
    "off": ("main.querySelector('.switch').click()", "!/…/.test(main.querySelector('.now')?.textContent ?? '…')"),
    "box": None,
}  # fmt: skip
