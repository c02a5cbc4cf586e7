"""The code blocks of Markdown pages."""

import re
import textwrap
from pathlib import Path


def blocks(page: Path, language: str = "") -> list[tuple[str, str]]:
    """(language, code) of each block in order; of one language, if given."""
    found = re.findall(r"^( *)```(\w+)\n(.*?)^ *```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [(name, textwrap.dedent(code)) for _, name, code in found if language in ("", name)]


def commands(block: str) -> list[str]:
    """The commands of a block of bash, each in one line."""
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]
