"""What several test files need."""

import functools
import sys

import pytest


@pytest.fixture
def mech(monkeypatch, capsys):
    """Runs a command in this process: (exit code, standard output, standard error)."""
    from mech import cli

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["mech", *words])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def browser():
    """One browser for all tests of pages."""
    support = pytest.importorskip("browser", reason="selenium drives the browser: pip install selenium")
    found = support.started()
    yield found
    found.driver.quit()


@pytest.fixture(scope="module")
def models():
    """Tiny models by name, each opened once for a file."""
    from tiny_models import opened

    return functools.cache(opened)
