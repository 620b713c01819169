"""Blocks from the command line: the same output, `mech work` beside it, `mech status` after it, and exit codes."""

import json

import pytest

from mech.cli.scale.spread import with_bare_ray
from mech.scale.folder import Folder

RANK = ("rank", "--n", "12", "--json", "-q")


def test_a_bare_ray_is_this_machine():
    assert with_bare_ray(["study", "--ray"]) == ["study", "--ray", "local"]
    assert with_bare_ray(["rank", "--ray", "-q"]) == ["rank", "--ray", "local", "-q"]
    assert with_bare_ray(["rank", "--ray", "auto"]) == ["rank", "--ray", "auto"]


def test_ranking_in_blocks_prints_what_ranking_prints(mech, tmp_path):
    code, direct, _ = mech(*RANK)
    assert code == 0
    code, cut, _ = mech(*RANK, "--blocks", str(tmp_path / "b"))
    assert code == 0 and json.loads(cut)["heads"] == json.loads(direct)["heads"]
    code, said, err = mech("rank", "--n", "12", "--blocks", str(tmp_path / "b"))
    assert code == 0 and "rank" in said and "measurement" in err and "GPU seconds" in err
    code, said, _ = mech("status", str(tmp_path / "b"))
    assert code == 0 and "blocks landed" in said and "Costs so far" in said and "done" in said
    code, said, _ = mech("status", str(tmp_path / "b"), "--json")
    assert json.loads(said)["failed"] == {} and json.loads(said)["landed"] >= 1
    code, said, _ = mech("work", str(tmp_path / "b"), "--linger", "0.1", "-q")
    assert code == 0 and said == "0 landed, 0 failed, 0 refused\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--elsewhere",), "add --blocks"),
        (("--gpus-per-model", "2"), "add --ray"),
        (("--threads", "2"), "add --ray or --blocks"),
        (("--gpus-per-model", "1.5"), "a share of one GPU"),
        (("--blocks", "nosuch://x"), "fsspec"),
        (("--ray", "auto", "--elsewhere"), "one of the two"),
        (("--blocks", " "), "a name"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(mech, words, expected):
    code, _, err = mech(*RANK, *words)
    assert code == 2 and expected in err


def test_a_worker_refuses_what_it_cannot_do(mech, tmp_path):
    assert mech("work", str(tmp_path), "--import", "no_such_module")[0] == 2
    assert mech("work", str(tmp_path), "--device", "cpu", "--device-map", "auto")[0] == 2
    code, said, _ = mech("work", str(tmp_path), "--idle", "0.1")
    assert code == 0 and said.startswith("0 landed")


def test_status_of_failures_ends_with_their_code(mech, tmp_path):
    folder = Folder(tmp_path)
    for i in range(3):
        folder.fail("k" * 32, f"w{i}", "RuntimeError: out of memory", ("a", "b"))
    code, said, _ = mech("status", str(tmp_path))
    assert code == 3 and "samples a, b: RuntimeError: out of memory" in said
