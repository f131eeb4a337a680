"""Documentation that mentions no framework, and what holds for every block."""

from __future__ import annotations

import ast

from tests.conftest import find_snippets
from tests.contract.readme import test_snippet  # noqa: F401


def imported(code: str) -> set[str]:
    """Return the names that imports bind."""
    imports = [n for n in ast.walk(ast.parse(code)) if isinstance(n, (ast.Import, ast.ImportFrom))]
    return {(a.asname or a.name).split(".")[0] for node in imports for a in node.names}


def test_blocks_show_the_imports_of_what_they_use():
    """What is hidden before a block is the reader's own: a model, an optimizer, data."""
    snippets = find_snippets()
    assert sum(bool(snippet.setup) for snippet in snippets) > 10
    hidden = {
        snippet.place: (imported(snippet.setup) - imported(snippet.code))
        & {node.id for node in ast.walk(ast.parse(snippet.code)) if isinstance(node, ast.Name)}
        for snippet in snippets
    }
    assert not {place: names for place, names in hidden.items() if names}
