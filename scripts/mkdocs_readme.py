"""The README as a page of the site: it stands outside docs/, and its links begin with docs/."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

README = Path(__file__).parents[1] / "README.md"


def on_files(files: Files, config: Any) -> Files:
    text = README.read_text().replace("](docs/", "](").replace("](CHANGELOG.md)", "](changelog.md)")
    files.append(File.generated(config, "start.md", content=text.replace("# timstore\n", "# Start\n", 1)))
    files.append(File.generated(config, "changelog.md", content=README.with_name("CHANGELOG.md").read_text()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace("](../README.md)", "](start.md)")
