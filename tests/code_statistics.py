"""Counts figures by which the readability of the package is judged.

    python tests/code_statistics.py

Prints the modules next to the package's folders, its lines (in all, and without docstrings,
comments and blank lines), functions of more than 60 lines, imports of private modules, and the
share of function docstrings that begin with a verb.
"""

import ast
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.helpers.imports import import_graph, list_modules, private_imports  # noqa: E402

MAX_FUNCTION_LINES = 60
# The verbs that first lines of docstrings begin with; a missing one is added here.
_VERBS = frozenset(
    [
        "accumulate",
        "add",
        "allow",
        "append",
        "apply",
        "arrange",
        "attend",
        "average",
        "bind",
        "bin",
        "build",
        "call",
        "cast",
        "check",
        "choose",
        "claim",
        "clip",
        "close",
        "collect",
        "combine",
        "compare",
        "compile",
        "complete",
        "compose",
        "compress",
        "compute",
        "connect",
        "convert",
        "convolve",
        "copy",
        "count",
        "create",
        "crop",
        "decide",
        "decode",
        "delay",
        "delete",
        "describe",
        "detect",
        "disable",
        "divide",
        "do",
        "download",
        "draw",
        "drop",
        "embed",
        "enable",
        "encode",
        "end",
        "enter",
        "evaluate",
        "exchange",
        "exclude",
        "exit",
        "expand",
        "export",
        "extract",
        "feed",
        "fill",
        "filter",
        "find",
        "finish",
        "flatten",
        "forget",
        "format",
        "free",
        "gather",
        "generate",
        "get",
        "give",
        "group",
        "handle",
        "hold",
        "ignore",
        "implement",
        "infer",
        "init",
        "initialize",
        "install",
        "join",
        "keep",
        "launch",
        "let",
        "limit",
        "list",
        "load",
        "locate",
        "lock",
        "log",
        "look",
        "lower",
        "make",
        "map",
        "mark",
        "match",
        "measure",
        "merge",
        "mirror",
        "move",
        "name",
        "normalize",
        "note",
        "open",
        "order",
        "pad",
        "paint",
        "parse",
        "perform",
        "pick",
        "place",
        "pool",
        "predict",
        "prepare",
        "print",
        "profile",
        "project",
        "pull",
        "put",
        "quiet",
        "raise",
        "rasterize",
        "read",
        "record",
        "redraw",
        "reduce",
        "refuse",
        "register",
        "release",
        "remove",
        "rename",
        "render",
        "replace",
        "report",
        "request",
        "require",
        "reshape",
        "resize",
        "restore",
        "resume",
        "return",
        "run",
        "sample",
        "save",
        "scale",
        "search",
        "select",
        "send",
        "serve",
        "set",
        "share",
        "shift",
        "show",
        "shrink",
        "shuffle",
        "sort",
        "split",
        "spread",
        "stack",
        "start",
        "stop",
        "store",
        "stretch",
        "strip",
        "sum",
        "switch",
        "take",
        "tell",
        "test",
        "tile",
        "time",
        "trace",
        "train",
        "transpose",
        "trim",
        "turn",
        "undo",
        "unstack",
        "update",
        "upgrade",
        "use",
        "validate",
        "wait",
        "warn",
        "warp",
        "watch",
        "widen",
        "wrap",
        "write",
        "yield",
    ]
)


def begins_with_verb(docstring):
    """Return whether the first word of a docstring is a verb: "Return", "Returns" or "Returns,"."""
    word = docstring.split()[0].strip(".,:;").lower()
    stems = {word, word.removesuffix("s"), word.removesuffix("es")}
    if word.endswith("ies"):
        stems.add(word.removesuffix("ies") + "y")
    return bool(stems & _VERBS)


def read_functions():
    """Yield (module, function) of every function and method of the package."""
    for name, path in list_modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield name, node


def count_code_lines(path):
    """Return the number of lines that are not blank, a comment or part of a docstring."""
    text = path.read_text()
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = enumerate(map(str.strip, text.splitlines()), start=1)
    return sum(i not in docstrings and line != "" and line[0] != "#" for i, line in lines)


def measure():
    """Return the statistics by name."""
    functions = list(read_functions())
    docstrings = [text for _, node in functions if (text := ast.get_docstring(node))]
    long = [
        f"{module}.{node.name}"
        for module, node in functions
        if node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    return {
        "modules next to the folders": len(list((ROOT / "dualpath_jax").glob("*.py"))),
        "lines": sum(len(path.read_text().splitlines()) for path in list_modules().values()),
        "lines of code": sum(map(count_code_lines, list_modules().values())),
        "functions": len(functions),
        f"functions over {MAX_FUNCTION_LINES} lines": long,
        "private imports": private_imports(import_graph()),
        "function docstrings": len(docstrings),
        "function docstrings that begin with a verb": (
            sum(map(begins_with_verb, docstrings)) / len(docstrings)
        ),
    }


if __name__ == "__main__":
    for name, value in measure().items():
        print(f"{name}: {value:.1%}" if isinstance(value, float) else f"{name}: {value}")
