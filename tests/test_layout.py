"""The house rules that a reader relies on: rooms, names, docstrings, calls that can be followed."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ray_abliterate"
MOST_LINES = 350
MOST_FILES = 22
MOST_PARAMETERS = 6
FACADES = {
    PACKAGE / "__init__.py",
    PACKAGE / "recipe" / "__init__.py",
    PACKAGE / "evaluation" / "streaming" / "__init__.py",
    PACKAGE / "testing" / "__init__.py",
}

MODULES = {
    path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))
}


def place(path: Path, node: ast.AST | None = None) -> str:
    line = f":{node.lineno}" if isinstance(node, ast.stmt | ast.expr) else ""
    return f"{path.relative_to(ROOT)}{line}"


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def is_verb(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether typer makes a command of it, whose parameters are what a user can say."""
    return any("command" in ast.unparse(decorator) for decorator in function.decorator_list)


def is_type(node: ast.stmt) -> str | None:
    """The name of a class or type alias that a statement at a module's top level defines."""
    if isinstance(node, ast.ClassDef):
        return node.name
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    if isinstance(target, ast.Name) and re.fullmatch(r"_?[A-Z]\w*[a-z]\w*", target.id):
        return target.id
    return None


def listed(lines: list[str]) -> str:
    return "\n" + "\n".join(lines)


def test_the_top_of_the_package_is_at_most_fifteen_rooms_and_four_files() -> None:
    rooms = [p for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()]
    assert len(rooms) <= 15
    assert len([*PACKAGE.glob("*.py")]) <= 4


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    long = [f"{place(path)}: {lines}" for path, lines in lengths.items() if lines > MOST_LINES]
    assert not long, listed(long)


def test_no_room_holds_more_than_22_files() -> None:
    files: dict[Path, int] = defaultdict(int)
    for path in MODULES:
        files[path.parent] += path.name != "__init__.py"
    full = [f"{place(room)}: {count}" for room, count in files.items() if count > MOST_FILES]
    assert not full, listed(full)


def test_inner_packages_hold_a_docstring_and_no_code() -> None:
    code = [
        place(path)
        for path, tree in MODULES.items()
        if path.name == "__init__.py" and path not in FACADES and len(tree.body) > 1
    ]
    assert not code, listed(code)


def test_no_type_name_stands_for_two_things() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path, tree in MODULES.items():
        for node in tree.body:
            if name := is_type(node):
                places[name.lstrip("_")].append(place(path, node))
    twice = [f"{name}: {', '.join(where)}" for name, where in places.items() if len(where) > 1]
    assert not twice, listed(twice)


def test_no_function_name_stands_for_two_things() -> None:
    """Verbs of the command line are named as users type them."""
    places: dict[str, list[str]] = defaultdict(list)
    for path, tree in MODULES.items():
        for node in tree.body:
            if (
                isinstance(node, ast.FunctionDef)
                and not node.name.startswith("_")
                and not is_verb(node)
            ):
                places[node.name].append(place(path, node))
    twice = [f"{name}: {', '.join(where)}" for name, where in places.items() if len(where) > 1]
    assert not twice, listed(twice)


def test_more_than_six_parameters_have_a_reason() -> None:
    """The reason is a sentence of the docstring that says why there are so many parameters.

    `self` is none, nor is a verb's: those are the options of a command. `__init__` may give its
    reason in the docstring of its class.
    """
    without = []
    for path, tree in MODULES.items():
        classes = {
            child: node
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef)
            for child in node.body
        }
        for function in functions(tree):
            names = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
            count = len([n for n in names if n not in {"self", "cls"}])
            count += len(function.args.kwonlyargs)
            owner = classes.get(function)
            docs = ast.get_docstring(function) or ""
            if owner is not None and function.name == "__init__":
                docs += ast.get_docstring(owner) or ""
            if count > MOST_PARAMETERS and not is_verb(function) and "parameters" not in docs:
                without.append(f"{place(path, function)} {function.name}: {count}")
    assert not without, listed(without)


def test_docstrings_are_sentences() -> None:
    """More than four words, and a full stop at the end of the first sentence."""
    thin = []
    for path, tree in MODULES.items():
        classes = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
        for node in (tree, *classes, *functions(tree)):
            docs = ast.get_docstring(node)
            if docs is None:
                continue
            first = docs.split("\n\n")[0].strip()
            if len(docs.split()) <= 4 or not re.search(r"[.:!?)`]$", first):
                name = getattr(node, "name", "module")
                thin.append(f"{place(path, node)} {name}: {first[:70]}")
    assert not thin, listed(thin)


def test_nothing_is_called_by_a_string() -> None:
    """`getattr(thing, name)(…)` and `call("method")` end go-to-definition.

    A replica's process takes the name of a `ReplicaApi` method off the wire, in one place.
    """
    wire = PACKAGE / "cluster" / "replica_actor.py"
    strings, dispatches = [], []
    for path, tree in MODULES.items():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = node.func
            if isinstance(called, ast.Call) and ast.unparse(called.func) == "getattr":
                if not isinstance(called.args[1], ast.Constant):
                    dispatches.append(path)
            elif (
                isinstance(called, ast.Attribute)
                and called.attr
                in {"call", "map", "streams", "map_by_reference", "call_by_reference"}
                and node.args
                and isinstance(node.args[0], ast.Constant | ast.JoinedStr)
            ):
                strings.append(place(path, node))
    assert not strings, listed(strings)
    assert set(dispatches) <= {wire} and len(dispatches) <= 1


@pytest.mark.parametrize("room", ["model/engine", "ablation", "directions"])
def test_numerical_rooms_explain_their_lines(room: str) -> None:
    """Two comment lines in a hundred, or more: reasons and shapes stand where the line is."""
    lines = [
        line.strip()
        for path in MODULES
        if path.is_relative_to(PACKAGE / room)
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    comments = [line for line in lines if re.search(r"(^|\s)#\s", line)]
    assert len(comments) >= 0.02 * len(lines), f"{len(comments)} in {len(lines)}"
