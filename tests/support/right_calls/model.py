"""Right calls of models, inputs, layouts, studies and views."""

import mech
from right_calls.given import RUN, Call, Given, entered


def calls(given: Given) -> dict[str, Call]:
    return {
        "explore": Call(mech.explore, given.tested, {**RUN, "reference": "?samples", "link": "text"}),
        "on_folder": Call(
            entered(mech.on_folder),
            {"folder": given.folder / "blocks"},
            {
                "folder": "path",
                "works": "flag",
                "workers": "count",
                "batches": "?count",
                "threads": "?count",
                "say": "function",
            },
        ),
        "on_ray": Call(
            entered(mech.on_ray),
            {"folder": given.folder / "blocks"},
            {
                "address": "text",
                "folder": "path",
                "gpus_per_model": "?positive",
                "threads": "?count",
                "batches": "?count",
                "modules": "texts",
                "say": "function",
            },
        ),
        "report": Call(mech.report, {}, {"study_folder": "path"}),
        "view": Call(mech.view, {"result": given.ranking}, {"result": "dataset", "folder": "path"}),
        "Inputs": Call(
            mech.Inputs,
            {"tensors": given.inputs.tensors, "layouts": given.inputs.layouts},
            {"tensors": "tensors", "layouts": "layouts", "made_by": "text"},
        ),
        "Study": Call(mech.Study, {"path": given.folder / "study"}, {"path": "path", "settings": "?settings"}),
        "TokenLayout": Call(
            mech.TokenLayout,
            {**given.columns, "tokens": given.layout.tokens, "spans": given.layout.spans},
            {**dict.fromkeys(given.columns, "columns"), "frames_per_token": "count", "memory": "?source"},
        ),
        "TokenLayout.positions": Call(given.layout.positions, {}, {"where": "where"}),
        "TokenLayout.cells": Call(
            given.layout.cells,
            {"rows": 2, "cols": 2},
            {"rows": "count", "cols": "count", "image": "whole", "frame": "?whole"},
        ),
        "TokenLayout.rectangle": Call(given.layout.rectangle, {}, {"position": "int"}),
        "HookedMLLM.from_pretrained": Call(
            mech.HookedMLLM.from_pretrained,
            {"name": "reference:llava-s"},
            {"name": "path", "dtype": "dtype", "device": "device", "revision": "?text", "quantization": "?word"},
        ),
        "HookedMLLM.generate": Call(
            given.model.generate, {"inputs": given.inputs}, {"inputs": "source", "max_new_tokens": "count"}
        ),
        "HookedMLLM.generate_text": Call(
            given.model.generate_text, {"inputs": given.inputs}, {"inputs": "source", "max_new_tokens": "count"}
        ),
        "HookedMLLM.forward": Call(given.model.forward, {"inputs": given.inputs}, {"inputs": "source"}),
        "HookedMLLM.run_with_cache": Call(
            given.model.run_with_cache,
            {"inputs": given.inputs},
            {"inputs": "source", "names_filter": "points", "remove_batch_dim": "flag"},
        ),
        "HookedMLLM.encode_pictures": Call(given.model.encode_pictures, {}, {"inputs": "source"}),
        "HookedMLLM.hooks": Call(entered(given.model.hooks), {}, {"fwd_hooks": "hooks", "bwd_hooks": "hooks"}),
        "HookedMLLM.add_hook": Call(
            given.model.add_hook, {"name": "hook_embed", "hook": print}, {"name": "points", "hook": "function"}
        ),
        "HookedMLLM.attending": Call(
            entered(given.model.attending), {"fn": print}, {"fn": "function", "stack": "word"}
        ),
        "HookedMLLM.inputs": Call(
            given.model.inputs,
            {"question": "What?", "images": [given.picture]},
            {"question": "text", "images": "pictures", "video": "pictures", "fps": "positive", "answer": "text"},
        ),
        "HookedMLLM.inputs_of": Call(
            given.model.inputs_of, {"sample": given.sample}, {"sample": "sample", "answer": "flag"}
        ),
        "HookedMLLM.collate": Call(given.model.collate, {}, {"rows": "several inputs"}),
        "HookedMLLM.select": Call(given.model.select, {}, {"names": "points"}),
    }
