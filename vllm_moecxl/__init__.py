"""vllm_moecxl: serve Mixture-of-Experts models whose experts do not fit on the device, as a vLLM plugin.

Layers, imports go strictly downward: `integration` (vLLM) and `commands` -> `runtime` (dispatch) -> `data` (torch,
Linux) -> `control` (plain Python and numpy) -> vocabulary (`types`, `config`, `errors`, `units`).
"""

__version__ = "0.1.0"

from vllm_moecxl.integration.early import accept_keywords as _accept_keywords

_accept_keywords()
