"""The shell blocks of a page: continuous integration runs what the page says, not a copy of it that
could differ.

python3 tests/docs/shell_blocks.py README.md 1    # the second block, as a script
"""

import re
import sys
from pathlib import Path

BLOCK = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)


def shell_blocks(page: Path) -> list[str]:
    """The text of every block marked as bash, in the order of the page."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    path, number = sys.argv[1:]
    print(shell_blocks(Path(path))[int(number)], end="")
