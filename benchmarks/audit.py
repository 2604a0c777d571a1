"""Cost of the default audit: seconds by measure, and passes over the data by model and split.

python benchmarks/audit.py [REPEATS]
"""

import collections
import sys
import time

import numpy as np
import torch

import zsu
from zsu import data, models
from zsu.evaluation import audits

repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
splits = data.load("fashion-mini")
original = models.bundled("original")
held_out = data.without_samples(splits.test, "Trouser")
edits = {m: zsu.forget(original, data.samples(splits.test, "Trouser"), 1, m) for m in ("paths", "lra-npp", "head-npp")}
references = [models.bundled("retrained", seed) for seed in range(8)]

passes = collections.Counter()
observe = audits.observe


def observe_and_count(model, dataset, *rest):
    passes[id(model), len(dataset)] += 1
    return observe(model, dataset, *rest)


audits.observe = observe_and_count
whole, parts = [], []
for _ in range(repeats):
    passes.clear()
    started = time.perf_counter()
    report = zsu.audit(original, edits, splits.train, held_out, "Trouser", references, progress=False)
    whole.append(time.perf_counter() - started)
    parts.append(report.seconds)

number = len(report.frame) - 1 + len(references)
print(f"zsu {zsu.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads")
print(f"{number} models (8 references), {len(splits.train):,} train and {len(held_out):,} test images")
print(f"passes over the data: {sum(passes.values())}, at most {max(passes.values())} for a model and split")
print(f"seconds, median of {repeats} [min, max]: {np.median(whole):.1f} [{min(whole):.1f}, {max(whole):.1f}]")
for name in report.seconds:
    values = [p[name] for p in parts]
    print(f"  {name:<18} {np.median(values):6.2f} [{min(values):.2f}, {max(values):.2f}]")
