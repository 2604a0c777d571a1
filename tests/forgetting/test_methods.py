"""Methods as data: options with defaults, by name or as an object, and one of your own."""

import copy
from dataclasses import FrozenInstanceError, dataclass, fields

import numpy as np
import pytest
import torch
from torch import nn

from helpers import TROUSER, bits
from zsu import Patch, ZsuError, forget
from zsu.forgetting import METHODS, BoundaryShrink, CutPaths, Edit, LraNpp, Mask, Method, Random, Ssd
from zsu.forgetting.methods import no_rows
from zsu.forgetting.perturb import in_short
from zsu.inside import logit_layer


def test_the_methods_and_their_tiers():
    assert {name: method.tier for name, method in METHODS.items()} == {
        "paths": "T1", "lra-npp": "T1", "head-npp": "T1", "mask": "T0", "bias-shift": "T0", "random": "T1",
        "zeroed": "T0", "fine-tune": "T4", "negative-gradient": "T4", "ssd": "T3", "svd": "T3", "boundary-shrink": "T2",
        "paths+retained": "T3",
    }  # fmt: skip
    for name, method in METHODS.items():
        assert name.removesuffix("+retained") == method.name
        with pytest.raises(FrozenInstanceError):
            method.tier = "T0"


@pytest.mark.parametrize(
    ("name", "options", "method"),
    [
        ("ssd", {"alpha": 5}, Ssd(alpha=5)),
        ("lra-npp", {"k": 3, "layers": ["fc"]}, LraNpp(k=3, layers=["fc"])),
        ("boundary-shrink", {"epochs": 1, "lr": 1e-3}, BoundaryShrink(epochs=1, lr=1e-3)),
        ("paths", {"k": 4, "perturbation": "gaussian"}, CutPaths(k=4, perturbation="gaussian")),
        ("mask", {}, Mask()),
    ],
)
def test_a_name_with_options_is_the_method_with_them(original, x, without, name, options, method):
    more = {"retained": without(1)} if name == "ssd" else {}
    by_name, by_method = (forget(original, x, TROUSER, m, **o, **more) for m, o in ((name, options), (method, {})))
    assert bits(by_name.model) == bits(by_method.model)
    assert by_name.patch.metadata["options"] == by_method.patch.metadata["options"]
    assert {o: by_name.patch.metadata["options"][o] for o in options} == options


def test_options_reach_the_method(original, x, without):
    few, many = (forget(original, x, TROUSER, "ssd", alpha=a, retained=without(1)) for a in (20, 5))
    assert few.patch.weights_changed < many.patch.weights_changed


def test_an_option_that_is_none_is_the_default(original, x, edited):
    assert bits(forget(original, x, TROUSER, "mask", k=None, layers=None).model) == bits(edited["mask"].model)


def test_retained_samples_make_paths_a_method_of_t3(original, x, without):
    by_data, by_name = (forget(original, x, TROUSER, m, retained=without(1)) for m in ("paths", "paths+retained"))
    assert bits(by_data.model) == bits(by_name.model)
    assert by_data.patch.metadata["tier"] == by_name.patch.metadata["tier"] == "T3"
    with pytest.raises(ZsuError, match=r"'paths' needs retained samples \(T3\)"):
        forget(original, x, TROUSER, "paths+retained")


def test_a_method_of_your_own(original, x):
    @dataclass(frozen=True, kw_only=True)
    class Halve(Method):
        """Divide the class's row of the head."""

        name = "halve"
        tier = "T0"
        by: float = 2.0

        @torch.no_grad()
        def edit(self, model, x, target, retained, seed):
            model.head.weight[target] /= self.by
            return Edit(no_rows(), {"rows": 1})

    result = forget(original, x, TROUSER, Halve(by=4.0))
    torch.testing.assert_close(4 * result.model.head.weight[TROUSER], original.head.weight[TROUSER], rtol=0, atol=0)
    assert list(result.patch.changes) == ["head.weight"]
    about = result.patch.metadata
    assert (about["method"], about["tier"], about["options"]) == ("halve", "T0", {"by": 4.0})
    assert result.patch.budget == "rows 1"
    with pytest.raises(ZsuError, match="'halve' takes no k. it takes by"):
        forget(original, x, TROUSER, Halve(), k=3)


def test_a_method_that_returns_nothing_is_refused(original, x):
    class Forgetful(Mask):
        def edit(self, *arguments):
            super().edit(*arguments)

    with pytest.raises(ZsuError, match=r"'mask' returned no Edit. let edit return Edit\(cut, budget\)"):
        forget(original, x, TROUSER, Forgetful())


def test_the_random_control_says_nothing_of_samples_that_it_did_not_count(original, x):
    (budget,) = forget(original, x, TROUSER, Random()).patch.metadata["budget"]
    assert list(budget) == ["neurons"]


@pytest.mark.parametrize("wrong", [Ssd, None, 3, ("paths",), ["paths"]])
def test_what_is_no_method_is_refused(original, x, wrong):
    with pytest.raises(ZsuError, match="unknown method .* use one of paths, .*, or a method such as"):
        forget(original, x, TROUSER, wrong)


def test_options_are_checked_when_the_method_is_made():
    for make, match in (
        (lambda: CutPaths(k=0), "k is 0"),
        (lambda: LraNpp(perturbed=3), "perturbed without k"),
        (lambda: CutPaths(perturbation="salt"), "perturbation 'salt'"),
        (lambda: CutPaths(scale=-1.0), "scale is -1"),
    ):
        with pytest.raises(ZsuError, match=match):
            make()


@pytest.mark.parametrize(
    ("name", "option", "wrong"),
    [
        ("ssd", "alpha", "5"), ("ssd", "alpha", float("nan")), ("svd", "alphas_r", ()), ("svd", "alphas_f", (3, -1)),
        ("fine-tune", "epochs", 1.5), ("fine-tune", "lr", "x"), ("boundary-shrink", "batch_size", 0),
        ("negative-gradient", "epochs", 0), ("negative-gradient", "lr", float("inf")),
    ],
)  # fmt: skip
def test_options_of_the_peers_are_numbers(original, x, without, name, option, wrong):
    with pytest.raises(ZsuError, match=f"{name}: {option} is "):
        forget(original, x, TROUSER, name, **{option: wrong})


def test_a_model_that_changes_its_input_leaves_the_callers_samples_alone(original, x):
    class Doubling(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(original)

        def forward(self, x):
            return self.net(x.mul_(2) / 2)

    before = x.clone()
    for name in ("paths", "mask", "lra-npp", "head-npp", "boundary-shrink"):
        assert bits(forget(Doubling().eval(), x, TROUSER, name, **({"k": 2} if "npp" in name else {})).model.net)
        assert torch.equal(x, before)


def test_a_head_whose_output_is_changed_in_place_is_none(original, x):
    class Cooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(original)

        def forward(self, x):
            return self.net(x).div_(4)

    assert logit_layer(original, x) == "head"
    assert logit_layer(Cooled().eval(), x) is None


def test_a_model_that_returns_no_tensor_is_refused(original, x):
    class Wrapped(nn.Module):
        def forward(self, x):
            return {"logits": original(x)}

    with pytest.raises(ZsuError, match="the model's output is dict"):
        forget(Wrapped().eval(), x, TROUSER, "mask")


def test_numbers_of_numpy_and_tuples_survive_a_file(original, x, tmp_path):
    options = {"k": np.int64(2), "layers": {"fc"}, "scale": np.float32(1), "seed": np.int64(0)}
    patch = forget(original, x, TROUSER, "lra-npp", **options).patch
    assert patch.metadata["options"] == {
        "perturbation": "zero", "scale": 1.0, "absolute": False, "k": 2, "perturbed": None, "layers": ["fc"]
    }  # fmt: skip
    patch.save(tmp_path / "p.safetensors")
    assert Patch.load(tmp_path / "p.safetensors").metadata == patch.metadata


def test_a_budget_of_a_thousand_classes_is_said_in_a_few_words():
    patch = Patch({}, {"budget": [{"edges": 3, "receiving": [*range(990)]}, {"edges": 4, "receiving": [7]}]})
    assert patch.budget == "edges 3, receiving [0, 1, 2, 3, 4, ... 990 in all]; edges 4, receiving [7]"
    assert Patch({}).budget == Patch({}, {"budget": [{}, {}]}).budget == ""
    assert in_short({"a": None, "b": 0.5}) == "a None, b 0.5"


def test_every_option_has_a_default():
    for method in METHODS.values():
        assert all(f.kw_only for f in fields(method))
        assert isinstance(type(method)(), type(method))
