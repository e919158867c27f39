"""Measurements: rows, costs and settings of one comparison, which tables are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fisher_lab._ground.arguments import check_kind
from fisher_lab.results.rows import ALL, Cost, Row, Settings


@dataclass(frozen=True)
class Measurements:
    """What was measured, layer by layer and over all layers; see Comparison."""

    rows: tuple[Row, ...]
    costs: tuple[Cost, ...] = ()
    settings: Settings = field(default_factory=Settings)
    quantities: tuple[dict[str, Any], ...] = ()
    covariances: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        kinds = (("rows", Row), ("costs", Cost), ("quantities", dict), ("covariances", dict))
        for name, kind in kinds:
            entries = getattr(self, name)
            expected = f"a tuple of {kind.__name__}"
            check_kind(name, entries, (tuple, list), expected)
            for entry in entries:
                check_kind(name, entry, kind, expected)
        check_kind("settings", self.settings, Mapping, "a table of settings")
        # a plain table, as older code and users write it
        if not isinstance(self.settings, Settings):
            object.__setattr__(self, "settings", Settings(self.settings))

    @property
    def layers(self) -> list[str]:
        """Names of the layers measured, "(all)" not among them."""
        found = dict.fromkeys(row.layer for row in self.rows)
        found.pop(ALL, None)
        return list(found)

    @property
    def approximations(self) -> list[str]:
        """Labels of the approximations."""
        found = dict.fromkeys(row.approximation for row in self.rows)
        return list(found)

    @property
    def errors(self) -> list[str]:
        """Names of the measures."""
        found = dict.fromkeys(row.error for row in self.rows)
        return list(found)
