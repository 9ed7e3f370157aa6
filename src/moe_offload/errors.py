"""Every error this project raises for a reason that a user can act on.

MoeOffloadError
├── ConfigError            an option or argument is wrong (also a ValueError)
├── BudgetError            the memory given is too small; says the smallest that works
├── UnsupportedModelError  no experts, or experts of a class that is not known
├── SourceError            the checkpoint cannot be read: missing, truncated, inconsistent, not downloadable
│   └── UnsupportedQuantizationError   the checkpoint's quantisation is not one we can read
├── FormatError            a weight cannot be held in the format asked for
├── DiskFullError          not enough room to write a pack
├── PackError              an expert pack cannot be used
│   ├── PackIncompleteError    packing was not finished
│   ├── PackVersionError       written by another version of the format
│   ├── PackShareError         holds a part of the experts, and not the part that is needed
│   └── PackCorruptError       damaged: missing or truncated file, wrong checksum, manifest that does not add up
├── GroupError             processes that share a model's experts cannot go on together
│   ├── GroupMismatchError     they were started with different models, formats or versions
│   ├── PeerFailedError        one of them cannot go on, and has said why
│   └── PeerLostError          one of them is gone, or gives no sign of life
├── ReportError            a profile report cannot be read or compared
├── ExpertReadError        the disk failed while an expert was read, after retries
└── ExpertCopyError        the device failed while an expert was copied to it
"""


class MoeOffloadError(Exception):
    """Base of all errors; its text is a message for people, with numbers and a remedy."""


class ConfigError(MoeOffloadError, ValueError):
    """An option or argument is wrong."""


class BudgetError(MoeOffloadError):
    """The memory given cannot hold what is needed.

    ``needed_bytes`` is the smallest budget that works, ``budget_bytes`` the one that was given.
    """

    def __init__(self, message: str, *, needed_bytes: int, budget_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.budget_bytes = budget_bytes


class UnsupportedModelError(MoeOffloadError):
    """The model has no experts, or experts of a class that is not known."""


class SourceError(MoeOffloadError):
    """The checkpoint cannot be read."""


class UnsupportedQuantizationError(SourceError):
    """The checkpoint is quantised in a way that cannot be read here."""


class FormatError(MoeOffloadError):
    """A weight cannot be held in the format asked for."""


class DiskFullError(MoeOffloadError):
    """Not enough room on the disk to write a pack."""


class PackError(MoeOffloadError):
    """An expert pack cannot be used."""


class PackIncompleteError(PackError):
    """Packing was not finished."""


class PackVersionError(PackError):
    """The pack was written by another version of the format."""


class PackShareError(PackError):
    """The pack holds a part of the experts, and not the part that is needed."""


class PackCorruptError(PackError):
    """The pack is damaged."""


class GroupError(MoeOffloadError):
    """Processes that share a model's experts cannot go on together."""


class GroupMismatchError(GroupError):
    """They were started with different models, formats or versions."""


class PeerFailedError(GroupError):
    """One of them cannot go on, and has said why."""


class PeerLostError(GroupError):
    """One of them is gone, or gives no sign of life."""


class ReportError(MoeOffloadError):
    """A profile report cannot be read or compared."""


class ExpertReadError(MoeOffloadError):
    """The disk failed while an expert was read, after retries."""


class ExpertCopyError(MoeOffloadError):
    """The device failed while an expert was copied to it."""
