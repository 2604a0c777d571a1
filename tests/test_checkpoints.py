"""Checkpoints as DataParallel, torch.compile, Lightning, timm, torchvision and people write them."""

import argparse
import copy
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from zsu import ZsuError, forget, models
from zsu.cli import write_edited


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def resnet():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return models.build("resnet18", 5, 3)


def renamed(prefix, state):
    return {prefix + name: t for name, t in state.items()}


def averaged(state):
    return {name: t + 1 if t.is_floating_point() else t for name, t in state.items()}


# Where the state dict is, and what stands around its names


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "_orig_mod.module.",
                                    "model.module.", "model._orig_mod.", "backbone.", "learner.net."])  # fmt: skip
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_prefixes_are_taken_off_and_said(tmp_path, original, prefix, ending):
    state, file = renamed(prefix, original.state_dict()), tmp_path / f"m.{ending}"
    (safetensors.torch.save_file if ending == "safetensors" else torch.save)(state, file)
    with pytest.warns(UserWarning, match=rf"m.{ending}: names without .*{prefix.split('.')[0]}\.") as said:
        assert same_weights(models.load(file), original)
    assert len(said) == 1


def test_wrappers_inside_names(tmp_path, resnet):
    state = {name.replace("layer1.", "layer1._orig_mod.").replace("fc.", "fc.module."): t
             for name, t in resnet.state_dict().items()}  # fmt: skip
    torch.save(state, tmp_path / "m.pt")
    with pytest.warns(UserWarning, match=r"names without '_orig_mod.', 'module.'"):
        assert same_weights(models.load(tmp_path / "m.pt", "resnet18"), resnet)


OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(3, 3)}, "fc.weight": {"exp_avg": torch.zeros(3, 3)}}}
BESIDE = {"epoch": 3, "acc": 95.1, "optimizer": OPTIMIZER, "optimizer_states": [OPTIMIZER], "lr_schedulers": [{"a": 1}],
          "hyper_parameters": {"lr": 0.1}, "callbacks": {"best": {"score": torch.tensor(0.9)}}}  # fmt: skip


@pytest.mark.parametrize("wrap", [
    lambda s: {"net": s}, lambda s: {"model_state_dict": s}, lambda s: {"model_state": s}, lambda s: {"state_dict": s},
    lambda s: {"state_dict_ema": s}, lambda s: {"my_own_name": s}, lambda s: {"checkpoint": {"model": s}},
    lambda s: {"state": {"state_dict": s}},
])  # fmt: skip
def test_the_state_dict_is_found_beside_other_things(tmp_path, original, wrap):
    torch.save(BESIDE | wrap(original.state_dict()), tmp_path / "m.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is lost
        assert same_weights(models.load(tmp_path / "m.pt"), original)


@pytest.mark.parametrize(
    ("plain", "average"), [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("net", "ema")]
)
def test_the_model_is_taken_and_not_its_moving_average_which_is_said(tmp_path, original, plain, average):
    state = original.state_dict()
    torch.save({average: {"n_averaged": torch.tensor(4), **renamed("module.", averaged(state))}, plain: state,
                "args": argparse.Namespace(lr=0.1)}, tmp_path / "m.pt")  # fmt: skip
    with pytest.warns(UserWarning, match=f"'{plain}' was taken, not '{average}'"):
        assert same_weights(models.load(tmp_path / "m.pt"), original)


def test_a_moving_average_alone(tmp_path, original):
    average = torch.optim.swa_utils.AveragedModel(original)
    torch.save({"model_ema": average.state_dict()}, tmp_path / "m.pt")
    with pytest.warns(UserWarning, match=r"names without 'module.'; left out n_averaged"):
        assert same_weights(models.load(tmp_path / "m.pt"), original)


def test_a_moving_average_among_the_names(tmp_path, original):
    state = original.state_dict()
    torch.save({"state_dict": renamed("ema.", averaged(state)) | renamed("model.", state)}, tmp_path / "m.pt")
    with pytest.warns(UserWarning, match=r"names without 'model.'; left out ema.conv1.weight, .* and 7 more"):
        assert same_weights(models.load(tmp_path / "m.pt"), original)


def test_several_state_dicts_of_unusual_names_are_refused_by_name(tmp_path, original):
    torch.save({"first": original.state_dict(), "second": original.state_dict()}, tmp_path / "m.pt")
    with pytest.raises(ZsuError, match=r"several state dicts: first, second. save the one that you mean"):
        models.load(tmp_path / "m.pt")


def test_numbers_of_numpy_options_and_an_epoch_beside_the_weights(tmp_path, original):
    content = {"model": original.state_dict(), "acc": np.float64(0.9), "best": np.float32(1), "epoch": np.int64(3)}
    torch.save(content | {"args": argparse.Namespace(lr=0.1, arch="x")}, tmp_path / "m.pt")
    assert same_weights(models.load(tmp_path / "m.pt"), original)
    torch.save(dict(original.state_dict()) | {"epoch": 3}, tmp_path / "m.pt")
    with pytest.warns(UserWarning, match="left out epoch"):
        assert same_weights(models.load(tmp_path / "m.pt"), original)


def test_pickled_code_is_refused_by_its_name(tmp_path, original):
    torch.save({"net": original.state_dict(), "model": original}, tmp_path / "m.pt")
    with pytest.raises(ZsuError, match=r"pickled code \(zsu.models.SmallCNN\).*trusted=True"):
        models.load(tmp_path / "m.pt")
    torch.jit.trace(original, torch.rand(1, 1, 28, 28)).save(tmp_path / "s.pt")
    with pytest.raises(ZsuError, match=r"TorchScript program.*ask for a state dict"):
        models.load(tmp_path / "s.pt")


# What is there, and what is not


def test_batch_norms_of_old_files(tmp_path, resnet):
    state = {name: t for name, t in resnet.state_dict().items() if "num_batches_tracked" not in name}
    torch.save(state, tmp_path / "m.pt")
    with pytest.warns(UserWarning, match="num_batches_tracked, which old files lack, is 0"):
        assert same_weights(models.load(tmp_path / "m.pt", "resnet18"), resnet)


def test_other_heads_are_left_and_said(tmp_path, resnet):
    extra = {"fc_aux.weight": torch.zeros(9, 512), "fc_aux.bias": torch.zeros(9)}
    for prefix in ("", "model."):
        torch.save(
            renamed(prefix, resnet.state_dict() | extra) | {"criterion.weight": torch.ones(5)}, tmp_path / "m.pt"
        )
        with pytest.warns(UserWarning, match=rf"left out {prefix}fc_aux.weight, {prefix}fc_aux.bias, criterion.weight"):
            assert same_weights(models.load(tmp_path / "m.pt", "resnet18"), resnet)


def test_a_head_behind_a_dropout_is_the_head_which_is_said(tmp_path, resnet):
    fc = {f"fc.1.{name}": t for name, t in resnet.fc.state_dict().items()}
    state = {name: t for name, t in resnet.state_dict().items() if not name.startswith("fc.")} | fc
    torch.save(renamed("module.", state), tmp_path / "m.pt")
    with pytest.warns(UserWarning, match=r"module.fc.1.weight taken for fc.weight; module.fc.1.bias taken for fc.bias"):
        assert same_weights(models.load(tmp_path / "m.pt", "resnet18"), resnet)


def test_a_head_of_two_layers_is_not_taken_for_one(tmp_path, resnet):
    fc = {"fc.0.weight": torch.zeros(512, 512), "fc.0.bias": torch.zeros(512), "fc.2.weight": resnet.fc.weight,
          "fc.2.bias": resnet.fc.bias}  # fmt: skip
    torch.save({n: t for n, t in resnet.state_dict().items() if not n.startswith("fc.")} | fc, tmp_path / "m.pt")
    with pytest.raises(ZsuError, match="fc.weight: absent in the file"):
        models.load(tmp_path / "m.pt", "resnet18")


def test_a_first_convolution_of_another_size_is_named_alone(tmp_path, resnet):
    torch.save(resnet.state_dict() | {"conv1.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "m.pt")
    with pytest.raises(ZsuError, match=r"1 parameters differ, first conv1.weight: \(64, 3, 3, 3\) in the file"):
        models.load(tmp_path / "m.pt", "resnet18")


@pytest.mark.parametrize("compute", [
    lambda fc: nn.utils.prune.l1_unstructured(fc, "weight", 0.5), nn.utils.weight_norm,
    nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal, nn.utils.spectral_norm,
    lambda fc: fc.register_parameter("lora_A", nn.Parameter(torch.zeros(2, 512))),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_weights_that_are_stored_as_their_parts_are_to_be_baked_in(tmp_path, resnet, compute):
    model = copy.deepcopy(resnet)
    compute(model.fc)
    torch.save(model.state_dict(), tmp_path / "m.pt")
    with pytest.raises(ZsuError, match="not one of resnet18: .*bake in the weights that are computed"):
        models.load(tmp_path / "m.pt", "resnet18")


def test_a_deeper_model_is_not_taken_for_a_shallower_one(tmp_path):
    deep = models.build("resnet34", 5, 3).state_dict()
    torch.save(renamed("module.", deep), tmp_path / "m.pt")
    with pytest.raises(ZsuError, match=r"not one of resnet18: .* layer1.2.conv1.weight: .*absent in the model"):
        models.load(tmp_path / "m.pt", "resnet18")


def test_missing_weights_are_named(tmp_path, resnet):
    state = resnet.state_dict()
    del state["layer2.0.conv1.weight"]
    torch.save(renamed("module.", state), tmp_path / "m.pt")
    with pytest.raises(ZsuError, match=r"1 parameters differ, first layer2.0.conv1.weight: absent in the file"):
        models.load(tmp_path / "m.pt", "resnet18")


def test_integers_are_no_weights(tmp_path, original):
    torch.save(original.state_dict() | {"fc.bias": torch.zeros(32, dtype=torch.int8)}, tmp_path / "m.pt")
    with pytest.raises(ZsuError, match=r"fc.bias: \(32,\) torch.int8 in the file, \(32,\) in the model"):
        models.load(tmp_path / "m.pt")


HEADS = ["squeezenet1_1", "mobilenet_v3_small", "mnasnet0_5", "shufflenet_v2_x0_5"]
LARGE = ["squeezenet1_0", "densenet121", "mobilenet_v2", "efficientnet_b0", "regnet_y_400mf", "convnext_tiny", "swin_t",
         "googlenet", "inception_v3", "vit_b_16", "maxvit_t", "alexnet", "resnext50_32x4d"]  # fmt: skip


@pytest.mark.parametrize("arch", [*HEADS, *(pytest.param(arch, marks=pytest.mark.large) for arch in LARGE)])
def test_the_number_of_classes_is_read_wherever_the_head_is(tmp_path, arch):
    model = models.build(arch, 3, 3)
    models.save(model, tmp_path / "m.safetensors", arch=arch)  # by name, so that the head is not the last
    torch.save(model.state_dict(), tmp_path / "m.pt")
    for file in ("m.safetensors", "m.pt"):
        assert same_weights(models.load(tmp_path / file, arch), model)
        assert same_weights(models.load(tmp_path / file, arch, classes=3), model)
        with pytest.raises(ZsuError, match="not one of"):
            models.load(tmp_path / file, arch, classes=4)


@pytest.mark.large
@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_without_the_heads_that_help_to_train(tmp_path, arch):
    model = models.build(arch, 3, 3)
    state = {name: t for name, t in model.state_dict().items() if "aux" not in name.casefold()}
    torch.save(state, tmp_path / "m.pt")
    found = models.load(tmp_path / "m.pt", arch)
    assert found.state_dict().keys() == state.keys()
    x = torch.rand(1, 3, 96, 96)
    assert torch.equal(found(x), model.eval()(x))


@pytest.mark.large
def test_the_first_names_of_densenet(tmp_path):
    model = models.build("densenet121", 3, 3)
    state = {n.replace(".norm1", ".norm.1").replace(".conv2", ".conv.2"): t for n, t in model.state_dict().items()}
    torch.save(state, tmp_path / "m.pt")
    assert same_weights(models.load(tmp_path / "m.pt", "densenet121"), model)


# Types of numbers, and patches


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["mask", "paths"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_patch_fits_the_file_and_comes_out_again_bit_for_bit(tmp_path, original, x, dtype, method, prefix):
    state = {prefix + name: t.to(dtype) for name, t in original.state_dict().items()}
    file, edited, back = (tmp_path / f"{name}.safetensors" for name in ("file", "edited", "back"))
    safetensors.torch.save_file(state, file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = models.load(file)
        wide = next(model.parameters()).dtype
        assert wide == (torch.float64 if dtype == torch.float64 else torch.float32)
        forgotten = forget(model, x.to(wide), 1, method)
        forgotten.patch.save(tmp_path / "patch")
        write_edited(tmp_path / "patch", edited, file, False, "apply")
        assert same_weights(models.load(edited), forgotten.model)
        write_edited(tmp_path / "patch", back, edited, False, "revert")
    found = safetensors.torch.load_file(back)
    assert found.keys() == state.keys()
    assert all(found[name].dtype == dtype and torch.equal(found[name], state[name]) for name in state)
    assert models.metadata(back) == {}


def test_weights_that_do_not_fit_half_precision_are_said(tmp_path, original, x):
    file = tmp_path / "file.safetensors"
    safetensors.torch.save_file({name: t.half() for name, t in original.state_dict().items()}, file)
    with pytest.warns(UserWarning, match="float16 as float32"):
        model = models.load(file)
    forget(model, x, 1, "paths", perturbation="gaussian", k=5).patch.save(tmp_path / "patch")
    with pytest.warns(UserWarning, match=r"in more digits than .*weight does not fit float16"):
        write_edited(tmp_path / "patch", tmp_path / "edited.safetensors", file, False, "apply")
    found = safetensors.torch.load_file(tmp_path / "edited.safetensors")
    assert {t.dtype for t in found.values()} == {torch.float16, torch.float32}


def test_a_patch_of_another_model_is_refused_in_half_precision_too(tmp_path, original, x):
    forget(models.bundled("original", 1), x, 1, "mask").patch.save(tmp_path / "patch")
    torch.save({name: t.half() for name, t in original.state_dict().items()}, tmp_path / "file.pt")
    with pytest.raises(ZsuError, match="the patch was made for model"):
        write_edited(tmp_path / "patch", tmp_path / "edited.safetensors", tmp_path / "file.pt", False, "apply")
    assert not (tmp_path / "edited.safetensors").exists()


def test_a_patch_fits_an_old_file_with_another_head(tmp_path, resnet):
    state = {name: t for name, t in resnet.state_dict().items() if "num_batches_tracked" not in name}
    state = renamed("module.", {"fc_aux.weight": torch.zeros(9, 512)} | state)
    torch.save(state, tmp_path / "file.pt")
    with pytest.warns(UserWarning, match="left out"):
        model = models.load(tmp_path / "file.pt", "resnet18")
    forgotten = forget(model, torch.rand(5, 3, 32, 32), 1, "mask")
    forgotten.patch.save(tmp_path / "patch")
    edited = tmp_path / "edited.safetensors"
    write_edited(tmp_path / "patch", edited, tmp_path / "file.pt", False, "apply", "resnet18")
    found = safetensors.torch.load_file(edited)
    assert found.keys() == state.keys()
    assert torch.equal(found["module.fc.weight"], forgotten.model.fc.weight)


def test_what_a_patch_needs_to_know_of_a_file_that_holds_more_is_said(tmp_path, resnet):
    torch.save(renamed("net.", resnet.state_dict()) | {"fc_aux.weight": torch.zeros(9, 512)}, tmp_path / "file.pt")
    forget(copy.deepcopy(resnet).eval(), torch.rand(5, 3, 32, 32), 1, "mask").patch.save(tmp_path / "patch")
    files = tmp_path / "patch", tmp_path / "edited.safetensors", tmp_path / "file.pt"
    with pytest.raises(ZsuError, match="where the file holds more than the model, give --arch"):
        write_edited(*files, False, "apply")
    write_edited(*files, False, "apply", "resnet18")
    assert files[1].exists()
