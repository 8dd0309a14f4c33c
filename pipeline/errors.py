"""Every error Millrace raises, in one tree: the class says what happens to the record.

    MillraceError(code, retryable)
    ├─ ContractError       not retryable   bytes break the contract        -> dead letter; HTTP 400/422
    │  └─ RecordTooLargeError              the broker refuses the size     -> told to the publisher; HTTP 413
    ├─ ImageError          not retryable   the image is at fault           -> dead letter; HTTP 413/415/422
    │  ├─ UndecodableImageError
    │  ├─ ImageTooLargeError
    │  └─ MissingImageError                the object behind `dataref` is not there, or is another one
    ├─ ExpiredError        not retryable   past its deadline               -> outcome `expired`
    ├─ ModelError          not retryable   the model failed on this record -> dead letter, counted by the limiter
    ├─ ProcessKilledError  not retryable   the record killed its worker    -> dead letter, unopened
    ├─ StorageRefusedError not retryable   the database refuses the data   -> dead letter
    ├─ ConflictError       not retryable   somebody else was first         -> told to the caller; HTTP 409
    ├─ DependencyError     retryable       broker, store, database, NVML   -> retried in place for ever; HTTP 503
    ├─ FatalError          not retryable   the process cannot be trusted   -> exit 70 without acknowledging
    └─ ConfigurationError  not retryable   wrong setting or model          -> exit 78 before readiness, one line

`code` is stable and machine-readable: it is stored with dead letters and used as a metric label.
"""

from typing import ClassVar

EXIT_FATAL = 70  # sysexits.h EX_SOFTWARE
EXIT_CONFIGURATION = 78  # sysexits.h EX_CONFIG


class MillraceError(Exception):
    """An error with a stable code; the message is for a person and names the fault."""

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ContractError(MillraceError):
    """The record's bytes or headers break the published contract."""

    code = "contract"


class RecordTooLargeError(ContractError):
    """The record is larger than its topic allows."""

    code = "record_too_large"


class ImageError(MillraceError):
    """The image itself is at fault."""

    code = "image"


class UndecodableImageError(ImageError):
    """The bytes are not a picture that can be decoded."""

    code = "undecodable_image"


class ImageTooLargeError(ImageError):
    """The image has more bytes or pixels than the limits allow."""

    code = "image_too_large"


class MissingImageError(ImageError):
    """The object behind `dataref` does not exist or has another digest."""

    code = "missing_image"


class ExpiredError(MillraceError):
    """The record's deadline has passed."""

    code = "expired"


class ModelError(MillraceError):
    """The model failed on this record, alone in its batch."""

    code = "model"


class ProcessKilledError(MillraceError):
    """The record was alone in flight each of the last times its worker died."""

    code = "process_killed"


class StorageRefusedError(MillraceError):
    """The database refuses this record's data, however often it is tried."""

    code = "storage_refused"


class ConflictError(MillraceError):
    """Somebody else changed it first; the caller must look before it tries again."""

    code = "conflict"


class DependencyError(MillraceError):
    """A broker, store, database or driver does not answer; trying again may help."""

    code = "dependency"
    retryable = True


class FatalError(MillraceError):
    """The process can no longer be trusted with records; it must end without acknowledging."""

    code = "fatal"


class ConfigurationError(MillraceError):
    """A setting or model is wrong; the message names the setting."""

    code = "configuration"
