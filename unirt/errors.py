"""Everything that can go wrong, as one tree.

    UnirtError
    ├── CandidateError      (ValueError)         a candidate string that cannot be read
    ├── OptionError         (ValueError)         an unknown option, or a value it does not take
    ├── ModelError          (ValueError)         a model file that must not reach an engine
    │   └── ModelNotFound   (FileNotFoundError)  no file there
    ├── ProfileError        (ValueError)         a shape profile that does not suit the model
    ├── InputError          (ValueError)         wrong name, dtype, rank or shape of an input
    ├── DataError           (ValueError)         samples or labels that do not fit the model
    ├── ClosedError         (RuntimeError)       use after close
    ├── BackendUnavailable  (RuntimeError)       the engine cannot run here, or not on that device
    ├── NoBackend           (RuntimeError)       no candidate is left; carries every reason
    └── BackendError        (RuntimeError)       the engine failed; its own exception is `__cause__`
        └── BuildError                           ... while compiling
            └── BuildCancelled                   ... because the caller stopped it

Each says in three sentences what happened, why, and what to do, and keeps the facts as attributes.
"""

from __future__ import annotations


def sentence(text: str) -> str:
    """A reason or hint as a sentence of its own: a capital first, a full stop last."""
    return f"{text[0].upper()}{text[1:]}{'' if text[-1] in '.!?' else '.'}" if text else ""


class UnirtError(Exception):
    """The root of all errors that UniRT raises on purpose.

    `what`, `why` and `remedy` are its sentences; keyword facts become attributes and stand together
    in `facts`. Survives pickling with all of them.
    """

    def __init__(self, what: str, why: str = "", remedy: str = "", **facts: object) -> None:
        super().__init__(" ".join(sentence for sentence in (what, why, remedy) if sentence))
        self.what = what
        self.why = why
        self.remedy = remedy
        self.facts = facts

    def __getattr__(self, name: str) -> object:
        # Only reached where normal lookup fails; unpickling asks before `facts` exists.
        facts = self.__dict__.get("facts", {})
        if name in facts:
            return facts[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class CandidateError(UnirtError, ValueError):
    """A candidate is written `backend[@device][:precision]`, and this one is not."""


class OptionError(UnirtError, ValueError):
    """An unknown option, or a value the option does not take."""


class ModelError(UnirtError, ValueError):
    """A model file that is damaged, hostile or over a limit: no engine has seen it."""


class ModelNotFound(ModelError, FileNotFoundError):
    """No model file at that path."""


class ProfileError(UnirtError, ValueError):
    """A shape profile that is no range, or does not suit the model."""


class InputError(UnirtError, ValueError):
    """An input that does not fit the model. The session stays usable."""


class DataError(UnirtError, ValueError):
    """Samples or labels that cannot be used with this model."""


class ClosedError(UnirtError, RuntimeError):
    """A session, binding or engine used after it was closed."""


class BackendUnavailable(UnirtError, RuntimeError):
    """The engine cannot be used here, or does not offer the device that was asked for."""


class NoBackend(UnirtError, RuntimeError):
    """No candidate is left. `reasons` maps each candidate to why it fell out."""


class BackendError(UnirtError, RuntimeError):
    """The engine itself failed; the vendor's exception is the `__cause__`."""


class BuildError(BackendError):
    """The engine refused the model or failed to compile it."""


class BuildCancelled(BuildError):
    """The caller's progress function stopped the build. Nothing was kept."""
