"""Right calls of attention, scores and rankings."""

import numpy as np

import mech
from right_calls.given import OTHER, RUN, TOLD, USUAL, Call, Given


def calls(given: Given) -> dict[str, Call]:
    return {
        "agreement": Call(
            mech.agreement,
            {"rankings": {"a": given.ranking}},
            {"rankings": "rankings", "k": "amount", "n_resamples": "whole", "seed": "seed"},
        ),
        "attention_from": Call(
            mech.attention_from,
            {"model": given.model, "inputs": given.inputs},
            {"model": "model", "inputs": "inputs", "queries": "word"},
        ),
        "attention_mass": Call(
            mech.attention_mass,
            {"model": given.model, "inputs": given.inputs, "sets": {"a": "image"}},
            {"model": "model", "inputs": "inputs", "sets": "places", "queries": "word"},
        ),
        "attention_sinks": Call(
            mech.attention_sinks,
            given.tested,
            {**RUN, "by": "word", "tau": "positive", "dims": "dims", "share": "share", "batch_size": "count", **TOLD},
        ),
        "evidence_retrieval": Call(
            mech.evidence_retrieval,
            {**given.tested, "ranking": given.ranking},
            {
                **RUN,
                "ranking": "ranking",
                "over": "?word",
                "grid": "grid",
                "heads": "amount",
                "ks": "numbers",
                "reduce": "word",
                "n_random": "count",
                **USUAL,
                **TOLD,
                **OTHER,
            },
        ),
        "causal_head_gating": Call(
            mech.causal_head_gating,
            given.tested,
            {**RUN, "pressure": "positive", "steps": "count", "rate": "positive", "n_fits": "count", **USUAL, **TOLD},
        ),
        "head_record": Call(
            mech.head_record, given.tested, {**RUN, "scores": "scores", "top": "amount", **USUAL, **TOLD}
        ),
        "HeadRecord.from_json": Call(mech.HeadRecord.from_json, {}, {"source": "records"}),
        "head_scores": Call(
            mech.head_scores,
            given.tested,
            {**RUN, "scores": "scores", **USUAL, "sink_tau": "positive", "max_new_tokens": "count", **TOLD},
        ),
        "key_coverage": Call(
            mech.key_coverage, given.tested, {**RUN, "sets": "sets", "keys": "amount", "batch_size": "count"}
        ),
        "attention_maps": Call(
            mech.attention_maps,
            {**given.tested, "ranking": given.ranking},
            {**RUN, "ranking": "ranking", "k": "count", "bands": "sets", "queries": "word", **OTHER},
        ),
        "modality_transfer": Call(
            mech.modality_transfer,
            {"model": given.model, "pictures": given.test, "text": mech.haystacks("grounding", n=2, form="text")},
            {
                "model": "model",
                "pictures": "samples",
                "text": "samples",
                "base": "?model",
                "score": "scores",
                "k": "amount",
                "n_resamples": "count",
                **USUAL,
                **TOLD,
            },
        ),
        "published_claims": Call(
            mech.published_claims, given.tested, {**RUN, "only": "?words", "n_random": "count", **USUAL, **TOLD}
        ),
        "rank_heads": Call(
            mech.rank_heads,
            {"scores": given.ram},
            {"scores": "dataset", "score": "text", "model": "?text", "domain": "?text"},
        ),
        "read_heads": Call(mech.read_heads, {"source": [(0, 0)]}, {"source": "head list"}),
        "retrieval_attention_mass": Call(
            mech.retrieval_attention_mass, given.tested, {**RUN, "queries": "word", "batch_size": "count", **TOLD}
        ),
        "retrieval_test": Call(
            mech.retrieval_test,
            given.tested,
            {**RUN, "score": "scores", "alpha": "share", "n_permutations": "count", **USUAL, **TOLD},
        ),
        "sample_curve": Call(
            mech.sample_curve,
            {"ranking": given.ranking},
            {"ranking": "ranking", "sizes": "?numbers", "k": "amount", "n_splits": "count", "seed": "seed"},
        ),
        "scale_agreement": Call(
            mech.scale_agreement,
            {"a": given.ranking, "b": given.ranking},
            {"a": "ranking", "b": "ranking", "n_bins": "?count", "n_permutations": "count", "seed": "seed"},
        ),
        "seed_agreement": Call(
            mech.seed_agreement,
            {"a": given.ranking, "b": given.ranking},
            {"a": "ranking", "b": "ranking", "k": "amount", "n_permutations": "count", "seed": "seed"},
        ),
        "tag_leak": Call(mech.tag_leak, given.tested, {**RUN, "tags": "pair of texts", **USUAL}),
        "token_attention": Call(
            mech.token_attention,
            {"model": given.model, "inputs": given.inputs},
            {"model": "model", "inputs": "inputs", "layers": "layers", "groups": "count"},
        ),
        "Head": Call(mech.Head, {"layer": 0, "head": 0}, {"layer": "int", "head": "int"}),
        "Ranking": Call(
            mech.Ranking,
            {"mean": np.zeros((2, 2))},
            {"mean": "array", "score": "text", "model": "text", "domain": "text", "examples": "*path"},
        ),
        "Score": Call(
            mech.Score,
            {},
            {
                "queries": "word",
                "reduce": "word",
                "aggregate": "word",
                "calibrate": "word",
                "on": "word",
                "top": "amount",
                "source": "text",
            },
        ),
        "Ranking.top": Call(given.ranking.top, {}, {"k": "amount"}),
        "Ranking.random": Call(
            given.ranking.random, {"k": 2}, {"k": "amount", "n_draws": "count", "seed": "seed", "exclude": "*heads"}
        ),
        "Ranking.stability": Call(given.ranking.stability, {}, {"n_resamples": "count", "k": "amount", "seed": "seed"}),
        "Ranking.interval": Call(
            given.ranking.interval, {}, {"level": "share", "n_resamples": "count", "seed": "seed"}
        ),
        "retrieval_table": Call(mech.retrieval_table, {}, {"result": "dataset"}),
        "modality_table": Call(mech.modality_table, {}, {"result": "dataset"}),
        "sink_tokens": Call(mech.sink_tokens, {}, {"result": "dataset"}),
        "with_sinks": Call(
            mech.with_sinks,
            given.tested,
            {"maps": "dataset", "model": "model", "samples": "samples", "found": "dataset"},
        ),
        "without_sinks": Call(
            mech.without_sinks,
            given.tested,
            {"maps": "dataset", "model": "model", "samples": "samples", "found": "dataset"},
        ),
    }
