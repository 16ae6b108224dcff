"""What the site shows that is made when it is built: the command line's reference.

`mkdocs` calls these functions, see `hooks` in `mkdocs.yml`.
"""

import re
import subprocess
import sys
from typing import Any

from mkdocs.structure.files import File, Files


def on_files(files: Files, config: Any) -> Files:
    """Add `cli.md`: every command with its arguments and options, from the commands themselves."""
    command = ["-m", "typer", "ray_abliterate.cli.app", "utils", "docs", "--name", "ray-abliterate"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    text = re.sub(r"^# `ray-abliterate`", "# Command line", done.stdout)
    files.append(File.generated(config, "cli.md", content=text))
    return files
