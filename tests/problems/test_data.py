"""The data of the problems, and the cache of what was trained."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from fisher_lab.problems import data


class TestData:
    def test_the_first_examples_have_every_class_equally_often(self):
        _, y = data.mnist(16).train
        assert torch.equal(y.bincount(), torch.full((10,), 400))
        assert all(abs(count - 10) <= 1 for count in y[:100].bincount(minlength=10).tolist())

    def test_training_and_test_digits_are_all_of_them_and_in_range(self):
        digits = data.mnist(28)
        assert digits.train[0].shape == (4000, 1, 28, 28)
        assert digits.test[0].shape == (1000, 1, 28, 28)
        assert digits.train[0].min() == 0
        assert digits.train[0].max() == 1
        rows = torch.cat([digits.train[0], digits.test[0]]).flatten(1)
        assert len(rows.unique(dim=0)) == 5000

    @pytest.mark.parametrize("side", [0, 29])
    def test_a_side_outside_the_images_is_refused(self, side):
        with pytest.raises(ValueError, match=f"side={side}, expected 1 to 28"):
            data.mnist(side)

    def test_iris_is_standardised_on_the_training_examples(self):
        (x, y), _, _ = data.iris_sizes()
        for part in (x, y):
            torch.testing.assert_close(part.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
            torch.testing.assert_close(part.std(0), torch.ones(2), atol=1e-5, rtol=0)

    def test_the_fingerprint_sees_values_shape_and_type(self):
        a = torch.arange(6)
        prints = {data.fingerprint(b) for b in (a, a.reshape(2, 3), a.int(), a + 1, a.float())}
        assert len(prints) == 5
        assert data.fingerprint(a) == data.fingerprint(a.numpy())


class TestCache:
    @pytest.fixture(autouse=True)
    def fresh(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        self.path = tmp_path / "fisher_lab" / "a.npz"
        self.reads = 0

    def read(self):
        self.reads += 1
        return np.arange(4), np.ones(2)

    def get(self):
        x, y = data._cached("a.npz", self.read, lambda x, y: x.shape == (4,) and y.shape == (2,))
        assert np.array_equal(x, np.arange(4))
        assert np.array_equal(y, np.ones(2))

    def test_the_second_time_reads_the_cache(self):
        self.get()
        self.get()
        assert self.reads == 1
        assert [p.name for p in self.path.parent.iterdir()] == ["a.npz"]

    @pytest.mark.parametrize("content", [b"", b"PK half a file", None])
    def test_a_damaged_cache_is_replaced(self, content):
        self.get()
        self.path.write_bytes(self.path.read_bytes()[:200] if content is None else content)
        self.get()
        self.get()
        assert self.reads == 2

    def test_a_directory_that_cannot_be_written_means_no_cache(self, tmp_path):
        (tmp_path / "fisher_lab").write_text("a file in the way")
        self.get()
        self.get()
        assert self.reads == 2

    def test_an_interrupted_write_leaves_nothing(self, monkeypatch):
        def interrupted(file, **arrays):
            file.write(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(np, "savez_compressed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            self.get()
        assert list(self.path.parent.iterdir()) == []

    def test_a_cache_file_is_readable_as_any_new_file(self):
        before = os.umask(0o022)
        try:
            self.get()
        finally:
            os.umask(before)
        assert stat.S_IMODE(self.path.stat().st_mode) == 0o644

    def test_no_home_directory_means_no_cache(self, monkeypatch):
        def homeless():
            raise RuntimeError

        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", homeless)
        assert data.cache_directory() is None
        self.get()
        assert self.reads == 1

    def test_a_relative_cache_home_is_ignored(self, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", "here")
        assert data.cache_directory() == Path(os.path.expanduser("~")) / ".cache" / "fisher_lab"
