"""The datasets of a study folder, and the record of what made them."""

import dataclasses
import enum
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image

from mech import axes
from mech.data.regions import Box
from mech.data.samples import Sample, Samples
from mech.errors import OutputError
from mech.results import ShownHead, ablation_dataset, check, map_facts, maps_dataset, provenance, ram_dataset
from mech.results.provenance import jsonable, weight_digest
from mech.results.schema import KINDS


def ram(**attrs):
    return ram_dataset(np.zeros((3, 2, 4)), np.zeros((3, 2, 4)), np.zeros(3), np.ones(3, int), examples="abc", **attrs)


def ablation(**changes):
    settings = {"method": ["none", "mean"], "band": ["none", "top"], "fraction": [0, 0.1], "n_heads": [0, 1]}
    settings |= {"draw": [0, 0], **changes}
    return ablation_dataset(np.ones((2, 3), bool), np.zeros((2, 3)), **settings)


FACTS = {"question": "?", "answer": "7", "prediction": "1", "pictures": ["map0_0.png"], "evidence": [[0, 1, 2, 3, 4]]}


def maps(facts=(FACTS,), corners=4):
    return maps_dataset(
        np.zeros((1, 2, 6)), np.zeros((1, 6, corners)), np.zeros((1, 6), int), facts,
        [ShownHead(0, 2, "top", 0.9), ShownHead(1, 3, "bottom", 0.0)],
    )  # fmt: skip


def test_every_kind_has_its_dimensions_units_and_signs():
    assert ram().ram.dims == ("example", "layer", "head") and ram().sel(layer=1, head=3).ram.shape == (3,)
    assert ablation().accuracy.dims == ("condition", "example") and ablation().accuracy.dtype == float
    assert maps().attention.dims == ("example", "shown", "token")
    for dataset, kind in ((ram(), "ram"), (ablation(), "ablation"), (maps(), "maps")):
        assert check(dataset, kind) is dataset
        assert dataset.attrs["kind"] == kind and dataset.attrs["schema"] == 1
        for variable in dataset.data_vars.values():
            assert variable.attrs["unit"] and "sign" in variable.attrs
    for kind in ("ram", "ablation"):
        assert {d for dims in KINDS[kind].variables.values() for d in dims} <= set(axes.WORDS)
    assert ram(model="m", provenance={"seed": 1}).attrs["provenance"] == {"seed": 1}


def test_look_facts_come_back():
    assert map_facts(maps()) == [FACTS]
    assert isinstance(maps().attrs["facts"], str)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: check(ram(), "rams"), "no kind of result is called 'rams'"),
        (lambda: check(ram().drop_vars("n_evidence"), "ram"), "without the variable 'n_evidence'"),
        (lambda: check(ram().transpose("layer", ...), "ram"), r"\(layer, example, head\)\nExpected: \(example"),
        (lambda: check(ablation().drop_vars("draw"), "ablation"), "without the coordinate 'draw'"),
        (lambda: check(maps().drop_attrs(), "maps"), r"without attrs\['facts'\]"),
        (lambda: ablation(method=["none", "means"]), "method='means'\n.*\n.*'mean'"),
        (lambda: ablation(band=["none", "lowest"]), "band='lowest'"),
        (lambda: ablation(draw=[0]), "lengths that differ"),
        (lambda: maps(facts=[]), "0 entries"),
        (lambda: maps(facts=[{"question": ""}]), "example 0 does not say its answer, prediction"),
        (lambda: maps(corners=2), "has 2 corners"),
        (lambda: ram_dataset(np.zeros((2, 4)), np.zeros((3, 2, 4)), np.zeros(3), np.ones(3)), "'ram' has shape"),
        (lambda: ram_dataset(*[np.zeros((3, 2, 4))] * 2, np.zeros(3), np.ones(2)), "lengths that differ"),
    ],
)
def test_what_a_reader_would_misread_is_refused(make, message):
    with pytest.raises(OutputError, match=message):
        make()


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
        self.register_buffer("scale", torch.tensor(2.0))
        self.config = SimpleNamespace(_attn_implementation="sdpa", _commit_hash="abc", name_or_path="org/tiny")
        self.name_or_path = "org/tiny"


class Resample(enum.IntEnum):
    BICUBIC = 3


def wrapped(hf):
    image_processor = SimpleNamespace(size={"shortest_edge": 56}, min_pixels=4, resample=Resample.BICUBIC)
    return SimpleNamespace(
        hf_model=hf, name="tiny", dtype=torch.bfloat16, device=torch.device("cpu"),
        processor=SimpleNamespace(image_processor=image_processor),
    )  # fmt: skip


def samples(colour):
    image = Image.new("RGB", (4, 4), colour)
    return Samples([Sample("?", "a", (image,), evidence=(Box(0, 0, 2, 2),), domain="d")])


@dataclasses.dataclass(frozen=True)
class Spec:
    point: str
    heads: tuple = ((0, 1),)


def test_provenance_names_everything_that_moves_a_number():
    record = provenance(
        wrapped(Tiny()), samples("red"), metric="accuracy", specs=[Spec("hook_z")], seed=3, fractions=(0.1,), to=Spec
    )
    assert record == json.loads(json.dumps(record, allow_nan=False))
    model = record["model"]
    assert (model["name"], model["class"], model["revision"]) == ("tiny", "Tiny", "abc")
    assert (model["dtype"], model["device"], model["attention"]) == ("torch.bfloat16", "cpu", "sdpa")
    assert model["processor"] == {"size": {"shortest_edge": 56}, "min_pixels": 4, "resample": 3}
    assert record["data"] == {"digest": samples("red").digest(), "n": 1, "domains": ["d"]}
    assert record["specs"] == [{"type": "Spec", "point": "hook_z", "heads": [[0, 1]]}]
    assert record["settings"]["fractions"] == [0.1] and record["seed"] == 3 and record["metric"] == "accuracy"
    assert record["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__
    assert all(record["versions"][name] for name in ("python", "transformers", "numpy"))
    assert record["date"].endswith("+00:00") and record["machine"]["cpus"] >= 1
    both = provenance(data={"find": samples("red"), "test": samples("blue")})
    assert both["model"] is None and both["data"]["find"]["digest"] != both["data"]["test"]["digest"]


def test_weight_digest_knows_the_weights_and_nothing_else():
    a, b = Tiny(), Tiny()
    first = weight_digest(a)
    assert len(first) == 64 and first == weight_digest(b) == weight_digest(wrapped(a))
    with torch.no_grad():
        a.linear.weight[0, 0] += 1
    changed = weight_digest(a)
    assert changed != first  # although it was asked for before
    a.load_state_dict(b.state_dict())
    assert weight_digest(a) == first
    b.scale.fill_(3.0)
    assert weight_digest(b) != first
    assert weight_digest(Tiny().to(torch.float32)) != first
    assert weight_digest(Tiny().to("meta")) is None and weight_digest(object()) is None


def test_weight_digest_reads_the_weights_once(monkeypatch):
    model, read = Tiny(), []
    monkeypatch.setattr(torch.Tensor, "numpy", lambda self, f=torch.Tensor.numpy: read.append(1) or f(self))
    assert weight_digest(model) == weight_digest(model) == weight_digest(wrapped(model))
    assert len(read) == 3  # weight, bias, scale


def test_a_model_without_a_processor_is_recorded_all_the_same():
    class Unready:
        hf_model = Tiny()
        name = "m"

        @property
        def processor(self):
            raise OutputError("no processor")

    assert provenance(Unready())["model"]["processor"] == {}


def test_jsonable_known_values():
    value = {1: (np.int64(2), np.float32(0.5)), "s": {"b", "a"}, "n": [float("inf"), np.nan], "p": Path("/a"), "f": len}
    assert jsonable(value) == {"1": [2, 0.5], "s": ["a", "b"], "n": [None, None], "p": "/a", "f": "builtins.len"}
    assert jsonable(torch.tensor([1, 2])) == [1, 2] and jsonable(np.bool_(True)) is True
    assert type(jsonable(Resample.BICUBIC)) is int and jsonable(torch.float32) == "torch.float32"


def test_results_need_no_torch():
    code = "import sys, mech.results; mech.results.provenance(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout == "False\n", done.stderr


def test_saved_attributes_of_every_kind_survive(tmp_path):
    from mech.results import load, save

    for kind, dataset in (("ram", ram(provenance=provenance(seed=1))), ("ablation", ablation()), ("maps", maps())):
        xr.testing.assert_identical(check(load(save(dataset, tmp_path / f"{kind}.nc")), kind), dataset)
