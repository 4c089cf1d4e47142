import functools

import matplotlib.font_manager  # noqa: F401  (builds its cache once, here, so that no lesson reports it)
import play
import pytest
import torch

torch.set_num_threads(play.threads())


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="lessons at full length, on five seeds, and damaged")


@pytest.fixture(scope="session")
def full(request) -> bool:
    return request.config.getoption("--full")


@pytest.fixture
def only_full(full):
    if not full:
        pytest.skip("runs with --full")


@pytest.fixture(scope="session")
def ran(full, tmp_path_factory):
    """ran(script, device): the lesson's run; one for all the tests that look at it."""
    return functools.cache(
        lambda script, device: play.run(script, tmp_path_factory.mktemp("run"), device=device, full=full)
    )
