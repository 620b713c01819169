"""A driver that leaves all blocks to workers: it opens no weights, and ends in what one process ends in."""

import threading
from dataclasses import replace

import pytest
import xarray as xr

import mech
from mech.errors import UnsupportedModel
from mech.model import hooked
from mech.results import Study
from mech.scale import model_here, status
from mech.scale.laid_out import LaidOut
from mech.scale.work import work
from mech.settings import Settings
from mech.study import study

TINY = Settings(
    n_find=4, n_test=4, n_other=4, n_maps=1, n_causal=2, n_gating=2, n_order=2, n_forms=0, n_random=1, n_control=1,
    fractions=(1,), other_fractions=(1,), methods=("mean", "resample"), shares=(0.25,),
    choices=("ram", "causal", "gates", "dynamic"), n_sets=1, n_long=6, batch_size=2,
)  # fmt: skip


@pytest.fixture
def no_weights_here(monkeypatch):
    """Whoever opens weights in this thread, which is the driver's, fails; workers are other threads."""
    opened, driver = hooked.open_checkpoint, threading.current_thread()

    def refusing(*given, **options):
        assert threading.current_thread() is not driver, "the driver opened weights"
        return opened(*given, **options)

    monkeypatch.setattr(hooked, "open_checkpoint", refusing)


@pytest.fixture
def worker():
    """Starts a worker of a folder; it ends soon after its drivers."""
    started = []

    def start(url):
        started.append(threading.Thread(target=work, args=(url,), kwargs={"linger": 0.3, "idle": 30, "pause": 0.02}))
        started[-1].start()

    yield start
    for one in started:
        one.join()


def undated(dataset):
    if "provenance" in dataset.attrs:
        dataset.attrs["provenance"] = {**dataset.attrs["provenance"], "date": ""}
    return dataset


@pytest.mark.parametrize("own", [False, True], ids=["haystacks", "samples of one's own, without counterfactuals"])
def test_a_study_of_workers_is_that_of_one_process_and_its_driver_opens_no_weights(
    own, tmp_path, no_weights_here, worker
):
    data = mech.Samples([replace(one, counterfactual=None) for one in mech.haystacks("grounding", 8, 0)])
    # Speed is of its moment: on the samples of one's own nothing is made fast.
    options = {"data": data if own else None, "settings": replace(TINY, shares=()) if own else TINY}
    url = f"memory://driver/{tmp_path.name}"
    worker(url)
    with mech.on_folder(url, works=False, batches=1):
        study(tmp_path / "cut", ["reference:llava-s"], ["grounding"], **options)
    done = str(status(url))
    assert "0 waiting, 0 failed" in done
    alone = threading.Thread(
        target=study, args=(tmp_path / "whole", ["reference:llava-s"], ["grounding"]), kwargs=options
    )
    alone.start()
    alone.join()
    with Study(tmp_path / "cut") as cut, Study(tmp_path / "whole") as whole:
        there, keys = cut.keys(), [key for key in whole.keys() if not key.endswith("/speed")]  # noqa: SIM118
        assert set(keys) <= set(there) and any(key.endswith("/causal") for key in keys)
        for key in keys:
            xr.testing.assert_identical(undated(cut.get(key)), undated(whole.get(key)))


def test_a_model_without_weights_is_known_and_cannot_run(tmp_path, no_weights_here, worker):
    worker(str(tmp_path))
    with mech.on_folder(tmp_path, works=False):
        laid = model_here("reference:llava-s")
    found = []
    whole = threading.Thread(target=lambda: found.append(mech.HookedMLLM.from_pretrained("reference:llava-s")))
    whole.start()
    whole.join()
    (model,) = found
    sample = mech.haystacks("grounding", 1, 0)[0]
    assert isinstance(laid, LaidOut) and laid.cfg == model.cfg and laid.points() == model.points()
    assert laid.inputs_of(sample).layout.spans == model.inputs_of(sample).layout.spans
    record, other = (mech.results.provenance(one, seed=0)["model"] for one in (laid, model))
    assert record == other and record["weights"]
    assert all(weight.is_meta for weight in laid.hf_model.parameters())
    for run in (lambda: laid(laid.inputs_of(sample)), lambda: laid.answer(laid.inputs_of(sample))):
        with pytest.raises(UnsupportedModel, match="weights only the workers hold"):
            run()


def test_other_files_are_recorded_anew(tmp_path, worker, monkeypatch):
    worker(str(tmp_path))
    with mech.on_folder(tmp_path, works=False) as run:
        for times, files in ((1, "a"), (1, "a"), (2, "b")):
            monkeypatch.setattr("mech.scale.run.files_of", lambda name, files=files: [files])
            assert model_here("reference:llava-s").elsewhere["weights"]
            assert run.costs["model"].blocks == times


@pytest.mark.parametrize(
    "words",
    [
        ("rank", "--n", "4", "--score", "ram,gaze"),
        ("ablate", "--n", "8", "--fraction", "1", "--band", "top", "--band", "random", "--n-random", "2"),
        ("patch", "--n", "2", "--over", "layer"),
        (
            "accelerate",
            "--n",
            "16",
            "--share",
            "0.25",
            "--choice",
            "ram",
            "--choice",
            "bottom",
            "--domain",
            "grounding",
        ),
        (
            "transfer",
            "--n",
            "8",
            "--domain",
            "grounding",
            "--domain",
            "documents",
            "--fraction",
            "1",
            "--n-random",
            "2",
        ),
    ],
    ids=lambda words: words[0],
)
def test_a_command_whose_blocks_are_elsewhere_opens_no_weights(mech, words, tmp_path, no_weights_here, worker):
    worker(str(tmp_path))
    code, said, err = mech(*words, "--blocks", str(tmp_path), "--elsewhere")
    assert code == 0 and "reference:llava-s" in said
    lines = err.splitlines()
    assert lines[0] == f"waiting for workers: mech work {tmp_path}"  # a log, not a terminal
    assert "reference:llava-s: model | 1/1 blocks" in err and " failed" in lines[1]
    header, *rows = lines[next(i for i, line in enumerate(lines) if line.startswith("measurement ")) :]
    place = header.index("blocks")
    assert rows[0].startswith("model ") and all(row[place].isdigit() and row[place - 1] == " " for row in rows)
