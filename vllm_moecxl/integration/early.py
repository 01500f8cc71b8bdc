"""Make `LLM(moe_offload=...)` work after `import vllm_moecxl`, whichever of the two packages is imported first."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_ENGINE_ARGUMENTS = "vllm.engine.arg_utils"


def accept_keywords() -> None:
    """Teach vLLM's engine arguments our keywords: now if they are imported, else as soon as they are."""
    if _ENGINE_ARGUMENTS in sys.modules:
        _patch()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _patch() -> None:
    from vllm_moecxl.integration.options import rewrite_keywords
    from vllm_moecxl.integration.patches import patch_keywords

    patch_keywords(rewrite_keywords)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Waits for one module, lets the ordinary machinery import it, patches, and takes itself out."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _ENGINE_ARGUMENTS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run: Any = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _patch()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
