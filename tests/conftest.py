"""What several test files need, and where tests run: on the CPU, also on a machine with a GPU, but for ``-m gpu``."""

import functools
import os
import sys

import pytest


def pytest_configure(config):
    if config.option.markexpr.strip() != "gpu":  # inherited by the processes that tests start
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items):
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and is run by pytest -m gpu alone"))


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


@pytest.fixture(scope="module")
def llava():
    """The plainest of the tiny models, in double precision."""
    from pairs import opened

    return opened("llava")


@pytest.fixture(scope="module")
def key():
    """A planted circuit of one retrieval head among others."""
    from mech.reference import planted

    return planted.circuit("roles")


@pytest.fixture(scope="module")
def toy(key):
    """The model in which it is planted."""
    from mech.model import HookedMLLM

    return HookedMLLM.from_hf(key.model, key.processor)
