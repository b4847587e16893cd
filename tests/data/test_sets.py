"""Data sets, tables, the order of batches, and augmentations."""

import gzip
import io
import struct
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lorajax import data
from lorajax.data import augment, order

RNG = np.random.default_rng(0)
PINNED = ([0, 8, 9, 3, 7, 5, 1, 2, 6, 4], [9, 8, 3, 2, 6, 7, 5, 0, 4, 1])


def picture(height=8, width=8, shade=None):
    if shade is not None:
        return np.full((height, width, 3), shade, np.uint8)
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


class TestPacks:
    def save(self, path, **changes):
        arrays = {
            "train_x": RNG.integers(0, 256, (6, 5, 5), dtype=np.uint8),
            "train_y": np.array([0, 1, 2, 0, 1, 2], np.uint8),
            "test_x": RNG.integers(0, 256, (3, 5, 5), dtype=np.uint8),
            "test_y": np.array([2, 1, 0]),
        } | changes
        np.savez(path, **{k: v for k, v in arrays.items() if v is not None})
        return arrays

    def test_arrays(self, tmp_path):
        arrays = self.save(tmp_path / "set.npz")
        found = data.load(tmp_path / "set.npz")
        assert found.name == "set"
        assert found.classes == ("0", "1", "2")
        np.testing.assert_array_equal(found.train.columns["images"][..., 0], arrays["train_x"])
        assert found.train.columns["labels"].dtype == np.int32
        assert found.test.columns["images"].shape == (3, 5, 5, 1)

    def test_a_pack_is_found_in_the_folder_and_by_the_environment(self, tmp_path, monkeypatch):
        self.save(tmp_path / "set.npz", classes=np.array(["a", "b", "c"]))
        assert data.load("set.npz", folder=tmp_path).classes == ("a", "b", "c")
        monkeypatch.setenv("LORAJAX_DATA", str(tmp_path))
        assert data.load("set.npz").classes == ("a", "b", "c")

    def test_jpeg_bytes(self, tmp_path):
        shades, encoded = [10, 100, 250], []
        for shade in shades:
            buffer = io.BytesIO()
            Image.fromarray(picture(shade=shade)).save(buffer, "JPEG", quality=95)
            encoded.append(buffer.getvalue())
        offsets = np.cumsum([0, *map(len, encoded)])
        stream = np.frombuffer(b"".join(encoded), np.uint8)
        arrays = {}
        for kind in ("train", "val"):
            arrays |= {f"{kind}_jpg": stream, f"{kind}_off": offsets, f"{kind}_y": np.arange(3)}
        np.savez(tmp_path / "set.npz", **arrays)
        found = data.load(tmp_path / "set.npz")
        assert found.test.columns["images"].shape == (3, 8, 8, 3)
        means = found.train.columns["images"].mean(axis=(1, 2, 3))
        np.testing.assert_allclose(means, shades, atol=2)
        arrays["train_off"] = offsets[::-1]
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(ValueError, match="offsets must rise from 0"):
            data.load(tmp_path / "bad.npz")
        arrays["train_off"] = offsets
        arrays["train_jpg"] = np.zeros_like(stream)
        np.savez(tmp_path / "worse.npz", **arrays)
        with pytest.raises(ValueError, match="image 0 cannot be decoded"):
            data.load(tmp_path / "worse.npz")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"train_y": np.array([0, 1])}, "6 images and labels of shape"),
            ({"train_x": np.zeros((6, 5, 5), np.float32)}, "must be bytes"),
            ({"train_y": np.array([0.5] * 6)}, "must be integers"),
            ({"test_y": np.array([0, -1, 1])}, "labels of int64 from -1"),
            ({"train_y": np.full(6, 2**60)}, "labels up to 1152921504606846976; number"),
            ({"test_y": None}, "a pack needs test_y"),
            ({"classes": np.array(["a"])}, "must be integers in 0 … 0"),
        ],
    )
    def test_refusals(self, tmp_path, changes, message):
        self.save(tmp_path / "set.npz", **changes)
        with pytest.raises(ValueError, match=message):
            data.load(tmp_path / "set.npz")

    def test_pickles_and_garbage(self, tmp_path):
        np.savez(tmp_path / "pickle.npz", train_x=np.array([{}], dtype=object))
        (tmp_path / "garbage.npz").write_bytes(b"PK\x03\x04 not really")
        for name in ("pickle.npz", "garbage.npz"):
            with pytest.raises(ValueError, match="without pickles"):
                data.load(tmp_path / name)

    def test_no_such_source(self):
        with pytest.raises(ValueError, match="must be one of mnist-sample, cifar10-sample, mnist"):
            data.load("no-such-set")


def test_the_embedded_sample_is_real():
    found = data.load("mnist-sample")
    assert found.train.columns["images"].shape == (5000, 28, 28, 1)
    assert found.test.columns["images"].shape == (10000, 28, 28, 1)
    assert np.bincount(found.train.columns["labels"]).tolist() == [500] * 10
    # The counts of MNIST's own test set.
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(found.test.columns["labels"]).tolist() == counts
    # Digits, not noise: the nearest training image classifies the test set far above chance.
    train = found.train.columns["images"].reshape(5000, -1).astype(np.float32)
    test = found.test.columns["images"].reshape(10000, -1).astype(np.float32)
    distance = (train**2).sum(1) - 2 * test @ train.T
    nearest = found.train.columns["labels"][distance.argmin(1)]
    assert (nearest == found.test.columns["labels"]).mean() > 0.85


def test_the_embedded_pictures_are_real():
    found = data.load("cifar10-sample")
    assert found.classes[:3] == ("airplane", "automobile", "bird") and len(found.classes) == 10
    parts = (found.train, found.test)
    assert [each.columns["images"].shape for each in parts] == [(1000, 32, 32, 3)] * 2
    assert [np.bincount(each.columns["labels"]).tolist() for each in parts] == [[100] * 10] * 2
    train, test = (part.columns["images"].reshape(1000, -1).astype(np.float32) for part in parts)
    # No picture is in both parts, and the nearest one tells the class more often than chance
    # (a tenth, with a standard error of 0.95 points).
    distance = (test**2).sum(1)[:, None] - 2 * test @ train.T + (train**2).sum(1)
    assert distance.min() > 0
    nearest = found.train.columns["labels"][distance.argmin(1)]
    assert (nearest == found.test.columns["labels"]).mean() > 0.15
    # They lie as they came: a pack of JPEG bytes.
    with np.load(Path(data.__file__).parent / "embedded" / data.EMBEDDED["cifar10-sample"]) as pack:
        assert bytes(pack["test_jpg"][:3]) == b"\xff\xd8\xff"


class TestFolders:
    def make(self, tmp_path, sizes=((8, 8), (8, 8))):
        for split in ("train", "val"):
            for i, name in enumerate(("cat", "dog")):
                folder = tmp_path / split / name
                folder.mkdir(parents=True)
                for j, (height, width) in enumerate(sizes):
                    image = Image.fromarray(picture(height, width, 100 * i + 10 * j))
                    image.save(folder / f"{j}.png")
                (folder / "notes.txt").write_text("not an image")

    def test_images_are_decoded_when_asked_for(self, tmp_path):
        self.make(tmp_path)
        found = data.load(tmp_path)
        assert found.classes == ("cat", "dog")
        assert isinstance(found.train.columns["images"], data.ImageFiles)
        assert found.train.columns["images"].shape == (4, 8, 8, 3)
        np.testing.assert_array_equal(found.train.columns["labels"], [0, 0, 1, 1])
        chosen = found.train.columns["images"][np.array([3, 0])]
        assert chosen[:, 0, 0, 0].tolist() == [110, 0]

    def test_sizes_are_brought_together(self, tmp_path):
        self.make(tmp_path, sizes=((8, 8), (20, 12)))
        with pytest.raises(ValueError, match="give the size to bring them to"):
            data.load(tmp_path).train.columns["images"][:]
        found = data.load(tmp_path, size=6)
        assert found.train.columns["images"][:].shape == (4, 6, 6, 3)
        assert found.train.columns["images"][:][1].max() == 10

    def test_refusals(self, tmp_path):
        with pytest.raises(ValueError, match="must have a folder train"):
            data.load(tmp_path)
        self.make(tmp_path)
        (tmp_path / "val" / "wolf").mkdir()
        Image.fromarray(picture(8, 8, 5)).save(tmp_path / "val" / "wolf" / "0.png")
        with pytest.raises(ValueError, match="has the class 'wolf'"):
            data.load(tmp_path)


def idx(array):
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.tobytes(), mtime=0)


class TestNamed:
    def test_mnist_from_its_own_files(self, tmp_path, monkeypatch):
        images = RNG.integers(0, 256, (4, 28, 28), dtype=np.uint8)
        labels = np.array([3, 1, 4, 1], np.uint8)
        known = data.NAMED["mnist"]
        for name in known.files:
            (tmp_path / name).write_bytes(idx(images if "images" in name else labels))
        with pytest.raises(OSError, match="has md5 .* expected f68b3c2d"):
            data.load("mnist", folder=tmp_path)  # not the published files
        checksum = data.sets.downloads.checksum
        sums = {name: checksum(tmp_path / name, "md5") for name in known.files}
        monkeypatch.setitem(data.sets.NAMED, "mnist", known._replace(files=sums))
        found = data.load("mnist", folder=tmp_path)
        np.testing.assert_array_equal(found.train.columns["images"][..., 0], images)
        np.testing.assert_array_equal(found.test.columns["labels"], labels)
        assert found.classes == tuple("0123456789")

    @pytest.mark.parametrize("name", ["cifar10", "cifar100"])
    def test_cifar_from_its_own_archive(self, name, tmp_path, monkeypatch):
        ten = name == "cifar10"
        image = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        record = bytes([7] if ten else [1, 7]) + image.transpose(2, 0, 1).tobytes()
        names = "\n".join(f"class{i}" for i in range(10)) + "\n"
        members = (
            {f"data_batch_{i}.bin": record for i in range(1, 6)} | {"test_batch.bin": record}
            if ten
            else {"train.bin": record * 5, "test.bin": record}
        )
        members["batches.meta.txt" if ten else "fine_label_names.txt"] = names.encode()
        (file,) = data.NAMED[name].files
        with tarfile.open(tmp_path / file, "w:gz") as archive:
            for member, content in members.items():
                info = tarfile.TarInfo(f"folder/{member}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        md5 = data.sets.downloads.checksum(tmp_path / file, "md5")
        monkeypatch.setitem(data.sets.NAMED, name, data.NAMED[name]._replace(files={file: md5}))
        found = data.load(name, folder=tmp_path)
        np.testing.assert_array_equal(found.train.columns["images"], np.stack([image] * 5))
        np.testing.assert_array_equal(found.test.columns["labels"], [7])
        assert found.classes[7] == "class7"

    def test_without_download(self, tmp_path, monkeypatch):
        monkeypatch.setenv("LORAJAX_CACHE", str(tmp_path))
        with pytest.raises(ValueError, match=r"mnist is not in .* it needs mnist\.npz"):
            data.load("mnist", folder=tmp_path, download=False)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"no gzip", "not a readable gzip file"),
            (gzip.compress(b"\0\0\x0d\x01", mtime=0), "no IDX file of bytes"),
            (idx(np.zeros((2, 3), np.uint8))[:-12], "not a readable gzip file"),
            (gzip.compress(b"\0\0\x08\x02\0\0\0\x02\0\0\0\x03\0\0", mtime=0), "its header says"),
        ],
    )
    def test_bad_idx_files(self, tmp_path, content, message):
        (tmp_path / "x.gz").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            data.read_idx(tmp_path / "x.gz")


class TestOrder:
    def test_each_epoch_takes_each_sample_once_in_another_order(self):
        plan = data.Order(samples=12, batch_size=4, seed=3)
        epochs = [np.concatenate([plan(3 * e + i) for i in range(3)]) for e in range(3)]
        for epoch in epochs:
            assert sorted(epoch.tolist()) == list(range(12))
        assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3

    def test_it_is_a_function_of_seed_and_step(self):
        first = [data.Order(100, 7, seed=1)(step) for step in range(40)]
        order.permutation.cache_clear()
        again = data.Order(100, 7, seed=1)
        for step in (39, 0, 20):  # in any order, as after a resumption
            np.testing.assert_array_equal(again(step), first[step])
        assert not np.array_equal(data.Order(100, 7, seed=2)(0), first[0])

    def test_the_stream_is_pinned(self):
        # Resuming a run under another NumPy must find the same batches.
        np.testing.assert_array_equal(data.Order(10, 10, seed=0)(0), PINNED[0])
        np.testing.assert_array_equal(data.Order(10, 10, seed=5)(3), PINNED[1])

    @pytest.mark.parametrize(
        ("samples", "batch", "seed", "message"),
        [(5, 6, 0, "must lie in 1 … 5"), (5, 0, 0, "batch_size is 0"), (5, 1, -1, "seed is -1")],
    )
    def test_refusals(self, samples, batch, seed, message):
        with pytest.raises(ValueError, match=message):
            data.Order(samples, batch, seed)

    @pytest.mark.parametrize("window", [1, 3, 100])
    def test_buckets_hold_similar_lengths_of_the_very_samples(self, window):
        lengths = np.random.default_rng(0).integers(1, 50, 103)
        plain = data.Order(103, 4, seed=3)
        plan = data.Buckets(lengths, 4, seed=3, window=window)
        assert plan.steps_per_epoch == plain.steps_per_epoch == 25
        epochs = []
        for epoch in range(2):
            steps = range(25 * epoch, 25 * (epoch + 1))
            batches = np.stack([plan(step) for step in steps])
            taken = np.concatenate([plain(step) for step in steps])
            assert sorted(batches.ravel()) == sorted(taken)
            spread = np.ptp(lengths[batches], axis=1).sum()
            assert spread <= sum(np.ptp(lengths[plain(step)]) for step in steps)
            epochs.append(batches)
        assert (epochs[0] != epochs[1]).any()
        again = data.Buckets(lengths, 4, seed=3, window=window)
        np.testing.assert_array_equal(again(30), plan(30))
        if window == 100:
            low, high = lengths[epochs[0]].min(axis=1), lengths[epochs[0]].max(axis=1)
            order = np.lexsort([high, low])
            assert (high[order][:-1] <= low[order][1:]).all()

    def test_buckets_refuse(self):
        lengths = np.arange(1, 6)
        with pytest.raises(ValueError, match="batch_size is 6; for 5 samples"):
            data.Buckets(lengths, 6)
        with pytest.raises(ValueError, match="window is 0; it must be at least 1"):
            data.Buckets(lengths, 2, window=0)

    def test_samples_are_held_out_in_the_same_way_each_time(self, tmp_path):
        table = data.Table({"images": np.arange(20).reshape(20, 1, 1, 1), "labels": np.arange(20)})
        rest, aside = data.hold_out(table, 5)
        numbers = [each.columns["labels"] for each in (rest, aside)]
        assert len(aside) == 5 and sorted(np.concatenate(numbers)) == [*range(20)]
        assert isinstance(rest.columns["images"], np.ndarray)
        np.testing.assert_array_equal(rest[:]["images"].ravel(), rest[:]["labels"])
        again = data.hold_out(table, 5)[1]
        np.testing.assert_array_equal(again[:]["labels"], aside[:]["labels"])
        other = data.hold_out(table, 5, seed=1)[1]
        assert not np.array_equal(other[:]["labels"], aside[:]["labels"])
        TestFolders().make(tmp_path)  # files stay files, decoded when asked for
        found = data.load(tmp_path).train
        rest, aside = data.hold_out(found, 1)
        assert isinstance(aside.columns["images"], data.Rows) and len(rest) == 3
        both = np.concatenate([rest[:]["images"], aside[:]["images"]])
        assert sorted(both[:, 0, 0, 0].tolist()) == [0, 10, 100, 110]
        for count in (0, 20):
            with pytest.raises(ValueError, match=f"count is {count}"):
                data.hold_out(table, count)

    def test_evaluation_batches_cover_everything_once(self):
        table = data.Table({"images": np.arange(7).reshape(7, 1, 1, 1), "labels": np.arange(7)})
        found = list(data.batches(table, 3))
        assert {batch["images"].shape for batch, _ in found} == {(3, 1, 1, 1)}
        seen = np.concatenate([batch["labels"][weights > 0] for batch, weights in found])
        np.testing.assert_array_equal(seen, np.arange(7))
        assert sum(weights.sum() for _, weights in found) == 7
        with pytest.raises(ValueError, match="batch_size is 0"):
            next(data.batches(table, 0))


class TestTable:
    @pytest.mark.parametrize(
        "columns", [{}, {"a": np.zeros(0)}, {"a": np.zeros(2), "b": np.zeros(3)}]
    )
    def test_columns_have_one_length(self, columns):
        with pytest.raises(ValueError, match="all of the same length"):
            data.Table(columns)

    def test_rows_of_any_column_are_taken_as_it_reads_them(self):
        class Squares:
            """A column that computes; it has no arrays to slice."""

            def __len__(self):
                return 6

            def __getitem__(self, index):
                return np.arange(6)[index] ** 2

        table = data.Table({"n": np.arange(6), "square": Squares()})
        part = table.take(np.array([5, 2, 4])).take(slice(1, None))
        assert part[:]["square"].tolist() == [4, 16] and part[:]["n"].tolist() == [2, 4]
        assert part[np.array([1])]["square"].tolist() == [16]
        assert len(table.take(table.columns["n"] > 3)) == 2
        assert data.stacked([table[:2], table[2:4]])["n"].tolist() == [[0, 1], [2, 3]]


class TestAugment:
    @pytest.fixture
    def images(self):
        return jnp.asarray(RNG.integers(0, 256, (16, 12, 10, 3), dtype=np.uint8))

    @pytest.mark.parametrize("name", data.POLICIES)
    def test_policies_are_pure_and_keep_bytes(self, images, key, name):
        apply = jax.jit(data.policy(name, (8, 8)))
        out = apply(key, images)
        assert out.shape == (16, 8, 8, 3) and out.dtype == jnp.uint8
        np.testing.assert_array_equal(out, apply(key, images))
        other = apply(jax.random.key(1), images)
        assert np.array_equal(out, other) == (name == "none")

    def test_flip_mirrors_whole_images(self, images, key):
        out = augment.flip(key, images)
        kept = (out == images).all(axis=(1, 2, 3))
        mirrored = (out == images[:, :, ::-1]).all(axis=(1, 2, 3))
        assert bool((kept ^ mirrored).all())
        assert 0 < int(mirrored.sum()) < 16

    def test_crop_shifts_within_its_padding(self, images, key):
        out = np.asarray(augment.crop(key, images, 2))
        padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
        shifts = set()
        for image, around in zip(out, padded, strict=True):
            found = [
                (i, j)
                for i in range(5)
                for j in range(5)
                if np.array_equal(image, around[i : i + 12, j : j + 10])
            ]
            assert len(found) == 1
            shifts.add(found[0])
        assert len(shifts) > 3

    def test_resized_crop_of_a_gradient_stays_inside_and_in_order(self, key):
        ramp = np.broadcast_to(np.arange(0, 240, 10, dtype=np.uint8)[None, :, None], (24, 24, 3))
        out = np.asarray(augment.resized_crop(key, jnp.asarray(ramp)[None].repeat(8, 0), (6, 6)))
        assert (np.diff(out[:, 0, :, 0].astype(int), axis=1) >= 0).all()
        assert out.max() <= 230
        spans = out[:, 0, -1, 0].astype(int) - out[:, 0, 0, 0]
        assert spans.min() < 150 < spans.max() + 60  # cuts of different sizes

    def test_zooms_keep_a_third_of_the_image(self, key):
        """Of a ramp from left to right a cut shows its width, of one downwards its height."""
        side = np.arange(0, 240, 5, dtype=np.uint8)
        ramps = np.stack(np.broadcast_arrays(side[None, :], side[:, None]), axis=-1)[None]
        images = jnp.asarray(np.concatenate([ramps, ramps[..., :1]], axis=-1).repeat(64, 0))

        def shares(name):
            out = np.asarray(data.policy(name, (24, 24))(key, images)).astype(int)
            wide = np.abs(out[:, 12, -1, 0] - out[:, 12, 0, 0])
            high = out[:, -1, 12, 1] - out[:, 0, 12, 1]
            # 24 middles of pixels span 23/24 of a cut, and the whole ramp is 235.
            return (wide * high) * (24 / 23) ** 2 / 235**2

        assert shares("zoom-flip").min() > 0.3  # rounding to bytes costs up to a tenth
        assert shares("resized-crop").min() < 0.25

    def test_resize_keeps_a_constant(self):
        out = data.resize(jnp.full((1, 9, 9, 1), 77, jnp.uint8), (4, 13))
        assert out.shape == (1, 4, 13, 1)
        assert bool((out == 77).all())

    def test_unknown_policy(self):
        with pytest.raises(ValueError, match="must be one of none, crop"):
            data.policy("mixup", (8, 8))
