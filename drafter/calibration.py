"""The cells in which acceptance is measured: a draft token's source, its match length, its share in its context.

Invariants: the geometry is that of kernels/csrc/calibration.h; a cell is a pure function of (source class, match
length, relative weight); NUM_CELLS cells fit into int16.

The features are those of adaptive context models (PPM's secondary escape estimation): relative frequencies in rare
contexts are badly calibrated, but in the same way every time.
"""

from __future__ import annotations

import numpy as np

from slipstream.drafter.base import SOURCE_PROMPT, SOURCE_SELF, SOURCE_SHARED, SOURCE_SIBLING

SOURCE_CLASSES = ("self", "sibling", "prompt", "shared", "age 1", "age 2", "age 3-4", "age 5+")
MATCH_BUCKETS = ("1", "2", "3", "4", "5-6", "7-10", "11-20", "21+")
NUM_WEIGHT_BUCKETS = 12
CELL_SHAPE = (len(SOURCE_CLASSES), len(MATCH_BUCKETS), NUM_WEIGHT_BUCKETS)
NUM_CELLS = len(SOURCE_CLASSES) * len(MATCH_BUCKETS) * NUM_WEIGHT_BUCKETS

_MATCH_UPPER = np.array([1, 2, 3, 4, 6, 10, 20])
_CLASS_OF_SOURCE = {SOURCE_SELF: 0, SOURCE_SIBLING: 1, SOURCE_PROMPT: 2, SOURCE_SHARED: 3}


def source_class(source: int, age: int) -> int:
    """Index into SOURCE_CLASSES. source: index into SOURCE_NAMES; age: visits, for history."""
    known = _CLASS_OF_SOURCE.get(source)
    if known is not None:
        return known
    return 4 if age <= 1 else 5 if age == 2 else 6 if age <= 4 else 7


def cell(class_index: int, match_len: int, relative_weight: float) -> int:
    """The cell of a draft token. match_len: context tokens that matched; relative_weight: its share in [0, 1]."""
    match = int(np.searchsorted(_MATCH_UPPER, match_len))
    weight = min(max(int(np.float32(relative_weight) * NUM_WEIGHT_BUCKETS), 0), NUM_WEIGHT_BUCKETS - 1)
    return (class_index * len(MATCH_BUCKETS) + match) * NUM_WEIGHT_BUCKETS + weight
