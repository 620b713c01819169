"""Real actors of a cluster of two cores: the same numbers, deaths that cost nothing, refusals before any work."""

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
from mech.errors import ExperimentError, MechError, OutputError
from mech.scale import BlocksFailed, stream
from mech.scale import ray_actors as on
from mech.scale.folder import Folder

# Ray leaves sockets and processes to the end of the interpreter.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning:ray")]


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two cores without a dashboard and with the smallest store there is."""
    on._ray()
    ray = pytest.importorskip("ray")
    place = tempfile.mkdtemp(prefix="r", dir="/tmp")  # sockets below it must have short paths
    support = str(Path(ray_measures.__file__).parent)  # what actors import by name
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([support, str(Path(mech.__file__).parents[1]), before])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(
                num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, _temp_dir=place,
                log_to_driver=False, logging_level="error",
            )  # fmt: skip
    except Exception as error:  # no shared memory, no sockets, no processes: the machine's, not ours
        pytest.skip(f"Ray cannot start here: {error}")
    finally:
        os.environ["PYTHONPATH"] = before
    yield ray
    ray.shutdown()
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(scope="module")
def model():
    return mech.HookedMLLM.from_pretrained("reference:llava-s")


@pytest.fixture(scope="module")
def samples():
    return mech.haystacks("grounding", n=14, seed=4)


def test_two_actors_give_the_numbers_of_one_process(cluster, model, samples, tmp_path):
    with mech.on_folder(tmp_path / "one", batches=1, threads=1):
        alone = mech.retrieval_attention_mass(model, samples, batch_size=2)
    with mech.on_ray(folder=tmp_path / "two", batches=1) as run:
        assert run.executor.workers == 2
        found = mech.retrieval_attention_mass(model, samples, batch_size=2)
        ranking = mech.rank_heads(found)
        test = Samples([one for one in mech.haystacks("grounding", n=6, seed=8) if one.id not in ranking.examples])
        effects = mech.ablation(model, test, ranking, reference=samples[:4], bands=("top", "bottom"), fractions=(2,))
    xr.testing.assert_equal(found, alone)
    direct = mech.ablation(model, test, ranking, reference=samples[:4], bands=("top", "bottom"), fractions=(2,))
    xr.testing.assert_allclose(effects, direct, atol=1e-6)
    parts = [Folder(tmp_path / "two").part(key) for key in Folder(tmp_path / "two").keys("parts")]
    assert len({part.attrs["mech_block"]["worker"] for part in parts}) == 2


def test_an_actor_that_dies_costs_nothing_and_one_that_always_dies_is_reported(cluster, model, samples, tmp_path):
    options = {"batch_size": 2, "kills": samples[5].id}
    with mech.on_ray(folder=tmp_path, batches=1, modules=("ray_measures",)) as run:
        found = run.measure(
            ray_measures.length.measure, model, samples, {**options, "once": str(tmp_path / "died")}
        )  # fmt: skip
        assert (tmp_path / "died").exists() and found.sizes["example"] == 14
        with pytest.raises(BlocksFailed) as failed:
            run.measure(ray_measures.length.measure, model, samples, options)
    ((ids, error),) = failed.value.failed.values()
    assert ids == (samples[4].id, samples[5].id) and "the worker died" in error
    assert len(Folder(tmp_path).keys("parts")) == 7 + 6


def test_samples_stream_to_actors_in_bounded_memory(cluster, model, tmp_path):
    alive, most = weakref.WeakSet(), 0

    def read():
        nonlocal most
        for i in range(20_000):
            sample = Sample("x" * (1 + i % 7), "7", context="a text", id=str(i))
            alive.add(sample)
            most = max(most, len(alive))
            yield sample

    with mech.on_ray(folder=tmp_path, batches=2, modules=("ray_measures",)) as run:
        found = stream(ray_measures.length, model, read(), batch_size=250)
        bound = (run.executor.in_flight + 1) * 2 * 250
    assert found.sizes["example"] == 20_000 and most <= bound
    assert float(found["letters"].sum()) == sum(1 + i % 7 for i in range(20_000))


def test_a_node_that_is_not_fit_is_refused_before_any_work(cluster, model, samples, tmp_path, monkeypatch):
    with pytest.raises(ExperimentError, match="largest node has"), mech.on_ray(folder=tmp_path, threads=64):
        pass
    with pytest.raises(ExperimentError, match="GPUs for a model"), mech.on_ray(folder=tmp_path, gpus_per_model=2):
        pass
    monkeypatch.setattr(on, "size_in_bytes", lambda model: 10**15)
    with pytest.raises(ExperimentError, match="the largest node has"), mech.on_ray(folder=tmp_path):
        mech.retrieval_attention_mass(model, samples)
    monkeypatch.undo()
    with mech.on_ray(folder=tmp_path) as run:
        folder = run.folder
        monkeypatch.setattr(folder, "url", str(tmp_path / "elsewhere"))  # as a disk that only the driver has
        with pytest.raises(OutputError, match="all machines see"):
            mech.retrieval_attention_mass(model, samples)
    monkeypatch.undo()
    monkeypatch.setattr("mech.scale.run.software", lambda: {**on_software(), "code": "0" * 64})
    with pytest.raises(ExperimentError, match="the code of mech"), mech.on_ray(folder=tmp_path):
        mech.retrieval_attention_mass(model, samples)
    assert not Folder(tmp_path).keys("parts")


def on_software():
    from mech.scale.models import software

    return software()


def test_other_weights_on_a_node_are_refused(cluster, samples, tmp_path):
    import torch

    model = mech.HookedMLLM.from_pretrained("reference:llava-s")
    with torch.no_grad():
        model.hf_model.lm_head.weight.mul_(1.01)
    with pytest.raises(ExperimentError, match="the weights on"), mech.on_ray(folder=tmp_path):
        mech.retrieval_attention_mass(model, samples)


@pytest.mark.parametrize("address", ["auto", "ray://127.0.0.1:9"])
def test_a_cluster_that_cannot_be_reached_is_said(address, monkeypatch):
    ray = pytest.importorskip("ray")

    def unreachable(**options):
        raise ConnectionError(f"Could not find any running Ray instance at {options['address']}.")

    monkeypatch.setattr(ray, "init", unreachable)
    with pytest.raises(MechError, match="cannot be reached") as error:
        on._connected(ray, address)
    assert address in str(error.value) and "ray status" in error.value.do
