"""What the site shows that is made when it is built; `mkdocs` calls these functions.

Three things would go stale if people wrote them: the reference of the command line, the files of
each room with what each is for, and the pages of the notebooks.
"""

import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ray_abliterate"
MOST_OUTPUT = 4_000
"""Characters of one output of a notebook's cell that its page shows."""


def on_files(files: Files, config: Any) -> Files:
    """Add the page of the command line and one for each notebook."""
    files.append(File.generated(config, "cli.md", content=_command_line()))
    for notebook in sorted((ROOT / "docs" / "examples").glob("*.ipynb")):
        page = f"examples/{notebook.stem}.md"
        files.append(File.generated(config, page, content=_notebook_page(notebook)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace `<!-- files: ROOM -->` by the files of a room and the rooms around it."""
    return re.sub(r"<!-- files: (\w+) -->", lambda match: _room(match[1]), markdown)


def _command_line() -> str:
    """Every command with its arguments and options, as markdown, from the commands themselves."""
    command = ["-m", "typer", "ray_abliterate.cli.app", "utils", "docs", "--name", "ray-abliterate"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    return re.sub(r"^# `ray-abliterate`", "# Command line", done.stdout)


def _room(room: str) -> str:
    """The files of a room, sub-rooms after it, with the first sentence of each; its neighbours."""
    lines = ["## Files", ""]
    folders = [PACKAGE / room, *sorted(p.parent for p in PACKAGE.glob(f"{room}/*/__init__.py"))]
    for folder in folders:
        if folder != PACKAGE / room:
            lines += ["", f"### `{folder.relative_to(PACKAGE)}/`", ""]
            lines += [_first_sentence(folder / "__init__.py"), ""]
        lines += ["| file | |", "|---|---|"]
        for path in sorted(folder.glob("*.py")):
            if path.name != "__init__.py":
                lines.append(f"| `{path.name}` | {_first_sentence(path)} |")
    imports = _room_imports()
    users = sorted(other for other, used in imports.items() if room in used)
    lines += ["", "## Neighbours", ""]
    lines.append(f"Imports: {_links(sorted(imports[room]))}. Imported by: {_links(users)}.")
    return "\n".join(lines)


def _links(rooms: list[str]) -> str:
    return ", ".join(f"[{room}]({room}.md)" for room in rooms) or "nothing"


def _first_sentence(path: Path) -> str:
    docs = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docs.split("\n\n")[0].replace("\n", " ").replace("|", "\\|")


@cache
def _room_imports() -> dict[str, set[str]]:
    """The rooms that each room's modules import."""
    rooms = {p.parent.name for p in PACKAGE.glob("*/__init__.py")}
    imports: dict[str, set[str]] = {room: set() for room in rooms}
    for room in rooms:
        for path in (PACKAGE / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module:
                    parts = node.module.split(".")
                    if parts[0] == PACKAGE.name and len(parts) > 1 and parts[1] in rooms - {room}:
                        imports[room].add(parts[1])
    return imports


def _notebook_page(notebook: Path) -> str:
    """A notebook's cells, and what they printed or drew when it was last run, as markdown."""
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        parts += filter(None, map(_output, cell["outputs"]))
    return "\n\n".join(parts)


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f"![output](data:image/png;base64,{''.join(data['image/png']).strip()})"
    text = "".join(output.get("text", data.get("text/plain", [])))
    return f"```text\n{text[:MOST_OUTPUT].rstrip()}\n```" if text.strip() else ""
