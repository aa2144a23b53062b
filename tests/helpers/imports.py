"""Reads the imports of the package from its source, without executing anything."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = "dualpath_jax"


def list_modules(root=ROOT):
    """Return the path of each module of the package by its dotted name."""
    modules = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        modules[name.removesuffix(".__init__")] = path
    return modules


def read_imports(path, modules):
    """Return the dotted names that a file imports, also inside functions.

    `from a import b` is a.b if that is a module of the package, and a otherwise.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in modules else node.module)
    return found


def import_graph(root=ROOT):
    """Return the imports of each module of the package."""
    modules = list_modules(root)
    return {name: read_imports(path, modules) for name, path in modules.items()}


def reachable(name, graph):
    """Return everything that a module imports directly or through modules of the package."""
    seen, todo = set(), [name]
    while todo:
        for imported in graph.get(todo.pop(), ()):
            if imported not in seen:
                seen.add(imported)
                todo.append(imported)
    return seen


def private_imports(graph):
    """Return imports of a library's private modules."""
    return [
        f"{module} -> {name}"
        for module, imported in graph.items()
        for name in imported
        if name.split(".")[0] != PACKAGE
        and any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
    ]
