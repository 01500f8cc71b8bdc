"""What a contract with vLLM's source can say, and how it is checked."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tests.seams.source import Definition, Source, defines, mentioned

#: class:    there is a class of this name, derived from `wants` if that is given.
#: value:    there is a value of this name in the module.
#: call:     we call it with `wants`: those before `*` by position, those after it by keyword.
#: replace:  we put a function of our own in its place, whose parameters are exactly `wants`.
#: has:      its objects have the members `wants`, fields or methods; "a|b" is satisfied by either.
#: lacks:    they have none of them.
#: says:     its definition names all of `wants`, in code or as strings.
#: only:     of the classes derived from its owner, none but `wants` define this member anew.
Kind = Literal["class", "value", "call", "replace", "has", "lacks", "says", "only"]


@dataclass(frozen=True)
class Seam:
    """One thing of vLLM's that we rely on.

    Attributes:
        kind: see `Kind`.
        module: where we import it from.
        name: in the module; with dots for members.
        wants: see `Kind`.
        used_by: our files, separated by blanks; in vllm_moecxl/integration where only a module is named.
        why: what we do with it.
    """

    kind: Kind
    module: str
    name: str
    wants: str
    used_by: str
    why: str

    @property
    def names(self) -> set[str]:
        """The names that this contract answers for: the seam's own, and those of what it wants of it."""
        own = {self.name.rpartition(".")[2]}
        return own | {name for want in self.wants.split() for name in want.split("|")} if self.is_list else own

    @property
    def files(self) -> list[str]:
        """Our files that use it, as paths in the repository."""
        return [
            file if "/" in file or not file.endswith(".py") else f"vllm_moecxl/integration/{file}"
            for file in self.used_by.split()
        ]

    @property
    def is_list(self) -> bool:
        return self.kind in ("has", "lacks", "says", "only")


def broken(source: Source, release: str, seams: tuple[Seam, ...]) -> str:
    """All broken seams of a release in one message; empty if there are none."""
    lines = []
    for seam in seams:
        for expected, there in _differences(source, seam):
            lines.append(
                f"  {seam.module}: {seam.name}\n"
                f"    expected: {expected}\n"
                f"    there is: {there}\n"
                f"    used by:  {', '.join(seam.files)} to "
                f"{seam.why}"
            )
    if not lines:
        return ""
    return f"vLLM {release} breaks {len(lines)} seam(s) that vllm_moecxl relies on:\n" + "\n".join(lines)


def _differences(source: Source, seam: Seam) -> Iterator[tuple[str, str]]:
    """(expected, there is) of each difference between a seam and the source."""
    definition = source.find(seam.module, seam.name)
    if definition is None:
        yield f"a {seam.kind if seam.kind in ('class', 'value') else 'definition'} of this name", _nearest(source, seam)
        return
    match seam.kind:
        case "value":
            return
        case "class":
            if not isinstance(definition.node, ast.ClassDef):
                yield "a class", f"something else at {definition}"
            elif seam.wants:
                bases = [base.node.name for base in source.bases(definition) if isinstance(base.node, ast.ClassDef)]
                if seam.wants not in bases:
                    yield f"a class derived from {seam.wants}", f"derived from {bases} at {definition}"
        case "call" | "replace":
            yield from _parameter_differences(source, seam, definition)
        case "has" | "lacks":
            yield from _member_differences(source, seam, definition)
        case "says":
            absent = [want for want in seam.wants.split() if want not in mentioned(definition.node)]
            if absent:
                yield f"{', '.join(absent)} in its definition", f"no such word at {definition}"
        case "only":
            owner, _, member = seam.name.rpartition(".")
            for derived in source.derived(owner):
                assert isinstance(derived.node, ast.ClassDef)
                if derived.node.name not in seam.wants.split() and defines(derived.node, member):
                    yield f"no class that defines {member} anew but {seam.wants}", f"{derived.node.name} at {derived}"


def _nearest(source: Source, seam: Seam) -> str:
    """What there is instead of a name: the module, or the class without the member."""
    owner, _, _ = seam.name.rpartition(".")
    if owner and (definition := source.find(seam.module, owner)) is not None:
        return f"{owner} without it at {definition}"
    if (module := source.find_module(seam.module)) is not None:
        return f"a module without it at {module}"
    return "no such module"


def _member_differences(source: Source, seam: Seam, definition: Definition) -> Iterator[tuple[str, str]]:
    for want in seam.wants.split():
        found = [source.find(seam.module, f"{seam.name}.{name}") for name in want.split("|")]
        if seam.kind == "has" and not any(found):
            yield f"a member {want.replace('|', ' or ')}", f"{seam.name} without it at {definition}"
        if seam.kind == "lacks" and any(found):
            yield f"no member {want}", f"one at {found[0]}"


def _parameter_differences(source: Source, seam: Seam, definition: Definition) -> Iterator[tuple[str, str]]:
    function = definition
    if isinstance(definition.node, ast.ClassDef):
        constructor = source.find(seam.module, f"{seam.name}.__init__")
        if constructor is None:
            yield f"a constructor that takes ({seam.wants})", f"none at {definition}"
            return
        function = constructor
    if not isinstance(function.node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield f"a function that takes ({seam.wants})", f"something else at {function}"
        return
    wanted, there = _arguments(f"def _({seam.wants}): ..."), function.node.args
    is_bound = function.is_member and "staticmethod" not in {ast.unparse(d) for d in function.node.decorator_list}
    positional = [argument.arg for argument in (*there.posonlyargs, *there.args)][1 if is_bound else 0 :]
    wanted_positional = [argument.arg for argument in wanted.args]
    wanted_keywords = [argument.arg for argument in wanted.kwonlyargs]
    shown = f"({ast.unparse(there)}) at {function}"
    if seam.kind == "replace":
        keywords = [argument.arg for argument in there.kwonlyargs]
        is_open = (there.vararg is None, there.kwarg is None) != (wanted.vararg is None, wanted.kwarg is None)
        if (positional, keywords) != (wanted_positional, wanted_keywords) or is_open:
            yield f"exactly the parameters ({seam.wants})", shown
        return
    optional = set(positional[len(positional) - len(there.defaults) :] if there.defaults else ())
    optional |= {a.arg for a, default in zip(there.kwonlyargs, there.kw_defaults, strict=True) if default is not None}
    named = {*positional, *(argument.arg for argument in there.kwonlyargs)}
    given = {*wanted_positional, *wanted_keywords}
    fits = (
        (positional[: len(wanted_positional)] == wanted_positional or there.vararg is not None)
        and (set(wanted_keywords) <= named or there.kwarg is not None)
        and named - optional <= given
    )
    if not fits:
        yield f"that it can be called with ({seam.wants})", shown


def _arguments(text: str) -> ast.arguments:
    [function] = ast.parse(text).body
    assert isinstance(function, ast.FunctionDef)
    return function.args
