import pickle

import play
import pytest
from filelock import FileLock  # torch brings it


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="lessons at full length, on five seeds, and damaged")


@pytest.fixture(scope="session", autouse=True)
def full(request) -> bool:
    """Whether this is the full suite; also what every process sets up before its first test."""
    import matplotlib.font_manager  # noqa: F401  (builds its cache once, here, so that no lesson reports it)
    import torch

    torch.set_num_threads(play.threads())
    return request.config.getoption("--full")


@pytest.fixture
def only_full(full):
    if not full:
        pytest.skip("runs with --full")


@pytest.fixture(scope="session")
def ran(request, full, tmp_path_factory):
    """ran(script, device): the lesson's run, one for all the tests that look at it, in any process.

    With --full in a fresh interpreter; otherwise in a copy of a process that has imported torch already.
    """
    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # one of several processes of pytest-xdist
        folder = folder.parent  # where they meet

    def run(script, device) -> play.Run:
        kept = folder / f"{script.path.stem}-{script.sprint}-{device}"
        with FileLock(f"{kept}.lock"):
            if not kept.exists():
                scratch = tmp_path_factory.mktemp("run")
                kept.write_bytes(
                    pickle.dumps(play.run(script, scratch, device=device, full=full, fresh=full))
                )
        return pickle.loads(kept.read_bytes())

    return run
