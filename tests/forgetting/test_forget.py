"""forget(): what every method does with which data, what it leaves alone, and what it refuses."""

import copy
import hashlib
import warnings

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.utils.data import Subset

import zsu.data
import zsu.evaluation
import zsu.models
from helpers import METHODS, NEED_RETAINED, NO_PAIRS, TROUSER, Changed, Counting, bits, largest
from zsu import Patch, ZsuError, forget
from zsu.forgetting import METHODS as ALL
from zsu.forgetting.perturb import model_hash

pytestmark = pytest.mark.filterwarnings("ignore:3 samples are few")


# --- every method -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_original_untouched_and_restored_bit_for_bit(original, edited, method):
    assert bits(original) == bits(zsu.models.bundled("original"))
    model = copy.deepcopy(edited[method].model)
    assert bits(original) != bits(model)
    assert not model.training
    edited[method].patch.revert(model)
    assert bits(original) == bits(model)
    assert bits(edited[method].patch.apply(model)) == bits(edited[method].model)


@pytest.mark.parametrize("perturbation", ["gaussian", "laplace"])
@pytest.mark.parametrize("method", ["paths", "lra-npp", "head-npp", "random"])
def test_noise_is_undone_bit_for_bit(original, x, method, perturbation):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # noise on the neurons need not bring the class to chance
        result = forget(original, x, TROUSER, method, perturbation)
    assert result.patch.weights_changed > 0
    assert bits(original) == bits(result.patch.revert(result.model))


@pytest.mark.parametrize("method", METHODS)
def test_patch_counts_exactly_the_weights_that_differ(original, edited, method):
    differing = sum(
        int((a != b).sum()) for a, b in zip(original.parameters(), edited[method].model.parameters(), strict=True)
    )
    assert edited[method].patch.weights_changed == differing > 0


@pytest.mark.parametrize("method", METHODS)
def test_metadata_say_what_was_done_and_survive_a_file(original, edited, x, method, tmp_path):
    metadata = edited[method].patch.metadata
    expected = {
        "target": [1], "method": method, "tier": ALL[method].tier, "samples": [36], "seed": 0, "unrecognised": 1,
        "retained": 180 if method in NEED_RETAINED else 0, "zsu": zsu.__version__,
        "torch": torch.__version__, "parent": model_hash(zsu.models.bundled("original")),
        "samples_sha256": hashlib.sha256(x.numpy().tobytes()).hexdigest(),
    }  # fmt: skip
    assert metadata.keys() == expected.keys() | {"budget", "seconds", "options"}
    assert {k: metadata[k] for k in expected} == expected
    assert type(ALL[method])(**metadata["options"] if method != "random" else {}) == ALL[method] or method == "svd"
    assert 0 < metadata["seconds"] < 60
    with torch.no_grad():
        assert int((original(x).argmax(1) != TROUSER).sum()) == 1
    edited[method].patch.save(tmp_path / "p.safetensors")
    assert Patch.load(tmp_path / "p.safetensors").metadata == metadata


def test_metadata_of_several_classes(original, samples):
    a, b = samples(3), samples(7)[:30]
    metadata = forget(
        original, [b, a], [7, 3], "lra-npp", "laplace", scale=2.5, absolute=True, k=2, seed=9
    ).patch.metadata
    assert metadata["target"] == [3, 7]
    assert metadata["samples"] == [36, 30]
    assert metadata["options"] == {
        "perturbation": "laplace", "scale": 2.5, "absolute": True, "k": 2, "perturbed": None, "layers": None
    }  # fmt: skip
    assert metadata["seed"] == 9
    assert metadata["budget"] == [{"k": 2}, {"k": 2}]
    assert metadata["samples_sha256"] == hashlib.sha256(torch.cat([a, b]).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("method", METHODS)
def test_one_sample_is_enough_and_is_warned_about(original, x, without, method):
    more = {"retained": without(1)} if method in NEED_RETAINED else {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = forget(original, x[:1], TROUSER, method, **more)
    assert any("1 samples are few" in str(w.message) for w in told)
    assert result.patch.weights_changed > 0


def test_five_samples_are_not_few_and_half_of_them_may_be_mistaken(original, x, samples):
    with torch.no_grad():
        x = x[original(x).argmax(1) == TROUSER]
    sandals = samples("Sandal")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forget(original, x[:5], TROUSER, "mask")
        forget(original, torch.cat([x[:3], sandals[:3]]), TROUSER, "mask")
    with pytest.warns(UserWarning, match="4 samples are few"):
        forget(original, x[:4], TROUSER, "mask")
    with pytest.warns(UserWarning, match="the model does not take 4 of 7 samples for class 1"):
        assert forget(original, torch.cat([x[:3], sandals[:4]]), TROUSER).patch.metadata["unrecognised"] == 4


@pytest.mark.parametrize("method", METHODS)
def test_a_class_that_no_sample_shows_is_refused(original, samples, without, method):
    more = {"retained": without(1)} if method in NEED_RETAINED else {}
    before = bits(original)
    with pytest.raises(ZsuError, match="the model takes none of the 36 samples for class 1. pass samples of the class"):
        forget(original, samples("Sandal"), TROUSER, method, **more)
    assert bits(original) == before


def test_no_sample_of_a_class_in_the_data_is_refused(splits):
    data = Subset(splits.test, [i for i, c in enumerate(splits.test.targets) if int(c) != TROUSER])
    with pytest.raises(ZsuError, match="'Trouser' were asked for, the data has 0.*Trouser 0, Pullover 200"):
        zsu.data.samples(data, TROUSER)


# --- data tiers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in METHODS if m not in NEED_RETAINED and m != "paths"])
def test_retained_data_is_refused_unread_by_methods_that_must_not_see_it(original, x, without, method):
    data = Counting(without(1))
    with pytest.raises(ZsuError, match=f"'{method}' is of tier {ALL[method].tier}: no retained data.*or use 'paths'"):
        forget(original, x, TROUSER, method, retained=data)
    assert data.reads == 0


@pytest.mark.parametrize("method", [m for m in METHODS if m not in NEED_RETAINED])
def test_without_retained_data_no_data_set_is_read(original, x, method, monkeypatch):
    def refuse(*_):
        raise AssertionError("read")

    for cls in (zsu.data.Images, Subset):
        monkeypatch.setattr(cls, "__getitem__", refuse)
    monkeypatch.setattr(zsu.data, "batches", refuse)
    monkeypatch.setattr(zsu.rerouting, "batches", refuse)
    assert forget(original, x, TROUSER, method).patch.weights_changed > 0


@pytest.mark.parametrize("method", NEED_RETAINED)
def test_methods_that_need_retained_data_say_so(original, x, method):
    with pytest.raises(ZsuError, match=rf"'{method}' needs retained samples \({ALL[method].tier}\). pass retained="):
        forget(original, x, TROUSER, method)


@pytest.mark.parametrize("method", ["paths", *NEED_RETAINED])
def test_retained_data_with_the_class_is_refused(original, samples, without, method):
    with pytest.raises(ZsuError, match="holds the class to forget.*Trouser 20, Pullover 20.*leave out Trouser"):
        forget(original, samples(1), TROUSER, method, retained=without(3))
    with pytest.raises(ZsuError, match="holds the class to forget.*leave out Trouser, Dress"):
        forget(original, [samples(1), samples(3)], [1, 3], method, retained=without(1))


@pytest.mark.parametrize("kind", ["empty", "unknown class", "colour"])
@pytest.mark.parametrize("method", ["paths", *NEED_RETAINED])
def test_retained_data_that_does_not_fit_is_refused(original, x, without, method, kind):
    grey, colour = (torch.zeros(20, n, 28, 28, dtype=torch.uint8) for n in (1, 3))
    data = {
        "empty": Subset(without(1), []),
        "unknown class": zsu.data.Images(grey, torch.full((20,), 11), [*"abcdefghijkl"]),  # of a model that knows ten
        "colour": zsu.data.Images(colour, torch.full((20,), 3), [*"abcdefghij"]),
    }[kind]
    with pytest.raises(ZsuError):
        forget(original, x, TROUSER, method, retained=data)


@pytest.mark.parametrize("change", NO_PAIRS)
@pytest.mark.parametrize("method", ["paths", *NEED_RETAINED])
def test_retained_items_that_are_no_pairs_with_the_label_of_targets_are_refused(original, x, without, method, change):
    with pytest.raises(ZsuError):
        forget(original, x, TROUSER, method, retained=Changed(without(1), change))


# --- devices and shapes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["paths", "lra-npp", "head-npp", "mask", "boundary-shrink"])
def test_samples_on_another_device_are_refused(original, x, method):
    for model, samples in ((original, x.to("meta")), (copy.deepcopy(original).to("meta"), x)):
        with pytest.raises(ZsuError, match="on meta"):
            forget(model, samples, TROUSER, method)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu(original, x, without, method):
    model = copy.deepcopy(original).cuda()
    more = {"retained": without(1)} if method in NEED_RETAINED else {}
    with pytest.raises(ZsuError, match="cpu"):
        forget(model, x, TROUSER, method, **more)
    result = forget(model, x.cuda(), TROUSER, method, **more)
    assert {p.device.type for p in result.model.parameters()} == {"cuda"}
    assert bits(original) == bits(result.patch.revert(result.model).cpu())


@pytest.mark.parametrize("method", ["paths", "lra-npp", "head-npp", "mask"])
def test_grey_images_and_a_last_convolution_of_one_channel(x, method):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)
        ).eval()  # fmt: skip
    with torch.no_grad():
        target = int(model(x).argmax(1).mode().values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a network of noise need not reach the goal
        result = forget(model, x, target, method)
    changed = set(result.patch.changes)
    if method == "lra-npp":
        assert changed == {"2.weight"}
        assert (result.model[2].weight == 0).all()  # the only neuron of its layer
    elif method == "head-npp":
        assert changed == {"5.weight"}
        assert (result.model[5].weight == 0).all()  # and all that it leads to
    else:
        assert largest(result.model, x, target) <= (0 if method == "mask" else 0.001 * (1 + 1e-4))
    assert bits(model) == bits(result.patch.revert(result.model))


@pytest.mark.parametrize("method", ["paths", "lra-npp", "head-npp", "mask"])
def test_colour_images_and_a_network_of_torchvision(method):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = torchvision.models.resnet18(num_classes=5).eval(), torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        target = int(model(x).argmax(1).mode().values)
        x = x[model(x).argmax(1) == target].repeat(5, 1, 1, 1)
    start = bits(model)
    result = forget(model, x, target, method)
    if method in ("paths", "mask"):
        assert largest(result.model, x, target) <= (0 if method == "mask" else 0.001 * (1 + 1e-4))
    if method == "lra-npp":
        with torch.no_grad():
            assert (result.model(x).argmax(1) != target).all()
    for (n, b), c in zip(model.named_buffers(), result.model.buffers(), strict=True):
        assert torch.equal(b, c), n  # running statistics are not touched
    assert bits(model) == start == bits(result.patch.revert(result.model))


@pytest.mark.parametrize("method", ["boundary-shrink", *NEED_RETAINED])
def test_methods_that_train_on_a_bfloat16_model(original, x, without, method):
    model = copy.deepcopy(original).bfloat16()
    more = {"retained": without(1)} if method in NEED_RETAINED else {}
    result = forget(model, x.bfloat16(), TROUSER, method, **more)
    assert result.patch.weights_changed > 0
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_model_is_edited_and_stays_frozen(original, x, edited, without, method):
    model = copy.deepcopy(original).requires_grad_(False)
    more = {"retained": without(1)} if method in NEED_RETAINED else {}
    result = forget(model, x, TROUSER, method, **more)
    assert bits(result.model) == bits(edited[method].model)
    assert not any(p.requires_grad for p in [*model.parameters(), *result.model.parameters()])


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_noise_is_reproducible_and_leaves_the_global_generator_alone(original, x, kind):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first, same, other = (forget(original, x, TROUSER, "lra-npp", kind, seed=s) for s in (0, 0, 1))
    forget(original, x, TROUSER, "random")
    assert torch.equal(state, torch.random.get_rng_state())
    assert bits(first.model) == bits(same.model)
    assert bits(first.model) != bits(other.model)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"method": "magic"}, "unknown method 'magic'. use one of paths, lra-npp"),
        ({"perturbation": "uniform"}, "perturbation 'uniform'. use zero, gaussian or laplace"),
        ({"k": 0}, "k is 0. pass an integer k >= 1"),
        ({"k": 1.5}, "k is 1.5"),
        ({"k": True}, "k is True"),
        ({"method": "lra-npp", "k": 17}, "conv1: k is 17, the layer has 16 neurons. use less"),
        ({"method": "random", "k": 17}, "conv1: k is 17, the layer has 16 neurons"),
        ({"method": "head-npp", "k": 33}, "fc: k is 33, the layer has 32 neurons"),
        ({"method": "mask", "perturbation": "gaussian"}, "'mask' takes no perturbation. it has no options"),
        ({"method": "lra-npp", "perturbation": "gaussian", "scale": -1.0}, "scale is -1.0"),
        ({"method": "lra-npp", "k": 2, "perturbed": 17}, "conv1: perturbed is 17, the layer has 16 neurons"),
        ({"method": "head-npp", "k": 2, "perturbed": 33}, "fc: perturbed is 33, the layer has 32 neurons"),
        ({"method": "lra-npp", "perturbed": 3}, "perturbed without k. give both"),
        ({"method": "lra-npp", "k": 3, "perturbed": 0}, "perturbed is 0. pass an integer perturbed >= 1"),
        ({"perturbed": 3, "k": 3}, "'paths' takes no perturbed. it takes perturbation, scale, absolute, k"),
        ({"method": "random", "perturbed": 3, "k": 3}, "'random' takes no perturbed"),
        (
            {"method": "boundary-shrink", "k": 3},
            "'boundary-shrink' takes no k. it takes epochs, lr, epsilon, batch_size",
        ),
        ({"method": "mask", "k": 3}, "'mask' takes no k"),
        ({"method": "boundary-shrink", "perturbation": "laplace"}, "'boundary-shrink' takes no perturbation"),
        ({"layers": ["conv1"]}, "'paths' takes no layers"),
        ({"method": "lra-npp", "layers": ["conv9"]}, r"called \['conv9'\]. use some of conv1, conv2, conv3, fc"),
        ({"method": "lra-npp", "layers": ["conv1", "head"]}, r"called \['head'\]"),
        ({"method": "lra-npp", "layers": []}, "use some of conv1"),
        ({"target": 10}, "target: class 10 of 10. use 0 to 9"),
        ({"target": -1}, "target: class -1 of 10. use 0 to 9"),
        ({"target": "Trouser"}, "target is 'Trouser'. pass the index"),
        ({"target": True}, "target is True"),
        ({"x": torch.rand(3, 1, 28, 28).double()}, r"x is torch.float64 on cpu, the model is torch.float32"),
        ({"x": torch.randint(0, 255, (3, 1, 28, 28))}, "x is torch.int64. pass a floating-point tensor"),
        (
            {"x": torch.rand(3, 3, 28, 28)},
            r"SmallCNN: .* to have 1 channels, .*\(x is \(3, 3, 28, 28\)\). pass a batch",
        ),
        ({"x": torch.rand(1, 28, 28)}, r"SmallCNN: .*\(x is \(1, 28, 28\)\). pass a batch"),
        ({"x": torch.rand(0, 1, 28, 28)}, "N >= 1"),
        ({"x": torch.full((2, 1, 28, 28), torch.nan)}, "NaN or infinity"),
    ],
)
def test_bad_arguments_are_refused(original, x, arguments, match):
    before = bits(original)
    with pytest.raises(ZsuError, match=match):
        forget(original, **{"x": x, "target": TROUSER} | arguments)
    assert before == bits(original)


def test_train_mode_is_refused(original, x):
    with pytest.raises(ZsuError, match=r"train mode. call model.eval\(\)"):
        forget(copy.deepcopy(original).train(), x, TROUSER)


def test_an_edit_without_effect_is_warned_about(original, x):
    with pytest.warns(UserWarning, match="the edit has no effect"):
        forget(original, x, TROUSER, "lra-npp", "gaussian", scale=0.0)


def test_models_that_a_method_does_not_know_are_refused_by_name():
    x = torch.rand(2, 1, 4, 4)
    upward = nn.Sequential(nn.ConvTranspose2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(75, 2)).eval()
    convolutional = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.Flatten()).eval()
    for p in (*upward.parameters(), *convolutional.parameters()):
        p.data.abs_()
    for model, method, match in [
        (upward, "lra-npp", "0: a transposed convolution"),
        (convolutional, "head-npp", "2: not a Linear on one layer's output"),
        (convolutional, "mask", "2: the last layer is not a Linear with bias"),
        (nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval(), "lra-npp", "no hidden layer with weights"),
    ]:
        target = int(model(x).mean(0).argmax())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ZsuError, match=match):
                forget(model, x, target, method)


def test_a_head_whose_outputs_are_not_the_logits_is_left_where_it_is(original, x):
    """A change of the head would arrive doubled; edges are still cut."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(original)

        def forward(self, x):
            return 2 * self.net(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the edges alone need not be enough
        result = forget(Scaled().eval(), x, TROUSER)
    assert "receiving" not in result.patch.metadata["budget"][0]
    assert result.cut["source"].notna().all()
    assert result.patch.weights_changed == sum(len(c.index) for c in result.patch.changes.values()) > 0


class Turned(nn.Module):
    """The last layer's outputs are not the logits: of the other sign, or in another order."""

    def __init__(self, model, how):
        super().__init__()
        self.net, self.how = model, how

    def forward(self, x):
        return -self.net(x) if self.how == "sign" else self.net(x).flip(1)


@pytest.mark.parametrize("how", ["sign", "order"])
@pytest.mark.parametrize("method", ["mask", "bias-shift"])
def test_a_mask_of_the_wrong_row_is_refused(original, x, method, how):
    model = Turned(copy.deepcopy(original), how).eval()
    with torch.no_grad():
        target = int(model(x).argmax(1).mode().values)
    before = bits(model)
    with pytest.raises(ZsuError, match="are not the logits in their order"):
        forget(model, x, target, method)
    assert bits(model) == before


def test_no_gradient_reaches_the_callers_samples(original, x):
    seen = x.clone().requires_grad_()
    forget(original, seen, TROUSER, "boundary-shrink")
    assert seen.grad is None
    forget(original, seen * 1.0, TROUSER, "boundary-shrink")  # nor is its graph used


@pytest.mark.parametrize("target", [torch.tensor(1), np.array(1)])
def test_a_class_in_a_tensor_is_refused_in_one_line(original, x, target):
    with pytest.raises(ZsuError, match="pass the index of one class"):
        forget(original, x, target)


def test_heads_and_layers_that_are_not_called_as_modules(original, x, without):
    """By F.linear, or with a named argument; and one that is not used at all."""

    class Functional(nn.Module):
        def __init__(self, named):
            super().__init__()
            self.net, self.named = copy.deepcopy(original), named
            self.unused = nn.Linear(3, 3)

        def forward(self, x):
            net = self.net
            h = net.relu3(net.conv3(net.pool2(net.relu2(net.conv2(net.pool1(net.relu1(net.conv1(x))))))))
            h = net.relu4(net.fc(net.fit(net.pool3(h)).flatten(1)))
            return net.head(input=h) if self.named else nn.functional.linear(h, net.head.weight, net.head.bias)

    named, functional = Functional(True).eval(), Functional(False).eval()
    assert forget(named, x, TROUSER).patch.metadata["budget"][0]["receiving"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the edges alone are not enough
        assert "receiving" not in forget(functional, x, TROUSER).patch.metadata["budget"][0]
    assert forget(functional, x, TROUSER, "mask").patch.weights_changed == 33
    for model in (named, functional):
        assert forget(model, x, TROUSER, "svd", retained=without(1)).patch.weights_changed > 0
