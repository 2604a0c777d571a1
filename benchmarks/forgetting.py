"""Forgetting against retraining, in one run: `python benchmarks/forgetting.py`.

Prints the median and range of the seconds that each method of tier T0 and T1 takes, and how many times faster than one
training of the same model without the class it is. What the methods achieve: `zsu bench`.
"""

import statistics
import time

import torch

import zsu
from zsu import data, models, training
from zsu.forgetting import METHODS as ALL

ROUNDS = 20
METHODS = [method for method, m in ALL.items() if m.tier in ("T0", "T1")]

train, test = data.load("fashion-mini")
model = models.bundled("original")
trouser = data.class_index(test, "Trouser")
x = data.samples(test, "Trouser")


def seconds(action) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def row(name: str, times: list[float], retrain: float) -> str:
    median = statistics.median(times)
    return f"{name:<10} {median:8.3f} s  ({min(times):.3f} to {max(times):.3f})  {retrain / median:8.0f} x"


for method in METHODS:  # compile and warm up
    zsu.forget(model, x, trouser, method)
retraining = [
    seconds(lambda s=s: training.train(models.SmallCNN, train, exclude="Trouser", seed=s, progress=False))
    for s in range(3)
]
times = {method: [] for method in METHODS}
for _ in range(ROUNDS):  # interleaved, so that a slow moment of the machine hits all alike
    for method in METHODS:
        times[method].append(seconds(lambda m=method: zsu.forget(model, x, trouser, m)))
median = statistics.median(retraining)
print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {len(x)} samples, {ROUNDS} rounds")
print(row("retrain", retraining, median))
for method in METHODS:
    print(row(method, times[method], median))
