"""Calls that are damaged at random in one or two places: a result, or one `ZsuError` of one line that says what to do;
and whatever was passed is as it was.
"""

import contextlib
import copy
import io
import shutil
import sys
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import zsu
from helpers import NO_PAIRS, Changed
from zsu import cli
from zsu.data import Images
from zsu.evaluation import BASIC, MEASURES
from zsu.forgetting import METHODS, LraNpp, Ssd

DAMAGES = settings(max_examples=200, deadline=None, derandomize=True)
CLASSES = ["above", "below", "left"]
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.lists(st.integers(-1, 3), max_size=3),
    st.sampled_from([
        b"x", 1j, 2**70, -(2**70), {}, {1}, (), range(2), object(), int, len, ..., Fraction(1, 2), Decimal("NaN"),
        np.int64(1), np.float32(0.5), np.array([1.5]), np.array(["a"]), np.zeros((2, 0)), torch.tensor(1),
        torch.tensor(0.5), torch.tensor([0, 1]), torch.zeros(2, 0), torch.eye(3), torch.device("meta"), nn.Identity(),
    ]),
)  # fmt: skip


# --- what is valid --------------------------------------------------------------------------------------------


def pictures(n: int, seed: int = 0) -> Images:
    """Grey images of 8 x 8 pixels, n of each class: bright above, below, or on the left."""
    noise = np.random.default_rng(seed).integers(0, 90, (3, n, 1, 8, 8))
    noise[0, ..., :4, :] += 150
    noise[1, ..., 4:, :] += 150
    noise[2, ..., :4] += 150
    data = torch.from_numpy(noise).reshape(-1, 1, 8, 8)  # (classes, n, 1, 8, 8) -> (classes n, 1, 8, 8)
    return Images(data.to(torch.uint8), torch.arange(3).repeat_interleave(n), CLASSES)


def trained(n: int = 8, exclude: int | None = None) -> nn.Sequential:
    """A network that knows `pictures`, or all of its classes but one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
            nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3),
        )  # fmt: skip
    data = pictures(n)
    kept = data.targets != (-1 if exclude is None else exclude)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.data[kept] / 255), data.targets[kept]).backward()
        optimizer.step()
    model.zero_grad()
    return model.eval()


TRAIN, TEST = pictures(8), pictures(8, seed=1)
MODEL, REFERENCE = trained(), trained(exclude=1)
X = TEST.data[8:16] / 255
RETAINED = Subset(TRAIN, [*range(4), *range(20, 24)])
FORGOTTEN = zsu.forget(MODEL, X, 1, "mask")


# --- what is not ----------------------------------------------------------------------------------------------


class Answers(nn.Module):
    """A model whose outputs, or whose inputs, are changed."""

    def __init__(self, after=lambda logits: logits, before=lambda x: x):
        super().__init__()
        self.inner, self.before, self.after = copy.deepcopy(MODEL), before, after

    def forward(self, x):
        return self.after(self.inner(self.before(x)))


class Own(Exception):
    """Of nobody's base class, and without words."""

    def __str__(self):
        raise RuntimeError("no words")


def fails(error):
    """A function that raises it."""

    def fail(*_, **__):
        raise error

    return fail


def copies(*changes):
    """Each a function that makes a copy of the model and changes it; what it gives, or the copy."""

    def make(change):
        def made():
            model = copy.deepcopy(MODEL)
            found = change(model)
            return model if found is None or found is model else found

        return made

    return [make(change) for change in changes]


def fill(parameter, value):
    with torch.no_grad():
        parameter.view(-1)[0] = value


def setattr_of(name, value):
    return lambda m: setattr(m, name, value)


class Scalar(nn.Module):
    """No parameter at all."""

    def forward(self, x):
        return x.flatten(1)[:, :3]


class TwoInputs(nn.Module):
    def forward(self, x, y):
        return x


class Locked(nn.Module):
    """Cannot be copied."""

    def __init__(self):
        super().__init__()
        self.inner, self.stream = copy.deepcopy(MODEL), (i for i in range(3))

    def forward(self, x):
        return self.inner(x)


class Stores(Answers):
    def forward(self, x):
        self.kept = super().forward(x)
        return self.kept


MODELS = [
    *copies(
        lambda m: m.train(), lambda m: m[1].train(), lambda m: fill(m[0].weight, torch.nan),
        lambda m: fill(m[5].weight, torch.inf), lambda m: fill(m[7].bias, -torch.inf), lambda m: m.half(),
        lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m[7].double(), lambda m: m.to("meta"),
        lambda m: m.to(torch.complex64), lambda m: m.requires_grad_(False), lambda m: m[0].requires_grad_(False),
        lambda m: m[0].weight.data.zero_(), lambda m: [p.data.zero_() for p in m.parameters()],
        lambda m: [p.data.mul_(1e30) for p in m.parameters()], lambda m: [p.data.mul_(1e-30) for p in m.parameters()],
        lambda m: setattr_of("7", nn.Linear(8, 2))(m), lambda m: setattr_of("7", nn.Linear(8, 1))(m),
        lambda m: setattr_of("7", nn.Linear(8, 12))(m), lambda m: setattr_of("7", nn.Linear(8, 3, bias=False))(m),
        lambda m: setattr_of("5", nn.LazyLinear(8))(m), lambda m: setattr_of("0", nn.Conv2d(3, 4, 3))(m),
        lambda m: setattr_of("6", nn.Dropout())(m), lambda m: setattr_of("6", m[2])(m),
        lambda m: setattr_of("6", nn.Sequential(nn.Linear(8, 8), m[2], nn.Linear(8, 8)))(m),
        lambda m: nn.Sequential(*m, nn.Softmax(1)).eval(), lambda m: nn.Sequential(*m, nn.LogSoftmax(1)).eval(),
        lambda m: nn.Sequential(*m, nn.Sigmoid()).eval(), lambda m: nn.Sequential(*m, m[6], m[7]).eval(),
        lambda m: nn.Sequential(*m, nn.Linear(3, 3)).eval(), lambda m: nn.Sequential().eval(), lambda m: m[:5],
        lambda m: parametrizations.weight_norm(m[0]) and None, lambda m: parametrizations.orthogonal(m[5]) and None,
        lambda m: prune.l1_unstructured(m[5], "weight", 0.5) and None, lambda m: nn.utils.spectral_norm(m[7]) and None,
        lambda m: torch.compile(m), lambda m: m.compile(), lambda m: m[0].compile(),
        lambda m: setattr_of("0", torch.compile(m[0]))(m), lambda m: torch.jit.trace(m, X),
        lambda m: torch.jit.script(m),
        lambda m: nn.DataParallel(m), lambda m: m.state_dict(), lambda m: type(m), lambda m: m.forward,
        lambda m: (m, m), lambda m: [],
        lambda m: m[5].register_forward_hook(fails(KeyError("hook\nof two lines"))) and None,
        lambda m: m[5].register_forward_hook(lambda *_: None) and None,
        lambda m: m[5].register_forward_hook(lambda *_: torch.zeros(2)) and None,
        lambda m: m[5].register_forward_pre_hook(lambda _, args: args[0] * 2) and None,
        lambda m: m.register_full_backward_hook(lambda *_: None) and None,
        lambda m: setattr_of("forward", fails(ValueError("a\r\nb\vc\u2028d")))(m),
        lambda m: setattr_of("hook", lambda x: x)(m), lambda m: m.register_buffer("count", torch.tensor(3)),
        lambda m: m.register_parameter("number", nn.Parameter(torch.tensor(3), requires_grad=False)),
        lambda m: m.register_parameter("unused", nn.Parameter(torch.tensor(torch.nan))),
        lambda m: m.register_parameter("empty", nn.Parameter(torch.zeros(0, 3))),
        lambda m: m[7].register_parameter("bias", nn.Parameter(m[7].bias.detach().double())),
        lambda m: setattr_of("7", m[7].to_sparse() if hasattr(m[7], "to_sparse") else nn.Identity())(m),
    ),
    *(lambda after=after: Answers(after).eval() for after in [
        lambda y: (y, y), lambda y: {"logits": y}, lambda y: [y], lambda y: None, lambda y: 3, lambda y: "y",
        lambda y: y[0], lambda y: y[None], lambda y: y[:1], lambda y: y[:0], lambda y: y[:, :0], lambda y: y.mean(),
        lambda y: y.argmax(1), lambda y: y.int(), lambda y: y > 0, lambda y: y.to(torch.complex64), lambda y: y.T,
        lambda y: y.detach(), lambda y: y.numpy(), lambda y: y.detach().numpy(), lambda y: y.tolist(),
        lambda y: y.to("meta"), lambda y: y.to_sparse(), lambda y: y.half(), lambda y: y.double(),
        lambda y: y * torch.nan,
        lambda y: y / 0, lambda y: y + torch.rand_like(y), lambda y: y.expand(3, *y.shape), lambda y: y.repeat(2, 1),
        lambda y: torch.zeros_like(y), lambda y: y.sort(1).values, lambda y: y.clamp(min=0), lambda y: y.relu_(),
        lambda y: torch.cat([y, y], 1), lambda y: torch.stack([y, -y], 2), lambda y: y[:, [1, 0, 2]],
        lambda y: y.masked_fill(y < 0, -torch.inf), lambda y: y.new_tensor([[9.0, 0, 0]]).expand_as(y),
        lambda y: y @ y.T,
    ]),
    *(lambda before=before: Answers(before=before).eval() for before in [
        lambda x: x.zero_(), lambda x: x.detach(), lambda x: torch.from_numpy(x.detach().numpy()), lambda x: x.double(),
        lambda x: x[:, :, :4], lambda x: x + x.mean().item(), lambda x: x.flip(0), lambda x: x.data.mul_(2),
        *(fails(error) for error in [ValueError(), KeyError("key"), RuntimeError("one\ntwo\n"), MemoryError(), Own(),
          StopIteration(), AssertionError(), NotImplementedError(), OSError(2, "no"), Exception("x" * 3000),
          UnicodeDecodeError("utf8", b"", 0, 1, "bad"), RecursionError(),
          torch.OutOfMemoryError("CUDA"), zsu.ZsuError("own words"), Warning("w"), IndexError("i")]),
    ]),
    Scalar, TwoInputs, Locked, Stores, lambda: nn.Identity().eval(), lambda: zsu.models.build("small-cnn").eval(),
]  # fmt: skip


def tensors(x):
    """Samples that are not quite what is wanted."""
    broken, spoilt, great = x.clone(), x.clone(), x.clone()
    broken[0, 0, 0, 0], spoilt[1, 0, 0, 0], great[0] = torch.nan, -torch.inf, 1e38
    return [
        lambda: x[0], lambda: x[None], lambda: x[:, 0], lambda: x[:0], lambda: x[:1], lambda: x[:, :0],
        lambda: x[:, :, :4], lambda: x[:, :, :, :0], lambda: x.repeat(1, 3, 1, 1), lambda: x.flatten(1),
        lambda: x.half(),
        lambda: x.bfloat16(), lambda: x.double(), lambda: x.byte(), lambda: x.int(), lambda: x.long(), lambda: x > 0.5,
        lambda: x.to(torch.complex64), lambda: broken, lambda: spoilt, lambda: great, lambda: 1e20 * x, lambda: 0 * x,
        lambda: -x, lambda: x.numpy(), lambda: x.tolist(), lambda: list(x), lambda: [x], lambda: [x, x],
        lambda: (x, x[:0]),
        lambda: x.clone().requires_grad_(), lambda: x.clone().requires_grad_() * 2, lambda: x.permute(0, 1, 3, 2),
        lambda: x[::2, :, ::1], lambda: x[:1].expand(8, -1, -1, -1), lambda: x.to_sparse(), lambda: x.to("meta"),
        lambda: x.sum(), lambda: torch.zeros(()), lambda: torch.empty(0), lambda: TEST, lambda: DataLoader(TEST),
        lambda: nn.Parameter(x.clone()), lambda: TEST.data[:8] / 255, lambda: torch.rand(2, 1, 8, 8, 1),
        lambda: x[:, :, 0],
        lambda: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), lambda: torch.nested.nested_tensor([x[0], x[1]]),
        lambda: x.to_mkldnn(), lambda: np.ma.array(x.numpy()),
    ]  # fmt: skip


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TEST)


def with_attributes(dataset, **values):
    """A copy of a data set with other attributes."""
    twin = copy.copy(dataset)
    vars(twin).update(values)
    return twin


DATASETS = [
    lambda: Subset(TEST, []), lambda: Subset(TEST, range(8)), lambda: Subset(TEST, range(8, 16)), lambda: Stream(),
    lambda: Subset(TEST, [0, 99]), lambda: Subset(TEST, ["a"]), lambda: Subset(TEST, [0.5]), lambda: Subset(TEST, None),
    lambda: Subset(TEST, [7, 8, 16]), lambda: Subset(TEST, torch.arange(24)), lambda: Subset(TEST, [-1, 0, 9]),
    lambda: ConcatDataset([TEST, TRAIN]), lambda: DataLoader(TEST), lambda: list(TEST), lambda: TensorDataset(X),
    lambda: TensorDataset(X, torch.zeros(8)), lambda: X, lambda: {"train": TEST}, lambda: Dataset(), lambda: type(TEST),
    lambda: zsu.data.Splits(TRAIN, TEST), lambda: Images(TEST.data[:0], [], CLASSES),
    lambda: Images(TEST.data, TEST.targets, list("abc")),
    lambda: Images(TEST.data, TEST.targets, list("abcd")),
    lambda: Images(TEST.data.repeat(1, 3, 1, 1), TEST.targets, CLASSES),
    lambda: Images(TEST.data[..., :4], TEST.targets, CLASSES),
    *(lambda values=values: with_attributes(TEST, **values) for values in [
        {"targets": None}, {"targets": [0, 1]}, {"targets": TEST.targets.float()}, {"targets": [0.5] * 24},
        {"targets": 3},
        {"targets": ["above"] * 24}, {"targets": ["?"] * 24}, {"targets": TEST.targets + 1},
        {"targets": TEST.targets - 1},
        {"targets": (TEST.targets + 1) % 3}, {"targets": torch.eye(24)}, {"targets": [[1], [2, 3]]},
        {"targets": [None] * 24},
        {"targets": {}}, {"targets": object()}, {"targets": TEST.targets.to("meta")},
        {"targets": TEST.targets.to_sparse()},
        {"targets": [2**70] * 24}, {"targets": TEST.targets + 0j}, {"targets": (t for t in TEST.targets)},
        {"classes": None}, {"classes": []}, {"classes": ["a"]}, {"classes": "abc"}, {"classes": [1, 2, 3]},
        {"classes": ["a"] * 3},
        {"classes": {"a": 0, "b": 1, "c": 2}}, {"classes": [None] * 3}, {"classes": 3},
        {"classes": ["a\nb", "below", "c"]},
        {"data": TEST.data[:5]}, {"transform": fails(OSError("no\nfile"))}, {"transform": fails(Own())},
        {"transform": lambda image: image}, {"transform": lambda image: torch.full((1, 8, 8), torch.nan)},
        {"transform": lambda image: torch.rand(1, 8, 8) + 1e38}, {"transform": lambda image: torch.zeros(0)},
        {"transform": lambda image: torch.zeros(1, 8, 8).to("meta")},
        {"transform": lambda image: torch.zeros(1, 8, 8).to_sparse()},
        {"transform": lambda image: torch.zeros(1, 8, 8, dtype=torch.float64)}, {"transform": 3},
    ]),
    *(lambda change=change: Changed(TEST, change) for change in NO_PAIRS),
]  # fmt: skip


def any_of(*makers):
    """One of the values, made anew, or an odd one."""
    return st.one_of(st.sampled_from([*makers]), ODD.map(lambda value: lambda: value))


def value(*values):
    return any_of(*(lambda v=v: v for v in values))


TARGETS = value(-1, 0, 3, 10**9, 1.0, True, "1", "below", np.int32(1), np.bool_(1), torch.tensor(1), [1], [1, 1],
[0, 1],
                (1,), np.array([1]), torch.tensor([1]), [[1]], ["below"], [True], [1.0], {1}, range(1, 2),
                Ellipsis)  # fmt: skip
SEEDS = value(-1, 2**32, 2**63, 2**64, -(2**63), 1.5, 1.0, "1", np.int64(3), np.uint64(2**63), torch.tensor(2))
NUMBERS = value(0, -1, 1, 2, 10**6, 2**63, 1.0, 1.5, np.int64(2), torch.tensor(2), "1", np.float64(2), [1], True)
WORDS = value("", "paths", "magic", "Mask", "zero", "gaussian", "laplace", ["gaussian"], LraNpp, LraNpp(), Ssd(), Ssd)
FORGET = {
    "model": any_of(*MODELS), "x": any_of(*tensors(X)), "target": TARGETS,
    "method": st.one_of(st.sampled_from([lambda m=m: m for m in METHODS]), WORDS), "perturbation": WORDS,
    "retained": any_of(lambda: RETAINED, *DATASETS), "seed": SEEDS, "k": NUMBERS, "perturbed": NUMBERS,
    "layers": value("0", "5", "7", "all", "none", [], ["0"], ["0", "0"], ["all", "0"], ("5",), [5], 5, ["7"], {"0"},
    b"0"),
    "scale": value(torch.nan, torch.inf, -1, -0.0, 0, 1e308, 1e-320, 2, "1", np.float32(1), torch.tensor(1.0)),
    "absolute": value(True, False), "alpha": value(-1.0, 0, torch.inf, torch.nan, 1e30, "1", [], [1, 2], (3.0,)),
    "epsilon": value(-1.0, 0, 1e30, "1"), "lam": value(-1, 0, "1"), "batch_size": NUMBERS,
    "lr": value(-1.0, 0, 1e30, "1"),
    "nothing": value(1),
}  # fmt: skip
AUDIT = {
    "original": any_of(*MODELS, *(lambda m=m: m for m in [[MODEL, MODEL], [], [None], (MODEL,), FORGOTTEN])),
    "forgotten": any_of(*(lambda f=f: f for f in [
        FORGOTTEN, MODEL, [], {}, {"a": MODEL}, {"a": None}, {"a": [MODEL, MODEL]}, {"a": []}, {"": MODEL}, {1: MODEL},
        {"original": MODEL}, {"retrain": MODEL}, {"mask": FORGOTTEN}, {"a": [[MODEL]]},
        {"a": FORGOTTEN._replace(patch=None)},
        {"a": FORGOTTEN._replace(model=None)}, {"a": FORGOTTEN.patch}, {"a\nb": MODEL}, {"a": tuple(FORGOTTEN)},
        {"a": zsu.Forgotten(MODEL, FORGOTTEN.patch)}, {"broken": MODEL}, {"model": MODEL}, {"0": MODEL},
    ]), *(lambda m=m: {"a": m()} for m in MODELS)),
    "train": any_of(*DATASETS), "test": any_of(*DATASETS), "target": TARGETS,
    "references": any_of(*(lambda r=r: r for r in [[], MODEL, [MODEL], [REFERENCE] * 3, (REFERENCE,), [None],
    [FORGOTTEN], {}]),
                         *(lambda m=m: [m()] for m in MODELS)),
    "measures": st.one_of(st.sampled_from([lambda m=m: [m] for m in MEASURES]),
    value("accuracy", [], ["x"], [1], [[]], None,
                          ("accuracy",), {"accuracy"}, "", [None], {"accuracy": 1}, ["accuracy", "accuracy"],
                          [MEASURES["accuracy"]])),
    "controls": value(False, True), "seed": SEEDS, "progress": value(False),
    "retrain_seconds": value(-1, "1", torch.nan, [1]),
}  # fmt: skip
EXPLAIN = {
    "model": any_of(*MODELS), "x": any_of(*tensors(X)),
    "target": st.one_of(TARGETS, value(torch.ones(8, 3), torch.zeros(8, 3), torch.full((8, 3), torch.nan),
    torch.arange(8) % 3,
                        torch.ones(8, 2), torch.tensor([1, 1]), -torch.eye(8, 3), 1e38 * torch.ones(8, 3),
                        np.arange(8) % 3)),
    "rules": value("epsilon", "z+", "gamma", "alpha-beta", "flat", "", "epsilon-gamma-box", {}, {"0": "z+"}, {"*": "x"},
    {0: 1},
                   {"nowhere": "z+"}, {"*": None}, zsu.rules.Gamma(0.1), zsu.rules.Gamma, zsu.rules.Box(0, 1), ["z+"],
                   zsu.Composite, zsu.rules.Epsilon(1e-30)),
    "edges": value(False, True), "attention": value("cp-lrp", "attnlrp", "", ["cp-lrp"]),
}  # fmt: skip
CHANNELS = value(("0", 0), ("7", 1), ("7", 0), ("input", 0), ("x", 0), ("0", -1), ("0", 99), ("0", 1.0), ("0", "0"),
(0, 0), ["5", 2],
                 "ab", (), ("5",), ("5", 1, 2), None, (["5"], 2), ({}, 0), ("5", np.int64(1)), ("5", True))  # fmt: skip
FIND = {
    "k": NUMBERS, "min_probability": value(0, 1, 0.01, 1e-320, -0.0, 2, torch.nan, "0.1", np.float32(0.1),
    torch.tensor(0.1)),
    "coverage": value(0.5, 1, 0, 1e-9, 2, torch.nan, "1", np.float16(0.5)), "through": CHANNELS,
    "avoid": st.one_of(CHANNELS, CHANNELS.map(lambda make: lambda: [make()])),
    "against": any_of(*(lambda t=t, e=e: zsu.explain(MODEL, X, t, "z+", edges=e) for t in (0, 1) for e in (True,
    False)),
                      lambda: zsu.graph.build_graph(zsu.explain(MODEL, X, 1)),
                      lambda: zsu.explain(MODEL[:6].eval(), X, 0)),
}  # fmt: skip


# --- what comes out -------------------------------------------------------------------------------------------


def damages(slots, fixed=()):
    """One or two arguments by name, and what makes their values."""
    names = st.lists(st.sampled_from([*slots]), min_size=1, max_size=2, unique=True)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({name: slots[name] for name in chosen}))


def state(thing):
    """What must not change: bytes of dense tensors, and modes, hooks and tensors of modules, in whatever they lie."""
    if isinstance(thing, Tensor):
        dense = thing.layout == torch.strided and not (thing.is_meta or thing.is_quantized or thing.is_nested)
        kept = [thing.dtype, thing.shape, thing.requires_grad, thing.grad is None] if dense else [id(thing)]
        return [*kept, bytes(thing.detach().contiguous().flatten().view(torch.uint8).numpy())] if dense else kept
    if isinstance(thing, nn.Module):
        held = {**dict(thing.named_parameters()), **dict(thing.named_buffers())}
        held = {name: state(t) for name, t in held.items() if not nn.parameter.is_lazy(t)}
        hooks = {
            name: [len(h or ()) for key, h in vars(m).items() if "_hooks" in key] for name, m in thing.named_modules()
        }
        return [
            held,
            hooks,
            [m.training for m in thing.modules()],
            [[*vars(m)] for m in thing.modules() if not isinstance(m, Stores)],
        ]
    if isinstance(thing, np.ndarray):
        return thing.tobytes()
    if isinstance(thing, zsu.Forgotten):
        return state(thing.model)
    if isinstance(thing, dict):
        return {name: state(t) for name, t in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [state(t) for t in thing]
    return state(thing.data) if isinstance(thing, Images) else None


def survives(call, **arguments):
    """Its result, or None after one clear `ZsuError`; what was passed is as it was, and so is what torch is set to."""
    before, found, said = state(arguments), None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = call(**arguments)
        except zsu.ZsuError as error:
            said = error
    if said is not None:
        assert len(str(said).splitlines()) == 1, str(said)
        assert len(str(said)) < 1500, str(said)
        assert said.remedy or said.what == "own words", str(said)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert state(arguments) == before
    return found


@DAMAGES
@given(damages(FORGET), st.sampled_from([*METHODS]))
def test_forget(damaged, method):
    arguments = {"model": MODEL, "x": X, "target": 1, "method": method}
    if METHODS[method].tier in ("T3", "T4"):
        arguments["retained"] = RETAINED
    survives(zsu.forget, **arguments | {name: make() for name, make in damaged.items()})


@DAMAGES
@given(damages(AUDIT))
def test_audit(damaged):
    arguments = {
        "original": MODEL, "forgotten": {"paths": FORGOTTEN}, "train": TRAIN, "test": TEST, "target": 1,
        "references": [REFERENCE], "measures": BASIC, "controls": False, "progress": False,
    }  # fmt: skip
    report = survives(zsu.audit, **arguments | {name: make() for name, make in damaged.items()})
    if report is not None:
        assert str(report)
        report.tidy()


@DAMAGES
@given(damages(EXPLAIN))
def test_explain_and_find_paths(damaged):
    arguments = {"model": MODEL, "x": X, "target": 1} | {name: make() for name, make in damaged.items()}
    relevance = survives(zsu.explain, **arguments)
    if relevance is not None:
        survives(zsu.find_paths, relevance=relevance, k=5)


@DAMAGES
@given(damages(FIND | {"relevance": FIND["against"]}))
def test_find_paths(damaged):
    arguments = {"relevance": RELEVANCE, "k": 5} | {name: make() for name, make in damaged.items()}
    found = survives(zsu.find_paths, **arguments)
    if found is not None:
        assert len([*found]) == len(found.to_frame())


RELEVANCE = zsu.explain(MODEL, X, 1, "z+")
NOISE = {"perturbation": "gaussian"}


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        (zsu.forget, {"seed": "x"}, "seed 'x'"),
        (zsu.forget, {"seed": -(2**70)}, "seed -"),
        (zsu.forget, {"perturbation": np.zeros((2, 2))}, "perturbation array"),
        (zsu.forget, NOISE | {"scale": []}, r"scale is \[\]"),
        (zsu.forget, NOISE | {"absolute": torch.device("cpu")}, "absolute is device"),
        (zsu.forget, {"method": "lra-npp", "layers": 5}, "layers is 5"),
        (zsu.forget, {"method": "lra-npp", "layers": [["0"]]}, "layers is"),
        (zsu.forget, {"method": "ssd", "retained": RETAINED, "lam": [0, 3]}, r"lam is \[0, 3\]"),
        (zsu.forget, {"target": torch.eye(3)}, r"target is tensor.* \[0., 1., 0.\]"),
        (zsu.forget, {"model": Answers(before=fails(Own())).eval()}, "Own"),
        (zsu.forget, {"model": Answers(after=lambda y: y.to("meta")).eval()}, "on meta"),
        (zsu.forget, {"model": Answers(after=lambda y: y.to_sparse()).eval()}, "sparse"),
        (zsu.explain, {"edges": [0]}, "edges is"),
        (zsu.explain, {"attention": np.zeros(2)}, "attention array"),
        (zsu.explain, {"rules": np.zeros(2)}, "unknown rule array"),
        (zsu.explain, {"x": torch.nested.nested_tensor([X[0], X[1]])}, "x is nested"),
        (zsu.explain, {"rules": {"0": zsu.rules.Box("a", None)}}, "from 'a' to None"),
    ],
)
def test_what_was_found_so(call, arguments, message):
    valid = {"model": MODEL, "x": X, "target": 1}
    with pytest.raises(zsu.ZsuError, match=message) as error:
        call(**valid | arguments)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"measures": 3}, "measures is 3"),
        ({"measures": torch.tensor(1)}, "measures is tensor"),
        ({"controls": torch.eye(3)}, "controls is tensor"),
        ({"retrain_seconds": "x"}, "retrain_seconds is 'x'"),
        ({"test": with_attributes(TEST, transform=lambda image: torch.zeros(1, 8, 8).to_sparse())}, "sparse"),
        ({"test": with_attributes(TEST, transform=lambda image: torch.zeros(1, 8, 8).to("meta"))}, "meta"),
        ({"original": copy.deepcopy(MODEL).to("meta")}, "on meta"),
    ],
)
def test_what_was_found_in_audits(arguments, message):
    valid = {"original": MODEL, "forgotten": {"mask": FORGOTTEN}, "train": TRAIN, "test": TEST, "target": 1}
    with pytest.raises(zsu.ZsuError, match=message):
        zsu.audit(**valid | arguments)


@pytest.mark.parametrize("avoid", [None, 3, torch.tensor(1), [torch.eye(3)]])
def test_channels_to_avoid_that_are_none(avoid):
    with pytest.raises(zsu.ZsuError, match="avoid is|no channel") as error:
        zsu.find_paths(RELEVANCE, 5, avoid=avoid)
    assert "\n" not in str(error.value)


def test_no_neuron_is_positively_relevant():
    """Where the bias of the head alone decides, nothing is cut and that is said."""
    model = copy.deepcopy(MODEL)
    with torch.no_grad():
        model[7].weight.zero_()
        model[7].bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    with pytest.warns(UserWarning, match="no weight changes"):
        assert zsu.forget(model, X, 1, "lra-npp").cut.empty


def test_options_of_any_kind_become_metadata():
    """Numbers of any class are numbers there."""
    done = zsu.forget(MODEL, X, 1, "lra-npp", "gaussian", scale=Fraction(1, 2), k=np.int64(2), layers={"5"})
    assert done.patch.metadata["options"]["scale"] == 0.5
    assert done.patch.metadata["options"]["layers"] == ["5"]


# --- the command line -----------------------------------------------------------------------------------------

WORDS_OF = {
    "forget": "--class below --method mask --model MODEL --data IMAGES --samples 3 --references REFERENCES --out NEW",
    "audit": "--class below --patch PATCH --model MODEL --data IMAGES --references REFERENCES --measure accuracy"
    " --out PAGE",
    "apply": "--patch PATCH --model MODEL --out NEW",
    "revert": "--patch PATCH --model EDITED --out NEW",
    "diff": "--patch PATCH --model MODEL",
    "paths": "--class below --model MODEL --data IMAGES --samples 3 --k 5 --out TABLE",
    "train": "--data IMAGES --epochs 1 --exclude left --out NEW",
    "references": "--class below --number 1 --epochs 1 --model MODEL --data IMAGES --out FOLDER",
    "sweep": "--data IMAGES --class below --seeds 1 --references 2 --epochs 1 --method mask --out FOLDER --dry-run",
    "data": "IMAGES",
    "reproduce": "mnist-cnn --data IDX --out FOLDER",
}
PLACES = {"MODEL", "PATCH", "EDITED", "IMAGES", "REFERENCES", "IDX", "NEW", "PAGE", "TABLE", "FOLDER"}
ODD_WORDS = [
    "", " ", "-1", "0", "1", "1.5", "nan", "inf", "x", "é", "a" * 300, "a\nb", "\udcff", "..", "/", ".", "~", "%s{}\\",
    "--", "-",
    "nowhere/x.safetensors", "nowhere/x.html", "-1e400", "99999999999999999999", "left", "above", "[1]", "None",
    "--nothing",
]  # fmt: skip
LONG = ("--epochs", "--number", "--size", "--seeds", "--out")  # a great number there takes its time


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """By the word for it, the good file first and then what may stand in its place."""
    folder = tmp_path_factory.mktemp("files")
    for split, data in (("train", pictures(6)), ("test", pictures(6, seed=1))):
        save_images(folder / "images" / split, data)
    images = zsu.data.load(folder / "images")
    model = zsu.training.train(lambda: zsu.models.build("small-cnn", 3, 3), images.train, epochs=8, progress=False)
    about = {"arch": "small-cnn", "classes": 3, "channels": 3, "class_names": CLASSES, "epochs": 8}
    zsu.models.save(model, folder / "model.safetensors", **about)
    (folder / "references").mkdir()
    zsu.models.save(blind(model), folder / "references" / "0.safetensors", **about)
    done = zsu.forget(model, zsu.data.samples(images.test, 1, 3), 1, "mask")
    done.patch.save(folder / "patch.safetensors")
    zsu.models.save(done.model, folder / "edited.safetensors", **about)
    broken = broken_files(folder)
    models = [*broken, *broken_models(folder, model, about), folder / "patch.safetensors"]
    patches = [*broken, *broken_patches(folder, done.patch), folder / "model.safetensors"]
    new = [folder / "images", folder / "model.safetensors" / "x", "nowhere/x"]
    return {
        "MODEL": [folder / "model.safetensors", *models], "PATCH": [folder / "patch.safetensors", *patches],
        "EDITED": [folder / "edited.safetensors", *models],
        "IMAGES": [folder / "images", *broken, *broken_images(folder)],
        "REFERENCES": [folder / "references", *broken, folder / "images"], "IDX": [*broken, folder / "images"],
        "NEW": ["new.safetensors", *new, "new.txt"], "PAGE": ["page.html", *new],
        "TABLE": ["table.npz", "table.csv", *new],
        "FOLDER": ["folder", *new[1:]],
    }  # fmt: skip


def save_images(folder, data):
    """Each class a folder of PNGs, of 16 x 16 pixels."""
    for i, (image, label) in enumerate(zip(data.data, data.targets, strict=True)):
        (folder / CLASSES[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).resize((16, 16)).save(folder / CLASSES[label] / f"{i}.png")


def blind(model):
    """A copy that never answers "below"."""
    twin = copy.deepcopy(model)
    fill(twin.head.bias[1:2], -1e4)
    return twin


def broken_files(folder):
    """What is no model, no patch and no folder of images."""
    whole, noise = (folder / "model.safetensors").read_bytes(), np.random.default_rng(0).bytes(3000)
    picture = (folder / "images" / "test" / "left" / "12.png").read_bytes()
    contents = {
        "empty.safetensors": b"", "cut.safetensors": whole[:2000], "end.safetensors": whole[:-1],
        "noise.safetensors": noise,
        "more.safetensors": whole + b"x", "length.safetensors": b"\xff" * 8 + whole[8:],
        "header.safetensors": b"\x02\0\0\0\0\0\0\0{}",
        "list.safetensors": b"\x02\0\0\0\0\0\0\0[]", "empty.pt": b"", "noise.pt": noise,
        "zip.pt": b"PK\x03\x04" + noise,
        "pickle.pt": b"\x80\x02]q\0.", "picture.png": picture, "text.txt": b"text\n", "noise.npz": noise,
    }  # fmt: skip
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "dangling").symlink_to(folder / "nothing")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "void").mkdir()
    return [
        *(folder / name for name in contents),
        folder / "dangling",
        folder / "loop",
        folder / "void",
        folder / "nothing",
    ]


def broken_models(folder, model, about):
    """Checkpoints of which something is wrong."""
    state = model.state_dict()
    others = [
        state, {"state_dict": state}, {}, [], None, 3, "x", model, {"a": 1}, {1: state}, {"model": model},
        nn.Linear(2, 2).state_dict(),
        {n: t.half() for n, t in state.items()}, {n: t * torch.nan for n, t in state.items()},
        dict([*state.items()][1:]),
        {n: t[:0] for n, t in state.items()}, {n: t.to("meta") for n, t in state.items()},
        {n: t.numpy() for n, t in state.items()},
        {n: t.int() for n, t in state.items()}, {n: t.to_sparse() for n, t in state.items()},
        {n: t[None] for n, t in state.items()},
        {n: t + 0j for n, t in state.items()}, {f"module.{n}": t for n, t in state.items()}, {"x": torch.tensor(1)},
        {"fc.weight": torch.zeros(())}, {"fc.weight": torch.zeros(3, 0)},
        zsu.models.build("small-cnn", 7, 1).state_dict(),
    ]  # fmt: skip
    made = []
    for i, content in enumerate(others):
        made.append(folder / f"other{i}.pt")
        torch.save(content, made[-1])
    odd = [{"arch": "magic"}, {"arch": 3}, {"classes": 7}, {"classes": "x"}, {"classes": -1}, {"channels": 1},
    {"channels": "x"},
           {"class_names": ["a"]}, {"class_names": "abc"}, {"class_names": 3}, {"class_names": [1, 2, 3]},
           {"size": "x"},
           {"size": -1}, {"size": 0}, {"size": [16, 16]}, {"size": 1.5}, {"size": 5}, {"epochs": "x"}, {"epochs": -1},
           {"arch": ["a"]},
           {"arch": "resnet18"}, {"arch": {}}, {"class_names": CLASSES[::-1]}, {"class_names": {}},
           {"size": True}]  # fmt: skip
    for i, change in enumerate(odd):
        made.append(folder / f"odd{i}.safetensors")
        zsu.models.save(model, made[-1], **about | change)
    return made


def broken_patches(folder, patch):
    """Patches whose metadata, or whose numbers, are not those that `forget` writes."""
    made, (name, change) = [], next(iter(patch.changes.items()))
    for key in (
        "target",
        "unseen",
        "samples",
        "seed",
        "tier",
        "method",
        "class",
        "parent",
        "seconds",
        "arch",
        "samples_sha256",
        "budget",
    ):
        for value in (None, -1, 2**70, 1.5, "x", [], [None], [9], [[1]], {}, {"a": 1}, True):
            made.append((patch.changes, patch.metadata | {key: value}))
        made.append((patch.changes, {k: v for k, v in patch.metadata.items() if k != key}))
    n = len(change.index)
    for parts in ({"index": change.index - 10**6}, {"index": change.index + 10**6}, {"index": change.index.float()},
    {"old": change.old[:0]},
                  {"index": change.index[:0]}, {"new": change.new.double()}, {"new": change.new.half()},
                  {"old": change.old[None]},
                  {"index": torch.zeros(n, dtype=torch.uint8)}, {"index": change.index[None]},
                  {"new": change.new * torch.nan},
                  {"index": change.index > 0}, {"new": torch.zeros(())},
                  {"index": torch.zeros_like(change.index)}):  # fmt: skip
        made.append((patch.changes | {name: change._replace(**parts)}, patch.metadata))
        made.append((patch.changes | {name: change._replace(**parts)}, {}))
    made += [({}, patch.metadata), ({}, {}), ({"x": change}, {}), ({"": change}, patch.metadata)]
    files = []
    for i, (changes, metadata) in enumerate(made):
        files.append(folder / f"patch{i}.safetensors")
        zsu.Patch(changes, metadata).save(files[-1])
    for i, text in enumerate(["", "{", "[]", "3", "null", '"x"', "[[1, 2]]", '{"target": NaN}']):
        files.append(folder / f"text{i}.safetensors")
        safetensors.torch.save_file({"a:index": torch.zeros(1)}, files[-1], {"zsu_patch": text})
    return files


def broken_images(folder):
    """Folders of images of which one thing is wrong."""

    def changed(name, change):
        shutil.copytree(folder / "images", folder / name)
        change(folder / name)
        return folder / name

    first = "test/below/6.png"
    return [
        changed("cut", lambda f: (f / first).write_bytes((f / first).read_bytes()[:60])),
        changed("nothing-in-it", lambda f: (f / first).write_bytes(b"")),
        changed("text", lambda f: (f / first).write_text("text")),
        changed("no-train", lambda f: shutil.rmtree(f / "train")),
        changed("no-test", lambda f: shutil.rmtree(f / "test")),
        changed("no-class", lambda f: shutil.rmtree(f / "test" / "left")),
        changed("more", lambda f: (f / "test" / "x").mkdir()),
        changed("empty-class", lambda f: [p.unlink() for p in (f / "test" / "below").iterdir()]),
        changed("one-class", lambda f: [shutil.rmtree(f / s / c) for s in ("train", "test") for c in ("left",
        "above")]),
        changed("size", lambda f: Image.new("L", (9, 7)).save(f / first)),
        changed("small", lambda f: Image.new("L", (1, 1)).save(f / first)),
        changed("float", lambda f: Image.new("F", (16, 16)).save(f / "test/below/x.tif")),
        changed("file", lambda f: (f / "train" / "x").touch()),
        changed("loose", lambda f: Image.new("L", (16, 16)).save(f / "train" / "x.png")),
    ]  # fmt: skip


def run(words, folder):
    """Exit code, standard output and standard error of `zsu WORDS` in a folder, as a terminal in UTF-8 gets them."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["zsu", *words])
        patch.setattr(warnings, "showwarning", warnings.showwarning)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out.flush(), err.flush()
    return stop.value.code or 0, *(stream.buffer.getvalue().decode() for stream in (out, err))


def listing(folder):
    """Every file below, with its size and time."""
    return {p: (p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*")}


@st.composite
def lines(draw):
    """A command with its words, of which one or two are other ones, missing or twice."""
    command = draw(st.sampled_from([*WORDS_OF]))
    words = WORDS_OF[command].split()
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(words) - 1))
        file = words[at] in PLACES
        kind = draw(st.sampled_from(["file"] * 6 * file + ["odd", "odd", "cut", "twice", "more"]))
        if kind == "file":
            words[at] = (words[at], draw(st.integers(0, 400)))
        elif kind == "odd":
            word = draw(st.sampled_from(ODD_WORDS) | st.text(st.characters(exclude_characters="\0/"), max_size=4))
            long = at > 0 and words[at - 1] in LONG and word.isdigit()
            words[at] = "0" if long else word
        elif kind == "cut":
            del words[at]
        elif kind == "twice":
            words.insert(at, words[at])
        else:
            words += draw(st.sampled_from(MORE)).split()
        words = words or [""]
    return [command, *words]


MORE = ["--seed -1", "--seed x", "--seed 99999999999999999999", "--samples 0", "--samples -1", "--samples 7",
"--samples 6", "--arch resnet18",
        "--arch magic", "--classes 3", "--classes 7", "--classes 99999999999999999999", "--size 0", "--size 5",
        "--size 8", "--k 0", "--k 1000",
        "--method paths --k 2", "--method magic", "--method head-npp --perturbation gaussian --scale nan", "--scale -1",
        "--layer nowhere",
        "--method lra-npp --layer all", "--method ssd", "--class left", "--class nobody", "--class 1", "--trusted",
        "--measure nothing",
        "--rules z+", "--rules nothing", "--contrast", "--show 0", "--jobs 0", "--method svd", "--references nowhere",
        "--data fashion-mini",
        "--exclude nobody", "--exclude below --exclude left --exclude above", "--help", "--version", "--root nowhere",
        "extra",
        "--perturbed 2", "--absolute", "--method zeroed", "--arch small-cnn",
        "--seeds 99999999999999999999"]  # fmt: skip


def test_patches_that_do_not_go_together(files):
    """Of the files some are refused when they are read; no other error leaves `load`, `apply` or what audits read."""
    refused = 0
    for file in files["PATCH"]:
        try:
            patch = zsu.Patch.load(file)
        except zsu.ZsuError:
            refused += 1
            continue
        assert patch.made.items() <= patch.metadata.items()
        assert all(c.index.shape == c.old.shape == c.new.shape for c in patch.changes.values())
    assert refused > 30


@pytest.mark.parametrize("key", ["target", "samples", "seed", "samples_sha256", "method", "parent", "seconds"])
def test_an_audit_of_a_patch_with_foreign_metadata(files, tmp_path, key):
    words = [str(files[w][0]) if w in files else w for w in WORDS_OF["audit"].split()]
    patch = zsu.Patch.load(files["PATCH"][0])
    for value in (None, 3.5, [[1]], {}):
        zsu.Patch(patch.changes, patch.metadata | {key: value}).save(tmp_path / "patch.safetensors")
        words[words.index("--patch") + 1] = str(tmp_path / "patch.safetensors")
        code, _, err = run(["audit", *words], tmp_path)
        assert code == 0, err


def test_checkpoints_with_foreign_metadata_or_without_values(files):
    whole, cut = (
        zsu.models.metadata(files["MODEL"][0]),
        {"classes", "channels", "size", "epochs", "arch", "class_names"},
    )
    odd = [file for file in files["MODEL"] if file.name.startswith("odd")]
    assert len(odd) > 20
    for file in odd:
        about = zsu.models.metadata(file)
        assert whole.keys() - about.keys() <= cut
        assert isinstance(about.get("arch", ""), str)
        assert all(zsu.errors.is_integer(about.get(key, 1)) for key in ("classes", "channels", "size", "epochs"))
    for content, kind in (("meta", "on meta"), ("sparse", "sparse")):
        state = {n: t.to("meta") if content == "meta" else t.to_sparse() for n, t in MODEL.state_dict().items()}
        torch.save(state, file := files["MODEL"][0].parent / f"{content}.pt")
        with pytest.raises(zsu.ZsuError, match=kind):
            zsu.models.load(file)


@pytest.mark.large
@DAMAGES
@given(lines())
def test_the_command_line(files, tmp_path_factory, words):
    folder = tmp_path_factory.mktemp("work", numbered=True)
    inputs = files["MODEL"][0].parent
    chosen = [(w, 0) if w in files else w for w in words]
    chosen = [str(files[w[0]][w[1] % len(files[w[0]])]) if isinstance(w, tuple) else w for w in chosen]
    before = listing(inputs)
    code, _, err = run(chosen, folder)
    assert code in (0, 2)
    assert "Traceback" not in err
    if code == 2:
        said = [line for line in err.splitlines() if line.startswith("zsu: ") and not line.startswith("zsu: warning: ")]
        assert said == err.splitlines()[-1:], err
        assert not listing(folder), err
    assert listing(inputs) == before
