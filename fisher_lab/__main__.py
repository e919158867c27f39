"""`python -m fisher_lab` is `fisher-lab`."""

from fisher_lab.cli import main

main()
