"""Labelled images: what is read, how it is split, and what is said of data that cannot be used."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
Image = pytest.importorskip("PIL.Image")

from dng_models.class_removal.data import held_out_rows, load_dataset  # noqa: E402


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
    cells = [{"bytes": image, "path": None} for image in images]
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
        ({"label": [0.5, 1.0, 0.5, 1.0]}, "found none \\(columns: image, label\\)"),
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
    with pytest.raises(ValueError, match="a.parquet' cannot be read"):
        load_dataset(path)


@pytest.mark.parametrize(
    ("name", "asked"), [("mnist", "ylecun/mnist"), ("cifar10", "uoft-cs/cifar10"), ("a/b", "a/b")]
)
def test_a_name_goes_to_the_hub(monkeypatch, name, asked):
    seen = []

    def unreachable(path, **_):
        seen.append(path)
        raise ConnectionError("no network")

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
