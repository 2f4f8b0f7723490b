"""A hook of MkDocs: links that leave docs/ go to the repository.

The pages are read on the web and in a checkout. There `../DESIGN.md` is a file; on the site it is none, so such a link
becomes the address of that file in the repository that `extra.repo_url` of mkdocs.yml names. A link to a file that the
checkout lacks is left as it is, which MkDocs reports.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

# The target of a Markdown link, without those of other sites and of the page itself.
_TARGET = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Rewrites the links of one page.

    Args:
        markdown: text of the page.
        page: the page, of which its place in docs/ is used.
        config: settings of the site, of which `docs_dir` and `extra.repo_url` are used.
    """
    docs = Path(config["docs_dir"])
    folder = posixpath.dirname(page.file.src_uri)

    def rewrite(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(docs.name, folder, link[1]))
        outside = path.split("/")[0] != docs.name
        if not outside or not (docs.parent / path).exists():
            return link[0]
        kind = "tree" if (docs.parent / path).is_dir() else "blob"
        return f"{config['extra']['repo_url'].rstrip('/')}/{kind}/main/{path}{link[2] or ''}"

    return _TARGET.sub(rewrite, markdown)
