"""One thread and one seed for every test: a bare `pytest` gives the same numbers as `pytest -n 2`."""

import os
import random
import signal

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
os.environ.pop("COLUMNS", None)
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in its background without it


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    torch.manual_seed(0)
