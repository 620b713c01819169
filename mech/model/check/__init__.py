"""Is this wrapped model right? Laws that must hold of every model, tried on a checkpoint or on tiny random ones.

    report = check("Qwen/Qwen3-VL-4B-Instruct")
    report.ok, report.notes()

Takes a model, gives deviations, point by point; ``laws`` lists what is tried, ``run`` tries it. The oracle is the stock
Hugging Face model. The folder does not know whether the weights are right, nor any experiment.
"""

from mech.model.check.run import Report, check, check_families, family_rows, family_table

__all__ = ["Report", "check", "check_families", "family_rows", "family_table"]
