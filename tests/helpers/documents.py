"""Finds commands, links, anchors and examples in the documentation, for tests."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
_COMMAND = re.compile(r"(python|pip|bash|dualpath|scripts/\S+) ")


def _blocks(text):
    """Return lines of code: indented by four, or fenced without a language.

    A line that ends with a backslash is joined with the next one.
    """
    text = re.sub(r"```python\n.*?```", "", text, flags=re.S)
    fenced = "\n".join(re.findall(r"^```\n(.*?)^```", text, flags=re.S | re.M))
    indented = "\n".join(re.findall(r"^    (?! *[-*] )(.*)$", text, flags=re.M))
    joined = re.sub(r"\\\n *", "", f"{fenced}\n{indented}")
    return joined.splitlines()


def find_commands(path):
    """Return the commands of a page in their order; `a && b` counts as two."""
    text = path.read_text()
    prose = re.sub(r"^( {4}|```).*$", "", text, flags=re.M)
    inline = re.findall(r"`((?:python|dualpath\s[^`\s]+)\s[^`]+)`", prose)
    parts = [part for line in _blocks(text) for part in line.split(" && ")]
    parts += [" ".join(command.split()) for command in inline]
    return [command.strip() for command in parts if _COMMAND.match(command.strip())]


def find_subcommands(path):
    """Return the set of NAME in `dualpath NAME`, with or without arguments, of a page."""
    inline = re.findall(r"`dualpath ([\w-]+)[ `]", path.read_text())
    commands = (command.split() for command in find_commands(path))
    return {*inline, *(words[1] for words in commands if words[0] == "dualpath")}


def find_links(path):
    """Return (file, anchor) for each link or picture of a page that points to a file."""
    targets = re.findall(r"\]\(([^)\s]+)\)", path.read_text())
    local = [target for target in targets if not target.startswith(("http://", "https://"))]
    return [target.partition("#")[::2] for target in local]


def find_anchors(path):
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def find_example(path, name):
    """Return the parts of an example: python blocks that begin with `# file: name`, in order."""
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(), flags=re.S | re.M)
    return [block for block in blocks if block.startswith(f"# file: {name}\n")]


def find_table_messages(path):
    """Return the messages in the first column of a page's tables, with their constant parts."""
    rows = re.findall(r"^\| `([^`]+)` \|", path.read_text(), flags=re.M)
    return {row: [part.strip() for part in row.split("...") if part.strip()] for row in rows}
