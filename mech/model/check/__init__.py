"""Is this wrapped model right? Laws that must hold for every model, tested on a checkpoint or on tiny random models.

    report = check("Qwen/Qwen3-VL-4B-Instruct")
    report.ok, report.notes()

The result is a list of deviations, point by point; ``laws`` says what is tested, ``run`` tests it. The oracle is the
stock Hugging Face model. This folder does not judge the weights, and knows no experiment.
"""

from mech.model.check.run import Report, check, check_families, family_rows, family_table

__all__ = ["Report", "check", "check_families", "family_rows", "family_table"]
