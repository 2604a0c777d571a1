"""Folders of images as people have them: what programs leave behind, links, names, and values of any depth."""

import os
import unicodedata
import warnings

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets, transforms

from zsu import ZsuError, data
from zsu.folders import open_image

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"
RAMP = (np.arange(64, dtype=np.uint16).reshape(8, 8) + 1) * 1000


def write_classes(folder, names=("cat", "dog"), parts=("train", "test")):
    """PART/NAME/0.png and PART/NAME/deep/1.PNG."""
    for part in parts:
        for value, name in enumerate(names):
            (folder / part / name / "deep").mkdir(parents=True)
            for i, place in enumerate(("0.png", "deep/1.PNG")):
                Image.fromarray(np.full((8, 8, 3), 10 * value + i, np.uint8)).save(folder / part / name / place)
    return folder


def write_debris(folder):
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "0-copy.png")


# Which names are classes, which files are images


def test_images_and_their_order_are_those_of_torchvision(tmp_path):
    ours = data.load(write_classes(tmp_path)).train
    theirs = datasets.ImageFolder(tmp_path / "train", transforms.ToTensor())
    assert (ours.samples, ours.targets, ours.classes) == (theirs.samples, theirs.targets, theirs.classes)
    for (x, label), (expected, expected_label) in zip(ours, theirs, strict=True):
        assert x.equal(expected)
        assert label == expected_label


@pytest.mark.parametrize("place", ["", "cat", "dog/deep"])
@pytest.mark.parametrize("name", [".ipynb_checkpoints", "__MACOSX", ".git", "@eaDir", "$RECYCLE.BIN"])
def test_what_programs_leave_behind_is_no_class_and_no_image(tmp_path, place, name):
    write_debris(write_classes(tmp_path) / "train" / place / name)
    train = data.load(tmp_path).train
    assert (train.classes, len(train)) == (["cat", "dog"], 4)


def test_folders_may_be_as_deep_as_the_system_lets_them(tmp_path):
    path = f"{write_classes(tmp_path)}/train/cat/deep"
    for _ in range(1200):  # deeper than Python calls functions
        path += "/q"
        os.mkdir(path)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(f"{path}/last.png")
    assert len(data.load(tmp_path).train) == 5
    os.remove(f"{path}/last.png")
    for _ in range(1200):  # shutil.rmtree calls itself
        os.rmdir(path)
        path = path[:-2]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(write_classes(tmp_path) / "train" / "cat" / "2.png")
    with pytest.raises(ZsuError, match=r"2.png: cannot read this image \(ValueError: this is no regular file\)"):
        [x for x, _ in data.load(tmp_path).train]


def test_hidden_files_are_no_images(tmp_path):
    write_classes(tmp_path)
    for name in ("._0.png", ".DS_Store", "Thumbs.db", ".hidden.jpg"):
        (tmp_path / "train" / "cat" / name).write_bytes(b"no image")
    assert len([x for x, _ in data.load(tmp_path).train]) == 4


def test_a_folder_below_a_hidden_one_is_read(tmp_path):
    assert len(data.load(write_classes(tmp_path / ".cache" / "data")).train) == 4


@pytest.mark.parametrize("place", ["train", "train/cat", "train/cat/deep"])
@pytest.mark.parametrize("target", [".", "..", "../..", "/"])
def test_a_link_to_a_folder_above_is_not_followed(tmp_path, place, target):
    os.symlink(target, write_classes(tmp_path) / place / "up")
    if (place, target) == ("train/cat/deep", ".."):
        os.symlink("up", tmp_path / place / "again")
    train = data.load(tmp_path).train
    assert (train.classes, len(train)) == (["cat", "dog"], 4)


def test_a_link_that_leads_to_itself_is_nothing(tmp_path):
    os.symlink("self", write_classes(tmp_path) / "train" / "self")
    assert len(data.load(tmp_path).train) == 4


def test_classes_and_images_may_be_links_to_elsewhere(tmp_path):
    elsewhere = write_classes(tmp_path / "elsewhere")
    for part in ("train", "test"):
        (tmp_path / "links" / part).mkdir(parents=True)
        for name in ("cat", "dog"):
            os.symlink(elsewhere / part / name, tmp_path / "links" / part / name)
    assert len(data.load(tmp_path / "links").train) == 4
    os.symlink("gone.png", elsewhere / "train" / "cat" / "2.png")
    with pytest.raises(ZsuError, match=r"2.png: cannot read this image \(FileNotFoundError"):
        list(data.batches(data.load(tmp_path / "links").train))


def test_accents_may_be_written_in_two_ways(tmp_path):
    write_classes(tmp_path, [DECOMPOSED, "cafz"], ["train"])
    write_classes(tmp_path, [COMPOSED, "cafz"], ["test"])
    train, test = data.load(tmp_path)
    assert train.classes == test.classes == ["cafz", COMPOSED]
    assert [data.class_index(train, unicodedata.normalize(form, COMPOSED)) for form in ("NFC", "NFD")] == [1, 1]
    (tmp_path / "test" / DECOMPOSED).mkdir()
    with pytest.raises(ZsuError, match=f"two class folders are called '{COMPOSED}'"):
        data.load(tmp_path)


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    os.mkdir(os.fsencode(write_classes(tmp_path) / "train") + b"/\xff")
    with pytest.raises(ZsuError, match=r"'\\udcff' of a class is not UTF-8"):
        data.load(tmp_path)


# Values


@pytest.mark.parametrize("name", ["16.png", "16.tif", "16b.tif", "16.pgm"])
def test_grey_of_16_bits_is_scaled(tmp_path, name):
    path = tmp_path / name
    if name == "16.pgm":
        path.write_bytes(b"P5 8 8 65535\n" + RAMP.astype(">u2").tobytes())
    else:
        Image.fromarray(RAMP.astype(">u2") if name == "16b.tif" else RAMP).save(path)
    found = np.asarray(open_image(path))
    assert found.shape == (8, 8, 3)
    assert np.array_equal(found, np.repeat(np.round(RAMP / 257).astype(np.uint8)[..., None], 3, 2))


def test_white_of_a_pgm_is_its_own(tmp_path):
    (tmp_path / "12.pgm").write_bytes(b"P5 8 8 4095\n" + (RAMP // 16).astype(">u2").tobytes())
    found = np.asarray(open_image(tmp_path / "12.pgm"))[..., 0]
    assert np.abs(found - (RAMP // 16) / 4095 * 255).max() <= 0.51


@pytest.mark.parametrize(("bits", "zero_is_white"), [(12, False), (16, False), (16, True)])
def test_white_of_a_tiff_is_in_its_tags(tmp_path, bits, zero_is_white):
    white = 2**bits - 1
    values = np.array([[0, white // 2], [white // 4, white]])
    raw = values.astype("<u2").tobytes()
    if bits == 12:  # two values in three bytes
        raw = b"".join((int(a) << 12 | int(b)).to_bytes(3, "big") for a, b in values)
    tags = {256: 2, 257: 2, 258: bits, 259: 1, 262: 0 if zero_is_white else 1, 273: 8, 277: 1, 278: 2, 279: len(raw)}
    entries = b"".join(
        tag.to_bytes(2, "little") + b"\3\0\1\0\0\0" + value.to_bytes(4, "little") for tag, value in tags.items()
    )
    start = 8 + len(raw)
    head = b"II*\0" + start.to_bytes(4, "little")
    (tmp_path / "x.tif").write_bytes(head + raw + len(tags).to_bytes(2, "little") + entries + bytes(4))
    share = 1 - values / white if zero_is_white else values / white
    assert np.array_equal(np.asarray(open_image(tmp_path / "x.tif"))[..., 0], np.round(255 * share))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize("values", [RAMP, RAMP / 64000, RAMP // 1000])
def test_floats_and_wide_integers_are_refused(tmp_path, dtype, values):
    Image.fromarray(values.astype(dtype)).save(tmp_path / "x.tif")
    with pytest.raises(ZsuError, match="x.tif: .*nothing says which of its .* is white; save it with 8 bits, or 16"):
        open_image(tmp_path / "x.tif")


def test_transparency_palettes_and_frames_are_as_torchvision_reads_them(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    first, second = Image.fromarray(colour[..., :3]), Image.fromarray(colour[..., 1:])
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    several = {"save_all": True, "append_images": [second]}
    files = {
        "rgba.png": (Image.fromarray(colour), {}), "la.png": (Image.fromarray(colour).convert("LA"), {}),
        "p.png": (first.quantize(8), {}), "1.png": (first.convert("1"), {}), "turned.jpg": (first, {"exif": exif}),
        "cmyk.jpg": (first.convert("CMYK"), {}), "frames.tif": (first, several),
        "frames.gif.png": (first, several | {"format": "GIF"}),
    }  # fmt: skip
    for name, (image, options) in files.items():
        image.save(tmp_path / name, **options)
        expected = datasets.folder.pil_loader(tmp_path / name)
        assert np.array_equal(np.asarray(open_image(tmp_path / name)), np.asarray(expected)), name


@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG", "BMP", "GIF", "PPM", "WEBP"])
def test_damaged_images_are_one_line_with_the_path(tmp_path, form):
    rng, path = np.random.default_rng(0), tmp_path / "broken.png"
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path, form)
    whole = path.read_bytes()
    errors = []
    for k in range(60):
        raw = bytearray(whole[: rng.integers(len(whole))] if k % 2 else whole)
        for place in rng.integers(0, max(1, min(len(raw), 200)), 0 if k % 2 else 3):
            raw[place] = rng.integers(256)
        path.write_bytes(raw)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                open_image(path)
            except ZsuError as error:
                errors.append(str(error))
    assert len(errors) > 10
    assert all(text.startswith(f"{path}: cannot read this image (") and "\n" not in text for text in errors)


def test_images_too_large_for_pillow_are_one_line(tmp_path, monkeypatch):
    Image.fromarray(RAMP).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ZsuError, match=r"bomb.png: cannot read this image \(DecompressionBombError"):
        open_image(tmp_path / "bomb.png")
