"""Definitions in a package's source files, found by reading them: nothing is imported, nothing has to be installed."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

#: How many re-exports and base classes are followed one after the other.
_STEP_COUNT_MAX = 12
#: Enough to tell which files are worth parsing.
_CLASS_HEADER = re.compile(r"^class (\w+)\(([^)]*)\)", re.MULTILINE)
_WORD = re.compile(r"\w+")


class Definition(NamedTuple):
    """Where a name is defined: its module, file, syntax, and the class that it is a member of, if it is one."""

    module: str
    path: Path
    node: ast.AST
    is_member: bool = False

    def __str__(self) -> str:
        return f"{self.path}:{getattr(self.node, 'lineno', 1)}"


class Source:
    """One release's source.

    Args:
        root: the folder that has the folder `vllm`; other packages are looked for where this Python has them.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._parsed: dict[str, tuple[Path, ast.Module] | None] = {}

    def files_read(self) -> list[Path]:
        """The files that have been looked into so far."""
        return [parsed[0] for parsed in self._parsed.values() if parsed is not None]

    def find(self, module: str, name: str, steps: int = _STEP_COUNT_MAX) -> Definition | None:
        """A class, function or value by its name in a module (with dots: a member of it); None if there is none."""
        if steps == 0 or (parsed := self._parse(module)) is None:
            return None
        path, tree = parsed
        first, _, rest = name.partition(".")
        found: Definition | None = None
        for statement in _statements(tree.body):
            if first in _defined(statement):
                found = Definition(module, path, statement)
            elif isinstance(statement, ast.ImportFrom | ast.Import):
                found = self._imported(module, path, statement, first, steps) or found
        return self._member(found, rest, steps) if found is not None and rest else found

    def derived(self, name: str) -> Iterator[Definition]:
        """The classes of the whole package that are derived, directly or not, from one of this name."""
        headers = [
            (path, match[1], set(_WORD.findall(match[2])))
            for path in sorted((self.root / "vllm").rglob("*.py"))
            for match in _CLASS_HEADER.finditer(path.read_text(encoding="utf-8"))
        ]
        family, size = {name}, 0
        while len(family) > size:
            size = len(family)
            family |= {derived for _, derived, bases in headers if family & bases}
        for path, derived, bases in headers:
            if family & bases and derived != name:
                module = ".".join(path.relative_to(self.root).with_suffix("").parts)
                if (definition := self.find(module, derived)) is not None:
                    yield definition

    def find_module(self, name: str) -> Definition | None:
        """A module by its name."""
        parsed = self._parse(name)
        return None if parsed is None else Definition(name, parsed[0], parsed[1])

    def bases(self, definition: Definition, steps: int = _STEP_COUNT_MAX) -> Iterator[Definition]:
        """The classes of the package that a class is derived from, near ones first."""
        if not isinstance(definition.node, ast.ClassDef) or steps == 0:
            return
        for base in definition.node.bases:
            name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
            if (found := self.find(definition.module, name, steps - 1)) is not None:
                yield found
                yield from self.bases(found, steps - 1)

    def _member(self, owner: Definition, name: str, steps: int) -> Definition | None:
        first, _, rest = name.partition(".")
        if isinstance(owner.node, ast.Import | ast.Module):
            return self.find(owner.module, name, steps - 1)
        found = None
        for holder in (owner, *self.bases(owner, steps - 1)):
            assert isinstance(holder.node, ast.ClassDef)
            if (node := _class_member(holder.node, first)) is not None:
                found = Definition(holder.module, holder.path, node, is_member=True)
                break
        return self._member(found, rest, steps) if found is not None and rest else found

    def _imported(
        self, module: str, path: Path, statement: ast.ImportFrom | ast.Import, name: str, steps: int
    ) -> Definition | None:
        for alias in statement.names:
            if (alias.asname or alias.name.partition(".")[0]) != name:
                continue
            if isinstance(statement, ast.Import):
                target = alias.name if alias.asname else name
                return self.find_module(target)
            origin = _absolute(module, path, statement)
            return self.find(origin, alias.name, steps - 1) or self.find_module(f"{origin}.{alias.name}")
        return None

    def _parse(self, module: str) -> tuple[Path, ast.Module] | None:
        if module not in self._parsed:
            path = self._path(module)
            self._parsed[module] = None if path is None else (path, _tree(path.read_text(encoding="utf-8")))
        return self._parsed[module]

    def _path(self, module: str) -> Path | None:
        package, *rest = module.split(".")
        if package == "vllm":
            folder: Path | None = self.root / package
        elif package == "prometheus_client":
            folder = installed_folder(package)
        else:  # nobody's business here, torch above all
            return None
        if folder is None:
            return None
        place = folder.joinpath(*rest)
        candidates = (place / "__init__.py", place.with_suffix(".py"))
        return next((path for path in candidates if path.is_file()), None)


@cache
def _tree(text: str) -> ast.Module:
    """Most files of two releases are the same."""
    return ast.parse(text)


@cache
def installed_folder(package: str) -> Path | None:
    """The folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    locations = None if spec is None else spec.submodule_search_locations
    return Path(locations[0]) if locations else None


def mentioned(node: ast.AST) -> set[str]:
    """Every name, attribute, keyword, imported name and string that occurs in a piece of syntax."""
    found: set[str] = set()
    for child in ast.walk(node):
        match child:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.Constant(value=str(name)) | ast.alias(name=name):
                found.add(name)
            case ast.keyword(arg=str(name)):
                found.add(name)
    return found


def defines(owner: ast.ClassDef, name: str) -> bool:
    """Whether a class has a member of its own, not one of a base."""
    return _class_member(owner, name) is not None


def _absolute(module: str, path: Path, statement: ast.ImportFrom) -> str:
    if not statement.level:
        return statement.module or ""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    package = package[: len(package) - (statement.level - 1)]
    return ".".join([*package, *([statement.module] if statement.module else [])])


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module or class, also those under `if`, `try` and `with`."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(statement, part, ()))


def _defined(statement: ast.stmt) -> set[str]:
    match statement:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return {name}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
        case ast.Assign(targets=targets):
            return {target.id for target in targets if isinstance(target, ast.Name)}
    return set()


def _class_member(owner: ast.ClassDef, name: str) -> ast.AST | None:
    """A method, field or attribute that methods assign to `self`; of overloads the last, which is the real one."""
    found: ast.AST | None = None
    for statement in _statements(owner.body):
        if name in _defined(statement):
            found = statement
    if found is not None:
        return found
    for node in ast.walk(owner):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=attribute, ctx=ast.Store()) if attribute == name:
                return node
            case ast.Call(func=ast.Attribute(attr="__setattr__"), args=[_, ast.Constant(value=attribute), *_]) if (
                attribute == name
            ):
                return node
    return None
