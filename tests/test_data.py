"""Data sets, samples of a class, batches, and the rebuilding of the bundled file."""

import gzip
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset
from torchvision import datasets, transforms

from zsu import ZsuError, data, files

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="module")
def mini():
    return data.load()


def write_idx(path: Path, array: np.ndarray) -> None:
    """An IDX file as Zalando and LeCun publish them."""
    raw = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def write_idx_folder(folder: Path, ending: str = ".gz", per_class: int = 5) -> dict[str, np.ndarray]:
    """Four IDX files with `per_class` images of each class; every image is filled with its own number."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for part in ("train", "t10k"):
        labels = np.tile(np.arange(10, dtype=np.uint8), per_class)
        images = np.repeat(np.arange(len(labels), dtype=np.uint8), 28 * 28).reshape(-1, 28, 28)
        write_idx(folder / f"{part}-images-idx3-ubyte{ending}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{ending}", labels)
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = images, labels
    return arrays


def write_image(path: Path, value: int, size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(path)


def write_image_folder(folder: Path, names=("cat", "dog"), parts=("train", "test")) -> Path:
    for part in parts:
        for value, name in enumerate(names):
            for i in range(3):
                write_image(folder / part / name / f"{i}.png", 10 * value + i)
    return folder


# The bundled data


def test_mini_is_balanced_and_matches_its_checksum(mini):
    assert data.MINI_FILE.stat().st_size <= 7_000_000
    for part, per_class in zip(mini, (1200, 200), strict=True):
        assert part.data.shape == (10 * per_class, 1, 28, 28)
        assert part.data.dtype == torch.uint8
        assert torch.bincount(part.targets).tolist() == [per_class] * 10
        assert part.classes == datasets.FashionMNIST.classes
    arrays = {}
    for name, part in zip(("train", "test"), mini, strict=True):
        arrays[f"{name}_images"] = part.data[:, 0].numpy()
        arrays[f"{name}_labels"] = part.targets.numpy().astype(np.uint8)
    assert data.checksum(arrays) == data.MINI_SHA256


def test_checksum_sees_every_array(mini):
    arrays = {name: np.zeros(2, np.uint8) for name in data.MINI_ARRAYS}
    sums = {data.checksum(arrays)}
    for name in data.MINI_ARRAYS:
        sums.add(data.checksum({**arrays, name: np.ones(2, np.uint8)}))
    assert len(sums) == 5


def test_train_and_test_share_no_image(mini):
    train = {image.numpy().tobytes() for image in mini.train.data}
    assert len(train) == 12000
    assert not any(image.numpy().tobytes() in train for image in mini.test.data)


def test_items_are_what_torchvisions_totensor_gives(mini):
    image, label = mini.test[7]
    assert image.dtype == torch.float32
    assert type(label) is int
    pil = Image.fromarray(mini.test.data[7, 0].numpy())
    assert torch.equal(image, transforms.ToTensor()(pil))
    resized, same_label = data.load(transform=transforms.Compose([transforms.Resize(16), transforms.ToTensor()])).test[
        7
    ]
    assert resized.shape == (1, 16, 16)
    assert same_label == label


@pytest.mark.parametrize("content", [None, b"", b"PK\3\4 cut short", b"no archive"])
def test_damaged_bundled_file_is_one_error(tmp_path, monkeypatch, content):
    file = tmp_path / "fashion-mini.npz"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr(data, "MINI_FILE", file)
    with pytest.raises(ZsuError, match="fashion-mini.npz.*reinstall"):
        data.load()


def test_changed_bundled_file_is_noticed(tmp_path, monkeypatch):
    with np.load(data.MINI_FILE) as file:
        arrays = dict(file)
    arrays["test_labels"] = np.roll(arrays["test_labels"], 1)
    np.savez(tmp_path / "fashion-mini.npz", **arrays)
    monkeypatch.setattr(data, "MINI_FILE", tmp_path / "fashion-mini.npz")
    with pytest.raises(ZsuError, match="checksum"):
        data.load()


# Rebuilding it


@pytest.mark.parametrize("place", ["", "FashionMNIST/raw"])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_build_selects_a_balanced_seeded_part_in_file_order(assets, tmp_path, ending, place):
    source = write_idx_folder(tmp_path / place, ending)
    built = assets.build_data(tmp_path, {"train": 3, "test": 2})
    assert sorted(built) == sorted(data.MINI_ARRAYS)
    for part, prefix, n in (("train", "train", 3), ("test", "t10k", 2)):
        numbers = built[f"{part}_images"][:, 0, 0]  # each image carries its number
        assert np.all(np.diff(numbers.astype(int)) > 0)
        assert np.array_equal(built[f"{part}_images"], source[f"{prefix}_images"][numbers])
        assert np.array_equal(built[f"{part}_labels"], source[f"{prefix}_labels"][numbers])
        assert np.bincount(built[f"{part}_labels"]).tolist() == [n] * 10
    assert not np.array_equal(built["train_labels"], np.tile(np.arange(10), 3))  # not simply the first
    again = assets.build_data(tmp_path, {"train": 3, "test": 2})
    assert data.checksum(built) == data.checksum(again)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_build_gives_the_bundled_arrays(assets):
    assert data.checksum(assets.build_data(DEBIAN)) == data.MINI_SHA256


def test_build_says_what_is_missing(assets, tmp_path):
    with pytest.raises(ZsuError, match=r"there is no train-images-idx3-ubyte\(.gz\).*dataset-fashion-mnist"):
        assets.build_data(tmp_path)


def test_command_rebuilds_the_file_and_refuses_other_data(assets, tmp_path, monkeypatch):
    write_idx_folder(tmp_path / "source")
    monkeypatch.setitem(assets.PER_CLASS, "train", 3)
    monkeypatch.setitem(assets.PER_CLASS, "test", 2)
    monkeypatch.setattr(data, "MINI_FILE", tmp_path / "mini.npz")
    arrays = assets.build_data(tmp_path / "source")
    with pytest.raises(ZsuError, match="another checksum"):
        assets.main(["data", "--root", str(tmp_path / "source")])
    assert not (tmp_path / "mini.npz").exists()
    monkeypatch.setattr(data, "MINI_SHA256", data.checksum(arrays))
    assets.main(["data", "--root", str(tmp_path / "source")])
    splits = data.load("fashion-mini")
    assert np.array_equal(splits.train.data[:, 0].numpy(), arrays["train_images"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mini.npz", "source"]


def test_command_line_says_what_is_missing(assets, tmp_path):
    command = [sys.executable, assets.__file__, "data", "--root", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 1
    assert re.fullmatch(r"error: .*there is no train-images-idx3-ubyte\(.gz\).*\n", found.stderr)


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\x08", b"\0\0\x08\3" + bytes(12) + b"1", b"no IDX", b"\0\0\x0d\1" + bytes(8)]
)
def test_damaged_idx_file_is_one_error(assets, tmp_path, content):
    write_idx_folder(tmp_path, "")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ZsuError, match="train-images-idx3-ubyte: this is not a complete IDX file"):
        assets.build_data(tmp_path, {"train": 1, "test": 1})


def test_truncated_gzip_is_one_error(assets, tmp_path):
    write_idx_folder(tmp_path)
    file = tmp_path / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ZsuError, match="t10k-labels"):
        assets.build_data(tmp_path, {"train": 1, "test": 1})


def test_too_few_images_of_a_class_are_named(assets, tmp_path):
    write_idx_folder(tmp_path)
    with pytest.raises(ZsuError, match="class 0 has 5 images, need 6"):
        assets.build_data(tmp_path, {"train": 6, "test": 1})


# torchvision's data sets and folders


def test_torchvision_files_are_used_as_they_are(tmp_path):
    source = write_idx_folder(tmp_path / "FashionMNIST" / "raw", "")
    splits = data.load("Fashion-MNIST", tmp_path, download=False)
    assert isinstance(splits.train, data.Images)
    assert np.array_equal(splits.train.data[:, 0].numpy(), source["train_images"])
    assert np.array_equal(splits.test.targets.numpy(), source["t10k_labels"])
    assert splits.test.classes == data.FASHION_CLASSES
    official = datasets.FashionMNIST(tmp_path, train=False, transform=transforms.ToTensor())
    assert torch.equal(splits.test[3][0], official[3][0])


def test_colour_images_are_turned_to_channels_first():
    image = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)  # torchvision's CIFAR layout
    assert torch.equal(data.channels_first(image)[1] / 255, transforms.ToTensor()(image[1]))


@pytest.mark.parametrize("name", ["fashion-mnist", "mnist", "cifar10", "CIFAR100"])
def test_missing_files_are_one_error(tmp_path, name):
    with pytest.raises(ZsuError, match=f"{name.lower()} is not complete.*download=False.*fashion-mini"):
        data.load(name, tmp_path, download=False)


def test_impossible_download_is_one_error(tmp_path):
    (tmp_path / "file").write_text("where the folder should be")
    with pytest.raises(ZsuError, match="the download failed"):
        data.load("mnist", tmp_path / "file")


@pytest.mark.parametrize("name", ["imagenet", "", None, 3])
def test_unknown_name_lists_the_known(name):
    with pytest.raises(ZsuError, match="fashion-mini, fashion-mnist, mnist, cifar10, cifar100"):
        data.load(name)


def test_name_in_capitals(mini):
    assert torch.equal(data.load("Fashion-Mini").test.data, mini.test.data)


@pytest.mark.parametrize("test_part", ["test", "val"])
def test_folder(tmp_path, test_part):
    splits = data.load(write_image_folder(tmp_path, parts=("train", test_part)))
    assert splits.test.classes == ["cat", "dog"]
    assert data.targets(splits.train).tolist() == [0, 0, 0, 1, 1, 1]
    x, y = next(data.batches(splits.test))
    assert x.shape == (6, 3, 8, 8)
    assert y.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal((x[:, 0, 0, 0] * 255).round().int(), torch.tensor([0, 1, 2, 10, 11, 12], dtype=torch.int32))
    assert data.samples(splits.test, "dog", n=3).min() > 0.03


@pytest.mark.parametrize("parts", [(), ("train",), ("test",)])
def test_folder_without_a_part(tmp_path, parts):
    write_image_folder(tmp_path, parts=parts)
    with pytest.raises(ZsuError, match="train/CLASS"):
        data.load(tmp_path)


def test_folder_with_an_empty_class(tmp_path):
    (write_image_folder(tmp_path) / "train" / "eel").mkdir()
    with pytest.raises(ZsuError, match="eel"):
        data.load(tmp_path)


def test_folder_with_one_class(tmp_path):
    with pytest.raises(ZsuError, match="only one class, 'cat'"):
        data.load(write_image_folder(tmp_path, ["cat"]))


def test_folder_with_differing_classes(tmp_path):
    write_image(write_image_folder(tmp_path) / "test" / "eel" / "0.png", 1)
    with pytest.raises(ZsuError, match="differ.*eel"):
        data.load(tmp_path)


def test_folder_with_a_damaged_image(tmp_path):
    (write_image_folder(tmp_path) / "test" / "dog" / "1.png").write_bytes(b"no image")
    with pytest.raises(ZsuError, match="1.png: cannot read"):
        list(data.batches(data.load(tmp_path).test))


def test_folder_with_images_of_several_sizes(tmp_path):
    write_image(write_image_folder(tmp_path) / "test" / "dog" / "1.png", 5, size=9)
    with pytest.raises(ZsuError, match=r"\(3, 8, 8\) and \(3, 9, 9\).*Resize"):
        list(data.batches(data.load(tmp_path).test))
    resize = transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()])
    x, _ = next(data.batches(data.load(tmp_path, transform=resize).test))
    assert x.shape == (6, 3, 8, 8)


def test_images_that_are_no_tensors(tmp_path):
    folder = datasets.ImageFolder(write_image_folder(tmp_path) / "test")
    with pytest.raises(ZsuError, match="Image, not a float tensor.*ToTensor"):
        data.samples(folder, "cat", n=1)


# Classes and labels


@pytest.mark.parametrize("cls", [1, np.int64(1), "Trouser", "trouser", " TROUSER ", "1"])
def test_class_index(mini, cls):
    for dataset in (mini.test, Subset(mini.test, [0])):
        index = data.class_index(dataset, cls)
        assert index == 1
        assert type(index) is int


@pytest.mark.parametrize("cls", [-1, 10, True, False, 1.0, None, "-1", "10", "trousers", "", b"1"])
def test_unknown_class_lists_the_classes(mini, cls):
    with pytest.raises(ZsuError, match="0 T-shirt/top, 1 Trouser.*9 Ankle boot"):
        data.class_index(mini.test, cls)


def test_digits_are_names_where_names_are_digits(tmp_path):
    test = data.load(write_image_folder(tmp_path, ["3", "7", "42"])).test  # sorted as text: 3, 42, 7
    assert [data.class_index(test, name) for name in ("3", "7", "42", 2)] == [0, 2, 1, 2]
    with pytest.raises(ZsuError, match="0 3, 1 42, 2 7"):
        data.class_index(test, "1")


@pytest.mark.parametrize("labels", [[0, 1, 2], [-1, 0, 1], [3, 7, 42]])
def test_labels_out_of_range(labels):
    with pytest.raises(ZsuError, match=r"not in 0\.\.1.*unique"):
        data.Images(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.tensor(labels), ["a", "b"])


@pytest.mark.parametrize("labels", [[0.0, 1.0], [[0], [1]], None])
def test_labels_that_are_no_integers(labels):
    with pytest.raises(ZsuError, match="one integer for each image"):
        data.Images(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), labels, ["a", "b"])


def test_labels_that_are_names_become_indices():
    images = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    assert data.Images(images, ["b", "a", "b"], ["a", "b"]).targets.tolist() == [1, 0, 1]
    with pytest.raises(ZsuError, match="label 'c' is no class"):
        data.Images(images, ["b", "a", "c"], ["a", "b"])


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 4, 4), torch.uint8), ((2, 1, 4, 4), torch.float32), ((3, 1, 4, 4), torch.uint8)]
)
def test_images_of_the_wrong_kind(shape, dtype):
    with pytest.raises(ZsuError, match="Images: "):
        data.Images(torch.zeros(shape, dtype=dtype), torch.tensor([0, 1]), ["a", "b"])


class Bare(Dataset):
    """A data set without torchvision's attributes."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        return torch.full((1, 2, 2), float(i)), i % 2


def test_dataset_without_the_attributes():
    bare = Bare()
    with pytest.raises(ZsuError, match="a Bare has no .targets"):
        data.targets(bare)
    with pytest.raises(ZsuError, match="a Bare has no .classes"):
        data.samples(Subset(bare, [0]), 0, 1)
    bare.targets = [0, 1, 0, 1]
    with pytest.raises(ZsuError, match="a Bare has no .classes"):
        data.targets(bare)
    bare.classes = ["even", "odd"]
    assert data.samples(bare, "odd", n=2).sum() == 4 * (1 + 3)


class Pairs(Dataset):
    """Thirty images, (image, label) as `item` makes them; `.targets` counts through the ten classes again and again."""

    def __init__(self, item=lambda x, y: (x, y), targets=tuple(i % 10 for i in range(30)), classes=tuple("abcdefghij")):
        self.item, self.targets, self.classes = item, targets, classes
        self.x = torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return 30

    def __getitem__(self, i):
        if i >= 30:
            raise IndexError("list index out of range")
        return self.item(self.x[i], int(i) % 10)


class Pair(NamedTuple):
    image: torch.Tensor
    label: int


class Stream(IterableDataset):
    targets, classes = list(range(10)), list("abcdefghij")

    def __iter__(self):
        return iter(Pairs())


class Unsized(Dataset):
    targets, classes = [0], ["a"]

    def __getitem__(self, i):
        return torch.zeros(1, 4, 4), 0


def consume(dataset):
    """All that data sets are read for: targets, batches, samples, and the rest."""
    x, y = (torch.cat(part) for part in zip(*data.batches(dataset, 7), strict=True))
    assert torch.equal(y, data.targets(dataset))
    assert data.samples(dataset, 1, 2).shape == (2, 1, 4, 4)
    assert len(data.without_samples(dataset, 1, 2)) == len(dataset) - 2
    assert x.dtype == data.first_image(dataset).dtype == torch.float32
    return x, y


@pytest.mark.parametrize(
    "item",
    [
        lambda x, y: Pair(x, y), lambda x, y: [x, y], lambda x, y: (x, torch.tensor(y)), lambda x, y: (x, np.uint16(y)),
        lambda x, y: (x, np.array(y)), lambda x, y: (x, "abcdefghij"[y]),
        lambda x, y: (x.clone().requires_grad_(), y),
    ],
)  # fmt: skip
@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(d, range(-30, 0)), lambda d: ConcatDataset([d])])
def test_pairs_of_any_kind_are_read(item, wrap):
    x, y = consume(wrap(Pairs(item)))
    assert torch.equal(x, Pairs().x)
    assert y.tolist() == [i % 10 for i in range(30)]


def test_half_precision_is_read_as_float32():
    x, _ = consume(Pairs(lambda x, y: (x.bfloat16(), y)))
    assert torch.equal(x, Pairs().x.bfloat16().float())


@pytest.mark.parametrize(
    ("item", "match"),
    [
        (lambda x, y: (x, y, 7), "item . is a tuple of 3, not"), (lambda x, y: x, "is a Tensor, not"),
        (lambda x, y: torch.stack([x, x]), "is a Tensor, not"), (lambda x, y: None, "is a NoneType, not"),
        (lambda x, y: {"image": x, "label": y}, "is a dict, not"), (lambda x, y: "ab", "is a str, not"),
        (lambda x, y: (x, None), "the labels are no numbers"), (lambda x, y: (x, {}), "the labels are no numbers"),
        (lambda x, y: (x, torch.eye(10)[y]), "one integer for each image"),
        (lambda x, y: (x, y + 0.7), "one integer for each image"), (lambda x, y: (x, float(y)), "one integer"),
        (lambda x, y: (x, -1), r"labels \[-1\] are not in 0..9"), (lambda x, y: (x, "q"), "label 'q' is no class"),
        (lambda x, y: (x, (y + 1) % 10), "item . has label 2, .targets has 1|item 0 has label 1, .targets has 0"),
        (lambda x, y: (x, bool(y)), "item . has label 1, .targets has 2"),
        (lambda x, y: (x.numpy(), y), "a ndarray, not a float tensor"),
        (lambda x, y: ((255 * x).byte(), y), "tensor of torch.uint8, not a float tensor.*ConvertImageDtype"),
        (lambda x, y: 1 / 0, r"item . cannot be read \(ZeroDivisionError: division by zero\)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(d, range(30)), lambda d: ConcatDataset([d, d])])
def test_items_that_are_no_pairs_with_the_label_of_targets(item, match, wrap):
    with pytest.raises(ZsuError, match=match):
        list(data.batches(wrap(Pairs(item))))
    with pytest.raises(ZsuError):
        data.samples(wrap(Pairs(lambda x, y: item(x, y) if y == 2 else (x, y))), 2, 1)


@pytest.mark.parametrize("make", [Stream, Unsized, lambda: DataLoader(Pairs()), lambda: Subset(Stream(), [0]), object])
def test_what_has_no_items_by_number(make):
    for use in (data.targets, data.classes, lambda d: next(data.batches(d)), lambda d: data.without_samples(d, 0, 1)):
        with pytest.raises(ZsuError, match=r"no items that can be read by their number.*len\(\) and \[i\]"):
            use(make())


@pytest.mark.parametrize(
    ("indices", "match"),
    [
        ([0, 1, 30], "indices 0 to 30 of a data set of 30"), ([-31], "indices -31 to -31"),
        ([True] * 30, r"dtype torch.bool.*of a mask, the places"), (torch.arange(30) < 20, "dtype torch.bool"),
        (np.arange(30) < 20, "dtype torch.bool"), ([0.0, 1.0], "dtype torch.float32"), ([[0, 1]], r"shape \(1, 2\)"),
        (["a"], "are no numbers"), (None, "are no numbers"),
    ],
)  # fmt: skip
def test_indices_of_a_subset_that_are_none(mini, indices, match):
    for dataset in (Pairs(), Subset(mini.test, range(30))):
        with pytest.raises(ZsuError, match=match):
            list(data.batches(Subset(dataset, indices)))


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda i: pd.Index(i)])
def test_indices_of_a_subset_of_any_kind(mini, kind):
    nested = Subset(Subset(mini.test, kind([5, 8, 11, 14])), kind([-1, 0]))
    x, y = next(data.batches(nested))
    assert torch.equal(x, mini.test.data[[14, 5]] / 255)
    assert torch.equal(y, mini.test.targets[[14, 5]])


@pytest.mark.parametrize(
    "kind",
    [
        list, np.array, torch.tensor, pd.Series, lambda y: np.array(y, np.uint16), lambda y: torch.tensor(y).int(),
        lambda y: [torch.tensor(i) for i in y], lambda y: pd.Series(y, index=range(5, 35)),
        lambda y: ["abcdefghij"[i] for i in y], lambda y: pd.Series(["abcdefghij"[i] for i in y], index=range(5, 35)),
    ],
)  # fmt: skip
def test_targets_of_any_kind(kind):
    assert consume(Pairs(targets=kind([i % 10 for i in range(30)])))[1].tolist() == [i % 10 for i in range(30)]


def test_targets_that_are_not_those_of_the_items():
    with pytest.raises(ZsuError, match="30 items, but 1 labels in .targets"):
        data.targets(Pairs(targets=[0]))
    with pytest.raises(ZsuError, match="item 9 has label 9, .targets has 0"):
        list(data.batches(Pairs(targets=[i % 9 for i in range(30)])))


@pytest.mark.parametrize("names", [None, "abcdefghij", 10])
def test_classes_that_are_no_names(names):
    with pytest.raises(ZsuError, match="a Pairs has no .classes"):
        data.targets(Pairs(classes=names))


def test_parts_with_other_classes_are_not_joined():
    with pytest.raises(ZsuError, match="the parts have different classes"):
        data.targets(ConcatDataset([Pairs(), Pairs(classes=list("abcdefghik"))]))
    assert data.targets(ConcatDataset([Pairs(), Subset(Pairs(), [3])])).tolist() == [*(i % 10 for i in range(30)), 3]


def test_items_of_a_class_made_of_ours_are_not_passed_by(mini):
    class Noisy(data.Images):
        def __getitem__(self, i):
            return super().__getitem__(i)[0], 3

    class Relabelled(Subset):
        def __getitem__(self, i):
            return super().__getitem__(i)[0], 3

        def __getitems__(self, indices):
            return [self[i] for i in indices]

    named = Subset(mini.test, range(20))
    named.targets = [3] * 20
    for dataset in (
        Noisy(mini.test.data, mini.test.targets, mini.test.classes),
        Relabelled(mini.test, range(20)),
        named,
    ):
        with pytest.raises(ZsuError, match="item . has label"):
            list(data.batches(dataset))


def test_labels_of_images_may_be_changed():
    images = data.Images(torch.arange(2 * 16).reshape(2, 1, 4, 4).byte(), [0, 1], ["a", "b"])
    images.targets = [1, 1]
    for dataset in (images, Subset(images, [0, 1])):
        assert [y.tolist() for _, y in data.batches(dataset)] == [[1, 1]]
        assert len(data.samples(dataset, "b", 2)) == 2


# Names


@pytest.mark.parametrize(
    ("names", "cls", "expected"),
    [
        (["cafe\u0301", "tea"], "caf\u00e9", 0), (["caf\u00e9", "tea"], "CAFE\u0301", 0), ([" cat", "dog"], " cat", 0),
        ([" cat", "dog"], "Cat", 0), ([" cat", "cat"], "cat", 1), ([" cat", "cat"], " cat", 0),
        (["Cat", "cat"], "cat", 1), (["STRASSE", "x"], "stra\u00dfe", 0),
    ],
)  # fmt: skip
def test_names_as_file_systems_make_them(names, cls, expected):
    assert data.class_index(Pairs(classes=names, targets=[0] * 30), cls) == expected


@pytest.mark.parametrize(
    ("names", "cls"), [(["Cat", "cat", "x"], "CAT"), (["cat ", " cat"], "cat"), (["cat", "cat"], "cat")]
)
def test_names_that_may_be_several(names, cls):
    with pytest.raises(ZsuError, match=f"'{cls}' may be any of 0 .*, 1 .*choose by index"):
        data.class_index(Pairs(classes=names), cls)
    assert data.class_index(Pairs(classes=names), 1) == 1


# Samples


def test_samples_are_of_the_class_and_reproducible(mini):
    x = data.samples(mini.test, "Trouser")
    assert x.shape == (36, 1, 28, 28)
    assert x.dtype == torch.float32
    trousers = {image.numpy().tobytes() for image in mini.test.data[mini.test.targets == 1] / 255}
    drawn = [image.numpy().tobytes() for image in x]
    assert set(drawn) <= trousers
    assert len(set(drawn)) == 36
    assert torch.equal(x, data.samples(mini.test, 1))
    assert not torch.equal(x, data.samples(mini.test, 1, seed=1))


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(d, range(0, 2000, 2))])
def test_without_samples_is_the_rest(mini, wrap):
    dataset = wrap(mini.test)
    drawn = {image.numpy().tobytes() for image in data.samples(dataset, 1, n=20, seed=3)}
    rest = data.without_samples(dataset, 1, n=20, seed=3)
    left = [x.numpy().tobytes() for batch, _ in data.batches(rest) for x in batch]
    assert len(drawn) == 20
    assert len(left) == len(dataset) - 20
    assert drawn.isdisjoint(left)
    everything = {dataset[i][0].numpy().tobytes() for i in range(len(dataset))}
    assert drawn | set(left) == everything
    assert torch.equal(data.targets(rest), torch.tensor([label for _, label in rest]))


def test_without_samples_of_several_classes(mini):
    both = data.without_samples(mini.test, ["Bag", 1], n=20, seed=3)
    assert both.indices == [i for i in data.without_samples(mini.test, 1, n=20, seed=3).indices
                            if i in set(data.without_samples(mini.test, "Bag", n=20, seed=3).indices)]  # fmt: skip
    assert data.counts(both) == [200, 180, 200, 200, 200, 200, 200, 200, 180, 200]


@pytest.mark.parametrize(("channels", "size", "shape"), [(1, None, None), (3, None, (3, 28, 28)), (1, 12, (1, 12, 12))])
def test_images_in_the_shape_that_a_model_wants(mini, channels, size, shape):
    transform = data.transform_for("Fashion-mini", channels, size)
    if shape is None:  # as they are
        assert transform is None
        return
    image, _ = data.load("fashion-mini", transform=transform).test[0]
    assert tuple(image.shape) == shape
    if size is None:
        assert torch.equal(image, mini.test[0][0].expand(3, 28, 28))
    with pytest.raises(ZsuError, match="size is 0"):
        data.transform_for("cifar10", 3, 0)


def test_global_random_state_is_neither_used_nor_changed(mini, tmp_path):
    folder = data.load(write_image_folder(tmp_path)).test  # goes through a DataLoader
    torch.manual_seed(0)
    first, before = data.samples(mini.test, 4), torch.get_rng_state()
    data.without_samples(mini.test, 4)
    list(data.batches(folder))
    data.samples(folder, 0, 1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(data.samples(mini.test, 4), first)


def test_too_few_samples(mini):
    with pytest.raises(ZsuError, match="201 samples of class 'Trouser' were asked for, the data has 200"):
        data.samples(mini.test, 1, n=201)
    assert len(data.samples(mini.test, 1, n=200)) == 200
    only_bags = Subset(mini.test, (mini.test.targets == 8).nonzero()[:5, 0].tolist())
    for draw in (data.samples, data.without_samples):
        with pytest.raises(ZsuError, match="the data has 0.*Trouser 0, .*Bag 5"):
            draw(only_bags, 1, n=1)


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "3", None])
def test_impossible_number_of_samples(mini, n):
    with pytest.raises(ZsuError, match="n is .*n >= 1"):
        data.samples(mini.test, 1, n=n)


# Batches


@pytest.mark.parametrize("batch_size", [1, 7, 100, 5000])
def test_batches_give_everything_in_order_sliced_or_loaded(mini, batch_size):
    memory = Subset(mini.test, range(100, 150))
    loaded = Subset(data.load(transform=transforms.ToTensor()).test, range(100, 150))
    assert data.in_memory(memory) is not None
    assert data.in_memory(loaded) is None
    for (x, y), (x2, y2) in zip(data.batches(memory, batch_size), data.batches(loaded, batch_size), strict=True):
        assert len(x) <= batch_size
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
        assert y2.dtype == torch.int64
    assert sum(len(y) for _, y in data.batches(memory, batch_size)) == 50


def test_batches_of_nothing(mini):
    assert list(data.batches(Subset(mini.test, []))) == []


@pytest.mark.parametrize("batch_size", [0, -1, 2.5])
def test_impossible_batch_size(mini, batch_size):
    with pytest.raises(ZsuError, match="batch_size"):
        list(data.batches(mini.test, batch_size))


# Writing


def test_write_is_all_or_nothing(tmp_path):
    path = tmp_path / "file"
    files.write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary):
        temporary.write_text("half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        files.write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["0.safetensors", "1-0.csv", "settings.json", "page.html", "board.png", "paths.npz"])
def test_what_a_killed_process_leaves_has_no_ending_that_is_read(tmp_path, name):
    seen = []

    def write(temporary):
        seen.append(temporary)
        temporary.write_text("half")

    files.write_atomically(tmp_path / name, write)
    assert (seen[0].suffix, seen[0].name[0], seen[0].parent) == (".tmp", ".", tmp_path)
