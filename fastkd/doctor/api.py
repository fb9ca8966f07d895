"""`doctor`: all checks, one after the other."""

from pathlib import Path

from .device import check_device
from .machine import check_machine
from .packages import check_packages
from .place import check_place
from .result import DoctorReport


def doctor(place: str | None = None) -> DoctorReport:
    """Look at the machine, the installed packages, the device with the fused loss on it, and a place for caches.

    place: a folder or a URL of a cache that is to be. None: the current folder is looked at.
    """
    found = [*check_machine(Path()), *check_packages(), *check_device()]
    return DoctorReport(found if place is None else [*found, check_place(place)])
