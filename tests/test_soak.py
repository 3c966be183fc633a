"""A short form of the standing test: `make soak` runs it in full."""

import pytest
from soak import soak


@pytest.mark.parametrize(("kills", "files"), [(1, 0), (0, 600)], ids=["kills", "poem files"])
def test_a_short_soak(kills, files, tmp_path, capsys):
    table = soak(kills, files, ["tiny"], tmp_path)
    assert table.faults.sum() == 0, f"{table.T}\n{capsys.readouterr().out}"
    assert table.iloc[0]["kills" if kills else "files"] >= (kills or files)
