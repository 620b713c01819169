"""Real actors of a cluster of two cores: the same numbers, deaths that cost nothing, samples that stream through.

What can be wrong with a cluster is in ``test_cluster``, on a stand-in.
"""

import os
import shutil
import tempfile
import warnings
import weakref
from pathlib import Path

import pytest
import ray_measures
import xarray as xr

import mech
from mech.data.samples import Sample, Samples
from mech.errors import ExperimentError
from mech.scale import BlocksFailed, stream
from mech.scale import ray_actors as on
from mech.scale.folder import Folder
from mech.scale.measures import run_by

# Ray leaves sockets and processes to the end of the interpreter.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning:ray")]


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two cores without a dashboard and with the smallest store there is."""
    on._ray()
    ray = pytest.importorskip("ray")
    place = tempfile.mkdtemp(prefix="r", dir="/tmp")  # sockets below it must have short paths
    support = str(Path(ray_measures.__file__).parent)  # what actors import by name
    path = os.pathsep.join([support, str(Path(mech.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patched, warnings.catch_warnings():
        patched.setenv("PYTHONPATH", path)
        patched.setenv("RAY_worker_niceness", "0")  # 15 by default: beside other tests they would starve
        warnings.simplefilter("ignore")
        try:
            ray.init(
                num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, _temp_dir=place,
                log_to_driver=False, logging_level="error",
            )  # fmt: skip
        except Exception as error:  # no shared memory, no sockets, no processes: the machine's, not ours
            pytest.skip(f"Ray cannot start here: {error}")
    yield ray
    ray.shutdown()
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def run(cluster, tmp_path_factory):
    """Two actors that live as long as the module: a process that opens a model takes seconds to start."""
    folder = tmp_path_factory.mktemp("blocks")
    with mech.on_ray(folder=folder, batches=1, modules=("ray_measures",)) as made, run_by(None):
        yield made


@pytest.fixture(scope="module")
def model():
    return mech.HookedMLLM.from_pretrained("reference:llava-s")


@pytest.fixture(scope="module")
def samples():
    return mech.haystacks("grounding", n=14, seed=4)


def parts_of(run, what):
    """The parts of one measurement."""
    found = [run.folder.part(key) for key in run.folder.keys("parts")]
    return [part for part in found if what in part]


def test_two_actors_give_the_numbers_of_one_process(run, model, samples, tmp_path):
    with mech.on_folder(tmp_path, batches=1, threads=1):
        alone = mech.retrieval_attention_mass(model, samples, batch_size=2)
    assert run.executor.workers == 2
    with run_by(run):
        found = mech.retrieval_attention_mass(model, samples, batch_size=2)
        ranking = mech.rank_heads(found)
        test = Samples([one for one in mech.haystacks("grounding", n=6, seed=8) if one.id not in ranking.examples])
        effects = mech.ablation(model, test, ranking, reference=samples[:4], bands=("top", "bottom"), fractions=(2,))
    xr.testing.assert_equal(found, alone)
    direct = mech.ablation(model, test, ranking, reference=samples[:4], bands=("top", "bottom"), fractions=(2,))
    xr.testing.assert_allclose(effects, direct, atol=1e-6)
    assert len({part.attrs["mech_block"]["worker"] for part in parts_of(run, "ram")}) == 2


def test_samples_stream_to_actors_in_bounded_memory(run, model, monkeypatch):
    alive, most = weakref.WeakSet(), 0
    monkeypatch.setattr(run, "batches", 2)

    def read():
        nonlocal most
        for i in range(20_000):
            sample = Sample("x" * (1 + i % 7), "7", context="a text", id=str(i))
            alive.add(sample)
            most = max(most, len(alive))
            yield sample

    with run_by(run):
        found = stream(ray_measures.length, model, read(), batch_size=250)
    bound = (run.executor.in_flight + 1) * 2 * 250
    assert found.sizes["example"] == 20_000 and most <= bound
    assert float(found["letters"].sum()) == sum(1 + i % 7 for i in range(20_000))


def test_other_weights_than_the_driver_has_are_refused(run):
    import torch

    model = mech.HookedMLLM.from_pretrained("reference:llava-s")
    with torch.no_grad():
        model.hf_model.lm_head.weight.mul_(1.01)
    before = len(run.folder.keys("parts"))
    with pytest.raises(ExperimentError, match="the weights on"), run_by(run):
        mech.retrieval_attention_mass(model, mech.haystacks("grounding", n=4, seed=4))
    assert len(run.folder.keys("parts")) == before


def test_an_actor_that_dies_costs_nothing_and_one_that_always_dies_is_reported(run, model, samples, tmp_path):
    options = {"batch_size": 2, "kills": samples[5].id}
    before = len(parts_of(run, "letters"))
    found = run.measure(ray_measures.length.measure, model, samples, {**options, "once": str(tmp_path / "died")})
    assert (tmp_path / "died").exists() and found.sizes["example"] == 14
    with pytest.raises(BlocksFailed) as failed:
        run.measure(ray_measures.length.measure, model, samples, options)
    ((ids, error),) = failed.value.failed.values()
    assert ids == (samples[4].id, samples[5].id) and "the worker died" in error
    assert len(parts_of(run, "letters")) == before + 7 + 6


def test_the_cluster_refuses_what_has_no_room(cluster, tmp_path):
    for options, words in (({"threads": 64}, "largest node has"), ({"gpus_per_model": 2}, "GPUs for a model")):
        with pytest.raises(ExperimentError, match=words), mech.on_ray(folder=tmp_path, **options):
            pass
    assert not Folder(tmp_path).keys("parts")
