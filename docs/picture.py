"""The picture of the README, from a finished study: ``python docs/picture.py study`` writes ``docs/report.png``.

The first screen of the report and its table of claims, as a figure.
"""

import sys
from pathlib import Path

from mech.views import View
from mech.views.report.first import first_screen
from mech.views.report.folder import read_settings, read_summary
from mech.views.report.matrix import claims_table


def picture(study: Path) -> View:
    """The figure of a finished study."""
    summary = read_summary(study)
    claims = f"<h2>Published claims, compared with what was measured here</h2>{claims_table(summary['verdicts'])}"
    return View("", first_screen(summary["pooled"], read_settings(study, summary)) + claims)


if __name__ == "__main__":
    print(picture(Path(sys.argv[1])).save(Path(__file__).with_name("report.png"), width=1160, scale=0.95))
