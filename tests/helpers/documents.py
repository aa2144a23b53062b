"""What the pages say: commands, links, anchors, examples. For test_docs.py.

Public: `ROOT`, `PAGES`, `commands`, `links`, `anchors`, `example`, `table_messages`.
"""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_COMMAND = re.compile(r"(python|pip|bash|scripts/\S+) ")


def _blocks(text):
    """Lines of code: indented by four, or fenced without a language; a backslash joins two."""
    text = re.sub(r"```python\n.*?```", "", text, flags=re.S)
    fenced = "\n".join(re.findall(r"^```\n(.*?)^```", text, flags=re.S | re.M))
    indented = "\n".join(re.findall(r"^    (?! *[-*] )(.*)$", text, flags=re.M))
    joined = re.sub(r"\\\n *", "", f"{fenced}\n{indented}")
    return joined.splitlines()


def commands(path):
    """The commands of a page, in their order; `a && b` is two."""
    text = path.read_text()
    inline = re.findall(r"`(python\s[^`]+)`", re.sub(r"^( {4}|```).*$", "", text, flags=re.M))
    found = [part for line in _blocks(text) for part in line.split(" && ")]
    found += [" ".join(command.split()) for command in inline]
    return [command.strip() for command in found if _COMMAND.match(command.strip())]


def links(path):
    """Targets of the page's links and pictures that are files: (file, anchor)."""
    targets = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    local = [target for target in targets if not target.startswith(("http://", "https://"))]
    return [target.partition("#")[::2] for target in local]


def anchors(path):
    """Of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def example(path, name):
    """The parts of an example, in their order: python blocks that begin with `# file: name`."""
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.S | re.M)
    return [block for block in blocks if block.startswith(f"# file: {name}\n")]


def table_messages(path):
    """The messages in the first column of the page's tables, each as its constant parts."""
    rows = re.findall(r"^\| `([^`]+)` \|", path.read_text(), flags=re.M)
    return {row: [part.strip() for part in row.split("...") if part.strip()] for row in rows}
