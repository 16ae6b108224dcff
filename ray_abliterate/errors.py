"""Errors a user can act on; the command line prints them without a traceback.

    RayAbliterateError
    ├── RecipeError             the recipe asks for something impossible
    ├── PromptSourceError       a prompt set cannot be read
    ├── ModelError              a model cannot be loaded or used
    │   └── UnknownArchitecture no writers are declared for the model's type
    ├── ScoreError              a score is missing or not a finite number
    ├── EvaluationError         a text cannot be evaluated as asked
    │   ├── TokenSourceError    tokens cannot be read, or are not the model's
    │   ├── UnsupportedCarry    the model cannot carry the context that is asked for
    │   └── EvaluationChanged   a saved evaluation belongs to something else
    ├── SearchError             the search cannot start or continue
    ├── RunDirectoryError       a run directory is missing, taken, changed or unreadable
    │   ├── RunExists
    │   ├── RunNotFound
    │   ├── RecipeChanged
    │   └── TrialNotFound
    ├── ExportError             an export cannot be written, or is not the trial
    ├── ReproductionError       an export cannot be rebuilt from its bundle
    ├── PushError               a folder cannot be uploaded
    ├── ChatError               a chat cannot do what a line asks for
    ├── ServeError              a model cannot be served
    └── ForeignStudyError       another tool's study cannot be imported

Every message says what was found, what was expected, and the next step.
"""


class RayAbliterateError(Exception):
    """Base of every error whose message is meant for the user."""


class RecipeError(RayAbliterateError):
    """The recipe asks for something impossible."""


class PromptSourceError(RayAbliterateError):
    """A prompt set cannot be read, or holds nothing usable."""


class ModelError(RayAbliterateError):
    """A model cannot be loaded, or cannot do what is asked of it."""


class UnknownArchitecture(ModelError):
    """No writers are declared for the model's type, or a layer has none."""


class ScoreError(RayAbliterateError):
    """A score is missing, or not a finite number."""


class EvaluationError(RayAbliterateError):
    """A text cannot be evaluated as asked."""


class TokenSourceError(EvaluationError):
    """Tokens cannot be read, are too few, or are not in the model's vocabulary."""


class UnsupportedCarry(EvaluationError):
    """The model cannot carry the context that is asked for, or carries it wrongly."""


class EvaluationChanged(EvaluationError):
    """A saved evaluation belongs to another model, text or setting."""


class SearchError(RayAbliterateError):
    """The search cannot start, or cannot continue."""


class RunDirectoryError(RayAbliterateError):
    """A run directory cannot be used."""


class RunExists(RunDirectoryError):
    """The run directory already holds a run."""


class RunNotFound(RunDirectoryError):
    """The folder does not hold a run."""


class RecipeChanged(RunDirectoryError):
    """The recipe is not the one the run was started with."""


class TrialNotFound(RunDirectoryError):
    """The run has no such trial, or the trial failed."""


class ExportError(RayAbliterateError):
    """An export cannot be written, or does not answer as the trial did."""


class ReproductionError(RayAbliterateError):
    """An export cannot be rebuilt, or what was rebuilt is another model."""


class PushError(RayAbliterateError):
    """A folder cannot be uploaded, or should not be."""


class ChatError(RayAbliterateError):
    """A chat's command is unknown, or cannot be carried out."""


class ServeError(RayAbliterateError):
    """A model cannot be served as asked."""


class ForeignStudyError(RayAbliterateError):
    """Another tool's study cannot be read, or asks for what cannot be done here."""
