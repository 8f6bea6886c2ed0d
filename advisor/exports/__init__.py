"""A plan for another library: files that carry it out there, and what that library cannot do of it.

`advisor.export(plan, "torchao")` gives an `Export`: files by name (a JSON or YAML that holds the plan's choices, and a
script with `convert` or `start` and `check`), and one sentence for everything that the target cannot express. Nothing
is dropped without a word, and `check` compares what was asked with what was done to the model, and raises.
"""

from __future__ import annotations

from advisor.exports.exporting import TARGETS, Export, export

__all__ = ["TARGETS", "Export", "export"]
