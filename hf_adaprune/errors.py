"""Every exception of the package, under one base class.

A message says what was wrong, what it should be, what was found and what to do next. All of them also are `ValueError`
or `RuntimeError` where that is the honest built-in, so callers need not import this module to catch them.
"""


class AdaPruneError(Exception):
    """Base class of everything that `hf_adaprune` raises on purpose."""


class ConfigError(AdaPruneError, ValueError):
    """A `PruningConfig` (or a command line) asks for something that does not exist or does not fit together."""


class UnsupportedModelError(AdaPruneError, ValueError):
    """The model's architecture, quantisation or weights cannot be pruned as asked."""


class PlanError(AdaPruneError, ValueError):
    """A plan does not fit the model, or cuts more than the rules allow."""


class BudgetError(PlanError):
    """No allowed plan meets the budget; the message states the range that can be reached."""


class CalibrationError(AdaPruneError, ValueError):
    """Texts are missing, too short, or overlap between calibration, selection and report."""


class StatisticsError(AdaPruneError, ValueError):
    """Statistics lack what a metric or a repair needs, or contain numbers that are not finite."""


class CheckpointError(AdaPruneError, RuntimeError):
    """A checkpoint could not be written, or what was written does not reload to the same model."""


class RunError(CheckpointError):
    """A folder belongs to a run with other inputs, or another run is writing to it."""


class HubError(AdaPruneError, RuntimeError):
    """The Hub refused or broke off an upload; the message says what it answered and what to do."""


class MissingDependencyError(AdaPruneError, ImportError):
    """An optional dependency is missing; the message names the extra that brings it."""


class JournalError(AdaPruneError, ValueError):
    """A journal of a search that is not there, is none, or belongs to another search."""
