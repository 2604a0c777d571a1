"""Between the checks at the entry and the result nobody waits for a device: no value is read on the host.

On a CPU a mode refuses what would wait; the passes over memory in NumPy are switched off, as on a card.
"""

import copy
import sys
from contextlib import contextmanager

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import TROUSER, Net, rand, wrap_explanation
from zsu import explain, explain_each, forget
from zsu.data import Images
from zsu.evaluation.observed import predict
from zsu.forgetting import cutting, neurons
from zsu.forgetting.perturb import perturb
from zsu.paths import graph
from zsu.relevance import composites, explanation
from zsu.relevance.rules import AlphaBeta, Box, Gamma, Rule

WAIT = set("_local_scalar_dense is_nonzero equal nonzero masked_select _unique2 unique_dim unique_consecutive".split())
READ = {"cpu", "numpy", "tolist", "item", "__bool__", "__float__", "__int__", "__index__", "__array__"}


def on_the_host():
    """Whether the call comes from where all is on the CPU, on all machines: numbers of channels, selections."""
    frame = sys._getframe()
    while frame:
        if frame.f_code.co_filename.endswith(("channels.py", "selection.py")) or frame.f_code.co_name == "checked":
            return True
        frame = frame.f_back
    return False


class Reads(TorchDispatchMode):
    """Counts what needs values on the host; with `most` it refuses more."""

    def __init__(self, most=None):
        super().__init__()
        self.most, self.seen = most, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_") else ()
        if name in WAIT or any(t is not None and t.dtype == torch.bool for t in indices):
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, name):
        if on_the_host():
            return
        self.seen.append(name)
        assert self.most is None or len(self.seen) <= self.most, f"{name} waits for the device"


class Calls(TorchFunctionMode):
    """What leaves tensors without a dispatch, on a CPU."""

    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in READ - {"__bool__", "__float__", "__int__", "item"}:  # which are dispatched
            self.reads.note(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_read():
    reads = Reads(most=0)
    with reads, Calls(reads):
        yield


def without_reading(function):
    def run(*args, **kwargs):
        with nothing_read():
            return function(*args, **kwargs)

    return run


@pytest.fixture
def watched(monkeypatch):
    """All of `explain` between the checks and the result."""
    monkeypatch.setattr("zsu.relevance.sums.fits", lambda *_: False)
    wrap_explanation(monkeypatch, without_reading)


def everyday(m, x):
    """Operations that might look at values: bending, bounds, constants, gates, products, slices."""
    h = F.gelu(m.conv((x - 0.5) / 0.25 + 1)).clamp(min=0)
    h = torch.cat([h, torch.maximum(h[:, :2], torch.zeros(()))], 1)
    h = m.norm(F.hardswish(h)) * m.gate(h.mean((2, 3))).sigmoid()[:, :, None, None] + torch.ones(1, 6, 1, 1)
    return m.head(F.leaky_relu(h, 0.1).amax((2, 3)))


MODELS = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "vit": lambda: torchvision.models.VisionTransformer(16, 8, 2, 2, 8, 16, num_classes=5),
    "everyday": lambda: Net(everyday, conv=nn.Conv2d(3, 4, 3), norm=nn.GroupNorm(2, 6), gate=nn.Linear(6, 6),
                            head=nn.Linear(6, 5)),
}  # fmt: skip
RULES = ["epsilon", "gamma", "z+", "alpha-beta", "epsilon-plus-flat"]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:relevance explodes", "ignore:the stabilisers", "ignore:the rule of the input")
def test_nothing_is_read_between_the_checks_and_the_result(watched, name, rules):
    torch.manual_seed(0)
    model, x = MODELS[name]().eval(), torch.rand(3, 3, 16, 16)
    if name == "vit":
        nn.init.normal_(model.heads.head.weight)
    explain(model, x, 1, rules)
    explain_each(model, x, [torch.tensor([0, 1, 2]), torch.rand(3, 5)], rules)


def test_a_box_is_checked_before(watched):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).eval()
    explain(model, torch.rand(2, 3, 5, 5), 1, composites.Composite(conv=Gamma(), first=Box()))


def test_what_reads_is_found(watched):
    class Looks(Rule):
        def __call__(self, R, z, b, signs):
            return AlphaBeta(1.0, 0.0)(R, z, b, signs) if (R >= 0).all() else AlphaBeta()(R, z, b, signs)

    model = nn.Sequential(nn.Linear(4, 3)).eval()
    with pytest.raises(AssertionError, match="waits for the device"):
        explain(model, torch.rand(2, 4), 1, Looks())


@pytest.mark.parametrize("rectify", [nn.ReLU(), nn.ReLU(True), nn.Identity(), nn.GELU()])
@pytest.mark.parametrize("rule", [Gamma(0.3), "z+"])
def test_what_stands_behind_a_layer_says_what_its_values_say(rectify, rule):
    """The gamma rule in one portion behind a ReLU, where no relevance arrives at negative outputs, else in two."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), rectify, nn.Flatten(), nn.Linear(36, 3)]
    model, x = nn.Sequential(*layers).double().eval(), rand(2, 2, 5, 5)
    found = explain(model, x, 1, rule)
    split = explain(Net(lambda m, x: read_twice(m.net, x), net=copy.deepcopy(model)).eval(), x, 1, rule)
    assert (found.input - split.input).abs().max() <= 1e-12 * found.input.abs().max()


def read_twice(net, x):
    """The same, but the convolution's output is also read by an operation that adds nothing."""
    z = net[0](x)
    return net[1:](z + 0.0 * z)


def test_perturb_reads_nothing_after_its_checks(original):
    selection = {"fc.weight": torch.tensor([5, 3, 3]), "head.bias": torch.tensor([1])}
    for kind in ("zero", "gaussian", "laplace"):
        with nothing_read():
            perturb(original, selection, kind)


def test_predict_reads_the_outputs_at_the_end(original, monkeypatch):
    images = Images(torch.randint(256, (250, 1, 28, 28), dtype=torch.uint8), torch.arange(250) % 10, list("abcdefghij"))
    monkeypatch.setattr("zsu.evaluation.observed.logits_of", without_reading(explanation.logits_of))
    assert predict(original, images)[0].shape == (250, 10)


@pytest.mark.parametrize("method", ["paths", "lra-npp"])
def test_a_search_reads_once_a_step(original, x, monkeypatch, method):
    """One number a step, whether it is enough; and a few for where the search begins."""
    steps, reads, inside = [], Reads(), []
    home, name = (cutting, "try_out") if method == "paths" else (neurons, "try_out")
    plain = getattr(home, name)

    def counted(*args):
        steps.append(1)
        before = len(reads.seen)
        found = plain(*args)
        inside.append(len(reads.seen) - before)
        return found

    monkeypatch.setattr(home, name, counted)
    search, at = (cutting, "fewest_cuts") if method == "paths" else (neurons, "fewest_neurons")
    whole = getattr(search, at)

    def watched_search(*args):
        with reads:
            return whole(*args)

    monkeypatch.setattr(search, at, watched_search)
    forget(original, x, TROUSER, method)
    assert len(steps) > 3
    assert sum(inside) == 0
    assert len(reads.seen) <= len(steps) + 4


def test_a_graph_takes_each_layers_edges_once(original, x, monkeypatch):
    sent, plain = [], graph.on_its_way
    monkeypatch.setattr(graph, "on_its_way", lambda t: sent.append(t.numel()) or plain(t))
    relevance = explain(original, x, TROUSER)
    graph.build_graph(relevance)
    assert len(sent) == len(relevance.layers) - 1
    head = relevance.layers[-2]
    assert sent[-2] < head.edges[0].numel()  # positions of a flattened channel are summed before
