"""Blocks: the same numbers however a measurement is cut, nothing lost, nothing joined that does not belong together."""

import json
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
import xarray as xr

import mech
from mech.data.regions import Box, Mask
from mech.data.samples import Distractor, Sample, Samples, Span
from mech.errors import ExperimentError, MechError, OutputError
from mech.experiments.scores.measure import PUBLISHED
from mech.scale import BlocksFailed, per_sample, status, stream
from mech.scale.blocks import Cut
from mech.scale.executors import Here
from mech.scale.folder import Folder
from mech.scale.packing import fingerprint, pack, unpack
from mech.scale.run import Run, driving
from mech.scale.work import ABOUT, Worker, work

BATCH = 4


@pytest.fixture(scope="module")
def model():
    return mech.HookedMLLM.from_pretrained("reference:llava-s")


@pytest.fixture(scope="module")
def samples():
    return mech.haystacks("grounding", n=22, seed=3)


@pytest.fixture(scope="module")
def plain(model, samples):
    return mech.retrieval_attention_mass(model, samples, batch_size=BATCH)


def same(one, other):
    """Bit for bit; all but the moment at which it was made."""
    for found in (one, other):
        found.attrs["provenance"] = {**found.attrs["provenance"], "date": ""}
    xr.testing.assert_identical(one, other)


@pytest.mark.parametrize("batches", [1, 2, 5, None])
def test_ram_in_blocks_is_ram_bit_for_bit(model, samples, plain, tmp_path, batches):
    with mech.on_folder(tmp_path, batches=batches) as run:
        found = mech.retrieval_attention_mass(model, samples, batch_size=BATCH)
    same(found, plain)
    assert run.costs["attention"].samples >= 22 and run.costs["attention"].devices.keys() == {"cpu"}
    assert len(Folder(tmp_path).keys("parts")) >= (-(-22 // BATCH // batches) if batches else 2)
    assert not Folder(tmp_path).keys("claims") and not Folder(tmp_path).keys("todo")


def test_scores_draw_the_same_regions_in_blocks(model, samples, tmp_path):
    names = tuple(name for name, score in PUBLISHED.items() if score.calibrate in ("random", "other_question", "none"))
    some = samples[:10]
    direct = mech.head_scores(model, some, names, batch_size=BATCH, seed=5)
    with mech.on_folder(tmp_path, batches=1):
        found = mech.head_scores(model, some, names, batch_size=BATCH, seed=5)
    same(found, direct)


def test_ablation_is_cut_along_conditions_too(model, samples, plain, tmp_path):
    ranking, test, find = mech.rank_heads(plain), mech.haystacks("grounding", n=10, seed=9), samples[:6]
    test = Samples([one for one in test if one.id not in ranking.examples])
    options = dict(reference=find, to=("mean", "resample", "zero"), fractions=(2,), n_random=3, batch_size=BATCH)
    direct = mech.ablation(model, test, ranking, **options)
    folder = Folder(tmp_path)
    run = Run(folder, Here(folder))
    run._cut = lambda *rest: (Cut(1, 4), rest[3])
    with driving(run):
        found = mech.ablation(model, test, ranking, **options)
    same(found, direct)
    n = -(-len(test) // BATCH) * -(-direct.sizes["condition"] // 4)
    assert n == run.seen.blocks == run.seen.ended
    assert len(folder.keys("parts")) == n + 1 and run.costs["reference"].blocks == 1  # made once, for all of them


def test_a_second_run_computes_nothing_and_a_damaged_part_is_computed_anew(model, samples, plain, tmp_path):
    for damaged in (False, True):
        with mech.on_folder(tmp_path, batches=2):
            mech.retrieval_attention_mass(model, samples, batch_size=BATCH)
        parts = sorted((tmp_path / "parts").iterdir())
        before = {path: path.stat().st_mtime_ns for path in parts}
        if not damaged:
            continue
        content = bytearray(parts[0].read_bytes())
        content[len(content) // 2] ^= 1
        parts[0].write_bytes(content)
        with mech.on_folder(tmp_path) as run:
            same(mech.retrieval_attention_mass(model, samples, batch_size=BATCH), plain)
        assert [path for path in parts if path.stat().st_mtime_ns != before[path]] == [parts[0]]
        assert run.costs["attention"].blocks == 1


@pytest.mark.parametrize("url", ["memory://study/blocks", "local://{}/blocks", "file://{}/blocks"])
def test_any_store_of_fsspec_is_a_folder_like_any_other(model, samples, plain, tmp_path, url):
    url = url.format(tmp_path)
    for blocks in (2, 0):
        with mech.on_folder(url, batches=3) as run:
            same(mech.retrieval_attention_mass(model, samples, batch_size=BATCH), plain)
        assert run.costs["attention"].blocks == blocks
    assert "2 blocks landed, 0 at work, 0 waiting, 0 failed" in str(status(url))
    folder = Folder(url)
    key = folder.keys("parts")[0]
    content = bytearray(folder.read(f"parts/{key}.npz"))
    content[len(content) // 2] ^= 1
    folder.write(f"parts/{key}.npz", bytes(content))
    assert folder.part(key) is None  # the checksum
    assert folder.claim(key, "one") and not folder.claim(key, "another")


def test_parts_of_other_weights_or_another_program_are_not_joined(model, samples, tmp_path):
    with mech.on_folder(tmp_path, batches=3):
        mech.retrieval_attention_mass(model, samples, batch_size=BATCH)
    folder = Folder(tmp_path)
    key = folder.keys("parts")[0]
    for what, name in (("model", "weights"), ("model", "processor"), ("software", "code")):
        part = folder.part(key)
        about = part.attrs[ABOUT]
        folder.land(key, part.assign_attrs({ABOUT: {**about, what: {**about[what], name: "0" * 64}}}))
        with pytest.raises(OutputError, match=f"another {name}"), mech.on_folder(tmp_path):
            mech.retrieval_attention_mass(model, samples, batch_size=BATCH)
        folder.land(key, part)


def test_an_id_that_is_there_twice_is_refused_before_any_work(model, samples, tmp_path):
    twice = Samples([*samples[:3], samples[0]])
    with pytest.raises(ExperimentError, match="twice"), mech.on_folder(tmp_path):
        mech.retrieval_attention_mass(model, twice, batch_size=2)
    assert not Folder(tmp_path).keys("parts")


@per_sample("length")
def length(model, samples, *, batch_size=8, spoils="", progress=None):
    """A cheap measurement: letters of the question; some samples spoil it."""
    if spoils and any(sample.id == spoils for sample in samples):
        raise ZeroDivisionError(f"spoilt by {spoils}")
    letters = [float(len(sample.question)) for sample in samples]
    return xr.Dataset({"letters": ("example", letters)}, {"example": [sample.id for sample in samples]})


def test_a_block_that_fails_three_times_is_reported_and_the_rest_is_done(model, samples, tmp_path):
    with pytest.raises(BlocksFailed) as failed, mech.on_folder(tmp_path, batches=1) as run:
        run.measure(length.measure, model, samples, {"batch_size": 4, "spoils": samples[5].id})
    ((ids, error),) = failed.value.failed.values()
    assert ids == tuple(sample.id for sample in samples[4:8]) and "spoilt by" in error and "test_blocks" not in error
    assert samples[4].id in str(failed.value) and "mech status" in failed.value.do
    folder = Folder(tmp_path)
    assert len(folder.keys("parts")) == 5 and len(folder.failures(folder.keys("failed")[0])) == 3
    assert "1 failed" in str(status(tmp_path))


def test_what_a_measurement_refuses_is_raised_as_it_was(model, samples, tmp_path):
    bare = Samples([*samples[:5], Sample("what?", "7", images=samples[0].images, id="bare")])
    with pytest.raises(ExperimentError) as direct:
        mech.head_scores(model, bare, "ram")
    with pytest.raises(ExperimentError) as found, mech.on_folder(tmp_path, batches=1):
        mech.head_scores(model, bare, "ram")
    assert str(found.value) == str(direct.value)
    blank = Samples(
        [one if i != 5 else mech.Sample("q?", "", images=one.images, id="x") for i, one in enumerate(samples[:8])]
    )
    with pytest.raises(ExperimentError, match="'x' has no answer"), mech.on_folder(tmp_path, batches=1):
        mech.ablation(model, blank, [mech.experiments.ablation.ablation.BASELINE], batch_size=2)


def test_twenty_thousand_samples_stream_through_in_bounded_memory(model, tmp_path):
    import datasets

    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "\n".join(json.dumps({"question": "how many? " + "x" * (i % 7), "id": str(i)}) for i in range(20_000))
    )
    alive, most = weakref.WeakSet(), 0

    def read():
        nonlocal most
        opened = datasets.load_dataset("json", data_files=str(rows), split="train", streaming=True)
        for row in opened:
            sample = Sample(row["question"], "7", context="a text", id=row["id"])
            alive.add(sample)
            most = max(most, len(alive))
            yield sample

    folder = Folder(tmp_path / "blocks")
    with driving(Run(folder, Here(folder, in_flight=3), batches=2)):
        found = stream(length, model, read(), batch_size=250)
    assert found.sizes["example"] == 20_000 and found["letters"].sum() == sum(10 + i % 7 for i in range(20_000))
    assert list(found["example"].values[:3]) == ["0", "1", "2"] and len(folder.keys("parts")) == 40
    assert most <= (3 + 1) * 2 * 250  # (in_flight + 1) x batches x batch_size


def test_streaming_needs_a_marked_measurement_and_a_folder(model, samples):
    with pytest.raises(ExperimentError, match="outside"):
        stream(length, model, iter(samples))
    with pytest.raises(ExperimentError, match="marked"):
        stream(mech.ablation, model, iter(samples))


def test_two_drivers_in_one_folder_share_the_work(model, samples, plain, tmp_path):
    found, errors = {}, []

    def drive(name):
        try:
            folder = Folder(tmp_path)
            with driving(Run(folder, Here(folder, pause=0.02), batches=1)) as run:
                found[name] = mech.retrieval_attention_mass(model, samples, batch_size=BATCH), run.costs["attention"]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=drive, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for one, _ in found.values():
        same(one, plain)
    assert found["a"][1].blocks + found["b"][1].blocks == 6  # each block once


def test_a_worker_with_other_weights_is_refused_before_it_computes(model, samples, tmp_path):
    folder = Folder(tmp_path)
    with mech.on_folder(tmp_path, batches=9):
        mech.retrieval_attention_mass(model, samples, batch_size=BATCH)
    worker = Worker(folder)
    job, _ = worker.job(folder.keys("jobs")[0])
    assert worker.model(job).name == "reference:llava-s"
    for name in ("weights", "processor"):
        other = {**job.model, name: "f" * 64}
        with pytest.raises(ExperimentError, match=name) as error:
            Worker(folder).model(type(job)(job.measure, other, job.software, job.options, 4, 1))
        assert "same program and the same weights" in error.value.expected
    with pytest.raises(ExperimentError, match="the code of mech"):
        worker.model(type(job)(job.measure, job.model, {**job.software, "code": "0" * 64}, job.options, 4, 1))
    with pytest.raises(OutputError, match="all machines see"):
        Worker(Folder(tmp_path / "elsewhere")).job(job.key)


def test_a_full_disk_stops_the_driver_and_loses_nothing(model, samples, plain, tmp_path, monkeypatch):
    land, landed = Folder.land, []

    def full(self, key, dataset):
        if len(landed) == 3:
            raise OutputError("no space left", "room", "make room")
        landed.append(key)
        land(self, key, dataset)

    monkeypatch.setattr(Folder, "land", full)
    with pytest.raises(OutputError, match="no space"), mech.on_folder(tmp_path, batches=1):
        mech.retrieval_attention_mass(model, samples, batch_size=BATCH)
    monkeypatch.undo()
    folder = Folder(tmp_path)
    assert len(folder.keys("parts")) == 3 and not folder.keys("claims") and not folder.keys("failed")
    with mech.on_folder(tmp_path) as run:
        same(mech.retrieval_attention_mass(model, samples, batch_size=BATCH), plain)
    assert run.costs["attention"].blocks == 3


def test_workers_that_join_in_do_the_work(model, samples, plain, tmp_path):
    counts, seen = {}, []
    joining = threading.Thread(
        target=lambda: counts.update(
            work(tmp_path, linger=0.5, pause=0.05, say=lambda outcome, task: seen.append(task))
        )
    )
    joining.start()
    with mech.on_folder(tmp_path, batches=1, works=False, threads=1):
        found = mech.retrieval_attention_mass(model, samples, batch_size=BATCH)
    joining.join()
    same(found, plain)
    assert counts == {"landed": 6, "failed": 0, "refused": 0} and len(seen) == 6


def test_whatever_a_sample_holds_is_packed_and_comes_back():
    mask = np.zeros((8, 8), bool)
    mask[2:4, 3] = True
    picture = mech.haystacks("grounding", n=1, seed=0)[0].images[0].resize((8, 8))
    other = Sample("q", "b", images=(picture,), id="cf")
    sample = Sample(
        "wo? ü", "a b", images=(picture, picture.convert("L")), evidence=(Box(1, 2, 3, 4), Mask(mask)), domain="d",
        id="1", counterfactual=other, distractors=(Distractor(Box(0, 0, 1, 1), "c"),),
        spans=(Span(0, 1, (Box(1, 2, 3, 4),)),),
    )  # fmt: skip
    (back,) = unpack(pack(Samples([sample])))
    assert back.digest() == sample.digest() and back.id == "1" and back.evidence[1].pixels.dtype == bool
    value = {"a": (1, 2.5, None), 3: [np.arange(3), float("inf")]}
    back = unpack(pack(value))
    assert back["a"] == (1, 2.5, None) and back[3][0].tolist() == [0, 1, 2] and fingerprint(back) == fingerprint(value)
    assert fingerprint(value) != fingerprint({"a": [1, 2.5, None], 3: value[3]})
    with pytest.raises(ExperimentError, match="cannot be sent"):
        pack(object())
    content = bytearray(pack(value))
    content[40] ^= 1
    with pytest.raises(OutputError, match="damaged"):
        unpack(bytes(content))


def test_blocks_are_as_long_as_wanted_and_not_too_few():
    assert Cut.by_time(0.5, 20, None, None, 1) == Cut(40)
    assert Cut.by_time(0.5, 20, 100, None, 4) == Cut(7)  # four for each worker
    assert Cut.by_time(0.5, 20, 1000, 10, 1) == Cut(4, 10)
    assert Cut.by_time(5.0, 20, 1000, 10, 1) == Cut(1, 4)
    assert Cut.by_time(90, 20, 5, None, 1) == Cut(1)


def test_errors_have_three_parts(tmp_path):
    for make in (lambda: Folder("nosuch://x"), lambda: Folder("/proc/nothing/here")):
        with pytest.raises(MechError) as error:
            make()
        assert error.value.given and error.value.expected and error.value.do


@pytest.mark.slow
def test_a_worker_that_has_imported_nothing_ablates(model, samples, plain, tmp_path):
    command = [sys.executable, "-c", "from mech.cli import main; main()", "work", str(tmp_path), "--linger", "2"]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    ranking, find = mech.rank_heads(plain), samples[:6]
    test = Samples([one for one in mech.haystacks("grounding", n=6, seed=9) if one.id not in ranking.examples])
    options = dict(reference=find, bands=("top", "bottom"), fractions=(2,), batch_size=BATCH)
    direct = mech.ablation(model, test, ranking, **options)
    with mech.on_folder(tmp_path, works=False, batches=1):
        found = mech.ablation(model, test, ranking, **options)
    same(found, direct)
    said, _ = worker.communicate(timeout=120)
    assert said.endswith("0 failed, 0 refused\n") and not said.startswith("0 landed")
