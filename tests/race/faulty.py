"""Tasks that a race refuses, and tasks whose processes run out of memory, die with their place, or tell who they are."""

import os
import signal
import time

import torch
from tiny import X, Y, make


def memory(seed):
    """At seeds 5 to 7 there is not enough memory, as Python, torch on a CPU and torch on a GPU say it; at any other
    seed it fails with the number of its process, and the GPU that the process sees."""
    if seed == 5:
        bytearray(2**60)
    elif seed == 6:
        torch.empty(2**50, dtype=torch.uint8)
    elif seed == 7:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    raise RuntimeError(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}")


def place(seed):
    """At seed 13 the process that asks the worker dies: the job, or the actor."""
    if seed == 13:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    return make(seed)


def wide_loss(seed):
    """One value per example and output: silently averaged, it would be another loss than meant."""
    made = make(seed)
    made.loss = lambda out, y: (out - y).expand(-1, 3)
    return made


def random_weights(seed):
    made = make(seed)
    made.model[0].weight.data.fill_(int.from_bytes(os.urandom(2)) / 2**16)
    return made


def few(seed):
    return make(seed, train=(X[:5], Y[:5]))
