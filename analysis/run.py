"""Redo the studies named on the command line, or all: `python -m analysis.run e5_kpsvd damping`."""

import importlib
import sys
import time

STUDIES = (
    "e1_kfac",
    "e2_tnt",
    "e3_mbf",
    "e4_tengrad",
    "e5_kpsvd",
    "e6_lngd",
    "e7_ekfac",
    "e8_tkfac",
    "recommended",
    "damping",
    "faster",
)


def main() -> None:
    """Run each and say how long it took."""
    for name in sys.argv[1:] or STUDIES:
        started = time.perf_counter()
        importlib.import_module(f"analysis.{name}").main()
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
