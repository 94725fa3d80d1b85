"""Draw docs/how-it-works.svg: from a training with the recorder on to a model without the samples.

Run: python scripts/plot_way.py
"""

from html import escape
from pathlib import Path

WIDTH, HEIGHT = 860, 340
# Readable on white and on black: the page's own setting chooses.
STYLE = """
  .box { fill: #f4f6fa; stroke: #5b6b8c; stroke-width: 1.5; }
  .store { fill: #e3ecfb; }
  text { font: 14px system-ui, sans-serif; fill: #1c2433; text-anchor: middle; }
  .title { font-weight: 600; }
  .note { font-size: 12px; fill: #4a566e; }
  .arrow { stroke: #5b6b8c; stroke-width: 1.8; fill: none; marker-end: url(#tip); }
  #tip path { fill: #5b6b8c; }
  @media (prefers-color-scheme: dark) {
    .box { fill: #232a38; stroke: #93a4c8; }
    .store { fill: #26354f; }
    text { fill: #eef2fa; }
    .note { fill: #b9c4dc; }
    .arrow { stroke: #93a4c8; }
    #tip path { fill: #93a4c8; }
  }
"""


def box(x: int, y: int, width: int, lines: list[str], kind: str = "") -> str:
    """Return a box with a title and notes below it, its upper left corner at (x, y)."""
    height = 26 + 18 * len(lines)
    texts = "".join(
        f'<text class="{"note" if place else "title"}" x="{x + width // 2}" y="{y + 26 + 18 * place}">'
        f"{escape(line)}</text>"
        for place, line in enumerate(lines)
    )
    return f'<rect class="box {kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="8"/>{texts}'


def arrow(*points: tuple[int, int]) -> str:
    return '<polyline class="arrow" points="' + " ".join(f"{x},{y}" for x, y in points) + '"/>'


def drawing() -> str:
    kept = ["records: gradients per sample and step", "rates, clip factors, moments", "rows kept for the probe"]
    sums = ["sum of the records,", "as the optimizer used them,", "filtered by the curvature", "on the probe"]
    shapes = [
        box(20, 20, 130, ["batch", "with sample ids"]),
        box(190, 20, 130, ["model", "forward"]),
        box(360, 20, 150, ["loss.backward()", "hooks see gradients"]),
        box(550, 20, 150, ["optimizer.step()", "hooks see its scalars"]),
        arrow((150, 51), (186, 51)),
        arrow((320, 51), (356, 51)),
        arrow((510, 51), (546, 51)),
        box(300, 135, 270, ["store", *kept], "store"),
        arrow((435, 82), (435, 131)),
        arrow((625, 82), (625, 110), (500, 110), (500, 131)),
        box(20, 155, 190, ["SQL", "what did sample 17 do?"]),
        arrow((300, 184), (214, 184)),
        box(640, 135, 200, ["rollback", *sums]),
        arrow((570, 184), (636, 184)),
        box(640, 280, 200, ["model without samples"]),
        arrow((740, 251), (740, 276)),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-label="Hooks record gradients per sample into a store; SQL asks it; a rollback removes samples">'
        f"<style>{STYLE}</style>"
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L10 5 L0 10 z"/></marker></defs>' + "".join(shapes) + "</svg>\n"
    )


if __name__ == "__main__":
    (Path(__file__).parents[1] / "docs" / "how-it-works.svg").write_text(drawing())
