"""Right calls of samples, regions and files of them."""

import numpy as np

import mech
from right_calls.given import Call, Given


def calls(given: Given) -> dict[str, Call]:
    return {
        "haystacks": Call(
            mech.haystacks,
            {"domain": "grounding", "n": 1},
            {
                "domain": "word",
                "n": "count",
                "seed": "seed",
                "n_items": "?count",
                "n_pictures": "?count",
                "split": "word",
                "answer": "word",
                "form": "word",
            },
        ),
        "hub_samples": Call(
            mech.hub_samples,
            {"name": "textvqa", "records": []},
            {
                "name": "word",
                "n": "count",
                "seed": "seed",
                "root": "path",
                "records": "records",
                "split": "?text",
                "files": "?text",
                "most": "?count",
                "skip_bad": "flag",
            },
        ),
        "read_samples": Call(
            mech.read_samples,
            {"path": given.folder / "none.jsonl"},
            {"path": "path", "root": "path", "n": "?count", "seed": "seed"},
        ),
        "write_samples": Call(
            mech.write_samples,
            {"samples": given.test, "folder": given.folder},
            {"samples": "samples", "folder": "path", "name": "text"},
        ),
        "Box": Call(
            mech.Box,
            {"x0": 0, "y0": 0, "x1": 1, "y1": 1},
            {"x0": "number", "y0": "number", "x1": "number", "y1": "number", "image": "int", "frame": "?int"},
        ),
        "Mask": Call(
            mech.Mask, {"pixels": np.ones((2, 2), dtype=bool)}, {"pixels": "mask", "image": "int", "frame": "?int"}
        ),
        "Sample": Call(
            mech.Sample,
            {"question": "a", "answer": "b", "images": (given.picture,)},
            {
                "question": "text",
                "answer": "text",
                "images": "pictures",
                "video": "pictures",
                "fps": "positive",
                "evidence": "evidence",
                "domain": "text",
                "id": "text",
                "counterfactual": "?sample",
                "context": "text",
                "spans": "evidence",
            },
        ),
        "Samples": Call(mech.Samples, {"samples": [given.sample]}, {"samples": "*samples"}),
        "Samples.split": Call(given.samples.split, {}, {"fraction": "share", "seed": "seed"}),
        "Samples.draw": Call(given.samples.draw, {"n": 1}, {"n": "count", "seed": "seed"}),
        "Frames": Call(lambda index: mech.Frames(index), {}, {"index": "int"}),
        "Pages": Call(lambda index: mech.Pages(index), {}, {"index": "int"}),
        "Passage": Call(mech.Passage, {"start": 0, "stop": 1}, {"start": "whole", "stop": "count"}),
        "Distractor": Call(
            mech.Distractor, {"region": mech.Box(0, 0, 1, 1), "answer": "a"}, {"region": "ranking", "answer": "text"}
        ),
    }
