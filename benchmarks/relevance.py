"""Relevance against plain backward passes and against other libraries: `python benchmarks/relevance.py --help`.

Times, as ratios of medians over interleaved rounds in one run: the plain forward and backward pass to the input, a
training step's forward and backward pass, `zsu.explain` with and without edges, captum's LRP and zennit for the same
rules where they run. With --memory also peak memory, each case in a process of its own.
"""

import resource
import statistics
import subprocess
import sys
import time
import warnings
from typing import Annotated

import captum.attr
import torch
import torch.nn.functional as F
import torchvision
import typer
import zennit.attribution
import zennit.composites
import zennit.rules
import zennit.types
from captum.attr._utils.lrp_rules import EpsilonRule

import zsu

MODELS = ["vgg16", "resnet18", "resnet50", "vit_b_16"]


def build(name: str, size: int, dtype: torch.dtype, device: str) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {"image_size": size} if name.startswith("vit") else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **options)
    if name.startswith("vit"):
        torch.nn.init.normal_(model.heads.head.weight, std=0.02)  # torchvision starts it at 0
    return model.to(device, dtype).eval()


def tiny() -> torch.nn.Module:
    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten()
    return torch.nn.Sequential(*layers, torch.nn.Linear(144, 10)).eval()


def plain(model, x, y):
    x = x.clone().requires_grad_()
    torch.autograd.grad(model(x).gather(1, y[:, None]).sum(), x)


def training(model, x, y):
    """With dropout and the statistics of BatchNorm off, as in the explanation; gradients of all parameters."""
    F.cross_entropy(model(x), y).backward()
    model.zero_grad()


def zsu_epsilon(model, x, y):
    zsu.explain(model, x, y, edges=False)


def zsu_epsilon_edges(model, x, y):
    zsu.explain(model, x, y)


def zsu_gamma(model, x, y):
    zsu.explain(model, x, y, "gamma", edges=False)


def zsu_gamma_edges(model, x, y):
    zsu.explain(model, x, y, "gamma")


def captum_epsilon(model, x, y):
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear, torch.nn.AdaptiveAvgPool2d)):
            module.rule = EpsilonRule()
    captum.attr.LRP(model).attribute(x.clone().requires_grad_(), target=y)


def with_zennit(rule, model, x, y):
    layers = (zennit.types.Convolution, zennit.types.Linear)
    composite = zennit.composites.LayerMapComposite([(kind, rule) for kind in layers])
    seed = F.one_hot(y, 10).to(x.dtype)
    with zennit.attribution.Gradient(model, composite) as attributor:
        attributor(x, lambda output: output * seed)


def zennit_epsilon(model, x, y):
    with_zennit(zennit.rules.Epsilon(1e-6), model, x, y)


def zennit_gamma(model, x, y):
    with_zennit(zennit.rules.Gamma(0.25), model, x, y)


CASES = [plain, training, zsu_epsilon, zsu_epsilon_edges, zsu_gamma, zsu_gamma_edges]
CASES += [captum_epsilon, zennit_epsilon, zennit_gamma]


def seconds(case, model, x, y) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    case(model, x, y)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak(case, model, x, y) -> float:
    """MiB that the case needs at most besides the model and the libraries."""
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case(model, x, y)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    case(model, x, y)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10


def measure(name: str, size: int, batch: int, rounds: int, device: str, dtype: torch.dtype) -> None:
    model = build(name, size, dtype, device)
    x = torch.rand(batch, 3, size, size, device=device, dtype=dtype)
    y = torch.randint(10, (batch,), device=device)
    times = {}
    for case in CASES:  # warm up, and leave out what does not run
        try:
            case(model, x, y)
            times[case] = []
        except Exception as error:
            why = type(error).__name__
            print(f"{name:<9} {size:>3} {batch:>3}  {case.__name__:<18} does not run: {why}", flush=True)
            model = build(name, size, dtype, device)  # whatever it left behind
    for _ in range(rounds):
        for case in times:
            times[case].append(seconds(case, model, x, y))
    median = {case: statistics.median(values) for case, values in times.items()}
    for case, values in times.items():
        print(
            f"{name:<9} {size:>3} {batch:>3}  {case.__name__:<18} {1e3 * median[case]:9.1f} ms "
            f"({1e3 * min(values):.1f} to {1e3 * max(values):.1f})  "
            f"{median[case] / median[plain]:6.2f} x plain  {median[case] / median[training]:6.2f} x training",
            flush=True,
        )


def main(
    models: Annotated[str, typer.Option(help="Names, by comma.")] = ",".join(MODELS),
    sizes: str = "32,64",
    batches: str = "8,64",
    rounds: int = 20,
    device: str = "cpu",
    dtype: str = "float32",
    memory: Annotated[bool, typer.Option(help="Measure peak memory instead of time.")] = False,
    only: Annotated[str | None, typer.Option(help="With --memory: this case, in this process.")] = None,
):
    warnings.simplefilter("ignore")
    card = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    if only is None:
        print(f"torch {torch.__version__}, {device} ({card}), {dtype}, {rounds} rounds")
    grid = [(m, int(s), int(b)) for m in models.split(",") for s in sizes.split(",") for b in batches.split(",")]
    for name, size, batch in grid:
        if only is not None:
            model = build(name, size, getattr(torch, dtype), device)
            x = torch.rand(batch, 3, size, size, device=device, dtype=getattr(torch, dtype))
            y = torch.randint(10, (batch,), device=device)
            case = {c.__name__: c for c in CASES}[only]
            plain(model, x[:1], y[:1])
            case(tiny().to(device, x.dtype), x[:1, :, :8, :8], y[:1])  # what the libraries load when first used
            print(f"{name:<9} {size:>3} {batch:>3}  {only:<18} {peak(case, model, x, y):9.0f} MiB", flush=True)
        elif memory:
            for case in CASES[:6]:
                options = ["--models", name, "--sizes", str(size), "--batches", str(batch), "--device", device]
                command = [sys.executable, __file__, *options, "--dtype", dtype, "--memory", "--only", case.__name__]
                subprocess.run(command, check=True)
        else:
            measure(name, size, batch, rounds, device, getattr(torch, dtype))


if __name__ == "__main__":
    typer.run(main)
