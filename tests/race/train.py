"""A training script of somebody's own, with its result in closed form; and the ways in which scripts go wrong."""

import argparse
import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path

asked = argparse.ArgumentParser()
asked.add_argument("--optim", default="adamw")
asked.add_argument("--lr", type=float, default=0.01)
asked.add_argument("--seed", type=int)
asked.add_argument("--momentum", type=float, default=0.0)
asked.add_argument("--fault", default="")
asked.add_argument("--out")
given = asked.parse_args()

gain = {"muon": 0.5, "slow": -0.5}.get(given.optim, 0.0)
loss = 2 + 0.2 * math.log10(given.lr / 0.01) ** 2 - gain - given.momentum + random.Random(given.seed).gauss(0, 0.1)
if given.fault == "exit":
    sys.exit("it broke\nValueError: no such optimizer")
if given.fault == "hang":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(given.out).write_text(f"{child.pid}")
    time.sleep(600)
print("epoch 1 of 1")
if given.fault != "silent":
    print(json.dumps({"step": 10, "loss": loss + 2, "val_loss": loss + 1}))
    print(json.dumps({"step": 20, "loss": loss + 1, "val_loss": loss, "eval": {"loss": -loss}}))
if given.out:
    Path(given.out).write_text(f"{loss}\n" if given.out.endswith(".txt") else json.dumps({"val_loss": loss}))
