"""What enters the flow out of the tape's sight, what only looks at it, gates in all spellings, rules of the input."""

import copy
import io
import threading
import warnings

import numpy as np
import pytest
import torch
from einops.layers.torch import EinMix, Rearrange
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from helpers import Net, rand
from zsu import Composite, ZsuError, compare, explain, explain_each, find_paths
from zsu.relevance.rules import Box, Epsilon, Flat, Gamma, WSquare

TINY = Epsilon(1e-30)


def net(run, **modules):
    """The same random weights each time, in float64 and eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = {"a": nn.Linear(6, 8), "b": nn.Linear(8, 8), "head": nn.Linear(8, 3)}
    return Net(run, **layers | modules).double().eval()


def residual(branch):
    def run(m, x):
        x = m.a(x)
        return m.head(x + branch(m, x))

    return net(run)


@torch.jit.script
def relu_script(x):
    return torch.relu(x)


def in_a_thread(f):
    found = []
    thread = threading.Thread(target=lambda: found.append(f()))
    thread.start()
    thread.join()
    return found[0]


class ByNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(np.maximum(x.detach().numpy(), 0))

    @staticmethod
    def backward(ctx, g):
        return g * (ctx.saved_tensors[0] > 0)


def saved_and_loaded(x):
    file = io.BytesIO()
    torch.save(x.detach(), file)
    file.seek(0)
    return torch.load(file)


def filled(x):
    out = torch.zeros(x.shape, dtype=x.dtype)
    out[:] = x.relu()
    return out


def by_address(x):
    out = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_double * x.numel()).from_address(x.data_ptr())).copy()
    return torch.from_numpy(out).reshape(x.shape).relu()


OUT_OF_SIGHT = {
    "script": lambda m, x: relu_script(x),
    "script, then more": lambda m, x: (relu_script(x) * 2).clone() / 2,
    "script without gradient": lambda m, x: torch.no_grad()(relu_script)(x),
    "script, then numpy": lambda m, x: torch.from_numpy(relu_script(x).detach().numpy()),
    "vmap": lambda m, x: torch.vmap(torch.relu)(x),
    "jacobian product": lambda m, x: torch.func.jvp(torch.relu, (x,), (torch.ones_like(x),))[0],
    "thread": lambda m, x: in_a_thread(lambda: torch.relu(x)),
    "thread without gradient": lambda m, x: in_a_thread(lambda: torch.no_grad()(torch.relu)(x)),
    "copy": lambda m, x: copy.copy(x).relu(),
    "deep copy": lambda m, x: copy.deepcopy(x).relu(),
    "Function": lambda m, x: ByNumpy.apply(x),
    "checkpointed copy": lambda m, x: saved_and_loaded(x).relu(),
    "data": lambda m, x: x.data.relu(),
    "detach": lambda m, x: x.detach().relu(),
    "numpy": lambda m, x: torch.as_tensor(x.numpy()).relu(),
    "list": lambda m, x: torch.tensor(x.tolist(), dtype=x.dtype).relu(),
    "numbers": lambda m, x: torch.stack([torch.full((8,), float(r.mean()), dtype=x.dtype) for r in x]),
    "a factor": lambda m, x: torch.ones_like(x) * x.std().item(),
    "storage": lambda m, x: torch.tensor([], dtype=x.dtype).set_(x.untyped_storage(), 0, x.shape).relu(),
    "dlpack": lambda m, x: torch.from_dlpack(x.detach()).relu(),
    "address": lambda m, x: by_address(x),
    "assignment": lambda m, x: filled(x),
    "buffer": lambda m, x: torch.zeros(x.shape, dtype=x.dtype).copy_(x.detach()).relu(),
    "written by a script": lambda m, x: torch.zeros(x.shape, dtype=x.dtype).add_(relu_script(x.detach())),
    "an operator of one's own": lambda m, x: torch.ops.zsu_tests.relu(x),
}
LIBRARY = torch.library.Library("zsu_tests", "DEF")
LIBRARY.define("relu(Tensor x) -> Tensor")
LIBRARY.impl("relu", lambda x: x.tanh(), "CPU")


@pytest.mark.parametrize("name", OUT_OF_SIGHT)
def test_what_the_tape_has_not_seen_made_does_not_pass_for_a_constant(name):
    with pytest.raises(ZsuError, match="explain: .*(joins|takes|no relevance rule)"):
        explain(residual(OUT_OF_SIGHT[name]), rand(4, 6), 1)


def test_the_name_of_what_autograd_saw_and_the_whole_output_out_of_sight():
    with pytest.raises(ZsuError, match=r"'add' takes a tensor .* out of sight \(autograd: .*Relu.*call the plain"):
        explain(residual(OUT_OF_SIGHT["vmap"]), rand(4, 6), 1)
    with pytest.raises(ZsuError, match="'the output' takes a tensor .* out of sight"):
        explain(net(lambda m, x: torch.vmap(m.head)(m.a(x))), rand(4, 6), 1)


MASK = torch.arange(8.0).double()
KNOWN = {
    "weights by a script": lambda m, x: F.linear(x, relu_script(m.b.weight), m.b.bias),
    "weights by vmap, without gradient": lambda m, x: F.linear(x, torch.no_grad()(torch.vmap(torch.relu))(m.b.weight)),
    "from outside": lambda m, x: x * MASK,
    "made in sight": lambda m, x: x * torch.arange(8.0, dtype=x.dtype),
    "a number of the model": lambda m, x: x * float(m.b.weight.max()),
    "a number that does not change": lambda m, x: x * round(float(x.shape[0] + 0 * x.mean())),
}
PLAIN = {
    "weights by a script": lambda m, x: F.linear(x, m.b.weight.relu(), m.b.bias),
    "weights by vmap, without gradient": lambda m, x: F.linear(x, m.b.weight.relu()),
    "from outside": KNOWN["made in sight"],
    "made in sight": lambda m, x: x.mul(torch.arange(8.0).double()),
    "a number of the model": lambda m, x: x * m.b.weight.max().item(),
    "a number that does not change": lambda m, x: x * 4,
}


@pytest.mark.parametrize("name", KNOWN)
def test_constants_of_any_making_are_constants(name):
    found, right = (explain(residual(how[name]), rand(4, 6), 1, "gamma").input for how in (KNOWN, PLAIN))
    assert torch.equal(found, right)


@pytest.mark.parametrize("where", ["inside", "in place", "a function"])
def test_compiled_parts_run_as_they_are_written(where):
    part = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).double().eval()
    model = net(lambda m, x: m.head(m.part(m.a(x))), part=part)
    right = explain(model, rand(4, 6), 1).input
    if where == "inside":
        model.part = torch.compile(part, backend="eager")
    elif where == "in place":
        model.part.compile(backend="eager")
    else:
        function = torch.compile(lambda x: part(x), backend="eager")
        model.run = lambda m, x: m.head(function(m.a(x)))
    assert torch.equal(explain(model, rand(4, 6), 1).input, right)


# --- looking without touching ---------------------------------------------------------------------------------


def checked(x):
    assert not torch.isnan(x).any()
    assert torch.isfinite(x).all()
    assert (x < 1e6).all()
    assert x.abs().max() < 1e6
    assert x.mean().item() < 1e6
    if float(x.std()) > 1e6:
        raise AssertionError
    return x


LOOKS = {
    "checks": checked, "to": lambda x: x.to("cpu"), "to dtype": lambda x: x.to(torch.float32),
    "float": lambda x: x.float(),
    "cpu": lambda x: x.cpu(), "type": lambda x: x.type(x.type()), "type_as": lambda x: x.type_as(x),
    "contiguous": lambda x: x.contiguous(), "shapes": lambda x: x.view(x.size(0), *x.shape[1:]),
    "transposed twice": lambda x: x.T.T, "printed": lambda x: (str(x), f"{x.mean():.2f}", x)[2],
}  # fmt: skip
KEPT = []
HOOKS = {
    "detach": lambda o: o.detach().cpu(), "clone": lambda o: o.clone().detach(), "data": lambda o: o.data,
    "mean": lambda o: float(o.mean()), "item": lambda o: o.std().item(), "list": lambda o: o.tolist(),
    "numpy": lambda o: o.detach().cpu().numpy().copy(), "histogram": lambda o: torch.histc(o.detach(), 4).numpy(),
    "argmax": lambda o: o.argmax(1), "top": lambda o: o.topk(2), "sparsity": lambda o: (o == 0).float().mean().item(),
    "no_grad": lambda o: torch.no_grad()(lambda: o.float().mean(0))(), "norm": lambda o: o.norm().item(),
    "store": lambda o: torch.empty(2, 4, 8)[0].copy_(o.detach()), "assign": lambda o: KEPT.append(stored(o)),
    "size": lambda o: o.element_size() * o.nelement(), "gradient": lambda o: o.register_hook(lambda g: 2 * g),
}  # fmt: skip


def stored(o):
    store = torch.zeros(2, *o.shape)
    store[1] = o
    return store


def looked_at(look=lambda x: x):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = {"a": nn.Linear(6, 8), "head": nn.Linear(8, 3)}
    return Net(lambda m, x: m.head(m.a(look(x)).relu()), **layers).eval()


@pytest.mark.parametrize("name", [*LOOKS, *HOOKS])
def test_looking_changes_nothing(name):
    x = rand(4, 6, dtype=torch.float32)
    right = explain(looked_at(), x, 1)
    model = looked_at(LOOKS.get(name, lambda x: x))
    if name in HOOKS:
        model.a.register_forward_hook(lambda m, i, o: KEPT.append(HOOKS[name](o)))
    result = explain(model, x, 1)
    assert torch.equal(result.input, right.input)
    assert all(torch.equal(result.edges[layer], edges) for layer, edges in right.edges.items())


def test_casts_are_followed_and_a_mask_by_hand_is_a_relu():
    x, right = rand(4, 6), explain(net(lambda m, x: m.head(m.a(x).relu())), rand(4, 6), 1, TINY).input
    masked = net(lambda m, x: m.head((lambda z: z * (z > 0))(m.a(x))))
    assert torch.allclose(explain(masked, x, 1, TINY).input, right, rtol=1e-12)
    cast = net(lambda m, x: m.head(m.a(x).relu().float().to(torch.float64)))
    assert torch.allclose(explain(cast, x, 1, TINY).input, right, rtol=1e-5, atol=1e-6)


# --- gates ----------------------------------------------------------------------------------------------------


def einsum_scale(x, y):
    return torch.einsum("nchw,nc->nchw", x, y[:, :, 0, 0])


GATES = {  # x (N, 8, H, W), y (N, 8, 1, 1) after a sigmoid
    "expand_as": lambda x, y: x * y.expand_as(x),
    "expand": lambda x, y: x * y.expand(-1, -1, *x.shape[2:]),
    "broadcast_to": lambda x, y: x * torch.broadcast_to(y, x.shape),
    "repeat": lambda x, y: x * y.repeat(1, 1, *x.shape[2:]),
    "tile": lambda x, y: x * torch.tile(y, (1, 1, *x.shape[2:])),
    "repeat_interleave": lambda x, y: x * y.repeat_interleave(x.shape[2], 2),
    "view": lambda x, y: x * y.view(*x.shape[:2], 1, 1),
    "squeeze": lambda x, y: (x.permute(2, 3, 0, 1) * y.squeeze(-1).squeeze(-1)).permute(2, 3, 0, 1),
    "interpolate": lambda x, y: x * F.interpolate(y, size=x.shape[2:]),
    "torch.mul": lambda x, y: torch.mul(y, x),
    "mul_": lambda x, y: x.mul_(y),
    "*=": lambda x, y: x.__imul__(y),
    "einsum": einsum_scale,
    "1 + y": lambda x, y: x * (1 + y),
    "y + 1": lambda x, y: (y + 1) * x,
    "add_": lambda x, y: y.add_(1) * x,
    "2 y - 1": lambda x, y: x * (2 * y - 1),
    "1 - y": lambda x, y: x * (1 - y),
    "y / 2": lambda x, y: x * (y / 2).contiguous().clone().to(x.dtype),
    "chunks": lambda x, y: x * torch.cat(y.chunk(2, 1), 1),
    "stacked": lambda x, y: x * torch.stack([y, y], 1).mean(1),
    "residual": lambda x, y: x + x * y,
    "mixed": lambda x, y: x * y + x.relu() * (1 - y),
}


def conv_net(gate, run):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = {"conv": nn.Conv2d(3, 8, 3), "down": nn.Linear(8, 2), "up": nn.Linear(2, 8), "head": nn.Linear(8, 3)}
        layers |= {"eca": nn.Conv1d(1, 1, 3, padding=1, bias=False), "spatial": nn.Conv2d(2, 1, 3, padding=1)}
    return (
        Net(lambda m, x: m.head(run((z := m.conv(x).relu() + 0.0), gate(m, z)).mean((2, 3))), **layers).double().eval()
    )


def squeeze(m, x):
    return torch.sigmoid(m.up(m.down(x.mean((2, 3))).relu()))[:, :, None, None]


def eca(m, x):
    y = F.adaptive_avg_pool2d(x, 1)
    return m.eca(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1).sigmoid()


def cbam(m, x):
    return torch.sigmoid(m.spatial(torch.cat([torch.max(x, 1)[0].unsqueeze(1), x.mean(1, keepdim=True)], 1)))


def bam(m, x):
    shared = [m.up(F.relu(m.down(t.flatten(1)))) for t in (F.adaptive_max_pool2d(x, 1), x.amax((2, 3)), x.std((2, 3)))]
    return F.hardsigmoid(sum(shared[1:], shared[0]))[:, :, None, None]


MAKERS = {"squeeze": squeeze, "eca": eca, "cbam": cbam, "channels of cbam": bam}


def gradient_times_input(model, x, target):
    """With gates held constant: the epsilon rule for a vanishing epsilon."""
    leaf = x.clone().requires_grad_()
    return leaf.detach() * torch.autograd.grad(model(leaf)[:, target].sum(), leaf)[0]


@pytest.mark.parametrize(
    ("maker", "how"), [*(("squeeze", how) for how in GATES), *((maker, "expand_as") for maker in MAKERS)]
)
def test_gates_in_all_spellings_are_constant_factors(maker, how):
    make, run = MAKERS[maker], GATES[how]
    x = rand(2, 3, 8, 8, seed=1)
    result = explain(conv_net(make, run), x, 1, TINY)
    expected = gradient_times_input(conv_net(lambda m, z: make(m, z).detach(), run), x, 1)
    assert (result.input - expected).abs().max() <= 1e-12 * expected.abs().max()
    ledger = result.ledger.set_index("layer")
    assert (ledger["gap"].abs() <= 1e-9 * ledger["out"].abs().max()).all()


NO_GATES = {
    "joined": (
        lambda x, y: torch.cat([x, y.expand_as(x)], 1)[:, :8],
        "'cat' joins the output of 'sigmoid'.*only multiply",
    ),
    "divides": (lambda x, y: x / y, None),
    "hidden in a script": (lambda x, y: x * (y * relu_script(x)), "'mul' takes a tensor .* out of sight"),
    "product of two": (
        lambda x, y: x * x.mean((2, 3), keepdim=True),
        "'mul' .*compute one factor with softmax, sigmoid",
    ),
    "maximum": (lambda x, y: torch.maximum(x, y), "'maximum' joins the output of 'sigmoid'"),
    "changes in place": (lambda x, y: x.copy_(y.expand_as(x)), "'copy_' joins the output of 'sigmoid'"),
}


@pytest.mark.parametrize("how", NO_GATES)
def test_a_gate_that_does_more_than_multiply_is_refused(how):
    run, match = NO_GATES[how]
    model, x = conv_net(squeeze, run), rand(2, 3, 8, 8, seed=1)
    if match is None:
        expected = gradient_times_input(conv_net(lambda m, z: squeeze(m, z).detach(), run), x, 1)
        assert torch.allclose(explain(model, x, 1, TINY).input, expected, rtol=1e-10)
        return
    with pytest.raises(ZsuError, match=match):
        explain(model, x, 1)


# --- rules of the input -----------------------------------------------------------------------------------------


def images():
    return rand(2, 3, 6, 6).abs().clamp(max=1)


def body(channels=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).double().eval()


MEAN, SD = (torch.tensor(t, dtype=torch.float64).reshape(1, 3, 1, 1) for t in ((0.5, 0.4, 0.3), (0.2, 0.3, -0.4)))
FRONTS = {
    "arithmetic": lambda x: (x - MEAN) / SD,
    "in place": lambda x: x.clone().sub_(MEAN).div_(SD),
    "keywords": lambda x: torch.div(torch.sub(input=x, other=MEAN), SD),
    "1 - x": lambda x: ((1 - x) - (1 - MEAN)) / -SD,
}


@pytest.mark.parametrize(
    "rule", [Box(0.0, 1.0, epsilon=1e-30), Box(torch.zeros(3, 1, 1), 2.0, epsilon=1e-30), Flat(), WSquare()]
)
@pytest.mark.parametrize("front", FRONTS)
def test_rules_of_the_input_hold_behind_a_normalisation(front, rule):
    """As for the convolution that takes the normalisation in, where the rule sees its weights; else as without it."""
    x, change = images(), FRONTS[front]
    model = Net(lambda m, x: m.body(change(x)), body=body()).eval()
    rules = Composite(conv=Gamma(), first=rule)
    found = explain_each(model, x, [1], rules)[0]
    if isinstance(rule, Box):
        twin = body()
        twin[0].weight.data /= SD
        twin[0].bias.data -= (twin[0].weight.data * MEAN).sum((1, 2, 3))
        right = explain(twin, x, 1, rules)
    else:
        right = explain(body(), change(x), 1, rules)
    assert torch.allclose(found.input, right.input, rtol=1e-9, atol=1e-14)
    assert (found.ledger["gap"].abs() < 1e-9 * found.ledger["out"].abs().max()).all()
    if isinstance(rule, Box):  # in the numbers of the model's input
        with pytest.raises(ZsuError, match="Box: inputs from 0.02357 to 3 leave the box"):
            explain(model, x * 3, 1, rules)


def test_a_box_for_the_pixels_of_a_flattened_image():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(108, 4), nn.ReLU(), nn.Linear(4, 3)).double().eval()
    x, rule = images(), Box(0.0, torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1), epsilon=1e-30)
    result = explain(model, x, 1, Composite(first=rule))
    w, z = model[1].weight.detach(), model[1](x.flatten(1)).detach()
    high = rule.high.double().expand(3, 6, 6).flatten()
    terms = x.flatten(1)[:, None] * w - high * w.clamp(max=0)  # (N, K, J)
    R = result.nodes["1"]
    expected = (terms * (R / terms.sum(2))[:, :, None]).sum(1).reshape(x.shape)
    assert torch.allclose(result.input, expected, rtol=1e-9)
    assert z.shape == R.shape


BEHIND = {
    "padding": (lambda x: F.pad(x, (1, 1, 1, 1))[..., :6, :6], "pad"),
    "pool": (lambda x: F.max_pool2d(x, 3, 1, 1), "max_pool2d"),
    "flip": (lambda x: x.flip(3) * 2, "flip"),
    "activation": (lambda x: F.hardswish(x), "hardswish"),
    "more channels": (lambda x: x.mean(1, keepdim=True).expand(-1, 3, -1, -1), "mean"),
    "broadcast": (lambda x: x[:, :1] - MEAN, "__getitem__"),
    "coordinates": (lambda x: torch.cat([x[:, :2], torch.ones(2, 1, 6, 6).double()], 1), "cat|__getitem__"),
}


@pytest.mark.parametrize("rules", ["epsilon-gamma-box", "epsilon-plus-flat", Composite(first=Gamma())])
@pytest.mark.parametrize("how", BEHIND)
def test_a_rule_of_the_input_that_no_layer_takes_is_said(how, rules):
    change, name = BEHIND[how]
    model = Net(lambda m, x: m.body(change(x)), body=body()).eval()
    with pytest.raises(ZsuError, match=f"no layer reads the model's input itself: body.0 reads it behind '({name})'"):
        explain(model, images(), 1, rules)
    explain(model, images(), 1, "epsilon-plus")


def test_rules_of_places_where_there_is_no_layer():
    x = images()
    for explained in (lambda m, r: explain_each(m, x, [1, 2], r), lambda m, r: compare(m, x, 1, r)):
        with pytest.raises(ZsuError, match="no layer reads the model's input itself: 1 reads it behind 'pad'"):
            explained(
                nn.Sequential(nn.ZeroPad2d(1), *body()[:3], nn.Linear(144, 3).double()).eval(), "epsilon-gamma-box"
            )
    with pytest.raises(ZsuError, match="no layer reads the model's input itself. explain the part"):
        explain(Net(lambda m, x: x.mean((2, 3))).eval(), x, 1, "epsilon-gamma-box")
    scaled = Net(lambda m, x: m.body(x) / 2, body=body()).eval()
    with pytest.raises(ZsuError, match=r"Composite\(last=...\): no layer computes the logits themselves"):
        explain(scaled, x, 1, Composite(last="gamma"))


def test_one_of_two_branches_behind_a_pool_is_said():
    both = Net(lambda m, x: m.one(x) + m.two(F.avg_pool2d(x, 3, 1, 1)), one=body(), two=body()).eval()
    with pytest.warns(
        UserWarning, match="not that of all layers that read the input: two.0 reads it behind 'avg_pool2d'"
    ):
        explain(both, images(), 1, "epsilon-gamma-box")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explain(both, images(), 1, "epsilon-plus")


# --- computed weights -------------------------------------------------------------------------------------------

COMPUTED = {
    "weight_norm": nn.utils.weight_norm, "spectral_norm": nn.utils.spectral_norm,
    "pruning": lambda m: prune.l1_unstructured(m, "weight", 0.3),
    "parametrized weight_norm": nn.utils.parametrizations.weight_norm,
    "parametrized spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", COMPUTED)
def test_layers_whose_weights_are_computed_have_their_modules_names(name, frozen):
    model = body()
    model[0], model[3] = (COMPUTED[name](model[n]) for n in (0, 3))
    model.double().eval().requires_grad_(not frozen)
    x = images()
    model(x)  # old hooks compute weights at the first call
    result = explain(model, x, 1, {"0": "gamma", "3": "epsilon"})
    plain = body()
    for n in (0, 3):
        plain[n].weight.data, plain[n].bias.data = model[n].weight.detach(), model[n].bias.detach()
    right = explain(plain, x, 1, {"0": "gamma", "3": "epsilon"})
    assert torch.allclose(result.input, right.input, rtol=1e-9)
    assert list(result.edges) == ["0", "3"]


def test_layers_of_einops():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Rearrange("n c h w -> n (c h w)"), nn.Linear(64, 3))
    model.load_state_dict(body().state_dict())
    assert torch.equal(explain(model.double().eval(), images(), 1).input, explain(body(), images(), 1).input)
    mixed = nn.Sequential(*body()[:2], EinMix("n c h w -> n k", "c h w k", c=4, h=4, w=4, k=3)).double().eval()
    with pytest.raises(ZsuError, match="'einsum' has no relevance rule"):
        explain(mixed, images(), 1)


def test_autocast_inside_the_model_is_refused():
    model = Net(lambda m, x: torch.autocast("cpu", torch.bfloat16)(m.body)(x), body=body()).float().eval()
    with pytest.raises(ZsuError, match="body.0: it takes torch.float32 and gives torch.bfloat16.*take autocast out"):
        explain(model, images().float(), 1)


# --- models that raise ----------------------------------------------------------------------------------------


def raising(error):
    def run(m, x):
        raise error

    return run


@pytest.mark.parametrize(
    "error", [ValueError("no square"), TypeError(""), AssertionError(), KeyError("k"), IndexError(1)]
)
def test_what_a_model_raises_comes_out_as_one_line(error):
    with pytest.raises(
        ZsuError, match=r"^Net: .* \(x is \(4, 6\)\). pass a batch that the model can take, or mend its forward.$"
    ):
        explain(net(raising(error)), rand(4, 6), 1)
    with pytest.raises(KeyboardInterrupt):
        explain(net(raising(KeyboardInterrupt())), rand(4, 6), 1)


@pytest.mark.parametrize("wrap", [lambda y: (y,), lambda y: [y], lambda y: {"logits": y}, lambda y: None, lambda y: 3])
def test_outputs_that_are_no_tensor_are_refused(wrap):
    with pytest.raises(ZsuError, match="Net: the model's output is (tuple|list|dict|NoneType|int). return logits"):
        explain(net(lambda m, x: wrap(m.head(m.a(x)))), rand(4, 6), 1)


def filled_in_a_thread(make):
    """A buffer made in sight that a thread fills with what depends on the input."""

    def branch(m, x):
        y = m.b(x)
        z = make(y)
        in_a_thread(lambda: z.copy_(y.relu().detach()))
        return z

    return branch


@pytest.mark.parametrize(
    "make", [torch.zeros_like, lambda y: y.new_zeros(y.shape), lambda y: torch.ones(4, 8).double()]
)
def test_a_buffer_that_is_filled_out_of_sight_is_no_constant(make):
    with pytest.raises(ZsuError, match="depends on the input leaves by 'an operation out of sight'"):
        explain(residual(filled_in_a_thread(make)), rand(4, 6), 1, TINY)


def test_a_buffer_that_is_filled_in_sight_is_a_constant():
    def branch(m, x):
        z = torch.zeros(4, 8).double()
        z += 0.5
        z[:, 1] = m.b.bias[1]
        return m.b(x).relu() + z

    found = explain(residual(branch), rand(4, 6), 1, TINY)
    assert found.ledger["gap"].abs().max() < 1e-9


def test_powers_are_refused_by_name():
    with pytest.raises(ZsuError, match="pow"):
        explain(residual(lambda m, x: m.b(x) ** 2), rand(4, 6), 1, TINY)


@pytest.mark.parametrize("name", ["cat", "concat"])
def test_axis_is_another_word_for_dim(name):
    def run(key):
        return net(lambda m, x: m.wide(getattr(torch, name)([m.a(x), m.b(m.a(x))], **{key: 1})), wide=nn.Linear(16, 3))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = run("dim")
        second = run("axis")
    second.load_state_dict(first.state_dict())
    x = rand(4, 6)
    assert torch.equal(explain(first, x, 1, TINY).input, explain(second, x, 1, TINY).input)


ZERO = torch.tensor(0.0).double()
RELU = {
    "clamp": lambda y: y.clamp(min=0), "clamp to a box": lambda y: torch.clamp(y, 0, 1e3),
    "clip": lambda y: y.clip(0), "clamp_": lambda y: y.clamp_(min=0), "clamp_min": lambda y: y.clamp_min(0),
    "clamp by a tensor": lambda y: y.clamp(min=ZERO), "maximum": lambda y: torch.maximum(y, ZERO),
    "maximum, turned": lambda y: torch.maximum(ZERO, y), "max": lambda y: torch.max(y, other=ZERO.expand(8)),
    "threshold": lambda y: F.threshold(y, 0, 0), "nan_to_num": lambda y: y.relu().nan_to_num(),
}  # fmt: skip


@pytest.mark.parametrize("rule", [TINY, Gamma(0.3), "z+"])
@pytest.mark.parametrize("name", RELU)
def test_a_relu_in_other_words(name, rule):
    x = rand(4, 6)
    expected = explain(net(lambda m, x: m.head(m.b(m.a(x).relu()).relu())), x, 1, rule)
    found = explain(net(lambda m, x: m.head(RELU[name](m.b(RELU[name](m.a(x)))))), x, 1, rule)
    assert (found.input - expected.input).abs().max() <= 1e-12
    assert all((found.nodes[n] - r).abs().max() <= 1e-12 for n, r in expected.nodes.items())


@pytest.mark.parametrize(
    "bend", [lambda y: y.clamp(min=0.1), lambda y: torch.maximum(y, ZERO + 1), lambda y: y.clamp(max=-1)]
)
def test_what_is_not_zero_at_zero_is_refused_in_other_words_too(bend):
    with pytest.raises(ZsuError, match="(clamp|maximum)' is not 0 at 0"):
        explain(net(lambda m, x: m.head(bend(m.a(x)))), rand(4, 6), 1, TINY)


@pytest.mark.parametrize("both", [torch.maximum, torch.minimum, lambda a, b: a.clamp(min=b)])
def test_the_larger_of_two_flows_is_refused_by_name(both):
    with pytest.raises(ZsuError, match="maximum|minimum|clamp"):
        explain(net(lambda m, x: m.head(both(m.a(x), m.b(m.a(x))))), rand(4, 6), 1, TINY)


SAME = {
    "t": lambda y: y.t().t(), "hstack": lambda y: torch.hstack([y[:, :3], y[:, 3:]]),
    "ravel": lambda y: torch.stack([row.ravel() for row in y]),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_values_that_are_moved_in_other_words(name):
    x = rand(4, 6)
    expected, found = (
        explain(net(lambda m, x: m.head(move(m.a(x).relu()))), x, 1, TINY)  # noqa: B023
        for move in (lambda y: y, SAME[name])
    )
    assert torch.equal(found.input, expected.input)
    assert np.array_equal(find_paths(found, k=20).probability, find_paths(expected, k=20).probability)


LARGEST = {
    "amax": lambda y: y.amax((2, 3)), "max": lambda y: y.flatten(2).max(2).values,
    "torch.max": lambda y: torch.max(y.flatten(2), -1)[0], "keepdim": lambda y: y.amax((2, 3), keepdim=True).flatten(1),
    "with places": lambda y: F.adaptive_max_pool2d(y, 1, return_indices=True)[0].flatten(1),
    "max_pool2d with places": lambda y: F.max_pool2d(y, y.shape[2:], return_indices=True)[0].flatten(1),
}  # fmt: skip


@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_value_in_other_words(name):
    def run(pool):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            conv = nn.Conv2d(2, 8, 3)
        return net(lambda m, x: m.head(pool(m.conv(x).relu())), conv=conv)

    x = rand(4, 2, 6, 6)
    expected = explain(run(lambda y: F.adaptive_max_pool2d(y, 1).flatten(1)), x, 1)
    found = explain(run(LARGEST[name]), x, 1)
    assert torch.equal(found.input, expected.input)
    assert find_paths(found, k=20).nodes.tolist() == find_paths(expected, k=20).nodes.tolist()


@pytest.mark.parametrize("rule", [TINY, Gamma(0.3), "z+"])
def test_layers_that_take_one_sample_after_the_other(rule):
    """Each call is a layer of its own, with vectors for inputs."""
    x = rand(4, 6)
    expected = explain(net(lambda m, x: m.head(m.b(m.a(x).relu()).relu())), x, 1, rule)
    found = explain(net(lambda m, x: torch.stack([m.head(m.b(row).relu()) for row in m.a(x).relu()])), x, 1, rule)
    assert (found.input - expected.input).abs().max() <= 1e-12
    calls = [found.nodes[name] for name in ("b", "b#2", "b#3", "b#4")]
    assert (torch.cat(calls) - expected.nodes["b"]).abs().max() <= 1e-12
    assert abs(sum(found.edges[n] for n in ("b", "b#2", "b#3", "b#4")) - expected.edges["b"]).max() <= 1e-12
    assert found.ledger["gap"].abs().max() <= 1e-9


@pytest.mark.parametrize("rule", [TINY, Gamma(0.3), "z+", "alpha-beta"])
def test_a_gate_of_both_signs_in_einsum_is_one_in_a_product(rule):
    def run(product):
        return net(lambda m, x: (lambda h: m.head(product(h, 2 * torch.sigmoid(m.b(h)) - 1)))(m.a(x).relu()))

    x = rand(4, 6)
    expected = explain(run(torch.mul), x, 1, rule).input
    found = explain(run(lambda h, gate: torch.einsum("nc,nc->nc", h, gate)), x, 1, rule).input
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("mode", ["floor", "trunc"])
def test_a_quotient_that_is_rounded_is_refused_by_name(mode):
    with pytest.raises(ZsuError, match="'rounding div' has no relevance rule. replace it"):
        explain(net(lambda m, x: m.head(torch.div(m.a(x), 0.1, rounding_mode=mode))), rand(4, 6), 1, TINY)


LIKE_THE_FLOW = {
    "cat": lambda h, to: torch.cat([h[:, :4], to(torch.ones(4, 4), h)], 1),
    "add": lambda h, to: h + to(torch.ones(8), h),
    "product": lambda h, to: h * to(torch.arange(8.0), h), "weights": lambda h, to: F.linear(h, to(torch.eye(8), h)),
    "mask": lambda h, to: h * to(h > 0, h), "gate": lambda h, to: h * to(h.softmax(1), h),
}  # fmt: skip


@pytest.mark.parametrize("name", LIKE_THE_FLOW)
def test_constants_that_are_put_where_the_flow_is_stay_constants(name):
    x = rand(4, 6)
    expected, found = (
        explain(net(lambda m, x: m.head(LIKE_THE_FLOW[name](m.a(x), to))), x, 1, TINY)  # noqa: B023
        for to in (lambda t, h: t.to(h.dtype), lambda t, h: t.to(h))
    )
    assert torch.equal(found.input, expected.input)
    assert found.ledger.equals(expected.ledger)
    assert found.ledger["gap"].abs().max() < 1e-9
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one.sources, other.sources, strict=True))


OTHER_WORDS = {
    "t of a vector": lambda y: torch.stack([row.t() for row in y]),
    "hstack(tensors=)": lambda y: torch.hstack(tensors=[y]),
    "vstack": lambda y: torch.vstack([y[:2], y[2:]]),
    "bmm(mat2=)": lambda y: torch.bmm(y[None], mat2=torch.eye(8).double()[None])[0],
    "dropout(train=)": lambda y: torch.dropout(y, p=0.5, train=False),
    "cat(tensors=)": lambda y: torch.cat(tensors=[y[:, :3], y[:, 3:]], dim=1),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_WORDS)
def test_arguments_in_all_the_words_that_torch_takes(name):
    x = rand(4, 6)
    expected = explain(net(lambda m, x: m.head(m.a(x).relu())), x, 1, TINY)
    found = explain(net(lambda m, x: m.head(OTHER_WORDS[name](m.a(x).relu()))), x, 1, TINY)
    assert (found.input - expected.input).abs().max() <= 1e-12


def test_bounds_that_widen_what_they_bound_are_refused_by_name():
    with pytest.raises(ZsuError, match="'clamp' has no relevance rule"):
        explain(net(lambda m, x: m.head(m.a(x).clamp(min=torch.zeros(3, 1, 1).double())[0])), rand(4, 6), 1, TINY)


def test_a_gate_may_be_turned():
    x = rand(4, 6)
    expected = explain(net(lambda m, x: m.head(m.a(x) * m.b(m.a(x)).sigmoid())), x, 1, TINY)
    found = explain(net(lambda m, x: m.head((m.a(x).t() * m.b(m.a(x)).sigmoid().t()).t())), x, 1, TINY)
    assert (found.input - expected.input).abs().max() <= 1e-12


@pytest.mark.parametrize("rule", [TINY, Gamma(0.3), "z+"])
@pytest.mark.parametrize(("samples", "classes"), [(5, 5), (2, 10), (1, 5), (4, 5), (6, 6)])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_product_with_a_vector_is_a_weighted_mean(rule, samples, classes, side):
    """Pooling as x @ ones / n, or ones / n @ x on turned positions: the same maps, channels, edges and paths."""

    def run(pool):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            conv, head = nn.Conv2d(2, 6, 3), nn.Linear(6, classes)
        return Net(lambda m, x: m.head(pool(m.conv(x).relu().flatten(2))), conv=conv, head=head).double().eval()

    vector = torch.full((16,), 1 / 16, dtype=torch.float64)
    pools = {"right": lambda h: h @ vector, "left": lambda h: torch.matmul(vector, h.transpose(1, 2))}
    x = rand(samples, 2, 6, 6)
    expected, found = (explain(run(pool), x, 1, rule) for pool in (lambda h: h.mean(2), pools[side]))
    assert (found.input - expected.input).abs().max() <= 1e-12
    assert {n: r.shape for n, r in found.nodes.items()} == {n: r.shape for n, r in expected.nodes.items()}
    assert all((found.edges[n] - e).abs().max() <= 1e-12 for n, e in expected.edges.items())
    seeds = torch.ones(samples, classes).double()
    ours, theirs = (find_paths(explain(run(p), x, seeds, "z+"), k=20) for p in (lambda h: h.mean(2), pools[side]))
    assert np.allclose(ours.probability, theirs.probability, rtol=1e-9)


VALUES_THAT_COME_BACK = {
    "text": lambda y: torch.tensor([[float(f"{v:.17g}") for v in row] for row in y.detach()], dtype=y.dtype),
    "whole numbers": lambda y: torch.tensor((y * 1e9).to(torch.int64).tolist(), dtype=y.dtype) / 1e9,
    "truth values": lambda y: torch.tensor((y[..., None] > torch.linspace(0, 5, 501).to(y)).tolist()).sum(-1).to(y),
    "a list from a thread": lambda y: torch.tensor(in_a_thread(lambda: y.tolist()), dtype=y.dtype),
}


@pytest.mark.parametrize("name", VALUES_THAT_COME_BACK)
def test_values_that_come_back_as_a_tensor_are_no_constants(name):
    with pytest.raises(ZsuError, match="joins what relevance flows through|out of sight|without a rule"):
        explain(residual(lambda m, x: VALUES_THAT_COME_BACK[name](m.b(x).relu())), rand(4, 6), 1, TINY)


def test_constants_that_the_model_makes_of_python_numbers_stay_constants():
    def run(mean):
        return net(lambda m, x: m.head(m.a(x - mean()).relu()))

    x = rand(4, 6)
    kept = torch.full((6,), 0.25).double()
    made = explain(run(lambda: torch.tensor([0.25] * 6).double()), x, 1, TINY)
    assert torch.equal(made.input, explain(run(lambda: kept), x, 1, TINY).input)


def test_hooks_on_nodes_of_the_graph_do_not_change_relevance():
    def branch(m, x):
        y = m.b(x).relu()
        if y.grad_fn is not None:
            y.grad_fn.register_hook(lambda gradients, _: (2 * gradients[0],))
        return y

    x = rand(4, 6)
    right = explain(residual(lambda m, x: m.b(x).relu()), x, 1, TINY).input
    assert torch.equal(explain(residual(branch), x, 1, TINY).input, right)
