"""Colours of all figures, PNGs and pages alike: one colour for one meaning.

They are those of Okabe and Ito (2008), which colour-blind readers can tell apart. What differs by
colour differs by dash or marker too.
"""

from __future__ import annotations

BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
VERMILION = "#D55E00"
SKY = "#56B4E9"
PURPLE = "#CC79A7"
YELLOW = "#F0E442"
BLACK = "#000000"

GREY = "#555555"  # diagnostics and notes on white paper
PAGE_GREY = "#8A8A8A"  # on pages, which are white or near-black

SEARCH, AGGREGATION, VOTE = ORANGE, BLUE, GREEN

# for any number of things that are compared, in this order
DISTINCT = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
