"""The command line: help at once, errors in three lines, numbers as JSON."""

import errno
import json
import os
import runpy
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version

import numpy as np
import pytest

from mech.results.store import read_json


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["study", "--help"],
        ["rank", "--help"],
        ["ablate", "--help"],
        ["transfer", "--help"],
        ["patch", "--help"],
        ["paths", "--help"],
        ["explore", "--help"],
        ["view", "--help"],
        ["check", "--help"],
        ["data", "--help"],
    ],
)
def test_help_is_printed_with_examples(mech, words):
    code, out, _ = mech(*words)
    assert code == 0 and "Usage" in out
    if len(words) == 2:
        examples = out.rpartition("╯")[2]  # below the options
        assert f"mech {words[0]}" in examples
    else:
        assert "130 stopped by Ctrl-C" in out


def test_the_version_is_that_of_the_package(mech):
    code, out, _ = mech("--version")
    assert code == 0 and out.split() == ["mech", version("mech")]


def test_python_m_mech_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mech", "--version"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("mech", run_name="__main__")
    assert not stop.value.code and capsys.readouterr().out.split() == ["mech", version("mech")]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("mech rank -m ref", "reference:llava-s"),
        ("mech study -d vi", "video"),
        ("mech ab", "ablate"),
        ("mech patch --dir", "--direction"),
    ],
)
def test_the_tab_key_offers_commands_options_models_and_domains(words, offered):
    bar = {"_MECH_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    code = "import sys; sys.argv = ['mech']; from mech.cli import main; main()"
    shown = subprocess.run([sys.executable, "-c", code], env={**os.environ, **bar}, capture_output=True, text=True)
    assert offered in shown.stdout.split()


@pytest.mark.parametrize("quiet", [True, False])
def test_progress_is_on_standard_error_and_absent_when_quiet(mech, quiet):
    code, out, err = mech("paths", "--samples", "1", "--sender", "L0H2", *["--quiet"] * quiet)
    assert code == 0 and "L0H2" in out and "1/1" not in out
    assert ("1/1" in err) != quiet


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["rank", "-d", "grounds"], "use 'grounding'"),
        (["rank", "--score", "ram,rma"], "use 'ram'"),
        (["rank", "--samples", "4", "--top", "49", "-q"], "1 to 48"),
        (["rank", "-m", "reference:lava-s"], "use 'reference:llava-s'"),
        (["rank", "--out", "/nowhere/at/all.json"], "cannot be written"),
        (["ablate", "--to", "men"], "use 'mean'"),
        (["ablate", "--band", "sink"], "use 'sinks'"),
        (["rank", "-m", "reference:llava-s-seed1", "--revision", "step230"], "use 'step2300'"),
        (["rank", "-m", "reference:llava-s", "--revision", "step2300"], "leave revision out"),
        (["rank", "-m", "mech", "--revision", "step2300"], "of the folder mech"),
        (["study", "--samples", "2"], "at least 8"),
        (["study", "--revision", "step2300"], "write each as NAME@REVISION"),
        (["study", "-m", "reference:llava-s", "-m", "reference:llava-s-seed1@step230"], "use 'step2300'"),
        (["transfer", "-d", "pages"], "give --domain again"),
        (["transfer", "--to", "men"], "use 'mean'"),
        (["transfer", "--samples", "4"], "at least 8"),
        (["transfer", "--n-random", "1"], "at least 2"),
        (["patch", "--point", "attn.hook_zz"], "hook_z"),
        (["patch", "--out", "grid.gif"], "ends in .nc, .html, .png, .pdf or .svg"),
        (["paths", "--samples", "1", "--sender", "L9H2"], "L9H2"),
    ],
)
def test_mistakes_end_with_code_2_and_what_to_do(mech, words, says):
    code, out, err = mech(*words)
    assert code == 2 and says in err and "Traceback" not in err and not out


EVERY_NUMBER = """
import contextlib, inspect, io, sys
import typer
from mech import cli

WRONG = {int: ["-1"], float: ["nan", "-1", "inf"], str: [" "]}
for command in cli.app.registered_commands:
    for name, parameter in inspect.signature(command.callback).parameters.items():
        hint, option = parameter.annotation.__origin__, parameter.annotation.__metadata__[0]
        kind = next((kind for kind in WRONG if kind.__name__ in str(hint).replace("'", " ")), None)
        if not isinstance(option, typer.models.OptionInfo) or kind is None:
            continue
        if kind is str and name not in ("model", "revision", "domain", "data"):
            continue  # other words are looked up in lists that have to be loaded
        for value in WRONG[kind]:
            called = f"--{name.replace('_', '-')}"
            sys.argv = ["mech", command.callback.__name__, called, value]
            with contextlib.redirect_stderr(io.StringIO()) as said:
                try:
                    cli.main()
                except SystemExit as stop:
                    code = stop.code
            first = said.getvalue().partition(chr(10))[0]
            print(code == 2 and first.startswith(f"mech: {called}"), *sys.argv[1:], first, sep="|")
print({"torch", "numpy", "transformers"}.isdisjoint(sys.modules), "nothing heavy is imported", sep="|")
"""


def test_every_number_and_name_is_checked_before_anything_is_loaded(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", EVERY_NUMBER], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    rows = done.stdout.splitlines()
    assert len(rows) > 50 and not [row for row in rows if not row.startswith("True|")]
    assert not list(tmp_path.iterdir())  # no study, above all


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["claims", "--answer", "numbers"], "digit, number, name, sentence"),
        (["study", "--batch-size", "0"], "--batch-size 0\nExpected: at least 1"),
        (["study", "--n-random", "0"], "--n-random 0\nExpected: at least 1"),
        (["study", "--seed", "4294967296"], "at most 4294967295"),
        (["ablate", "--fraction", "1.5"], "a share between 0 and 1, or a whole number"),
        (["ablate", "--fraction", "0"], "a share between 0 and 1, or a whole number"),
        (["accelerate", "--margin", "1"], "a share between 0 and 1"),
        (["accelerate", "--out", "a.gif"], "a name that ends in .nc, .html, .png, .pdf or .svg"),
        (["view", "a.nc", "--width", "100"], "at least 200"),
        (["view", "a.nc", "--out", "a.gif"], "ends in .html, .htm, .png, .pdf or .svg"),
        (["claims", "--out", "/nowhere/at/all.json"], "cannot be written"),
    ],
)
def test_numbers_and_places_are_checked_first(mech, words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = mech(*words)
    assert code == 2 and err.startswith("mech: ") and says in err and not out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_ends_with_code_2(mech, monkeypatch, number):
    monkeypatch.setattr("mech.haystacks", lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number), "x")))
    code, _, err = mech("rank")
    assert code == 2 and f"x cannot be written ({os.strerror(number)})" in err


def test_what_others_wrote_cannot_steer_the_terminal(mech, monkeypatch):
    from mech.cli.options import print_table, progress, tell
    from mech.errors import InputError, printable

    evil = "\x1b[2J\x9b31m[red]\u202ebold\r"
    print_table(f"table of {evil}", ("name", evil), [(evil, "[/nothing]")])
    tell(evil)
    monkeypatch.setattr("mech.haystacks", lambda *_: (_ for _ in ()).throw(InputError(evil, evil, evil)))
    with progress(quiet=False) as say:
        say(evil, 1, 2)
    code, out, err = mech("rank")
    assert code == 2 and out.count("[red]") == 4 and "[red]" in err and "[/nothing]" in out
    for control in set(evil) - set(printable(evil)):
        assert control not in out + err.replace("\x1b[", "")  # of the bar's own colours
    assert "\x1b[2J" not in out + err and "\\x1b[2J" in out


def test_an_unknown_option_is_a_usage_error(mech):
    code, _, err = mech("rank", "--modle", "x")
    assert code == 2 and "--modle" in err


def without_torch(*words):
    """What a command says where torch cannot be imported: code and standard error."""
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['mech', *sys.argv[1:]]; from mech.cli import main; main()"
    )
    ran = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    return ran.returncode, ran.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["accelerate", "--samples", "8"],
        ["accelerate", "--n", "8"],
        ["ablate", "--n", "7"],
        ["ablate", "--to", "meen"],
        ["ablate", "--band", "tob"],
        ["ablate", "--positions", "lost"],
        ["transfer", "--to", "noise"],
        ["accelerate", "--choice", "rams"],
        ["patch", "--direction", "up"],
        ["study", "--n", "2"],
        ["view", "grid.html"],
        ["view", "no-such-file.nc"],
    ],
    ids=" ".join,
)
def test_a_mistake_is_told_before_anything_heavy_is_imported(words):
    code, err = without_torch(*words)
    assert code == 2 and err.startswith("mech: ") and err.count("\n") == 3 and "Expected: " in err


def test_the_words_of_the_options_are_the_librarys():
    from mech.data.answers import ANSWERS
    from mech.experiments.ablation.ablation import BANDS
    from mech.experiments.patching.activation import DIRECTIONS
    from mech.interventions import METHODS, POSITIONS
    from mech.sparse.frontier.acceleration import CHOICES

    options = import_module("mech.cli.options")  # the package has a function of that name
    assert (options.METHODS, options.POSITIONS, options.BANDS) == (METHODS, POSITIONS, BANDS)
    assert (options.CHOICES, options.DIRECTIONS) == (CHOICES, DIRECTIONS)
    assert options.ANSWERS == ANSWERS


def test_samples_are_called_n_too(mech):
    code, out, _ = mech("rank", "--n", "4", "--top", "2", "-q")
    assert code == 0 and "4 samples" in out
    for command in ("study", "ablate", "transfer", "patch", "paths", "accelerate", "claims"):
        code, _, err = mech(command, "--n", "0")
        assert code == 2 and "--samples 0" in err


@pytest.mark.parametrize("name", ["grid.html", "grid.png", "figure.pdf"])
def test_a_picture_is_not_viewed_but_left_alone(mech, tmp_path, name):
    path = tmp_path / name
    path.write_text("a page")
    code, _, err = mech("view", str(path))
    assert code == 2 and "not a result" in err and "open it" in err and "delete" not in err
    assert path.read_text() == "a page"


def test_an_interrupt_ends_with_130(mech, monkeypatch):
    monkeypatch.setattr("mech.haystacks", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    code, _, err = mech("rank")
    assert code == 130 and "resumes when the same command" in err


def test_rank_prints_a_table_or_json_and_writes_the_ranking(mech, tmp_path):
    code, out, _ = mech("rank", "--samples", "6", "--top", "3", "-q")
    assert code == 0 and "95% over samples" in out and out.count("L") >= 3 and "null: even attention" in out
    assert out.startswith("Caution. ram: Unstable top set")  # six samples: said before the table
    path = tmp_path / "heads.json"
    code, out, err = mech("rank", "--samples", "6", "--json", "--out", str(path))
    assert code == 0 and err == ""
    assert json.loads(out) == read_json(path)
    assert len(json.loads(out)["heads"]) == 48 and json.loads(out)["cautions"]
    null = json.loads(out)["null"]
    assert np.shape(null["even"]) == np.shape(null["elsewhere"]) == (6, 8) and 0 < np.ptp(null["elsewhere"]) < 0.2
    np.testing.assert_allclose(null["even"], null["even"][0][0], atol=1e-6)  # the same of every head


def test_rank_by_several_scores_prints_and_writes_how_far_they_agree(mech, tmp_path):
    words = ["rank", "--samples", "6", "--top", "3", "--score", "ram, vera"]
    code, out, _ = mech(*words, "-q")
    assert code == 0 and "share of visual attention mass" in out
    assert "Rank correlation" in out and "Jaccard of the top 3, by chance" in out
    path = tmp_path / "scores.json"
    code, out, _ = mech(*words, "--json", "--out", str(path))
    found = json.loads(out)
    assert found == read_json(path) and list(found["rankings"]) == ["ram", "vera"]
    assert found["agreement"]["scores"] == ["ram", "vera"] and found["agreement"]["spearman"][0][0] == 1
    assert found["agreement"]["jaccard_low"][0][1] <= found["agreement"]["jaccard_high"][0][1]


def test_a_study_prints_its_findings_or_the_summary(mech, tmp_path):
    words = [
        "-m",
        "reference:llava-s",
        "-d",
        "grounding",
        "--samples",
        "8",
        "--n-random",
        "2",
        "-o",
        str(tmp_path / "s"),
    ]
    code, out, err = mech("study", *words)
    assert code == 0 and "report.html" in "".join(out.split())
    assert "in 1 of 1 setting (llava-s on grounding)" in " ".join(out.split())
    assert "ablation" in err  # the progress
    code, out, err = mech("study", *words, "--json")
    assert code == 0 and json.loads(out)["schema"] == 1 and err == ""


def test_rank_exports_every_score_for_others(mech, tmp_path):
    path = tmp_path / "heads.json"
    words = ["rank", "--samples", "4", "--top", "3", "-q", "--score", "ram,gaze", "--export", str(path)]
    assert mech(*words)[0] == 0
    found = read_json(path)
    assert found["kind"] == "heads" and list(found["scores"]) == ["ram", "gaze"] and found["n_top"] == 3
    assert len(found["scores"]["gaze"]["top"]) == 3 and len(found["model"]["weights"]) == 64
    assert mech("view", str(path), "--out", str(tmp_path / "heads.html"))[0] == 0
    code, _, err = mech("ablate", "--heads", str(path), "-m", "reference:llava-s-seed1", "--seed", "3", "-q")
    assert code == 2 and "another training" in err
    code, _, err = mech("rank", "--export", str(tmp_path / "heads.txt"))
    assert code == 2 and ".json" in err


def test_heads_that_were_ranked_are_tested_on_other_samples(mech, tmp_path):
    path = tmp_path / "heads.json"
    mech("rank", "--samples", "12", "-q", "--out", str(path))
    words = ["--heads", str(path), "--fraction", "1", "--to", "zero", "--n-random", "1", "--json"]
    assert mech("ablate", "--samples", "12", *words)[2].count("that did not find the heads") == 1
    code, out, _ = mech("ablate", "--samples", "24", *words)
    assert code == 0 and {entry["n_heads"] for entry in json.loads(out)["ablation"]} == {1}


def test_ablate_says_what_each_band_costs(mech, tmp_path):
    path = tmp_path / "effects.nc"
    words = ["--samples", "12", "--n-random", "2", "--fraction", "0.1", "--to", "mean", "--to", "zero"]
    code, out, _ = mech("ablate", *words, "--json", "--out", str(path))
    assert code == 0 and path.exists()
    found = json.loads(out)
    assert {entry["method"] for entry in found["ablation"]} == {"mean", "zero"}
    assert {entry["band"] for entry in found["ablation"]} == {"top", "bottom", "middle", "random", "layer_matched"}
    assert "Few random sets: with 2" in found["cautions"][-1]
    for entry in found["ablation"]:
        drop = entry["accuracy_drop"]
        assert -1 <= drop["low"] < drop["high"] <= 1  # six samples: neither empty nor beyond what is possible
    code, out, _ = mech("ablate", *words, "-q", "--band", "top", "--band", "random")
    assert code == 0 and out.startswith("Caution. ") and "top 5 against random" in out


def test_ablate_takes_heads_that_attend_to_pictures_or_sinks_as_bands(mech):
    words = ["--band", "sinks", "--band", "top", "--band", "vision", "--samples", "8", "--fraction", "1"]
    code, out, _ = mech("ablate", *words, "--json")
    assert code == 0
    assert {entry["band"] for entry in json.loads(out)["ablation"]} == {"top", "by vision_mass", "by sink_mass"}


def test_a_revision_is_opened_and_named(mech):
    words = ["rank", "-m", "reference:llava-s-seed1", "--samples", "4", "--json"]
    last, early = (json.loads(mech(*words, *more)[1]) for more in ((), ("--revision", "step2200")))
    assert last["model"] == "reference:llava-s-seed1" and early["model"] == "reference:llava-s-seed1@step2200"
    assert last["heads"] != early["heads"]


def test_transfer_says_what_the_heads_of_each_domain_cost_on_each(mech, tmp_path):
    words = ["transfer", "-d", "grounding", "-d", "pages", "--samples", "8", "--n-random", "2", "--fraction", "2"]
    code, out, _ = mech(*words, "-q", "--out", str(tmp_path / "t.html"))
    cautions, table = out.split("\n\n")  # four test samples, two random sets: said before the numbers
    assert "Few random sets" in cautions and "no loss of accuracy can be significant" in cautions
    assert code == 0 and "without 2 heads" in table and [line.split()[0] for line in table.splitlines()[2:]] == [
        "grounding", "pages", "random"
    ]  # fmt: skip
    assert (tmp_path / "t.html").read_text().startswith("<!doctype html>")
    code, out, err = mech(*words, "--json", "--out", str(tmp_path / "t.nc"))
    found = json.loads(out)
    assert (
        code == 0 and err == "" and (tmp_path / "t.nc").exists() and list(found["accuracy"]) == ["grounding", "pages"]
    )
    assert len(found["lost"]) == 4 and len(found["random"]) == 2
    assert all(-1 <= cell["lost_low"] < cell["lost_high"] <= 1 for cell in found["lost"])
    assert all(cell["p"] == max(cell["p_samples"], cell["p_sets"]) for cell in found["lost"])


def test_patch_names_the_cells_that_carry_the_answer(mech, tmp_path):
    code, out, err = mech("patch", "--samples", "1", "--direction", "noise", "--json", "--out", str(tmp_path / "a.nc"))
    cells = json.loads(out)["cells"]
    assert code == 0 and err == "" and len(cells) == 48 and (tmp_path / "a.nc").exists()
    words = ["--point", "hook_resid_pre", "--over", "layer", "--over", "region", "--regions", "image,question"]
    code, out, _ = mech("patch", "--samples", "1", "-q", *words, "--top", "3", "--out", str(tmp_path / "a.html"))
    assert code == 0 and len(out.strip().splitlines()) == 5 and "image" in out
    assert "offline" not in out and (tmp_path / "a.html").read_text().startswith("<!doctype html>")
    code, out, _ = mech("patch", "--samples", "1", "-q", *words[:-1], "2x2", "--json")
    assert len(json.loads(out)["cells"]) == 6 * 4


def test_paths_names_what_reaches_the_logits(mech):
    code, out, _ = mech("paths", "--samples", "1", "--top", "2")
    assert code == 0 and "logits" in out and len(out.strip().splitlines()) == 4
    words = ["--sender", "L0H2", "--receiver", "mlp.0", "--receiver", "L3K4.v", "--direction", "noise"]
    code, out, _ = mech("paths", "--samples", "2", *words, "--json")
    carried = {cell["receiver"]: cell["effect"] for cell in json.loads(out)["cells"]}
    assert carried["mlp.0"] > 0.9 and abs(carried["L3K4.v"]) < 0.1  # the README's path, and one that carries nothing


def test_the_families_are_a_table_or_json(mech):
    code, out, _ = mech("check")
    found = json.loads(mech("check", "--json")[1])
    assert code == 0 and all(f"`{row['model_type']}`" in out for row in found)
    assert {"models": "Qwen2-VL", "model_type": "qwen2_vl", "takes": ["images", "video"]}.items() <= next(
        row.items() for row in found if row["model_type"] == "qwen2_vl"
    )


def test_heads_of_another_model_are_refused_or_allowed_by_name(mech, tmp_path):
    heads = str(tmp_path / "ranking.json")
    assert mech("rank", "--model", "reference:llava-s-seed1", "--samples", "8", "-q", "--out", heads)[0] == 0
    words = ["ablate", "--heads", heads, "--samples", "16", "--seed", "1", "--n-random", "2", "--fraction", "2"]
    words += ["--to", "zero", "--band", "top", "-q"]
    code, _, err = mech(*words)
    assert code == 2 and "reference:llava-s-seed1" in err and "allow" in err
    assert mech(*words, "--allow-other-model")[0] == 0


def test_an_unknown_reference_model_is_told_before_anything_is_loaded():
    code = "import sys; sys.argv = ['mech', *{words!r}]\nfrom mech.cli import main\ntry: main()\n"
    code += "except SystemExit as stop: print(stop.code, 'torch' in sys.modules)"
    for words in (
        ["rank", "-m", "reference:lava-s"],
        ["study", "-m", "reference:lava-s@x"],
        ["explore", "reference:lava-s"],
    ):
        done = subprocess.run([sys.executable, "-c", code.format(words=words)], capture_output=True, text=True)
        assert done.stdout.split() == ["2", "False"] and "use 'reference:llava-s'" in done.stderr
