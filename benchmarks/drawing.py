"""How the studies draw: colours, and labels beside the ends of lines."""

from __future__ import annotations

# Okabe and Ito's, which the colour-blind tell apart; the package's methods are the thick lines.
COLOURS = ["#0072B2", "#56B4E9", "#999999", "#E69F00", "#D55E00", "#CC79A7", "#009E73", "#000000", "#8C7A00"]


def apart(heights: list[float], least: float = 0.055) -> list[float]:
    """Return ascending heights moved such that labels at them do not meet."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + least) if placed else height)
    over = max(0.0, placed[-1] - 1.0) if placed else 0.0
    for k in reversed(range(len(placed))):
        limit = placed[k + 1] - least if k + 1 < len(placed) else placed[k] - over
        placed[k] = min(placed[k], limit)
    return placed
