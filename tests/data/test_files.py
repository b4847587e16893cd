"""Sets of images as they lie about: without a split, of other makers' names, as lists of paths."""

import gzip
import pathlib

import numpy as np
import pytest
from PIL import Image

from lorajax import data, models
from tests.data.test_sets import idx

DRAW = np.random.default_rng(0)


def folders(root: pathlib.Path, counts=(10, 5, 1), mode="RGB") -> pathlib.Path:
    """A folder of images a class; each is of its class's shade and its number's."""
    for name, count in zip(("ant", "bee", "cat"), counts, strict=True):
        (root / name).mkdir(parents=True)
        for i in range(count):
            shade = (20 * i, 40, 10) if mode == "RGB" else 20 * i
            Image.new(mode, (6, 8), shade).save(root / name / f"{i}.png")
    return root


class TestWithoutSplit:
    def test_the_same_share_of_each_class_is_set_aside_and_one_sample_stays(self, tmp_path):
        found = data.load(folders(tmp_path), hold_out=0.4)
        assert (found.kind, found.classes) == ("held-out", ("ant", "bee", "cat"))
        assert np.bincount(found.test.columns["labels"][:], minlength=3).tolist() == [4, 2, 0]
        assert np.bincount(found.train.columns["labels"][:], minlength=3).tolist() == [6, 3, 1]
        again = data.load(tmp_path, hold_out=0.4)
        np.testing.assert_array_equal(again.test[:]["images"], found.test[:]["images"])
        both = np.concatenate([part[:]["images"][:, 0, 0, 0] for part in found[1:3]])
        assert sorted(both.tolist()) == sorted([20 * i for n in (10, 5, 1) for i in range(n)])

    def test_a_training_folder_alone_is_divided_too(self, tmp_path):
        folders(tmp_path / "train")
        (tmp_path / "notes.md").write_text("")
        found = data.load(tmp_path, hold_out=0.4)
        assert (len(found.train), len(found.test), found.left_out) == (10, 6, ("notes.md",))

    def test_a_split_that_is_there_is_kept(self, tmp_path):
        for name in ("train", "validation"):
            folders(tmp_path / name, (2, 2, 2))
        found = data.load(tmp_path, hold_out=0.5)
        assert (found.kind, len(found.train), len(found.test)) == ("test", 6, 6)

    def test_it_asks_for_the_share(self, tmp_path):
        with pytest.raises(ValueError, match="give hold_out, the share of each class"):
            data.load(folders(tmp_path))
        with pytest.raises(ValueError, match=r"hold_out is 1.0; it must lie in \[0, 1\)"):
            data.load(tmp_path, hold_out=1.0)

    def test_no_class_with_two_samples(self, tmp_path):
        with pytest.raises(ValueError, match="in which no class has two samples"):
            data.load(folders(tmp_path, (1, 1, 1)), hold_out=0.5)

    def test_sizes_that_differ_fall_back_to_the_models(self, tmp_path):
        folders(tmp_path, (2, 2, 2))
        Image.new("RGB", (50, 20)).save(tmp_path / "ant" / "wide.png")
        found = data.load(tmp_path, hold_out=0.4, fallback=(4, 4))
        assert found.train[:]["images"].shape[1:] == (4, 4, 3)
        Image.new("L", (20_000, 1)).save(tmp_path / "ant" / "thin.png")
        with pytest.raises(ValueError, match=r"thin.png is 20000×1 pixels, too thin"):
            data.load(tmp_path, hold_out=0.4, fallback=(224, 224))

    def test_folders_with_a_text_are_of_images_and_folders_of_texts_are_not(self, tmp_path):
        folders(tmp_path / "images", (2, 1, 1))
        (tmp_path / "images" / "classes.txt").write_text("ant")
        (tmp_path / "texts" / "good").mkdir(parents=True)
        (tmp_path / "texts" / "good" / "1.txt").write_text("fine")
        assert data.shows_images(tmp_path / "images")
        assert not data.shows_images(tmp_path / "texts")


class TestPacksOfOthers:
    def test_medmnist(self, tmp_path):
        parts = {"train": 6, "val": 2, "test": 4}
        arrays = {
            f"{kind}_images": DRAW.integers(0, 255, (count, 5, 5, 3), dtype=np.uint8)
            for kind, count in parts.items()
        }
        labels = {
            f"{kind}_labels": np.arange(count, dtype=np.uint8)[:, None] % 2
            for kind, count in parts.items()
        }
        np.savez(tmp_path / "pathmnist.npz", **arrays, **labels)
        found = data.load(tmp_path / "pathmnist.npz")
        assert (len(found.train), len(found.test), found.classes) == (6, 4, ("0", "1"))
        assert found.left_out == ("val_images",)
        np.testing.assert_array_equal(found.test.columns["images"], arrays["test_images"])
        labels["train_labels"] = np.zeros((6, 14), np.uint8)
        np.savez(tmp_path / "chestmnist.npz", **arrays, **labels)
        with pytest.raises(ValueError, match=r"labels of shape \(6, 14\); it must have one label"):
            data.load(tmp_path / "chestmnist.npz")

    def test_one_pair_of_arrays(self, tmp_path):
        images = DRAW.integers(0, 255, (10, 4, 4), dtype=np.uint8)
        np.savez(tmp_path / "all.npz", images=images, labels=np.arange(10) % 2)
        with pytest.raises(ValueError, match="a pack needs test_y .* or hold_out"):
            data.load(tmp_path / "all.npz")
        found = data.load(tmp_path / "all.npz", hold_out=0.4)
        assert (len(found.train), len(found.test), found.kind) == (6, 4, "held-out")

    @pytest.mark.parametrize("packed", [True, False])
    def test_idx_files(self, packed, tmp_path):
        write = gzip.compress if packed else bytes
        end = ".gz" if packed else ""
        for kind, count in (("train", 6), ("t10k", 4)):
            images = DRAW.integers(0, 255, (count, 5, 5), dtype=np.uint8)
            labels = np.arange(count, dtype=np.uint8) % 3
            for name, array in (("images-idx3", images), ("labels-idx1", labels)):
                path = tmp_path / f"{kind}-{name}-ubyte{end}"
                path.write_bytes(write(gzip.decompress(idx(array))))
        (tmp_path / "notes.md").write_text("")
        found = data.load(tmp_path)
        assert (len(found.train), len(found.test), found.classes) == (6, 4, ("0", "1", "2"))
        assert found.left_out == ("notes.md",)
        assert found.train.columns["images"].shape == (6, 5, 5, 1)


class TestLists:
    def write(self, root, text, name="list.csv"):
        (root / name).write_text(text, encoding="utf-8")
        return root / name

    def test_paths_and_labels(self, tmp_path):
        folders(tmp_path / "pics", (3, 3, 1))
        rows = [f"pics/{c}/{i}.png,{c},x" for c in ("ant", "bee") for i in range(3)]
        path = self.write(tmp_path, "\n".join(["file,label,note", *rows]) + "\n")
        assert data.shows_images(path)
        found = data.load(path, hold_out=0.34)
        assert (len(found.train), len(found.test), found.classes) == (4, 2, ("ant", "bee"))
        assert isinstance(found.train.columns["images"].column, data.ImageFiles)

    def test_a_column_of_splits(self, tmp_path):
        folders(tmp_path, (4, 0, 0), mode="L")
        rows = ["0,train,10", "1,train,9", "2,val,10", "3,extra,9"]
        rows = [f"ant/{row}" for row in rows]
        text = "\n".join(["Path\tSplit\tClass", *(r.replace(",", ".png\t", 1) for r in rows)])
        found = data.load(self.write(tmp_path, text.replace(",", "\t"), "list.tsv"))
        assert (len(found.train), len(found.test), found.classes) == (2, 1, ("9", "10"))
        assert found.train.columns["labels"].tolist() == [1, 0]
        assert found.train.columns["images"].mode == "L"
        assert [pathlib.Path(name).name for name in found.left_out] == ["3.png"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("path,label\nant/9.png,a\n", r"row 2, names 'ant/9.png', which is no file there"),
            ("path,label\nant/0.png,\n", "row 2, has no label"),
            ("path,label\nant/0.png\n", "row 2, has 1 fields; its header has 2"),
            ("path,one,two\nant/0.png,a,b\n", "call the one of classes 'label'"),
            ("path,label\nant/0.txt,a\n", "has no column of paths of pictures"),
            ("path,label,split\nant/0.png,a,test\n", "has no row whose split is train"),
            ("", "is empty"),
        ],
    )
    def test_what_cannot_be_read_is_one_sentence(self, text, message, tmp_path):
        folders(tmp_path, (1, 0, 0))
        with pytest.raises(ValueError, match=message):
            data.load(self.write(tmp_path, text), hold_out=0.5)


def test_a_model_of_one_channel_sees_the_brightness_as_pillow_has_it():
    images = DRAW.integers(0, 256, (2, 30, 30, 3), dtype=np.uint8)
    gray = np.stack([np.asarray(Image.fromarray(x).convert("L")) for x in images])[..., None]
    found = models.normalize(images, (0.0,), (1 / 255,), channels=1)
    np.testing.assert_allclose(found, gray, atol=1e-4)
