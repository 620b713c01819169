"""``mech``: mechanistic interpretability of multimodal LLMs.

Which attention heads fetch the visual evidence a question asks for, and are they needed?

    import mech

    model = mech.HookedMLLM.from_pretrained("reference:llava-s")       # or a hub id, or a folder
    find, test = mech.haystacks("grounding", n=96, seed=0).split(0.5)
    ranking = mech.rank_heads(mech.retrieval_attention_mass(model, find))
    effects = mech.ablation(model, test, ranking, reference=find, to="mean", fractions=(1, 0.05, 0.2))
    mech.view(effects)

Names are imported when they are first used: ``import mech`` alone loads neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# public name -> where it lives
_NAMES = {
    "Ablate": "mech.interventions",
    "Box": "mech.data.regions",
    "CausalReport": "mech.experiments.causal.report",
    "Circuit": "mech.experiments.paths.circuits",
    "CircuitGraph": "mech.experiments.circuit_tasks.graph",
    "CircuitTask": "mech.experiments.circuit_tasks.tasks",
    "Custom": "mech.interventions",
    "Distractor": "mech.data.samples",
    "Frames": "mech.data.regions",
    "Head": "mech.experiments.ranking.ranking",
    "HeadRecord": "mech.experiments.scores.record",
    "HookedMLLM": "mech.model",
    "Inputs": "mech.inputs",
    "KL": "mech.experiments.metrics",
    "Knockout": "mech.interventions",
    "LogProb": "mech.experiments.metrics",
    "LogitDiff": "mech.experiments.metrics",
    "Mask": "mech.data.regions",
    "MechError": "mech.errors",
    "Pages": "mech.data.regions",
    "Passage": "mech.data.regions",
    "Patch": "mech.interventions",
    "Policy": "mech.sparse.policy",
    "Probability": "mech.experiments.metrics",
    "OfLogits": "mech.experiments.metrics",
    "PerRow": "mech.interventions",
    "Rank": "mech.experiments.metrics",
    "Ranking": "mech.experiments.ranking.ranking",
    "Redirect": "mech.interventions",
    "Sample": "mech.data.samples",
    "Samples": "mech.data.samples",
    "Scale": "mech.interventions",
    "Score": "mech.experiments.scores.measure",
    "Study": "mech.results",
    "TokenLayout": "mech.inputs",
    "ablation": "mech.experiments.ablation.ablation",
    "acceleration": "mech.sparse.frontier.acceleration",
    "activation_patching": "mech.experiments.patching.activation",
    "agreement": "mech.experiments.ranking.agreement",
    "attention_from": "mech.experiments.attention.maps",
    "attention_maps": "mech.experiments.attention.maps",
    "attention_mass": "mech.experiments.attention.mass",
    "attention_sinks": "mech.experiments.scores.sinks",
    "attribution": "mech.experiments.attribution.nodes",
    "causal_head_gating": "mech.experiments.scores.gating",
    "causal_report": "mech.experiments.causal.report",
    "circuit_scores": "mech.experiments.circuit_tasks.scoring",
    "circuit_table": "mech.experiments.circuit_tasks.curves",
    "circuit_task": "mech.experiments.circuit_tasks.tasks",
    "deciding_queries": "mech.experiments.patching.deciding",
    "dense_static": "mech.sparse.localize",
    "edge_attribution": "mech.experiments.attribution.edges",
    "explore": "mech.explorer.widget",
    "evidence_retrieval": "mech.experiments.scores.evidence_retrieval",
    "haystacks": "mech.data.haystacks",
    "head_record": "mech.experiments.scores.record",
    "head_scores": "mech.experiments.scores.measure",
    "hub_samples": "mech.data.hub",
    "input_attribution": "mech.experiments.attribution.inputs",
    "intervene": "mech.interventions",
    "key_coverage": "mech.experiments.scores.coverage",
    "learned_gates": "mech.sparse.gates",
    "localize_dynamic": "mech.sparse.dynamic",
    "localize": "mech.sparse.localize",
    "logit_attribution": "mech.experiments.attribution.logits",
    "logit_lens": "mech.experiments.attribution.lenses",
    "modality_table": "mech.experiments.scores.modality",
    "modality_transfer": "mech.experiments.scores.modality",
    "on_folder": "mech.scale",
    "on_ray": "mech.scale.ray_actors",
    "ov_reading": "mech.experiments.attribution.lenses",
    "path_patching": "mech.experiments.paths.path_patching",
    "prune_heads": "mech.sparse.pruning.prune",
    "pruning_report": "mech.sparse.pruning.report",
    "published_claims": "mech.papers",
    "rank_heads": "mech.experiments.ranking.ranking",
    "read_heads": "mech.experiments.ranking.agreement",
    "read_samples": "mech.data.jsonl",
    "reference_activations": "mech.interventions",
    "redirection": "mech.experiments.ablation.redirection",
    "redirection_table": "mech.experiments.ablation.redirected",
    "report": "mech.views",
    "retrieval_attention_mass": "mech.experiments.scores.ram",
    "retrieval_table": "mech.experiments.scores.evidence_retrieval",
    "retrieval_test": "mech.experiments.scores.null_test",
    "sample_curve": "mech.experiments.ranking.agreement",
    "scale_agreement": "mech.experiments.ranking.agreement",
    "seed_agreement": "mech.experiments.ranking.agreement",
    "sink_tokens": "mech.experiments.scores.sinks",
    "sparsify": "mech.sparse.training.sparsify",
    "steering": "mech.experiments.ablation.steering",
    "steering_table": "mech.experiments.ablation.steering",
    "tag_leak": "mech.papers",
    "token_attention": "mech.experiments.attention.tokens",
    "top_edges": "mech.experiments.attribution.edges",
    "trace_circuit": "mech.experiments.paths.circuits",
    "transfer": "mech.experiments.ablation.transfer",
    "view": "mech.views",
    "with_counterfactuals": "mech.interventions.counterfactuals",
    "with_question": "mech.interventions.corruption",
    "with_sinks": "mech.experiments.scores.sinks",
    "without_evidence": "mech.interventions.corruption",
    "without_sinks": "mech.experiments.scores.sinks",
    "without_pictures": "mech.interventions.corruption",
    "write_samples": "mech.data.jsonl_writing",
}

# name in the previous version -> its name now
_RENAMED = {"asking": "with_question", "looks": "attention_maps"}

__all__ = ["__version__", *sorted(_NAMES)]

if TYPE_CHECKING:
    from mech.data.haystacks import haystacks as haystacks
    from mech.data.hub import hub_samples as hub_samples
    from mech.data.jsonl import read_samples as read_samples
    from mech.data.jsonl_writing import write_samples as write_samples
    from mech.data.regions import Box as Box
    from mech.data.regions import Frames as Frames
    from mech.data.regions import Mask as Mask
    from mech.data.regions import Pages as Pages
    from mech.data.regions import Passage as Passage
    from mech.data.samples import Distractor as Distractor
    from mech.data.samples import Sample as Sample
    from mech.data.samples import Samples as Samples
    from mech.errors import MechError as MechError
    from mech.experiments.ablation.ablation import ablation as ablation
    from mech.experiments.ablation.redirected import redirection_table as redirection_table
    from mech.experiments.ablation.redirection import redirection as redirection
    from mech.experiments.ablation.steering import steering as steering
    from mech.experiments.ablation.steering import steering_table as steering_table
    from mech.experiments.ablation.transfer import transfer as transfer
    from mech.experiments.attention.maps import attention_from as attention_from
    from mech.experiments.attention.maps import attention_maps as attention_maps
    from mech.experiments.attention.mass import attention_mass as attention_mass
    from mech.experiments.attention.tokens import token_attention as token_attention
    from mech.experiments.attribution.edges import edge_attribution as edge_attribution
    from mech.experiments.attribution.edges import top_edges as top_edges
    from mech.experiments.attribution.inputs import input_attribution as input_attribution
    from mech.experiments.attribution.lenses import logit_lens as logit_lens
    from mech.experiments.attribution.lenses import ov_reading as ov_reading
    from mech.experiments.attribution.logits import logit_attribution as logit_attribution
    from mech.experiments.attribution.nodes import attribution as attribution
    from mech.experiments.causal.report import CausalReport as CausalReport
    from mech.experiments.causal.report import causal_report as causal_report
    from mech.experiments.circuit_tasks.curves import circuit_table as circuit_table
    from mech.experiments.circuit_tasks.graph import CircuitGraph as CircuitGraph
    from mech.experiments.circuit_tasks.scoring import circuit_scores as circuit_scores
    from mech.experiments.circuit_tasks.tasks import CircuitTask as CircuitTask
    from mech.experiments.circuit_tasks.tasks import circuit_task as circuit_task
    from mech.experiments.metrics import KL as KL
    from mech.experiments.metrics import LogitDiff as LogitDiff
    from mech.experiments.metrics import LogProb as LogProb
    from mech.experiments.metrics import OfLogits as OfLogits
    from mech.experiments.metrics import Probability as Probability
    from mech.experiments.metrics import Rank as Rank
    from mech.experiments.patching.activation import activation_patching as activation_patching
    from mech.experiments.patching.deciding import deciding_queries as deciding_queries
    from mech.experiments.paths.circuits import Circuit as Circuit
    from mech.experiments.paths.circuits import trace_circuit as trace_circuit
    from mech.experiments.paths.path_patching import path_patching as path_patching
    from mech.experiments.ranking.agreement import agreement as agreement
    from mech.experiments.ranking.agreement import read_heads as read_heads
    from mech.experiments.ranking.agreement import sample_curve as sample_curve
    from mech.experiments.ranking.agreement import scale_agreement as scale_agreement
    from mech.experiments.ranking.agreement import seed_agreement as seed_agreement
    from mech.experiments.ranking.ranking import Head as Head
    from mech.experiments.ranking.ranking import Ranking as Ranking
    from mech.experiments.ranking.ranking import rank_heads as rank_heads
    from mech.experiments.scores.coverage import key_coverage as key_coverage
    from mech.experiments.scores.evidence_retrieval import evidence_retrieval as evidence_retrieval
    from mech.experiments.scores.evidence_retrieval import retrieval_table as retrieval_table
    from mech.experiments.scores.gating import causal_head_gating as causal_head_gating
    from mech.experiments.scores.measure import Score as Score
    from mech.experiments.scores.measure import head_scores as head_scores
    from mech.experiments.scores.modality import modality_table as modality_table
    from mech.experiments.scores.modality import modality_transfer as modality_transfer
    from mech.experiments.scores.null_test import retrieval_test as retrieval_test
    from mech.experiments.scores.ram import retrieval_attention_mass as retrieval_attention_mass
    from mech.experiments.scores.record import HeadRecord as HeadRecord
    from mech.experiments.scores.record import head_record as head_record
    from mech.experiments.scores.sinks import attention_sinks as attention_sinks
    from mech.experiments.scores.sinks import sink_tokens as sink_tokens
    from mech.experiments.scores.sinks import with_sinks as with_sinks
    from mech.experiments.scores.sinks import without_sinks as without_sinks
    from mech.explorer.widget import explore as explore
    from mech.inputs import Inputs as Inputs
    from mech.inputs import TokenLayout as TokenLayout
    from mech.interventions import Ablate as Ablate
    from mech.interventions import Custom as Custom
    from mech.interventions import Knockout as Knockout
    from mech.interventions import Patch as Patch
    from mech.interventions import PerRow as PerRow
    from mech.interventions import Redirect as Redirect
    from mech.interventions import Scale as Scale
    from mech.interventions import intervene as intervene
    from mech.interventions import reference_activations as reference_activations
    from mech.interventions.corruption import with_question as with_question
    from mech.interventions.corruption import without_evidence as without_evidence
    from mech.interventions.corruption import without_pictures as without_pictures
    from mech.interventions.counterfactuals import with_counterfactuals as with_counterfactuals
    from mech.model import HookedMLLM as HookedMLLM
    from mech.papers import published_claims as published_claims
    from mech.papers import tag_leak as tag_leak
    from mech.results import Study as Study
    from mech.scale import on_folder as on_folder
    from mech.scale.ray_actors import on_ray as on_ray
    from mech.sparse.dynamic import localize_dynamic as localize_dynamic
    from mech.sparse.frontier.acceleration import acceleration as acceleration
    from mech.sparse.gates import learned_gates as learned_gates
    from mech.sparse.localize import dense_static as dense_static
    from mech.sparse.localize import localize as localize
    from mech.sparse.policy import Policy as Policy
    from mech.sparse.pruning.prune import prune_heads as prune_heads
    from mech.sparse.pruning.report import pruning_report as pruning_report
    from mech.sparse.training.sparsify import sparsify as sparsify
    from mech.views import report as report
    from mech.views import view as view


def __getattr__(name: str):
    if name in _RENAMED:
        new = _RENAMED[name]
        importlib.import_module("mech.deprecation").renamed(f"mech.{name}", f"mech.{new}")
        return getattr(importlib.import_module("mech"), new)
    if name not in _NAMES:
        raise AttributeError(f"module 'mech' has no attribute {name!r}")
    value = getattr(importlib.import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
