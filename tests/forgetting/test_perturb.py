"""Patches: which bits they find, what they write and refuse to write, how they stack; and the noise."""

import copy

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

import zsu.data
import zsu.models
from zsu import Patch, ZsuError, forget
from zsu.forgetting.perturb import Change, model_hash, perturb, standard_noise, undo

TROUSER = 1


@pytest.fixture(scope="module")
def edited(original):
    """What `forget` makes of a real model."""
    return forget(original, zsu.data.samples(zsu.data.load("fashion-mini").test, TROUSER), TROUSER)


def bits(model):
    state = model if isinstance(model, dict) else model.state_dict()
    return {n: t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for n, t in state.items()}


def one_layer(*weights, dtype=torch.float32):
    model = nn.Linear(len(weights), 1, bias=False).to(dtype)
    model.weight.data = torch.tensor([weights], dtype=dtype)
    return model


# --- what is found --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_between_finds_exactly_the_bits_that_differ(dtype):
    nan, other_nan = (torch.tensor([1.0], dtype=dtype).log() / 0 for _ in range(2))
    before = one_layer(0.0, 1.0, -0.0, 2.0, float(nan), 3.0, dtype=dtype)
    after = one_layer(-0.0, 1.0, -0.0, 2.5, float(other_nan), 3.0, dtype=dtype)
    after.weight.data[0, 5] = torch.nextafter(torch.tensor(3.0, dtype=dtype), torch.tensor(4.0, dtype=dtype))
    start, end = bits(before), bits(after)
    patch = Patch.between(before, after)
    assert list(patch.changes) == ["weight"]
    assert patch.changes["weight"].index.tolist() == [0, 3, 5]
    assert {patch.changes["weight"].old.dtype, patch.changes["weight"].new.dtype} == {dtype}
    assert patch.weights_changed == 2  # 0.0 and -0.0 are the same value
    assert bits(patch.apply(before)) == end
    assert bits(patch.revert(before)) == start


def test_between_equal_models_is_empty_and_can_be_applied_looked_at_and_saved(original, tmp_path):
    patch = Patch.between(original, copy.deepcopy(original))
    assert patch.changes == {}
    assert patch.weights_changed == 0
    assert repr(patch) == "Patch(0 weights of nothing)"
    patch.save(tmp_path / "p")
    assert Patch.load(tmp_path / "p").changes == {}
    model = copy.deepcopy(original)
    assert bits(Patch.load(tmp_path / "p").apply(model)) == bits(original)
    frame = patch.diff(original)
    assert len(frame) == 0
    assert list(frame) == ["changed", "zeroed", "mean_change", "largest_change", "share"]


def test_between_leaves_both_models_alone_and_is_no_view_of_them(original):
    other = zsu.models.bundled("original", seed=1)
    before = bits(original), bits(other)
    patch = Patch.between(original, other)
    assert (bits(original), bits(other)) == before
    assert patch.weights_changed > 42_000
    model = copy.deepcopy(original)
    patch = Patch.between(model, other)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert patch.changes["head.bias"].old.tolist() == original.head.bias.tolist()


def test_hash_depends_on_every_bit_every_buffer_and_every_name(original):
    model = copy.deepcopy(original)
    assert model_hash(model) == model_hash(original) == model_hash(original.state_dict())
    assert len(model_hash(model)) == 64
    shuffled = dict(reversed(list(original.state_dict().items())))
    assert model_hash(shuffled) == model_hash(original)
    zero, minus = one_layer(0.0), one_layer(-0.0)
    assert model_hash(zero) != model_hash(minus)
    norm, moved = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    moved.num_batches_tracked += 1
    assert model_hash(norm) != model_hash(moved)
    state = {"a": torch.zeros(2)}
    hashes = {
        model_hash(s)
        for s in (
            state, {"b": state["a"]}, {"a": torch.zeros(1, 2)}, {"a": torch.zeros(4).half()}, {"a": torch.ones(2)}
        )
    }  # fmt: skip
    assert len(hashes) == 5


# --- what is written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_survive_a_file(original, dtype, tmp_path):
    model = copy.deepcopy(original).to(dtype)
    after = copy.deepcopy(model)
    perturb(after, {"conv2.weight": torch.arange(50, 100), "head.bias": torch.arange(3)}, "laplace").apply(after)
    start, end = bits(model), bits(after)
    Patch.between(model, after).save(tmp_path / "p.safetensors")
    patch = Patch.load(tmp_path / "p.safetensors")
    assert bits(patch.apply(model)) == end != start
    assert bits(patch.revert(model)) == start


def test_a_state_dict_alone_is_enough(original, edited, tmp_path):
    edited.patch.save(tmp_path / "p.safetensors")
    state = {n: t.clone() for n, t in original.state_dict().items()}
    assert Patch.load(tmp_path / "p.safetensors").apply(state) is state
    assert bits(state) == bits(edited.model)
    rest = undo(state, [edited.patch], 0)
    assert rest == []
    assert bits(state) == bits(original)


def test_patch_survives_a_file(original, edited, tmp_path):
    edited.patch.save(tmp_path / "a.safetensors")
    loaded = Patch.load(tmp_path / "a.safetensors")
    assert loaded.metadata == edited.patch.metadata
    assert loaded.changes.keys() == edited.patch.changes.keys()
    for name, change in edited.patch.changes.items():
        for ours, theirs in zip(change, loaded.changes[name], strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
    assert bits(loaded.apply(copy.deepcopy(original))) == bits(edited.model)
    assert [f.name for f in tmp_path.iterdir()] == ["a.safetensors"]


def test_weights_that_are_not_contiguous_are_written():
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    after = copy.deepcopy(model)
    with torch.no_grad():
        after[0].weight[2, 1, 0, 2] = 7
    patch = Patch.between(model, after)
    assert patch.changes["0.weight"].index.tolist() == [2 * 27 + 9 + 2]
    patch.apply(model)
    assert torch.equal(model[0].weight, after[0].weight)


def test_a_frozen_model_and_inference_mode():
    model = one_layer(1.0, 2.0).requires_grad_(False)
    patch = perturb(model, {"weight": torch.tensor([1])})
    with torch.inference_mode():
        patch.apply(model)
    assert model.weight.tolist() == [[1, 0]]


# --- what is refused ------------------------------------------------------------------------------------------


def test_another_model_is_refused_by_both_hashes_and_nothing_is_written(original, edited):
    """Even where it holds the old values: one bit of a weight that the patch does not touch."""
    other = copy.deepcopy(original)
    other.conv1.weight.data[0, 0, 0, 0] += 1
    assert "conv1.weight" not in edited.patch.changes
    for model in (other, zsu.models.bundled("original", seed=1), edited.model, other.state_dict(),
                  torchvision.models.squeezenet1_1().eval(), copy.deepcopy(original).double()):  # fmt: skip
        before, found = bits(model), model_hash(model)[:12]
        wanted = model_hash(original)[:12]
        with pytest.raises(ZsuError, match=f"made for model {wanted}, this is model {found}. .*Patch.rebase"):
            edited.patch.apply(model)
        assert bits(model) == before


def test_without_a_hash_the_values_decide(original, edited):
    patch = Patch(edited.patch.changes)
    other = copy.deepcopy(original)
    other.conv1.weight.data[0, 0, 0, 0] += 1
    patch.apply(other)
    for message, model in {
        "does not hold the old values": edited.model,
        "the model has no such parameter": torchvision.models.squeezenet1_1().eval(),
        "the model has torch.float64": copy.deepcopy(original).double(),
        r"the model has torch.float32 \(10, 2\)": nn.ModuleDict(
            {"head": nn.Linear(2, 10), "fc": nn.Linear(2, 10)}
        ),
    }.items():  # fmt: skip
        before = bits(model)
        with pytest.raises(ZsuError, match=f"{message}.*use the model that the patch was made for"):
            patch.apply(model)
        assert bits(model) == before
    before = bits(original)
    with pytest.raises(ZsuError, match="does not hold the new values"):
        patch.revert(original)
    assert bits(original) == before


def test_a_model_that_differs_in_the_last_parameter_only_is_not_half_edited(original):
    patch = perturb(original, {"conv1.weight": torch.arange(5), "head.bias": torch.tensor([3])})
    model = copy.deepcopy(original)
    model.head.bias.data[3] += 1
    before = bits(model)
    with pytest.raises(ZsuError, match="head.bias"):
        patch.apply(model)
    assert bits(model) == before


def test_the_sign_of_zero_is_checked_too():
    patch = perturb(one_layer(0.0, 1.0), {"weight": torch.tensor([0, 1])})
    with pytest.raises(ZsuError, match="old values"):
        patch.apply(one_layer(-0.0, 1.0))


def test_damaged_foreign_and_missing_patch_files_are_refused(edited, original, tmp_path):
    path = tmp_path / "patch.safetensors"
    edited.patch.save(path)
    content = path.read_bytes()
    for n in (0, 4, 40, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:n])
        with pytest.raises(ZsuError, match="not a patch.*pass a file that Patch.save wrote"):
            Patch.load(path)
    path.write_text("not a patch at all")
    zsu.models.save(original, tmp_path / "model.safetensors")
    safetensors.torch.save_file({"a:index": torch.ones(1)}, tmp_path / "half.safetensors", {"zsu_patch": "{}"})
    for name in ("patch.safetensors", "model.safetensors", "half.safetensors", "missing.safetensors"):
        with pytest.raises(ZsuError, match=f"{name}: not a patch"):
            Patch.load(tmp_path / name)


def test_unwritable_folder_is_refused_and_nothing_is_left(edited, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ZsuError, match="cannot write.*writable folder"):
        edited.patch.save(tmp_path / "file" / "patch.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ZsuError, match="cannot write"):
        edited.patch.save(tmp_path / "folder")  # the name of a folder
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "kept"


# --- what they say --------------------------------------------------------------------------------------------


def test_diff_counts_by_hand():
    before = nn.ModuleDict({"a": one_layer(1.0, 2.0, 0.0, -3.0, 0.0), "b": one_layer(0.0, 5.0)})
    after = nn.ModuleDict({"a": one_layer(0.0, 2.5, 4.0, -3.0, -0.0), "b": one_layer(-0.0, 5.0)})
    patch = Patch.between(before, after)
    frame = patch.diff(before)
    assert frame.index.name == "parameter"
    assert frame.index.tolist() == ["a.weight", "b.weight"]
    a, b = frame.loc["a.weight"], frame.loc["b.weight"]
    assert (a["changed"], a["zeroed"], a["share"]) == (3, 1, 3 / 5)
    assert (a["mean_change"], a["largest_change"]) == (pytest.approx((1 + 0.5 + 4) / 3), 4)
    assert (b["changed"], b["zeroed"], b["share"], b["largest_change"]) == (0, 0, 0, 0)
    assert patch.weights_changed == frame["changed"].sum() == 3
    assert "share" not in patch.diff()
    assert patch.diff().equals(frame.drop(columns="share"))


def test_diff_of_a_real_edit_agrees_with_the_models(original, edited):
    frame = edited.patch.diff(original.state_dict())
    pairs = {n: (p, edited.model.get_parameter(n)) for n, p in original.named_parameters()}
    differing = {n: int((p != q).sum()) for n, (p, q) in pairs.items()}
    assert frame["changed"].to_dict() == {n: c for n, c in differing.items() if c}
    for name, row in frame.iterrows():
        p, q = pairs[name]
        assert row["zeroed"] == int(((q == 0) & (p != 0)).sum())
        assert row["share"] == differing[name] / p.numel()
        assert row["largest_change"] == pytest.approx(float((p - q).detach().abs().max()))


# --- several patches ------------------------------------------------------------------------------------------


def test_rebase_keeps_the_new_values_and_takes_the_old_ones_from_the_model():
    patch = perturb(one_layer(1.0, 2.0, 3.0), {"weight": torch.tensor([0, 2])})
    patch.metadata["parent"] = model_hash(one_layer(1.0, 2.0, 3.0))
    other = one_layer(7.0, 8.0, 9.0)
    rebased = patch.rebase(other)
    assert other.weight.tolist() == [[7, 8, 9]]
    assert rebased.changes["weight"].old.tolist() == [7, 9]
    assert rebased.changes["weight"].new.tolist() == [0, 0]
    assert rebased.metadata == patch.metadata | {"parent": model_hash(other)}
    assert patch.changes["weight"].old.tolist() == [1, 3]  # a new patch, not this one
    assert rebased.apply(other).weight.tolist() == [[0, 8, 0]]
    assert rebased.revert(other).weight.tolist() == [[7, 8, 9]]
    with pytest.raises(ZsuError, match="no such parameter"):
        patch.rebase(nn.ModuleDict({"a": other}))


def three():
    """(model before, model that holds three patches, the patches); the first two share weight 1, the last two 2."""
    before = one_layer(1.0, 2.0, 3.0, 4.0)
    model, applied = copy.deepcopy(before), []
    for new in ([10.0, 20, 3, 4], [10, 200, 300, 4], [10, 200, 3000, 4000]):
        patch = Patch.between(model, one_layer(*new))
        patch.metadata["parent"] = model_hash(model)
        applied.append(patch)
        patch.apply(model)
    return before, model, applied


def test_undo_each_of_three_patches():
    for number, values in enumerate(([1, 200, 3000, 4000], [10, 20, 3000, 4000], [10, 200, 300, 4])):
        before, model, applied = three()
        kept = [dict(p.changes) for p in applied]
        rest = undo(model, applied, number)
        assert model.weight.tolist() == [values]
        assert len(rest) == 2
        assert rest[:number] == applied[:number]  # those before it are the same objects
        assert [p.changes for p in applied] == kept
        for patch in reversed(rest):
            patch.revert(model)
        assert bits(model) == bits(before)
        for patch in rest:  # and each knows the model that it now follows
            patch.apply(model)
        assert model.weight.tolist() == [values]


@pytest.mark.parametrize("order", [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (2, 0, 0), (2, 1, 0)])
def test_undo_all_in_any_order_is_bit_for_bit(order):
    before, model, applied = three()
    for number in order:
        applied = undo(model, applied, number)
    assert applied == []
    assert bits(model) == bits(before)


def test_undo_that_fails_leaves_the_model_as_it_was():
    _, model, applied = three()
    model.weight.data[0, 0] = 11.0  # patch 0 no longer holds; 2 and 1 have been reverted when that is found out
    start = bits(model)
    with pytest.raises(ZsuError, match="does not hold the new values"):
        undo(model, applied, 0)
    assert bits(model) == start
    for number in (3, -1):
        with pytest.raises(ZsuError, match=f"no patch {number} of 3. count from 0"):
            undo(model, applied, number)
    assert bits(model) == start
    assert undo(model, applied, 1)
    assert model.weight.tolist() == [[11, 20, 3000, 4000]]  # those that hold can still be undone


def test_undo_of_patches_from_files(tmp_path):
    before, model, applied = three()
    for i, patch in enumerate(applied):
        patch.save(tmp_path / f"{i}")
    rest = undo(model, [Patch.load(tmp_path / f"{i}") for i in range(3)], 1)
    for i, patch in enumerate(rest):
        patch.save(tmp_path / f"rest-{i}")
    again = copy.deepcopy(before)
    for i in range(2):
        Patch.load(tmp_path / f"rest-{i}").apply(again)
    assert bits(again) == bits(model)


# --- noise ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "deviation", "kurtosis"), [("gaussian", 1.0, 3.0), ("laplace", 2**0.5, 6.0)])
def test_noise_has_the_moments_of_its_distribution(kind, deviation, kurtosis):
    """Gaussian: standard deviation = scale x that of the weights; Laplace: diversity b, deviation sqrt(2) b."""
    model = nn.Linear(1000, 400, bias=False)
    selection = {"weight": torch.arange(400_000)}
    change = perturb(model, selection, kind, scale=0.5, seed=3).changes["weight"]
    noise = (change.new.double() - change.old.double()) / (0.5 * float(model.weight.detach().double().std()))
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(noise.std()) == pytest.approx(deviation, rel=0.01)
    assert float(((noise / noise.std()) ** 4).mean()) == pytest.approx(kurtosis, rel=0.05)
    if kind == "laplace":
        assert float(noise.abs().mean()) == pytest.approx(1, rel=0.01)  # E|x| = b


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_absolute_noise_has_the_same_size_whatever_the_weights(kind):
    small, large = nn.Linear(200, 100).double(), nn.Linear(200, 100).double()
    large.weight.data *= 1e3
    noise = []
    for model in (small, large):
        patch = perturb(model, {"weight": torch.arange(20_000)}, kind, scale=0.25, absolute=True)
        noise.append(patch.changes["weight"].new - patch.changes["weight"].old)
        assert patch.metadata["absolute"] is True
        assert patch.metadata["scale"] == 0.25
    torch.testing.assert_close(*noise, atol=1e-9, rtol=0)
    assert float(noise[0].std()) == pytest.approx(0.25 * (2**0.5 if kind == "laplace" else 1), rel=0.03)


def test_noise_is_in_deviations_of_the_whole_tensor_and_differs_between_tensors():
    model = nn.Sequential(nn.Linear(50, 40), nn.Linear(50, 40))
    model[1].weight.data = model[0].weight.data.clone()
    model[0].weight.data[20:] *= 10
    index = torch.arange(1000)  # the first 20 rows, which are equal in both
    patch = perturb(model, {"0.weight": index, "1.weight": index}, "gaussian")
    noise = {name: (c.new - c.old) / model.get_parameter(name).std(correction=0) for name, c in patch.changes.items()}
    for n in noise.values():
        assert float(n.std()) == pytest.approx(1, abs=0.1)
    assert abs(float(torch.corrcoef(torch.stack([*noise.values()]))[0, 1])) < 0.15


def test_a_weight_named_twice_is_perturbed_once(original):
    patch = perturb(original, {"head.weight": torch.tensor([3, 3, 1, 3])}, "laplace")
    assert patch.changes["head.weight"].index.tolist() == [1, 3]


def test_noise_on_a_single_weight_and_in_float64():
    one = nn.Linear(1, 1)
    assert perturb(one, {"weight": torch.tensor([0])}, "gaussian").changes["weight"].new.isfinite().all()
    model = nn.Linear(30, 30).double()
    change = perturb(model, {"weight": torch.arange(900)}, "gaussian", scale=0.0).changes["weight"]
    assert torch.equal(change.new, change.old)


def test_standard_noise_draws_the_number_asked_for():
    for kind in ("gaussian", "laplace"):
        assert standard_noise(kind, 0, torch.Generator()).shape == (0,)
        assert standard_noise(kind, 7, torch.Generator()).shape == (7,)


def test_perturb_refuses_what_it_does_not_know(original):
    for selection, options, match in (
        ({"conv9.weight": [0]}, {}, "no parameter 'conv9.weight'. use one of conv1.weight"),
        ({"conv1.weight": [0]}, {"perturbation": "uniform"}, "perturbation 'uniform'. use zero, gaussian or laplace"),
        ({"conv1.weight": [0]}, {"scale": -1.0}, "scale is -1.0"),
        ({"conv1.weight": [0]}, {"scale": float("nan")}, "scale is nan"),
    ):
        with pytest.raises(ZsuError, match=match):
            perturb(original, {n: torch.tensor(i) for n, i in selection.items()}, **options)


def test_perturb_does_not_change_the_model(original):
    before = bits(original)
    patch = perturb(original, {"fc.weight": torch.arange(10)})
    assert bits(original) == before
    assert isinstance(patch.changes["fc.weight"], Change)


def test_a_tied_weight_is_patched_under_each_of_its_names():
    """In a state dict they are two tensors."""
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    edited = copy.deepcopy(model)
    edited[0].weight.data[0] = 7.0
    patch = Patch.between(model, edited)
    assert list(patch.changes) == ["0.weight", "1.weight"]
    state = patch.apply({name: t.clone() for name, t in model.state_dict().items()})
    assert all(torch.equal(state[name], t) for name, t in edited.state_dict().items())
    assert bits(patch.apply(copy.deepcopy(model))) == bits(edited)
    assert bits(patch.revert(edited)) == bits(model)


@pytest.mark.parametrize("index", [[-1], [10], [0.5], [True]])
def test_indices_that_do_not_fit_are_refused(original, index):
    with pytest.raises(ZsuError, match="head.bias: indices .* pass int64 indices from 0 to 9"):
        perturb(original, {"head.bias": torch.tensor(index)})


def test_a_patch_by_hand_whose_values_do_not_fit_writes_nothing(original):
    model = copy.deepcopy(original)
    good = Change(torch.tensor([0]), model.head.bias.detach()[:1].clone(), torch.tensor([7.0]))
    wrong = Change(torch.tensor([0]), model.fc.bias.detach()[:1].clone(), torch.tensor([7.0]).half())
    with pytest.raises(ZsuError, match=r"fc.bias: places and values of the patch do not go together"):
        Patch({"head.bias": good, "fc.bias": wrong}).apply(model)
    assert bits(model) == bits(original)


def test_a_module_with_an_extra_state_forgets(x):
    class Scaled(nn.Linear):
        def get_extra_state(self):
            return {"scale": 1}

        def set_extra_state(self, state):
            pass

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.ReLU(), Scaled(8, 3)).eval()
    target = int(model(x).argmax(1).mode().values)
    edited = forget(model, x[model(x).argmax(1) == target], target, "mask")
    restored = edited.patch.revert(edited.model)
    assert bits(dict(restored.named_parameters())) == bits(dict(model.named_parameters()))
