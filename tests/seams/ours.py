"""What our integration takes from vLLM, found in its own source: imports, patches, attributes and names in lists."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
INTEGRATION = ROOT / "vllm_moecxl" / "integration"

#: How our code calls objects of vLLM's, and the functions that give them: what is read from one is read from vLLM.
VLLM_OBJECTS = frozenset(
    {
        *("vllm_config", "model_config", "load_config", "parallel", "cache", "scheduler", "compilation", "offload"),
        *(
            "layer",
            "method",
            "moe_config",
            "gate",
            "loader",
            "arguments",
            "executor",
            "fused_experts",
            "forward_context",
        ),
        *("get_forward_context", "get_current_vllm_config", "get_layerwise_info", "vllm", "envs"),
        *("runner", "scheduled", "cached", "batch", "worker", "world", "tensor_parallel", "pipeline"),
    }
)
#: Members of such objects that are torch's, Python's or ours.
NOT_VLLMS = frozenset(
    {
        *("_parameters", "get_parameter", "named_parameters", "named_children", "parameters", "weight", "bias"),
        *("items", "get", "astype", "device", "type"),
    }
)


def imports(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(file, module, name) of everything that is imported from vLLM."""
    for file, tree in _files(folder):
        yield from _imports_of(file, tree)


def _imports_of(file: str, tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] == "vllm":
                yield from ((file, module, alias.name) for alias in node.names)
            case ast.Import():
                for alias in node.names:
                    module, _, name = alias.name.rpartition(".")
                    if module.partition(".")[0] == "vllm":
                        yield file, module, name


def patched(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(file, owner, name) of each function that `patches._wrap` replaces."""
    for file, tree in _files(folder):
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef):
                continue
            lists = {
                node.target.id: [c.value for c in ast.walk(node.iter) if isinstance(c, ast.Constant)]
                for node in ast.walk(function)
                if isinstance(node, ast.For) and isinstance(node.target, ast.Name)
            }
            for node in ast.walk(function):
                match node:
                    case ast.Call(func=ast.Name(id="_wrap"), args=[owner, ast.Constant(value=str(name)), _]):
                        yield file, ast.unparse(owner), name
                    case ast.Call(func=ast.Name(id="_wrap"), args=[owner, ast.Name(id=variable), _]):
                        yield from ((file, ast.unparse(owner), str(name)) for name in lists[variable])


def attributes(folder: Path) -> Iterator[tuple[str, str]]:
    """(file, name) of each attribute that is read from one of `VLLM_OBJECTS`, from `self` in a class that is derived
    from vLLM's, or set there; by dots or by `getattr`."""
    for file, tree in _files(folder):
        yield from ((file, name) for name in _inherited(tree))
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(value=owner, attr=name) if _root(owner) in VLLM_OBJECTS:
                    yield file, name
                case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[owner, ast.Constant(value=str(name)), *_]):
                    if _root(owner) in VLLM_OBJECTS:
                        yield file, name


def _inherited(tree: ast.Module) -> Iterator[str]:
    """What classes that are derived from vLLM's take from `self` or `super()` and have not defined themselves."""
    vllms = {name for _, _, name in _imports_of("", tree)}
    for owner in ast.walk(tree):
        if not isinstance(owner, ast.ClassDef) or not {ast.unparse(base) for base in owner.bases} & vllms:
            continue
        own = {node.name for node in owner.body if isinstance(node, ast.FunctionDef)}
        own |= {ast.unparse(node.target) for node in owner.body if isinstance(node, ast.AnnAssign)}
        for node in ast.walk(owner):
            match node:
                case ast.Attribute(value=ast.Name(id="self"), attr=name) if name not in own:
                    yield name
                case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=name):
                    yield name


def listed_names(folder: Path) -> Iterator[tuple[str, str]]:
    """(file, string) of each string in a module's constant sets and tuples: names of vLLM's classes and choices."""
    for file, tree in _files(folder):
        for statement in tree.body:
            if isinstance(statement, ast.Assign) and _is_collection(statement.value):
                for node in ast.walk(statement.value):
                    if isinstance(node, ast.Constant) and isinstance(node.value, str):
                        yield file, node.value


def _is_collection(node: ast.expr) -> bool:
    match node:
        case ast.Call(func=ast.Name(id="frozenset")) | ast.Tuple() | ast.BinOp():
            return True
    return False


def _root(node: ast.expr) -> str:
    """The variable or function that a chain of attributes, subscripts and calls starts from, "" for anything else."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _files(folder: Path) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(folder.glob("*.py")):
        yield path.name, ast.parse(path.read_text(encoding="utf-8"))
