"""Installed packages: those that fastkd needs, and those of its extras."""

from collections.abc import Iterator, Sequence
from importlib import metadata

from packaging.requirements import Requirement

from .result import Found

SHOWN = ("torch", "triton", "zarr", "numcodecs", "pyarrow", "numpy", "transformers")
"""Packages whose versions are printed."""
OWN = ("test", "dev", "docs")
"""Extras of those who change fastkd."""


def check_packages(requirements: Sequence[str] | None = None) -> Iterator[Found]:
    """Versions; a problem for each requirement that is not met; and the extras that are complete.

    requirements: as in the metadata of a distribution. None: fastkd's.
    """
    given = (metadata.requires("fastkd") or []) if requirements is None else requirements
    parsed = [Requirement(text) for text in given]
    versions = {name: version for name in SHOWN if (version := _version(name)) is not None}
    yield Found("packages", "ok", ", ".join(f"{name} {version}" for name, version in versions.items()))
    needed = [one for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]
    for problem in filter(None, map(_problem, needed)):
        yield Found("packages", "problem", f"{problem}. Install it: pip install --upgrade fastkd")
    complete, lacking = [], []
    for extra in _extras(parsed):
        problems = [text for one in _of_extra(parsed, extra) if (text := _problem(one)) is not None]
        complete += [] if problems else [extra]
        lacking += [f"{extra} ({'; '.join(problems)})"] if problems else []
    yield Found("extras", "ok", ", ".join(complete) or "none")
    if lacking:
        yield Found(
            "extras not there", "ok", f"{', '.join(lacking)}. To add one: pip install 'fastkd[{_name(lacking)}]'"
        )


def _extras(parsed: Sequence[Requirement]) -> list[str]:
    """The names of extras, in the order of the metadata."""
    texts = [str(one.marker or "").replace("'", '"') for one in parsed]
    names = dict.fromkeys(part.partition('"')[0] for text in texts for part in text.split('extra == "')[1:])
    return [name for name in names if name not in OWN]


def _of_extra(parsed: Sequence[Requirement], extra: str) -> list[Requirement]:
    """What an extra requires; of one that is made of others, what they require."""
    own = [
        one
        for one in parsed
        if one.marker is not None and not one.marker.evaluate({"extra": ""}) and one.marker.evaluate({"extra": extra})
    ]
    others = [name for one in own if one.name == "fastkd" for name in sorted(one.extras)]
    return [one for one in own if one.name != "fastkd"] + [one for name in others for one in _of_extra(parsed, name)]


def _problem(one: Requirement) -> str | None:
    """Why a requirement is not met."""
    found = _version(one.name)
    if found is None:
        return f"{one.name} is not installed"
    return None if one.specifier.contains(found, prereleases=True) else f"{one.name} {found}, not {one.specifier}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _name(lacking: Sequence[str]) -> str:
    return lacking[0].partition(" ")[0]
