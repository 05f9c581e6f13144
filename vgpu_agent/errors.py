"""What can go wrong, grouped by the edge at which it does."""

import errno
import logging

SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""Errors of a machine that lacks something for a while."""


class VgpuAgentError(Exception):
    """Base of every error that this package raises on purpose."""


def is_shortage(error: BaseException) -> bool:
    """Whether it says what the machine lacks now, and not what is wrong: it is tried again."""
    return isinstance(error, OSError) or lacks_thread(error)


def lacks_thread(error: BaseException) -> bool:
    """Whether a thread cannot be started, which is a RuntimeError of its own."""
    return isinstance(error, RuntimeError) and "start new thread" in str(error)


class Once:
    """Warns of trouble when it begins or is another one, and not for as long as it goes on."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._last: str | None = None

    def warn(self, text: str | None = None) -> None:
        """What is wrong now; nothing where all is well again."""
        if text and text != self._last:
            self._logger.warning("%s", text)
        self._last = text


class SettingsError(VgpuAgentError):
    """One or more VGPU_* variables are wrong; the message lists every one of them."""


class ListenError(VgpuAgentError):
    """The metrics address cannot be listened on."""


class StoreError(VgpuAgentError):
    """A file of ours cannot be read or written; the message names it and says why."""


class StoreShortageError(StoreError):
    """A file cannot be read now, for want of descriptors or memory; it is not wrong."""


class DriverError(VgpuAgentError):
    """The source of GPUs cannot be asked at all: no library, no driver, a failing NVML."""


class DriverLibraryError(DriverError):
    """The driver's library is missing, or of another version than the driver.

    In a container it is injected at creation: waiting alone does not help.
    """


class DriverHangsError(DriverError):
    """A call to the driver that concerns all GPUs does not return."""


class NoAgentError(VgpuAgentError):
    """No running agent answers where it was asked; the message says what does instead."""


class ControlError(VgpuAgentError):
    """The running agent cannot do what it was asked; the message says why."""


class UnknownGpuError(ControlError):
    """No GPU, or more than one, is what was named; the message lists what there is."""


class MpsError(VgpuAgentError):
    """The MPS control daemon could not be asked or set up."""


class MpsDownError(MpsError):
    """No daemon answers in the pipe directory."""


class MpsBusyError(MpsError):
    """Somebody else has the one control connection of the daemon, which may be in order."""


class MpsHungError(MpsError):
    """The daemon does not answer in time."""


class MpsRefusedError(MpsError):
    """The daemon answered with an error, or with what nobody can understand."""


class MpsSetupError(MpsError):
    """A command of `vgpu-agent mps` cannot do its work; says what to do."""


class KubeletError(VgpuAgentError):
    """The kubelet was asked in vain, or was not understood; it is tried again."""


class KubeletAwayError(KubeletError):
    """No kubelet listens on its socket, or what does speaks no gRPC or hangs up."""


class EndpointError(KubeletError):
    """Our own socket cannot be bound where the kubelet looks for it; `rival` serves there."""

    def __init__(self, message: str, rival: str | None = None) -> None:
        super().__init__(message)
        self.rival = rival


class StreamMissingError(KubeletError):
    """The kubelet took the registration and did not open its stream."""


class StoryError(VgpuAgentError):
    """A step of `vgpu-agent dev` was not observed; the message names it."""


class AdmissionError(VgpuAgentError):
    """The stand-in kubelet could not admit a pod."""


class AllocationError(VgpuAgentError):
    """An allocation cannot be answered; nothing has changed."""


class InvalidRequestError(AllocationError):
    """The request itself is wrong: unknown, missing or repeated IDs."""


class UnavailableDeviceError(AllocationError):
    """The request is well formed, but a device cannot be given now."""
