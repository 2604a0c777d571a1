"""Running and copying a model as people have it: errors of its own, outputs that are no logits, computed weights,
compiled parts, layers that copy themselves."""

import copy
import threading
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import zsu
from helpers import METHODS, NEED_RETAINED, TROUSER, Net, bits
from zsu import ZsuError, explain, forget, training
from zsu.data import Images
from zsu.forgetting.methods import Edit, Method, no_rows
from zsu.inside import check_weights, copied, logits_of
from zsu.relevance import explain_contrast

pytestmark = pytest.mark.filterwarnings("ignore")  # of few samples, and of old functions of torch
DATA = Images(torch.arange(30, dtype=torch.uint8).reshape(-1, 1, 1, 1), torch.arange(30) % 3, ["a", "b", "c"])
AUDIT = {"measures": ["accuracy"], "controls": False, "progress": False}


@dataclass
class Answer:
    logits: torch.Tensor


class Answers(nn.Module):
    """What a function makes of the logits of a small network."""

    def __init__(self, make):
        super().__init__()
        self.make, self.hidden, self.head = make, nn.Linear(1, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.make(self.head(self.hidden(x.flatten(1)).relu()))


def entrances(make):
    """Everything that takes a model, by name."""
    torch.manual_seed(0)
    model, x = Answers(make).eval(), torch.rand(6, 1, 1, 1)
    return {
        "explain": lambda: explain(model, x, 1),
        "explain_contrast": lambda: explain_contrast(model, x, 1),
        "forget": lambda: forget(model, x, 1, "boundary-shrink"),
        "audit": lambda: zsu.audit(model, {}, DATA, DATA, 0, **AUDIT),
        "train": lambda: training.train(lambda: Answers(make), DATA, epochs=1, batch_size=10, progress=False),
        "class_accuracies": lambda: training.class_accuracies(model, DATA, 0),
    }


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda z: (z, z), "output is tuple"),
        (lambda z: [z], "output is list"),
        (lambda z: {"logits": z}, "output is dict"),
        (lambda z: None, "output is NoneType"),
        (lambda z: z[:, 0], r"output is \("),
        (lambda z: z[:, :, None], r"output is \("),
        (lambda z: z[:, :0], r"output is \("),
        (lambda z: torch.ones(z.shape, dtype=torch.int64), "output is torch.int64"),
        (lambda z: torch.ones(z.shape, dtype=torch.complex64), "output is torch.complex64"),
        (lambda z: torch.cat([z, z]), "output has .* rows for .* samples"),
        (lambda z: z.new_ones(3).expand(1, 3).repeat(7, 1), "output has 7 rows for .* samples"),
    ],
)
def test_outputs_that_are_no_logits_are_refused_in_the_same_words_everywhere(make, said):
    for name, call in entrances(make).items():
        with pytest.raises(ZsuError, match=f"the model's {said}"):
            pytest.fail(f"{name} returned {call()}")


def test_an_output_with_logits_in_it_is_refused_before_training_too():
    with pytest.raises(ZsuError, match="output is Answer. return logits"):
        entrances(Answer)["train"]()


ERRORS = [AssertionError("no such size"), ValueError("no such size\nat all"), IndexError("no such size"), TypeError(""),
          KeyError("size"), NotImplementedError(), RuntimeError("no such size."), RuntimeError(), MemoryError(),
          torch.OutOfMemoryError("no such size"), ZeroDivisionError("size"), AttributeError("size")]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_whatever_the_model_raises_is_one_line(error):
    def fail(_):
        raise error

    for name, call in entrances(fail).items():
        with pytest.raises(ZsuError, match=r"\(x is \(\d+, 1, 1, 1\)\)") as found:
            pytest.fail(f"{name} returned {call()}")
        assert "\n" not in str(found.value)
        assert found.value.__cause__ is error
        assert type(error) is RuntimeError or type(error).__name__ in str(found.value)
        assert ("fewer samples" in str(found.value)) == isinstance(error, (MemoryError, torch.OutOfMemoryError))


def test_an_interrupt_is_no_error_of_the_model():
    def stop(_):
        raise KeyboardInterrupt

    for call in entrances(stop).values():
        with pytest.raises(KeyboardInterrupt):
            call()


def test_errors_on_the_way_back_and_in_the_middle_of_an_edit_are_one_line():
    """Without gradients, and on images that are not those that the model was given first."""

    def without_gradient(z):
        return z.detach()

    with pytest.raises(ZsuError, match="does not require grad.* without no_grad"):
        entrances(without_gradient)["forget"]()
    with pytest.raises(ZsuError, match="does not require grad"):
        entrances(without_gradient)["train"]()
    calls = []

    def tire(z):
        calls.append(1)
        if len(calls) > 2:
            raise IndexError("tired")
        return z

    with pytest.raises(ZsuError, match="IndexError: tired"):
        entrances(tire)["forget"]()


@pytest.mark.parametrize("method", ["lra-npp", "random", "mask", "boundary-shrink", "zeroed", "paths"])
def test_the_only_class_cannot_be_forgotten(method):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)).eval()
    with pytest.raises(ZsuError, match="the model has one class"):
        forget(model, torch.rand(20, 6), 0, method)
    with pytest.raises(ZsuError, match="one class"):
        explain_contrast(model, torch.rand(20, 6), 0)


# --- copies ---------------------------------------------------------------------------------------------------


class Flat(nn.Module):
    """Pickles and copies itself as the layers of einops do: it is made anew from its arguments."""

    def __init__(self, start):
        super().__init__()
        self.start = start

    def __getstate__(self):
        return {"start": self.start}

    def __setstate__(self, state):
        self.__init__(**state)

    def forward(self, x):
        return x.flatten(self.start)


def small(*between):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), *between, nn.Flatten(), nn.Linear(144, 3)).eval()


def case(model):
    """Samples that the model takes for one class, and the class."""
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    answers = model(x).argmax(1)
    target = int(answers.mode().values)
    return x[answers == target], target


@pytest.mark.parametrize("method", ["paths", "mask", "boundary-shrink"])
def test_layers_that_are_made_anew_stay_in_eval_mode_and_keep_their_hooks(method):
    seen = []
    model = small(Flat(1))
    model[2].register_forward_hook(lambda *_: seen.append(1))
    edited = forget(model, *case(model), method).model
    assert not any(m.training for m in edited.modules())
    seen.clear()
    edited(torch.rand(1, 1, 8, 8))
    assert len(seen) == 1


def test_a_layer_that_draws_new_weights_when_it_is_copied_gets_the_old_ones():
    class Anew(nn.Linear):
        def __getstate__(self):
            return {}

        def __setstate__(self, _):
            self.__init__(4, 4)

    model = nn.Sequential(Anew(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    assert bits(copied(model)) == bits(model)
    assert not copied(model)[0].training


def test_activations_that_a_model_keeps_are_copied_without_their_graph():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.kept = small(), {}
            self.net[0].register_forward_hook(lambda m, args, out: self.kept.update(conv=out, both=[out, out]))

        def forward(self, x):
            self.last = self.net(x)
            return self.last

    model = Keeps().eval()
    x, target = case(model)  # with a graph
    twin = copied(model)
    assert torch.equal(twin.last, model.last)
    assert not twin.last.requires_grad
    assert twin.kept["both"][0] is twin.kept["conv"] is not model.kept["conv"]
    assert (forget(model, x, target, "mask").model(x).argmax(1) != target).all()


def test_tied_weights_and_what_was_frozen_stay_so():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    model[2].weight, model[3] = model[0].weight, model[0]
    model[0].bias.requires_grad_(False)
    twin = copied(model)
    assert twin[2].weight is twin[0].weight
    assert twin[3] is twin[0]
    assert not twin[0].bias.requires_grad


def test_what_cannot_be_copied_is_named():
    model = small()
    model[1].lock = threading.Lock()
    with pytest.raises(ZsuError, match=r"^1\.lock: the model cannot be copied: TypeError: cannot pickle"):
        forget(model, *case(model), "mask")


# --- computed weights -----------------------------------------------------------------------------------------

COMPUTED = {
    "remove_weight_norm": weight_norm,
    "remove_spectral_norm": spectral_norm,
    "prune.remove": lambda m: prune.l1_unstructured(m, "weight", 0.3),
    "remove_parametrizations": parametrizations.weight_norm,
    r"remove_parametrizations\(": parametrizations.spectral_norm,
    "parametrize.remove_parametrizations": parametrizations.orthogonal,
}


@pytest.mark.parametrize("remedy", COMPUTED)
def test_computed_weights_are_named_with_the_call_that_bakes_them_in(remedy):
    model = small()
    COMPUTED[remedy](model[0])
    model.eval()
    x, target = case(model)
    before = model(x)
    for method in ("paths", "lra-npp", "mask", "boundary-shrink", "zeroed"):
        with pytest.raises(ZsuError, match=rf"^0.weight: is no nn.Parameter, but parametrized.*{remedy}") as found:
            forget(model, x, target, method)
    exec(found.value.remedy.partition(": ")[2], {"torch": torch, "model": model})  # the remedy is true
    torch.testing.assert_close(model(x), before)
    check_weights(model)
    assert (forget(model, x, target, "mask").model(x).argmax(1) != target).all()


def test_a_model_with_computed_weights_is_audited():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(1, 4)), nn.ReLU(), nn.Linear(4, 3)).eval()
    model(torch.rand(2, 1))  # with a graph
    measures = ["accuracy", "robustness", "relearning"]
    frame = zsu.audit(model, {"same": model}, DATA, DATA, 0, measures=measures, progress=False).frame
    assert frame.loc["same", "at_int8"] >= 0


# --- compiled -------------------------------------------------------------------------------------------------


def compiled_whole(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_part(model):
    model.fc = torch.compile(model.fc, backend="eager")
    return model


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


@pytest.mark.parametrize("how", [compiled_whole, compiled_in_place, compiled_part, compiled_forward])
def test_a_compiled_model_forgets_as_the_one_inside(original, x, how):
    model = how(copy.deepcopy(original))
    model(x)  # compiled now, without hooks
    for method in ("paths", "lra-npp", "head-npp", "mask", "boundary-shrink"):
        plain, found = forget(original, x, TROUSER, method), forget(model, x, TROUSER, method)
        assert bits(found.model) == bits(plain.model)
        assert list(found.patch.changes) == list(plain.patch.changes)
        assert torch.equal(found.model(x), plain.model(x))
    plain.patch.apply(model)
    torch.testing.assert_close(model(x), plain.model(x))
    assert not plain.patch.revert(model).training


def test_hooks_see_a_compiled_model(original, x):
    model = compiled_in_place(copy.deepcopy(original))
    model(x)
    assert zsu.inside.logit_layer(model, x) == "head"
    assert torch.equal(logits_of(model, x), original(x))


@pytest.mark.parametrize("wrap", [
    lambda m: nn.DataParallel(m).eval(), lambda m: torch.jit.trace(m, torch.rand(2, 1, 8, 8)).eval(),
    lambda m: torch.export.export(m, (torch.rand(2, 1, 8, 8),)).module(),
])  # fmt: skip
def test_wrappers_are_refused_in_the_same_words_everywhere(wrap):
    model = small()
    x, target = case(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = wrap(model)
    eights = Images(torch.zeros(6, 1, 8, 8, dtype=torch.uint8), torch.arange(6) % 3, ["a", "b", "c"])
    for call in (lambda: explain(wrapped, x, target), lambda: forget(wrapped, x, target, "mask"),
                 lambda: zsu.audit(wrapped, {}, eights, eights, 0, **AUDIT)):  # fmt: skip
        with pytest.raises(ZsuError, match="the model: an? .*pass the plain module"):
            call()


def test_a_traced_graph_of_fx_forgets_as_the_module(original, x):
    graph = torch.fx.symbolic_trace(original).eval()
    for method in ("lra-npp", "mask"):
        plain, found = (forget(m, x, TROUSER, method).model for m in (original, graph))
        assert torch.equal(plain(x), found(x))


# Samples in pieces, buffers, integers, inference mode


def in_pieces(size):
    """The small network, that many samples at a time."""
    whole = small()
    return Net(lambda m, x: torch.cat([m.whole(part) for part in x.split(size)]), whole=whole).eval(), whole


@pytest.mark.parametrize(("method", "said"), [
    ("lra-npp", "rows. let the model take its batch at once"), ("random", "let the model take its batch at once"),
    ("head-npp", "use another method"), ("paths", "let the model call it once for its batch"),
])  # fmt: skip
@pytest.mark.parametrize("size", [1, 4])
def test_which_sample_uses_what_is_not_known_of_pieces_and_said(method, said, size):
    model, whole = in_pieces(size)
    x, target = case(whole)
    assert torch.allclose(model(x), whole(x), atol=1e-5)
    with pytest.raises(ZsuError, match=said):
        forget(model, x, target, method)


def test_features_of_pieces_are_not_taken_for_those_of_all_samples():
    body, head = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU()), nn.Linear(6, 3)
    model = Net(lambda m, x: m.head(torch.cat([m.body(part) for part in x.split(2)])), body=body, head=head).eval()
    x, target = case(model)
    kept = [c for c in range(3) if c != target]
    retained = Images(torch.zeros(6, 1, 8, 8, dtype=torch.uint8), torch.tensor(kept).repeat(3), ["a", "b", "c"])
    with pytest.raises(ZsuError, match=r"called \d+ times for \d+ samples. let the model call it once for its batch"):
        forget(model, x, target, retained=retained)


def test_a_buffer_that_a_method_changes_is_in_no_patch_and_said():
    @dataclass(frozen=True, kw_only=True)
    class Mine(Method):
        name = "mine"

        def edit(self, model, x, target, retained, seed):
            with torch.no_grad():
                model.head.bias[target] -= 9
                model.norm.running_mean += 1
            return Edit(no_rows(), {})

    layers = {"flat": nn.Flatten(), "norm": nn.BatchNorm1d(64), "head": nn.Linear(64, 3)}
    model = Net(lambda m, x: m.head(m.norm(m.flat(x))), **layers).eval()
    x, target = case(model)
    with pytest.warns(
        UserWarning, match="'mine' changes norm.running_mean, a buffer: the patch holds parameters alone"
    ):
        forget(model, x, target, Mine())


@pytest.mark.parametrize("method", METHODS)
def test_integers_among_the_parameters_and_inference_mode_are_no_obstacle(method):
    model = small()
    model.register_parameter("numbers", nn.Parameter(torch.tensor([1, 2]), requires_grad=False))
    x, target = case(model)
    kept = torch.tensor([c for c in range(3) if c != target])
    more = {}
    if method in NEED_RETAINED:
        more["retained"] = Images(torch.randint(256, (12, 1, 8, 8), dtype=torch.uint8), kept.repeat(6), ["a", "b", "c"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = forget(model, x, target, method, **more).patch
        with torch.inference_mode():
            inside = forget(model, x.clone(), target, method, **more).patch
    assert plain.changes.keys() == inside.changes.keys()
    assert all(torch.equal(c.new, inside.changes[name].new) for name, c in plain.changes.items())
