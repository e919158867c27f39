"""How the tests build a problem quickly."""

from fisher_lab import problems

SETTINGS = {"photo_patches_cnn": {"photos": "scikit-learn"}}  # the other photos need scikit-image


def quick(name, **settings):
    """A problem after very few steps."""
    return problems.load(name, **{"steps": 3, **SETTINGS.get(name, {}), **settings})
