"""Labelled images: what is read, how it is split, and what is said of data that cannot be used."""

from __future__ import annotations

from io import BytesIO

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dng_models.class_removal.data import (
    Dataset,
    held_out_rows,
    load_dataset,
    read_image,
)
from dng_models.support import foreign


@pytest.fixture(scope="module")
def digits():
    return load_dataset()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def encoded(array, mode=None):
    buffer = BytesIO()
    Image.fromarray(array, mode).save(buffer, format="PNG")
    return buffer.getvalue()


def grey(n, side=4, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(256, size=(side, side), dtype=np.uint8) for _ in range(n)]


def parquet(path, images, **columns):
    """A plain file, as any program writes it: no word of the datasets library in it."""
    cells = [image and {"bytes": image, "path": None} for image in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    arrays = {"image": pa.array(cells, kind)} | {k: pa.array(v) for k, v in columns.items()}
    pq.write_table(pa.table(arrays), path)
    return path


def test_the_digits(digits):
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.images.dtype == torch.float32 and digits.labels.dtype == torch.int64
    assert digits.images.min() == -1.0 and digits.images.max() == 1.0
    assert digits.classes == tuple("0123456789")
    assert digits.labels[:10].tolist() == list(range(10))
    assert (digits.image_size, digits.channels, len(digits)) == (8, 1, 1797)
    assert "digits" in repr(digits) and "1797" in repr(digits)


# ---------------------------------------------------------------------- subsets


def test_a_fifth_of_every_class_is_held_out(digits):
    assert (len(digits.train), len(digits.held_out)) == (1437, 360)
    share = digits.held_out.labels.bincount() / digits.labels.bincount()
    np.testing.assert_allclose(share, 0.2, atol=0.01)


def test_subsets_commute_and_keep_the_split(digits):
    """A network of one class and one of all are held to the same images."""
    for one, other in (
        (digits.train.only("3"), digits.only("3").train),
        (digits.held_out.without("3"), digits.without("3").held_out),
        (digits.train.train, digits.train),
    ):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    assert len(digits.train.held_out) == 0
    assert digits.only(3).classes == digits.classes


def test_only_and_without_are_complements(digits):
    assert digits.only(["1", 7]).labels.unique().tolist() == [1, 7]
    assert digits.without(["1", 7]).labels.unique().tolist() == [0, 2, 3, 4, 5, 6, 8, 9]
    assert len(digits.only(1)) + len(digits.without("1")) == len(digits)
    assert len(digits.only([])) == 0


def test_the_fingerprint_tells_data_apart(digits):
    again = load_dataset()
    assert again.fingerprint == digits.fingerprint
    assert len({digits.fingerprint, digits.train.fingerprint, digits.only(1).fingerprint}) == 3


@given(
    counts=st.lists(st.integers(2, 40), min_size=2, max_size=6),
    share=st.sampled_from([0.0, 0.01, 0.2, 0.5, 0.99]),
)
def test_the_split_is_in_proportion(counts, share):
    labels = np.repeat(np.arange(len(counts)), counts)
    rows = held_out_rows(labels, share)
    assert np.array_equal(rows, held_out_rows(labels, share))
    held = np.bincount(labels[rows], minlength=len(counts))
    if share == 0:
        assert held.sum() == 0
        return
    assert (held >= 1).all() and (held < counts).all()
    exact = np.array(counts) * share
    assert ((np.abs(held - exact) <= 1.0) | (held == 1) | (held == np.array(counts) - 1)).all()


# ---------------------------------------------------------------------- names


def test_a_class_by_name_or_number(digits):
    assert [digits.index_of(c) for c in ("0", 9, "9")] == [0, 9, 9]


@pytest.mark.parametrize("wrong", ["ten", 10, "10", -1, "-1", 1.5, ""])
def test_an_unknown_class_lists_those_that_there_are(digits, wrong):
    with pytest.raises(ValueError, match="class must be one of 0, 1, 2.*from 0 to 9; got"):
        digits.index_of(wrong)


def test_a_name_goes_before_a_number(tmp_path):
    path = parquet(tmp_path / "a.parquet", map(encoded, grey(4)), label=[7, 7, 1, 1])
    data = load_dataset(path)
    assert data.classes == ("1", "7")
    assert [data.index_of(c) for c in ("1", "0", 1, "7")] == [0, 0, 1, 1]


# ---------------------------------------------------------------------- reading


def test_a_plain_parquet_file(tmp_path):
    images = grey(6)
    folder = tmp_path / "shapes"
    folder.mkdir()
    path = parquet(folder / "train.parquet", map(encoded, images), kind=list("abcabc"))
    data = load_dataset(path, held_out=0.5)
    assert data.name == "shapes" and data.classes == ("a", "b", "c")
    assert data.labels.tolist() == [0, 1, 2, 0, 1, 2]
    np.testing.assert_allclose(data.images[:, 0], np.array(images) / 127.5 - 1.0, atol=1e-6)
    assert len(data.held_out) == 3


def test_a_parquet_file_of_the_datasets_library(tmp_path):
    """Its names of the classes are kept, and so is their order."""
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])}
    )
    cells = [{"bytes": encoded(image), "path": None} for image in grey(4)]
    table = datasets.Dataset.from_dict({"img": cells, "label": [0, 1, 0, 1]}, features)
    table.to_parquet(tmp_path / "pets.parquet")
    data = load_dataset(tmp_path / "pets.parquet")
    assert (data.name, data.classes) == ("pets", ("dog", "cat"))
    assert data.labels.tolist() == [0, 1, 0, 1]


def test_an_image_folder(tmp_path):
    folder = tmp_path / "pets"
    for row, image in enumerate(grey(6)):
        inside = folder / ("cat" if row < 3 else "dog")
        inside.mkdir(parents=True, exist_ok=True)
        (inside / f"{row}.png").write_bytes(encoded(np.stack([image] * 3, axis=-1)))
    data = load_dataset(str(folder))
    assert (data.name, data.classes) == ("pets", ("cat", "dog"))
    assert data.images.shape == (6, 3, 4, 4)
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_sizes_and_colours_are_made_alike_when_asked(tmp_path):
    images = [encoded(grey(1, side)[0]) for side in (4, 9, 6)]
    images.append(encoded(np.full((4, 8, 4), 255, dtype=np.uint8)))
    path = parquet(tmp_path / "a.parquet", images, label=[0, 0, 1, 1])
    data = load_dataset(path, image_size=4, channels=3)
    assert data.images.shape == (4, 3, 4, 4)
    assert torch.all(data.images[3] == 1.0)
    assert load_dataset(path, image_size=4, channels=1).images.shape == (4, 1, 4, 4)


# ---------------------------------------------------------------------- photographs


BACK = {1: 0, 3: 180, 6: 90, 8: 270}  # how a camera was turned, in degrees to the left


def photograph(orientation, kind="JPEG"):
    """Bright above and dark below, once it is turned as its EXIF says."""
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:8] = 255
    buffer, exif = BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(pixels).rotate(BACK[orientation])
    image.save(buffer, kind, exif=exif, quality=95)
    return buffer.getvalue()


def assert_upright(data):
    assert torch.all(data.images[:, :, :7] > 0.9) and torch.all(data.images[:, :, 9:] < -0.9)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_photographs_are_upright_however_they_are_read(tmp_path, monkeypatch, kind):
    """As the datasets library decodes them."""
    images = [photograph(orientation, kind) for orientation in (1, 3, 6, 8)]
    path = parquet(tmp_path / "a.parquet", images, label=[0, 1, 0, 1])
    assert_upright(load_dataset(path))
    folder = tmp_path / "photographs"
    for row, image in enumerate(images):
        inside = folder / "ab"[row % 2]
        inside.mkdir(parents=True, exist_ok=True)
        (inside / f"{row}.{kind.lower()}").write_bytes(image)
    assert_upright(load_dataset(folder))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    cells = [{"bytes": image, "path": None} for image in images]
    hub = datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 0, 1]}, features)
    for row in range(4):
        decoded = np.asarray(hub[row]["image"].convert("L"))
        assert decoded[:7].min() > 240 and decoded[9:].max() < 15
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub)
    assert_upright(load_dataset("owner/photographs"))


def test_a_photograph_is_cut_after_it_is_turned(tmp_path):
    """Its middle is another one before, and its sides are exchanged."""
    pixels = np.zeros((8, 16), dtype=np.uint8)
    pixels[:, :8] = 255
    exif, buffer = Image.Exif(), BytesIO()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    image = read_image(BytesIO(buffer.getvalue()), "it")
    assert image.size == (8, 16)
    assert np.asarray(image)[0, 0] == 255 and np.asarray(image)[-1, -1] == 0
    path = parquet(tmp_path / "a.parquet", [buffer.getvalue()] * 4, label=[0, 1, 0, 1])
    data = load_dataset(path, image_size=8)
    assert torch.all(data.images[:, :, 0] == 1.0) and torch.all(data.images[:, :, -1] == -1.0)


GREYS = np.arange(0, 256, 16, dtype=np.uint8).reshape(4, 4)
MODES = ("L", "P", "LA", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


@pytest.mark.parametrize("mode", [*MODES, "P with transparency", "L with transparency"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_of_eight_bits_is_the_same_image(mode, channels):
    buffer = BytesIO()
    image = Image.fromarray(GREYS).convert(mode[:5].strip() if " " not in mode else mode[0])
    more = {"transparency": b"\x00\xff\x80" if mode[0] == "P" else 16} if " " in mode else {}
    kind = {"CMYK": "TIFF", "YCbCr": "TIFF", "PA": "TIFF"}.get(mode, "PNG")
    if mode == "PA":
        image.convert("LA").save(buffer, kind)
    else:
        image.save(buffer, kind, **more)
    try:
        Image.open(buffer).load()
    except OSError as error:
        pytest.skip(f"this Pillow cannot read what it wrote ({error})")
    found = np.asarray(read_image(buffer, "it", channels))
    assert found.shape == (4, 4) if channels == 1 else (4, 4, 3)
    np.testing.assert_allclose(
        found.reshape(4, 4, -1), GREYS[..., None].repeat(channels, 2), atol=1
    )


@pytest.mark.parametrize("channels", [None, 1, 3])
def test_sixteen_bits_are_refused_with_transparency_too(channels):
    buffer = BytesIO()
    image = Image.fromarray(np.arange(16, dtype=np.uint16).reshape(4, 4) * 4096)
    image.save(buffer, "PNG", transparency=0)
    with pytest.raises(ValueError, match="8 bits a channel.*but it has mode 'I;16'"):
        read_image(buffer, "it", channels)


# ---------------------------------------------------------------------- classes without images


def labelled(path, labels, names):
    """A file of the datasets library, with names for labels that no row may use."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    cells = [{"bytes": image, "path": None} for image in usable(len(labels))]
    datasets.Dataset.from_dict({"image": cells, "label": labels}, features).to_parquet(path)
    return path


def test_a_subset_of_a_set_of_ten_classes(tmp_path):
    """Names and numbers stay those of the set; its classes are those with images."""
    path = labelled(tmp_path / "a.parquet", [7, 3, 7, 3], [f"n{i}" for i in range(10)])
    data = load_dataset(path)
    assert data.classes == ("n3", "n7") and data.labels.tolist() == [1, 0, 1, 0]
    for asked, position in (("n3", 0), ("n7", 1), (3, 0), ("3", 0), (7, 1)):
        assert data.index_of(asked) == data.only(asked).index_of(asked) == position
        assert data.only(asked).labels.unique().tolist() == [position]
    assert len(data.only(["n3", 7])) == 4 and len(data.without(7)) == 2
    for empty in ("n0", 0, "0", 1):
        for method in (data.index_of, data.only, data.without, data.train.only):
            with pytest.raises(
                ValueError, match=r"images of, n3, n7; got .*, and 'n[01]' has none"
            ):
                method(empty)
    with pytest.raises(ValueError, match="n3, n7 or a number from 0 to 9; got 10"):
        data.index_of(10)


def test_names_that_are_numbers_stay_those_numbers(tmp_path):
    """The digit 7 is no class of digits 1 and 7 by its position, nor is the first class a 0."""
    path = labelled(tmp_path / "a.parquet", [7, 1, 7, 1], list("0123456789"))
    data = load_dataset(path)
    assert data.classes == ("1", "7")
    assert [data.index_of(c) for c in ("1", 7)] == [0, 1]
    with pytest.raises(ValueError, match="got '0', and '0' has none"):
        data.index_of("0")
    with pytest.raises(ValueError, match="got 0, and '0' has none"):
        data.only(0)


def test_a_class_of_one_image_is_still_refused(tmp_path):
    path = labelled(tmp_path / "a.parquet", [0, 0, 1, 1, 2], list("abcd"))
    with pytest.raises(ValueError, match="at least 2 images .* 'c' has 1 of 5"):
        load_dataset(path)


def test_a_data_set_made_by_hand_numbers_its_classes_itself():
    data = Dataset(torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 0, 1]), ("a", "b"), "it")
    assert [data.index_of(c) for c in ("b", 0)] == [1, 0]
    assert data.train.source_classes == ("a", "b")


# ---------------------------------------------------------------------- webdatasets


@pytest.mark.parametrize("column", ["jpg", "png", "webp"])
@pytest.mark.parametrize("of_the_library", [True, False])
def test_the_columns_of_a_webdataset(tmp_path, column, of_the_library):
    path, cells = tmp_path / "shard.parquet", [encoded(image) for image in grey(4)]
    columns = {"__key__": list("abcd"), "__url__": ["shard.tar"] * 4, "cls": [5, 3, 5, 3]}
    if of_the_library:
        kinds = dict.fromkeys(("__key__", "__url__"), datasets.Value("string"))
        kinds |= {"cls": datasets.Value("int64"), column: datasets.Image()}
        held = [{"bytes": cell, "path": None} for cell in cells]
        table = datasets.Dataset.from_dict({**columns, column: held}, datasets.Features(kinds))
        table.to_parquet(path)
    else:
        pq.write_table(pa.table({**columns, column: cells}), path)
    for options in ({}, {"label_column": "cls"}, {"image_column": column}):
        data = load_dataset(path, **options)
        assert data.classes == ("3", "5") and data.labels.tolist() == [1, 0, 1, 0]
    with pytest.raises(ValueError, match="every class"):
        load_dataset(path, label_column="__key__")


def test_images_in_bytes_of_any_name_when_it_is_given(tmp_path):
    cells = [encoded(image) for image in grey(4)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"blob": cells, "mask": cells, "label": [0, 1, 0, 1]}), path)
    assert len(load_dataset(path, image_column="blob")) == 4
    with pytest.raises(ValueError, match="one image column, .* found none"):
        load_dataset(path)
    pq.write_table(pa.table({"jpg": cells, "png": cells, "label": [0, 1, 0, 1]}), path)
    with pytest.raises(ValueError, match="found several: jpg, png"):
        load_dataset(path)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([2.0, 10.0, 2.0, 10.0], ("2", "10")),
        ([2, 10, 2, 10], ("2", "10")),
        (["2", "10", "2", "10"], ("10", "2")),
        ([True, False, True, False], ("False", "True")),
        (pa.array(["b", "a", "b", "a"]).dictionary_encode(), ("a", "b")),
        (pa.array([7, 1, 7, 1], pa.uint8()), ("1", "7")),
    ],
)
def test_labels_of_every_kind(tmp_path, labels, classes):
    data = load_dataset(parquet(tmp_path / "a.parquet", usable(), label=labels))
    assert data.classes == classes
    assert data.labels.tolist()[:2] == [
        data.index_of(str(data.classes[i])) for i in data.labels[:2]
    ]


# ---------------------------------------------------------------------- data that cannot be used


def usable(n=4):
    return [encoded(image) for image in grey(n)]


def colour(mode, side=4):
    return encoded(np.zeros((side, side, len(mode)), dtype=np.uint8), mode)


BAD_IMAGES = {
    "all images must be alike, but image 0 is 4 x 4 in grey and image 1 is 5 x 5": [
        encoded(grey(1)[0]),
        encoded(grey(1, 5)[0]),
    ],
    "image 0 is 4 x 4 in grey and image 1 is 4 x 4 in colour": [
        encoded(grey(1)[0]),
        encoded(np.zeros((4, 4, 3), dtype=np.uint8)),
    ],
    "alpha channel, but image 0 is RGBA": [encoded(np.zeros((4, 4, 4), dtype=np.uint8))],
    "square, but image 0 has 5 x 4 pixels": [encoded(np.zeros((4, 5), dtype=np.uint8))],
    "8 bits a channel.* image 0 has mode 'I;16'": [encoded(np.zeros((4, 4), dtype=np.uint16))],
    "image 0 cannot be decoded": [b"no image"],
    "image 1 cannot be decoded": [encoded(grey(1)[0]), encoded(grey(1, 40)[0])[:-900]],
}


@pytest.mark.parametrize("message", BAD_IMAGES)
def test_images_that_cannot_be_used(tmp_path, message):
    images = BAD_IMAGES[message]
    images = images + usable(4 - len(images))
    path = parquet(tmp_path / "a.parquet", images, label=[0, 1, 0, 1])
    with pytest.raises(ValueError, match=message):
        load_dataset(path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "must have one label column.* found none \\(columns: image\\)"),
        ({"a": [0, 1, 0, 1], "b": [0, 1, 0, 1]}, "found several: a, b"),
        ({"height": [4.0, 4.0, 4.0, 4.0]}, "found none \\(columns: image, height\\)"),
        ({"label": [1.0, 0.5, 0.5, 1.0]}, "whole numbers, and row 1 of 'label' has 0.5"),
        ({"label": [1.0, float("inf"), 0.0, 1.0]}, "row 1 of 'label' has inf"),
        ({"label": [1.0, 0.0, 0.0, float("nan")]}, "row 3 of 'label' has none \\(nan\\)"),
        ({"label": [1.0, 0.0, None, 1.0]}, "row 2 of 'label' has none"),
        ({"label": [1, 0, -1, 1]}, "row 2 of 'label' has none \\(-1\\)"),
        ({"label": [True, False, None, True]}, "row 2 of 'label' has none"),
        ({"label": ["a", "b", "", "b"]}, "row 2 of 'label' has none"),
        ({"label": [0, 1, 0, 1], "cls": [0, 0, 1, 1]}, "found several: label, cls"),
        ({"__key__": list("abcd")}, "found none \\(columns: image, __key__\\)"),
        ({"label": [0, 0, 0, 1]}, "at least 2 images .* '1' has 1 of 4"),
        ({"label": [3, 3, 3, 3]}, "at least 2 classes, got \\['3'\\]"),
        ({"label": [0, 1, None, 1]}, "row 2 of 'label' has none"),
        ({"label": ["a", "b", None, "b"]}, "row 2 of 'label' has none"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path, columns, message):
    path = parquet(tmp_path / "a.parquet", usable(), **columns)
    with pytest.raises(ValueError, match=message):
        load_dataset(path)


def test_an_image_that_is_missing_is_named(tmp_path):
    path = parquet(tmp_path / "a.parquet", [*usable(2), None, *usable(1)], label=[0, 1, 0, 1])
    with pytest.raises(ValueError, match="every row must have an image, and row 2 has none"):
        load_dataset(path)
    kind = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    cells = [{"bytes": image, "path": None} for image in usable(3)]
    table = datasets.Dataset.from_dict({"image": [*cells, None], "label": [0, 1, 0, 1]}, kind)
    table.to_parquet(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="every row must have an image, and row 3 has none"):
        load_dataset(tmp_path / "b.parquet")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_is_named(tmp_path, kind):
    """Its first frame alone is not what was meant."""
    buffer = BytesIO()
    first, second = (Image.fromarray(image) for image in grey(2))
    first.save(buffer, kind, save_all=True, append_images=[second], duration=100)
    path = parquet(tmp_path / "a.parquet", [*usable(3), buffer.getvalue()], label=[0, 1, 0, 1])
    with pytest.raises(ValueError, match="one frame, but image 3 has 2"):
        load_dataset(path, channels=1)


def test_one_image_is_not_a_data_set(tmp_path):
    path = parquet(tmp_path / "a.parquet", usable(1), label=[0])
    with pytest.raises(ValueError, match="at least 2 images"):
        load_dataset(path)


def test_no_image_is_not_a_data_set(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty' cannot be read"):
        load_dataset(tmp_path / "empty")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    nothing = datasets.Dataset.from_dict({"image": [], "label": []}, features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: nothing)
    with pytest.raises(ValueError, match="it is empty"):
        load_dataset("owner/nothing")


def test_columns_by_name(tmp_path):
    columns = {"fine": [0, 1, 0, 1], "coarse": ["x", "x", "y", "y"]}
    path = parquet(tmp_path / "a.parquet", usable(), **columns)
    assert load_dataset(path, label_column="coarse").classes == ("x", "y")
    with pytest.raises(ValueError, match="label_column must be one of .* image, fine, coarse"):
        load_dataset(path, label_column="cose")
    with pytest.raises(ValueError, match="image_column must hold images"):
        load_dataset(path, image_column="fine")


def test_the_usual_name_of_the_labels_is_taken(tmp_path):
    path = parquet(tmp_path / "a.parquet", usable(), id=[0, 1, 2, 3], label=[0, 1, 0, 1])
    assert load_dataset(path).classes == ("0", "1")


def test_a_file_that_is_not_there(tmp_path):
    for missing in (tmp_path / "a.parquet", "a.parquet", "./folder", tmp_path / "folder"):
        with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
            load_dataset(missing)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "a.csv").write_text("image,label\n")
    with pytest.raises(ValueError, match="must be a parquet file.* got the file .*a.csv"):
        load_dataset(tmp_path / "a.csv")


def test_a_damaged_parquet_file(tmp_path):
    path = parquet(tmp_path / "a.parquet", usable(), label=[0, 1, 0, 1])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="a.parquet cannot be read: it is no whole parquet file"):
        load_dataset(path)


@pytest.mark.parametrize(
    ("name", "asked"), [("mnist", "ylecun/mnist"), ("cifar10", "uoft-cs/cifar10"), ("a/b", "a/b")]
)
def test_a_name_goes_to_the_hub(monkeypatch, name, asked):
    seen = []

    def unreachable(path, **_):
        seen.append(path)
        raise ConnectionError("no network")

    monkeypatch.setattr(foreign, "ask_hub", lambda name, kind: True)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(OSError, match=f"{name}.* hub did not give it: ConnectionError"):
        load_dataset(name)
    assert seen == [asked]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"held_out": 1.0}, ValueError, "held_out must be in \\[0, 1\\)"),
        ({"held_out": "a"}, TypeError, "held_out"),
        ({"image_size": 0}, ValueError, "image_size must be an integer >= 1"),
        ({"channels": 2}, ValueError, "channels must be 1"),
        ({"channels": 3}, ValueError, "channels must be 1 or None for the digits"),
        ({"image_size": 16}, ValueError, "image_size must be None for the digits"),
        ({"label_column": "x"}, ValueError, "label_column must be None for the digits"),
    ],
)
def test_arguments_that_are_not_allowed(arguments, error, message):
    with pytest.raises(error, match=message):
        load_dataset(**arguments)
