"""What can be wrong with a cluster, each refused before any work; the cluster is a stand-in in this process."""

import importlib.util
import sys

import fake_ray
import pytest
import xarray as xr

import mech
from mech.errors import ExperimentError, MechError, OutputError
from mech.scale import BlocksFailed, per_sample
from mech.scale import ray_actors as on
from mech.scale.folder import Folder
from mech.scale.models import identity, software

NODE = {"CPU": 2.0, "memory": 8e9}


@pytest.fixture(scope="module")
def model():
    return mech.HookedMLLM.from_pretrained("reference:llava-s")


@pytest.fixture(scope="module")
def samples():
    return mech.haystacks("grounding", n=8, seed=4)


@pytest.fixture
def cluster(monkeypatch):
    """A cluster of the nodes that are given."""

    def made(*nodes):
        found = fake_ray.Cluster(*nodes or (NODE,))
        monkeypatch.setattr(on, "_ray", lambda: found)
        return found

    return made


def refused(kind, words, model, samples, folder, **options):
    with pytest.raises(kind, match=words) as error, mech.on_ray(folder=folder, **options):
        mech.retrieval_attention_mass(model, samples, batch_size=4)
    assert error.value.given and error.value.expected and error.value.do
    assert not Folder(folder).keys("parts")


def test_actors_of_a_cluster_give_the_numbers_of_one_process(cluster, model, samples, tmp_path):
    found = cluster(NODE, NODE)
    with mech.on_ray(folder=tmp_path, batches=1) as run:
        cut = mech.retrieval_attention_mass(model, samples, batch_size=2)
    assert run.executor.workers == found.started == found.killed == 4
    assert "reference:llava-s: attention from sample 6" in found.names  # what Ray's dashboard shows
    direct = mech.retrieval_attention_mass(model, samples, batch_size=2)
    xr.testing.assert_equal(cut, direct)


@pytest.mark.parametrize(
    ("nodes", "options", "words"),
    [
        ([NODE], {"threads": 64}, "64 threads for a worker, and the largest node has 2 cores"),
        ([NODE], {"gpus_per_model": 2}, "2 GPUs for a model, and the largest node has 0"),
        ([{**NODE, "GPU": 4.0}, NODE], {"gpus_per_model": 8}, "8 GPUs for a model, and the largest node has 4"),
        ([{**NODE, "memory": 1e6}], {}, "takes 0.0 GB, and the largest node has 0.0"),
    ],
)
def test_a_model_that_fits_no_node_is_refused(cluster, model, samples, tmp_path, nodes, options, words):
    found = cluster(*nodes)
    refused(ExperimentError, words, model, samples, tmp_path, **options)
    assert not found.started


def test_a_model_larger_than_the_gpus_of_its_workers_is_refused(cluster, model, samples, tmp_path, monkeypatch):
    cluster({**NODE, "GPU": 1.0})
    monkeypatch.setattr(on, "_gpu_bytes", lambda: 1000)
    refused(ExperimentError, "give more --gpus-per-model", model, samples, tmp_path)


@pytest.mark.parametrize(("name", "words"), [("code", "the code of mech"), ("torch", "torch on")])
def test_another_program_on_a_node_is_refused(cluster, model, samples, tmp_path, monkeypatch, name, words):
    cluster()
    other = {**software(), name: "0" * 64}
    monkeypatch.setattr("mech.scale.work.software", lambda: other)
    refused(ExperimentError, words, model, samples, tmp_path)


@pytest.mark.parametrize(("name", "words"), [("weights", "the weights on"), ("processor", "the processor on")])
def test_another_model_on_a_node_is_refused(cluster, model, samples, tmp_path, monkeypatch, name, words):
    cluster()
    other = {**identity(model), name: "0" * 64}
    monkeypatch.setattr("mech.scale.work.identity", lambda model: other)
    refused(ExperimentError, words, model, samples, tmp_path)


def test_a_folder_that_a_node_does_not_see_is_refused(cluster, model, samples, tmp_path, monkeypatch):
    cluster()
    own, seen = Folder(tmp_path / "drivers"), []

    class Elsewhere(on.Actor):
        def __init__(self, url, *rest):
            seen.append(url)
            super().__init__(str(tmp_path / "a disk of the node"), *rest)

    monkeypatch.setattr(on, "Actor", Elsewhere)
    refused(OutputError, "give a folder that all machines see", model, samples, own.url)
    assert seen == [own.url] * 2


@per_sample("length")
def length(model, samples, *, batch_size=8, kills="", once=(), progress=None):
    """Letters of the question; a sample may kill the actor, once or whenever it is met."""
    if any(sample.id == kills for sample in samples) and len(died) < (1 if once else 9):
        died.append(kills)
        raise fake_ray.Killed("out of memory")
    letters = [float(len(sample.question)) for sample in samples]
    return xr.Dataset({"letters": ("example", letters)}, {"example": [sample.id for sample in samples]})


died: list[str] = []


@pytest.mark.parametrize("once", [True, False])
def test_an_actor_that_dies_is_replaced_only_while_there_is_work(cluster, model, samples, tmp_path, once):
    died.clear()
    found, options = cluster({**NODE, "CPU": 1.0}), {"batch_size": 2, "kills": samples[7].id, "once": once}
    with mech.on_ray(folder=tmp_path, batches=1) as run:
        if once:
            assert run.measure(length.measure, model, samples, options).sizes["example"] == 8
        else:
            with pytest.raises(BlocksFailed, match="the worker died"):
                run.measure(length.measure, model, samples, options)
    assert len(died) == (1 if once else 3) and found.started == (2 if once else 3)
    assert len(Folder(tmp_path).keys("parts")) == (4 if once else 3)


class Unreachable:
    def __init__(self, error):
        self.error = error

    def init(self, **options):
        raise self.error


@pytest.mark.parametrize("kind", [ConnectionError, TimeoutError, RuntimeError, ValueError])
@pytest.mark.parametrize("address", ["auto", "ray://127.0.0.1:9"])
def test_a_cluster_that_cannot_be_reached_is_said(address, kind, monkeypatch):
    monkeypatch.setattr(on, "find_spec", lambda name: object())
    with pytest.raises(MechError, match="cannot be reached") as error:
        on._connected(Unreachable(kind("nobody there\nand more")), address)
    assert address in error.value.given and "more" not in error.value.given and "ray status" in error.value.do


def test_an_address_elsewhere_needs_the_client(monkeypatch):
    monkeypatch.setattr(on, "find_spec", lambda name: None if name == "grpc" else importlib.util.find_spec(name))
    with pytest.raises(MechError, match=r"ray://head:10001.*client") as error:
        on._connected(None, "ray://head:10001")
    assert error.value.do == "pip install 'mech[ray]'" and "auto" in error.value.expected


def test_without_ray_its_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MechError, match="Ray is not installed") as error, mech.on_ray(folder=tmp_path):
        pass
    assert error.value.do == "pip install 'mech[ray]'"
