"""One browser for all tests of pages."""

import pytest


@pytest.fixture(scope="session")
def browser():
    support = pytest.importorskip("browser", reason="selenium drives the browser: pip install selenium")
    found = support.started()
    yield found
    found.driver.quit()
