"""Everything of vLLM's that our integration relies on. A new import, patch or attribute of ours belongs in here.

Read a row as: what it is (`contract.Kind`), in which module, its name, what we want of it, and which file of ours needs
it to do what.
"""

from __future__ import annotations

from tests.seams.table_engine import ENGINE_SEAMS
from tests.seams.table_layers import LAYER_SEAMS

SEAMS = (*LAYER_SEAMS, *ENGINE_SEAMS)
