"""Is this wrapped model right? ``mech check MODEL`` runs every law of ``mech.model.check`` and says what fails where.

    report = check("Qwen/Qwen2.5-VL-3B-Instruct")       # a hub id, a folder, "reference:llava-m" or a HookedMLLM
    print(report)                                       # one line a law, and every failing point with its deviation
    assert report.ok

    for report in check_families():                     # tiny random models of every family, offline
        print(report)

Check a model before you trust it: are idle logits transformers' own, does writing to a point reach the logits, do
padding, generation and geometry hold? The check does not judge weights or prompts.
``family_table()`` is the table of families in the documentation.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mech.arguments import NamedProgress
from mech.model.check.laws import LAWS, Batches, Finding, make_batches
from mech.model.check.running import unwrapping
from mech.model.eager import uncompiled
from mech.model.hooked import HookedMLLM


@dataclass(frozen=True)
class Report:
    """What was found for one model, law by law."""

    model: str
    family: str
    findings: dict[str, tuple[Finding, ...]]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failures()

    def failures(self) -> list[tuple[str, Finding]]:
        """(law, finding) for everything that failed."""
        return [
            (law, finding) for law, findings in self.findings.items() for finding in findings if finding.ok is False
        ]

    def inapplicable(self) -> list[tuple[str, Finding]]:
        """(law, finding) for everything that does not apply to this model; the finding says why."""
        return [(law, finding) for law, findings in self.findings.items() for finding in findings if finding.ok is None]

    def cell(self, law: str) -> str:
        """The verdict in a word: "ok 3e-07" (the worst deviation), "FAIL 2 of 60" or "n/a"."""
        findings = self.findings[law]
        failed = sum(finding.ok is False for finding in findings)
        if failed:
            return f"FAIL {failed} of {len(findings)}"
        held = [finding.deviation for finding in findings if finding.ok]
        if not held:
            return "n/a"
        return f"ok {max(held):.0e}" if max(held) else "ok"

    def notes(self) -> list[str]:
        """Every failure, and everything that does not apply, one line each."""
        lines = [f"{self.model}: {law} FAILED at {finding.where}: {finding.says}" for law, finding in self.failures()]
        return lines + [
            f"{self.model}: {law}, {finding.where}: n/a, {finding.says}" for law, finding in self.inapplicable()
        ]

    def to_json(self) -> dict[str, Any]:
        """The report as plain values; for laws that hold, only the worst deviation."""
        return {
            "model": self.model,
            "family": self.family,
            "ok": self.ok,
            "laws": {law: self.cell(law) for law in self.findings},
            "failures": [
                {"law": law, "where": finding.where, "deviation": finding.deviation, "says": finding.says}
                for law, finding in self.failures()
            ],
            "not_applicable": [
                {"law": law, "where": finding.where, "reason": finding.says} for law, finding in self.inapplicable()
            ],
        }

    def __str__(self) -> str:
        verdicts = [f"  {law:12s} {self.cell(law)}" for law in self.findings]
        return "\n".join([f"{self.model} ({self.family})", *verdicts, *self.notes()])


def check(model: HookedMLLM | str | Path, *, full: bool = False, progress: NamedProgress = lambda *_: None) -> Report:
    """Run every law on one model.

    Args:
        model: a wrapped model, which stays wrapped, or what ``HookedMLLM.from_pretrained`` takes; a model opened here
            is unwrapped at the end, to check that it is restored.
        full: look at all layers; otherwise at the first and the last layer of every kind.
        progress: called with (what, laws done, laws).

    Raises:
        UnsupportedModel: it cannot be opened.

    Cost: about 50 forwards and 28 for each layer looked at (two to four in each stack of most models), on a batch of
    three rows with three small pictures; one layer's activations are held at a time.
    """
    opened = not isinstance(model, HookedMLLM)
    wrapped = HookedMLLM.from_pretrained(model) if not isinstance(model, HookedMLLM) else model
    return _checked(wrapped, full, {**LAWS, "unwrapping": unwrapping} if opened else LAWS, progress)


def check_families(progress: NamedProgress = lambda *_: None) -> Iterator[Report]:
    """Run every law, at every layer, on a tiny random model of each variant in ``mech.reference.tiny.NAMES``.

    Cost: about two seconds per variant on one core; no files and no network.
    """
    from mech.reference import tiny, tiny_processors

    for index, name in enumerate(tiny.NAMES):
        wrapped = HookedMLLM.from_hf(tiny.model(name), tiny_processors.processor(name), name=name)
        yield _checked(wrapped, True, {**LAWS, "unwrapping": unwrapping}, lambda *_: None)
        progress("families", index + 1, len(tiny.NAMES))


def _checked(model: HookedMLLM, full: bool, laws: dict[str, Any], progress: NamedProgress) -> Report:
    findings: dict[str, tuple[Finding, ...]] = {}
    with torch.no_grad(), uncompiled():
        batches = make_batches(model, full)
        for index, (name, law) in enumerate(laws.items()):
            findings[name] = tuple(_found(law, model, batches))
            progress("laws", index + 1, len(laws))
    return Report(str(model.name), model.cfg.family, findings)


def _found(law: Any, model: HookedMLLM, batches: Batches) -> Iterator[Finding]:
    try:
        yield from law(model, batches)
    # Whatever a broken model raises is a finding, and must not hide the other laws.
    except Exception as error:
        yield Finding("an exception", False, float("inf"), f"{type(error).__name__}: {str(error).splitlines()[0]}")


# The names under which the rows' checkpoints are published.
CALLED = {
    "cohere2_vision": "Command A Vision, Aya Vision 2",
    "gemma3": "Gemma 3",
    "gemma4": "Gemma 4",
    "glm46v": "GLM-4.6V",
    "glm4v": "GLM-4.1V",
    "glm4v_moe": "GLM-4.5V",
    "idefics3": "Idefics3",
    "internvl": "InternVL 2.5 to 3.5 (-hf)",
    "lfm2_vl": "LFM2-VL",
    "llama4": "Llama 4",
    "llava": "LLaVA-1.5, Pixtral",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "mistral3": "Mistral Small 3.1",
    "mllama": "Llama 3.2 Vision",
    "paligemma": "PaliGemma 1 and 2",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen2_vl": "Qwen2-VL",
    "qwen3_5": "Qwen3.5",
    "qwen3_5_moe": "Qwen3.5 MoE",
    "qwen3_vl": "Qwen3-VL",
    "qwen3_vl_moe": "Qwen3-VL MoE",
    "smolvlm": "SmolVLM",
}


def family_rows() -> list[dict[str, Any]]:
    """The known architectures, from the rows of engine, inputs and tiny models."""
    from mech.inputs.families.family import FAMILIES
    from mech.model.architectures.rows import ROWS
    from mech.reference import tiny

    pairs: dict[str, list[str]] = {}
    for make in tiny.MODELS.values():
        config: Any = make()
        text, vision = config.text_config.model_type, config.vision_config.model_type.removesuffix("_vision_model")
        pairs.setdefault(config.model_type, []).append(f"{text} + {vision}")
    rows = []
    for kind in sorted(ROWS):
        row = FAMILIES.get(kind)
        takes = [] if row is None else ["images", "video"] if row.video else ["images"]
        checked = list(dict.fromkeys(pairs.get(kind, [])))
        rows.append({"models": CALLED.get(kind, kind), "model_type": kind, "takes": takes, "checked": checked})
    return rows


def family_table() -> str:
    """``family_rows`` as a Markdown table."""
    lines = [
        "| models | `model_type` | `model.inputs` takes | checked text + vision models |",
        "|---|---|---|---|",
    ]
    for row in family_rows():
        takes, checked = (", ".join(row[name]) for name in ("takes", "checked"))
        cells = (row["models"], f"`{row['model_type']}`", takes or "no pictures yet, tensors only", checked or "none")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
