"""The benchmark of embedding tables on small ones: the promised JSON."""

import json

import pytest

from benchmarks import embedding


@pytest.mark.filterwarnings("ignore")
def test_json_has_the_promised_form(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "peers_table", lambda *_: None)  # it takes seconds to import
    out = tmp_path / "out.json"
    embedding.main(["--rows", "50", "--columns", "32", "--rounds", "1", "--json", str(out)])
    results = json.loads(out.read_text())
    assert [row["name"] for row in results["results"]] == ["float", *embedding.SPECS]
    for row in results["results"]:
        assert all(row[kind] > 0 for kind in ("step", "sparse step", "evaluation", "layer"))
    assert results["results"][0]["step"] == 1
    assert results["read"] == 1024
