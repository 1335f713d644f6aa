"""Printed tables read back, so that they can be held against the JSON."""

import re


def lines_of(text, title):
    """The lines under the heading that begins so, up to the next blank line."""
    lines = text.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(title))
    end = next((n for n in range(start, len(lines)) if not lines[n].strip()), len(lines))
    return lines[start + 1 : end]


def columns_of(text, title, rows):
    """{label: [cells]} of a table of columns with so many rows and no empty cells; columns stand two blanks apart."""
    head, *body = lines_of(text, title)
    cells = [re.split(r"\s{2,}", line.strip()) for line in body[:rows]]
    return dict(zip(re.split(r"\s{2,}", head.strip()), zip(*cells, strict=True), strict=True))


def facts_of(text, title):
    """{name: value} of a table with a line each; lines that go on are joined, the note below is left out."""
    found, name = {}, None
    for line in lines_of(text, title):
        parts = re.split(r"\s{2,}", line, maxsplit=1)
        if parts[0] and len(parts) > 1:
            name, found[parts[0]] = parts
        elif not parts[0]:
            found[name] += f" {parts[-1]}"
    return found
