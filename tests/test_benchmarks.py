"""The benchmarks run, compare what they say they compare, and write figures down beside the others."""

import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def test_what_is_timed_computes_the_same(capsys):
    import attention

    runs = attention.runs(80)
    with torch.no_grad():
        plain, idle = runs["plain"]().logits, runs["idle"]()
        assert torch.equal(plain, idle)
        assert torch.equal(runs["cache_z"]()[0], plain)
        torch.testing.assert_close(runs["pattern"]()[0], plain, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(runs["explicit"](), runs["fused"](), atol=1e-5, rtol=1e-4)
        assert runs["ram_all_queries"]().sizes["set"] == 8
        rows = runs["ram_rows"]()[0]
    assert rows.shape == (1, 2, 4, 8) and (rows > 0).all()


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-onevision-7b", "qwen2.5-vl-7b", "qwen3-vl-8b"])
def test_published_sizes_keep_depth_and_heads_when_narrow(name):
    import fullsize

    full, narrow = (fullsize.config_of(name, flag) for flag in (False, True))
    for field in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        assert getattr(full.text_config, field) == getattr(narrow.text_config, field)
    assert narrow.text_config.hidden_size == 16 * narrow.text_config.num_attention_heads < full.text_config.hidden_size


def test_figures_are_added_to_the_others_and_the_page_shows_them(tmp_path, capsys):
    import record

    path = tmp_path / "results.json"
    record.record("b", 1.5, what="sweep", unit="x", compared_with="plain", bar="<= 1.2", path=path)
    record.record("a", 50, what="mass", unit="x less", compared_with="eager", bar=">= 40", path=path)
    record.record("b", 1.1, what="sweep", unit="x", compared_with="plain", bar="<= 1.2", path=path)
    found = json.loads(path.read_text())
    assert list(found) == ["a", "b"] and found["b"]["value"] == 1.1
    assert {"machine", "versions", "date", "command", "bar", "unit", "compared_with"} <= set(found["a"])
    assert "NOT MET" in capsys.readouterr().out
    assert "| `a` | mass | 50.0 x less | >= 40 met | eager |" in record.table(found)


def test_the_page_shows_the_figures_that_are_on_file():
    import record

    results = json.loads(record.RESULTS.read_text(encoding="utf-8"))
    assert all(entry["what"] for entry in results.values())
    assert record.PAGE.read_text(encoding="utf-8").endswith(record.table(results))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::mech.sparse.policy.StillDense")  # so short a prompt gains nothing
@pytest.mark.parametrize("section", ["layer", "sweep", "ram", "prefill", "decode"])
def test_every_section_of_the_gpu_bench_runs_at_toy_size_on_a_cpu(section):
    import gpu

    with torch.no_grad():
        rows = list(gpu.SECTIONS[section](gpu.Bench(dry=True, device="cpu", seconds=0)))
    assert rows and all(row.value > 0 and row.name.startswith(section) for row in rows)
    assert any(row.goal for row in rows)


def test_a_section_that_fails_or_takes_too_long_leaves_the_others(tmp_path, monkeypatch, capsys):
    import gpu

    def in_a_process(name, given):
        row = {
            "name": "ram_600",
            "what": "RAM",
            "value": 1.3,
            "unit": "x",
            "goal": "<= 1.15",
            "compared_with": "one forward",
        }
        return ([row], "") if name == "ram" else ([], "out of its 1 seconds")

    monkeypatch.setattr(gpu, "in_a_process", in_a_process)
    monkeypatch.setattr("sys.argv", ["gpu.py", "--dry", "--only", "layer", "ram", "--out", str(tmp_path / "gpu.json")])
    gpu.main()
    written = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert written["ended_early"] == {"layer": "out of its 1 seconds"} and written["rows"][0]["met"] is False
    assert {"card", "versions", "command", "date"} <= set(written) and "NOT MET" in capsys.readouterr().out


def test_without_a_gpu_one_sentence_says_that_nothing_was_measured(tmp_path, monkeypatch):
    import gpu

    monkeypatch.setattr("sys.argv", ["gpu.py", "--out", str(tmp_path / "gpu.json")])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    assert str(stop.value).startswith("nothing was measured: torch") and "sees no GPU" in str(stop.value)
    assert "\n" not in str(stop.value) and not list(tmp_path.iterdir())


def test_sections_that_end_early_are_named_and_what_they_had_is_kept(tmp_path, monkeypatch, capsys):
    """Real processes: one that is killed as a card out of memory would be, one that hangs, and one that gets done."""
    import gpu

    (tmp_path / "section.py").write_text(
        "import json, os, pathlib, sys, time\n"
        "given = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "name, out = given['--section'], pathlib.Path(given['--out'])\n"
        "row = dict(name=name + '_1', what='x', value=2.0, unit='x', goal='>= 1', compared_with='y', details={})\n"
        "out.write_text(json.dumps([row]))\n"
        "if name == 'ram': sys.exit('torch.OutOfMemoryError: CUDA out of memory.')\n"
        "if name == 'prefill': os.kill(os.getpid(), 9)\n"
        "if name == 'sweep': time.sleep(60)\n"
    )
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "section.py"))
    monkeypatch.setattr(
        "sys.argv", ["gpu.py", "--dry", "--limit", "2", "--only", "ram", "prefill", "sweep", "layer", "--out", str(out)]
    )
    gpu.main()
    written = json.loads(out.read_text(encoding="utf-8"))
    assert [row["name"] for row in written["rows"]] == ["ram_1", "prefill_1", "sweep_1", "layer_1"]
    assert written["ended_early"] == {
        "ram": "exit code 1: torch.OutOfMemoryError: CUDA out of memory.", "prefill": "exit code -9",
        "sweep": "out of its 2.0 seconds",
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert "ended early" in shown and "CUDA out of memory" in shown


def test_the_sections_take_no_more_than_eight_minutes():
    import gpu

    assert gpu.LIMITS.keys() == gpu.SECTIONS.keys() and sum(gpu.LIMITS.values()) <= 8 * 60


def test_a_ratio_is_the_median_over_turns():
    import record

    times = record.interleaved({"one": lambda: None, "two": lambda: None}, seconds=0, least=3)
    assert [len(times[name]) for name in ("one", "two")] == [3, 3]
    assert record.ratio({"a": [2.0, 9.0, 4.0], "b": [1.0, 1.0, 2.0]}, "a", "b") == 2.0
