"""Print comments and docstrings of agent/ drawn at random, to be read by somebody who does not know the code.

    .venv/bin/python -m tests.prose [--seed 1] [--count 100]

Each is printed with its place. One that cannot be understood without opening another file is to be rewritten.
"""

import argparse
import ast
import io
import random
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
DIRECTIVES = ("# noqa", "# type:", "# pragma:", "#!", "# --")


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and text of each docstring and each block of comments in a file."""
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            value = getattr(statement, "value", None)
            text = value.value if isinstance(value, ast.Constant) else None
            if isinstance(statement, ast.Expr) and isinstance(text, str):
                yield statement.lineno, text
    block: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or token.string.startswith(DIRECTIVES):
            continue
        if block and token.start[0] != last + 1:
            yield first, "\n".join(block)
            block = []
        if not block:
            first = token.start[0]
        last = token.start[0]
        block.append(token.string)
    if block:
        yield first, "\n".join(block)


def main() -> None:
    """Draw and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=100)
    wanted = parser.parse_args()
    found = [
        (path.relative_to(ROOT), line, text)
        for path in sorted((ROOT / "agent").rglob("*.py"))
        for line, text in prose(path)
    ]
    draw = random.Random(wanted.seed)
    for path, line, text in sorted(draw.sample(found, min(wanted.count, len(found)))):
        print(f"{path}:{line}\n{text}\n")  # noqa: T201 - what it is for


if __name__ == "__main__":
    main()
