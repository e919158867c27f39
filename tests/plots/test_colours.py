"""Colours that stay apart, measured: OKLab distances, also as colour-blind people see them.

Simulation: Machado, Oliveira & Fernandes (2009), severity 1. Distance: Ottosson (2020), OKLab.
"""

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from fisher_lab.plots.style import STYLES

APART = 0.09
SEEN = {
    "by most": np.eye(3),
    "without long cones": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "without middle cones": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "without short cones": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def oklab(color, seen):
    encoded = np.array(to_rgb(color))
    low = encoded / 12.92
    high = ((encoded + 0.055) / 1.055) ** 2.4
    linear = np.where(encoded <= 0.04045, low, high)
    shown = np.clip(seen @ linear, 0, 1)
    return LAB @ np.cbrt(CONES @ shown)


def test_the_measure_of_colours_is_right():  # Ottosson's own examples, and white against black
    np.testing.assert_allclose(oklab("#ffffff", np.eye(3)), [1, 0, 0], atol=1e-3)
    np.testing.assert_allclose(oklab("#ff0000", np.eye(3)), [0.628, 0.225, 0.126], atol=1e-3)


@pytest.mark.parametrize("seen", SEEN)
def test_any_two_methods_have_colours_apart(seen):
    labs = {name: oklab(style.color, SEEN[seen]) for name, style in STYLES.items()}
    for one, two in itertools.combinations(labs, 2):
        distance = np.linalg.norm(labs[one] - labs[two])
        assert distance >= APART, f"{one} and {two}: {distance:.3f}"


def test_every_method_stands_out_from_the_paper():
    white = oklab("#ffffff", np.eye(3))
    for name, style in STYLES.items():
        assert np.linalg.norm(white - oklab(style.color, np.eye(3))) >= APART, name
