"""All that a machine with a graphics card can tell, in a few minutes: `make device`, or `python benchmarks/device.py`.

The tests that need a card, then times and peak memory: relevance beside plain passes, training steps and other
libraries, graph and paths, forgetting, training. Each row goes into the table when it is measured, so that an
interrupted run is not lost; what the minutes do not suffice for is called not run.
"""

import csv
import datetime
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer

import relevance as peers
import zsu
from zsu import data, models, training

HEADER = ["part", "model", "size", "batch", "dtype", "case", "ms", "least", "most", "of plain", "of training", "MiB"]
ROOT = Path(__file__).parents[1]


class Table:
    """Rows in a file, each written at once."""

    def __init__(self, out: Path, minutes: float):
        self.out, self.end = out, time.monotonic() + 60 * minutes
        out.write_text("")
        self.add(*HEADER)

    def add(self, *row: object) -> None:
        with self.out.open("a", newline="") as file:
            csv.writer(file).writerow(row)
        print(*row, sep="  ", flush=True)

    @property
    def over(self) -> bool:
        return time.monotonic() > self.end


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], device: str) -> float:
    wait(device)
    started = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - started


def peak(run: Callable[[], object], device: str) -> float | str:
    """MiB on the card that it needs besides what lies there."""
    if device != "cuda":
        return "n/a"
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20)


def measure(table: Table, part: str, about: list, cases: dict[str, Callable], rounds: int, device: str) -> None:
    """Medians over interleaved rounds, as ratios of "plain" and "training" where these are among the cases."""
    memory, times = {}, {}
    for name, run in cases.items():
        try:
            run()  # loads, compiles, allocates
            memory[name], times[name] = peak(run, device), []
        except Exception as error:
            table.add(part, *about, name, f"does not run: {type(error).__name__}")
    for _ in range(rounds):
        for name in times:
            times[name].append(1e3 * seconds(cases[name], device))
        if table.over:
            break
    medians = {name: statistics.median(values) for name, values in times.items() if values}
    for name, ms in medians.items():
        ratios = [f"{ms / medians[base]:.2f}" if base in medians else "" for base in ("plain", "training")]
        low, high = min(times[name]), max(times[name])
        table.add(part, *about, name, f"{ms:.2f}", f"{low:.2f}", f"{high:.2f}", *ratios, memory[name])


def relevance_of(table: Table, name: str, size: int, batch: int, dtype: torch.dtype, rounds: int, device: str) -> None:
    model = peers.build(name, size, dtype, device)
    x = torch.rand(batch, 3, size, size, device=device, dtype=dtype)
    y = torch.randint(10, (batch,), device=device)
    cases = {case.__name__: (lambda case=case: case(model, x, y)) for case in peers.CASES}
    about = [name, size, batch, str(dtype).removeprefix("torch.")]
    measure(table, "relevance", about, cases, rounds, device)


def paths_of(table: Table, name: str, size: int, rounds: int, device: str) -> None:
    """From 36 images: the relevance with edges, the graph on the host, a thousand paths, an edit."""
    model = peers.build(name, size, torch.float32, device)
    x = torch.rand(36, 3, size, size, device=device)
    target = int(model(x).argmax(1).mode().values)
    x = x[model(x).argmax(1) == target]
    relevance = zsu.explain(model, x, target, "z+")
    graph = zsu.paths.graph.build_graph(relevance)
    cases = {
        "explain z+": lambda: zsu.explain(model, x, target, "z+"),
        "build_graph": lambda: zsu.paths.graph.build_graph(relevance),
        "find_paths 1,000": lambda: zsu.find_paths(graph, 1000),
        "forget paths": lambda: zsu.forget(model, x, target),
    }
    measure(table, "paths", [name, size, len(x), "float32"], cases, rounds, device)


def training_of(table: Table, size: int, batch: int, steps: int, device: str) -> None:
    """An epoch of the small CNN on the bundled images, and steps of a ResNet-50 on random ones, in both precisions."""
    train = data.load("fashion-mini").train
    fresh = lambda: models.SmallCNN(10, 1).to(device)  # noqa: E731
    epoch = lambda: training.train(fresh, train, epochs=1, progress=False)  # noqa: E731
    measure(table, "training", ["small-cnn", 28, 100, "float32"], {"one epoch": epoch}, 1, device)
    model = peers.build("resnet50", size, torch.float32, device).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    x, y = torch.rand(batch, 3, size, size, device=device), torch.randint(10, (batch,), device=device)

    def run(dtype: torch.dtype) -> None:
        for _ in range(steps):
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    for dtype in (torch.float32, torch.bfloat16):
        about = ["resnet50", size, batch, str(dtype).removeprefix("torch.")]
        measure(table, "training", about, {f"{steps} steps": lambda dtype=dtype: run(dtype)}, 1, device)


def main(
    out: Annotated[Path, typer.Option(help="The table.")] = ROOT / "benchmarks" / "results" / "device.csv",
    minutes: Annotated[float, typer.Option(help="No part begins later.")] = 8,
    device: str = "cuda",
    names: Annotated[str, typer.Option(help="Models, by comma.")] = "resnet18,resnet50,vgg16,vit_b_16",
    size: int = 224,
    batches: str = "1,8,64",
    rounds: int = 20,
    steps: int = 100,
    tests: Annotated[bool, typer.Option(help="Run the tests that need a card before all.")] = True,
):
    """Measure, and write each row when it is there."""
    warnings.simplefilter("ignore")
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no graphics card here; --device cpu measures the CPU")
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    machine = torch.cuda.get_device_name() if device == "cuda" else cpu
    table = Table(out, minutes)
    versions = f"torch {torch.__version__}", f"Python {platform.python_version()}"
    table.add("machine", machine, *versions, datetime.date.today())
    if tests and device == "cuda":
        command = [sys.executable, "-m", "pytest", "-q", "tests/test_cuda.py"]
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        table.add("tests", found.stdout.strip().splitlines()[-1])
        out.with_suffix(".log").write_text(found.stdout)
    parts: list[Callable[[], None]] = []
    for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
        for batch in map(int, batches.split(",")):
            for name in names.split(","):
                parts.append(lambda a=(name, size, batch, dtype): relevance_of(table, *a, rounds, device))
    for name in names.split(",")[:2]:
        parts.append(lambda name=name: paths_of(table, name, size, max(1, rounds // 4), device))
    parts.append(lambda: training_of(table, size, int(batches.split(",")[-1]), steps, device))
    for number, part in enumerate(parts):
        if table.over:
            table.add("not run", f"{len(parts) - number} of {len(parts)} parts: the minutes are over")
            break
        part()


if __name__ == "__main__":
    typer.run(main)
