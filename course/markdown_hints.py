"""A Python-Markdown extension: what stands inside a note's hint is Markdown too.

A Git host reads it so. Python-Markdown takes `<details>` for raw HTML unless md_in_html is told.
The search is told to leave hints out: it must not find one that nobody asked for.
"""

import re

from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor

# Fences are gone at 25, md_in_html reads blocks of HTML at 20.
_PRIORITY = 22
_OPENING = re.compile(r"<details>(?=<summary>)")
_MARKED = '<details class="hint" markdown="1" data-search-exclude="">'


class _MarkHints(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        return [_OPENING.sub(_MARKED, line) for line in lines]


class HintsExtension(Extension):
    """Lets md_in_html into every `<details><summary>`, and keeps the search out."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Register with a Markdown instance that has md_in_html."""
        md.preprocessors.register(_MarkHints(md), "course_hints", _PRIORITY)


def makeExtension(**options) -> HintsExtension:
    """Return the extension; Python-Markdown calls this."""
    return HintsExtension(**options)
