"""Every error that advice, plans, training and the client raise.

    AdvisorError
    ├── InvalidPlan (ValueError)          a plan, or what was asked of the planner, cannot be used
    │   └── PlanMismatch                  the plan was made for another model
    ├── CastNotScored (ValueError)        a window does not tell what this cast would do
    ├── UnknownHardware (ValueError)      no such hardware in the table
    ├── InvalidHardware (ValueError)      a hardware description that no time can be predicted with
    ├── InvalidModel (ValueError)         a model's declaration cannot be built
    │   └── DataMismatch                  the model and its data do not fit each other
    ├── TrainingDiverged                  the loss is not finite
    └── ServiceError                      the service refused or could not be reached

Imports nothing, so that the command line can name an error before torch is loaded.
"""

from __future__ import annotations


class AdvisorError(Exception):
    """Root of the tree."""


class InvalidPlan(AdvisorError, ValueError):
    """A plan file, or a limit given to the planner, cannot be used."""


class PlanMismatch(InvalidPlan):
    """The plan names sites, roles or weight shapes that the model does not have."""


class CastNotScored(AdvisorError, ValueError):
    """A cast of which a window's sketches do not tell enough: in e8m0, or with scales by row, column or block
    that the window was not opened for."""


class UnknownHardware(AdvisorError, ValueError):
    """A hardware name that the table does not hold."""


class InvalidHardware(AdvisorError, ValueError):
    """A Hardware whose figures are missing or impossible."""


class InvalidModel(AdvisorError, ValueError):
    """A model's declaration does not describe a model that can be built."""


class DataMismatch(InvalidModel):
    """The model does not fit its data: vocabulary, image size, number of classes."""


class TrainingDiverged(AdvisorError):
    """The loss became NaN or infinite."""


class ServiceError(AdvisorError):
    """The service answered with an error, or did not answer."""
