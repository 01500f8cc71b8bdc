"""What `moecxl pack` refuses before vLLM is asked for anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.slabfiles import pack as write_slab_file
from vllm_moecxl.commands.main import EXIT_USAGE, main
from vllm_moecxl.errors import ConfigError
from vllm_moecxl.integration.packing import require_replaceable


def test_a_slab_file_that_is_there_is_replaced_only_when_that_is_said(tmp_path: Path) -> None:
    path = tmp_path / "model.slabs"
    write_slab_file(path)
    with pytest.raises(ConfigError, match=r"model\.slabs is there already: name another file, or add --replace"):
        require_replaceable(path, 1, replace=False)
    require_replaceable(path, 1, replace=True)


def test_what_is_no_slab_file_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "thesis.tex"
    path.write_text("dear reader")
    with pytest.raises(ConfigError, match="is no slab file, so --replace does not replace it"):
        require_replaceable(path, 1, replace=True)
    assert path.read_text() == "dear reader"


def test_each_ranks_file_is_looked_at(tmp_path: Path) -> None:
    write_slab_file(tmp_path / "model.rank1of2.slabs")
    require_replaceable(tmp_path / "model.slabs", 1, replace=False)
    with pytest.raises(ConfigError, match="rank1of2"):
        require_replaceable(tmp_path / "model.slabs", 2, replace=False)


def test_engine_arguments_are_for_pack_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["topology", "--dtype", "float32"])
    assert ended.value.code == EXIT_USAGE
    assert "unrecognized arguments: --dtype float32" in capsys.readouterr().err
