"""`make audit`: known vulnerabilities of everything that is installed, Python's and the viewer's.

Asks the OSV database (https://osv.dev), which has PyPI's and npm's advisories, about the exact versions of
`constraints.txt` and `web/package-lock.json`. Needs the network, so no test run waits for it. A database
that cannot be asked is no clean bill of health: the exit status is then 2.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx

__all__ = ("Finding", "Package", "installed", "known", "main")

ROOT = Path(__file__).parents[1]
DATABASE = "https://api.osv.dev"
AT_ONCE = 500
"""Packages in one request; the database takes a thousand."""


class Package(NamedTuple):
    """One version of something."""

    ecosystem: str
    """`PyPI` or `npm`."""
    name: str
    version: str


class Finding(NamedTuple):
    """A vulnerability that is known of a package."""

    package: Package
    id: str


def installed(root: Path = ROOT) -> list[Package]:
    """Everything that the environment and the viewer's build are made of."""
    lines = (root / "constraints.txt").read_text().splitlines()
    pinned = (line.partition("==") for line in lines if "==" in line and line[0] != "#")
    found = {Package("PyPI", name, version.strip()) for name, _, version in pinned}
    lock = json.loads((root / "web" / "package-lock.json").read_text())
    for path, entry in lock["packages"].items():
        if path and "version" in entry:
            name = entry.get("name", path.rpartition("node_modules/")[2])
            found.add(Package("npm", name, entry["version"]))
    return sorted(found)


def known(packages: Sequence[Package], database: str = DATABASE) -> list[Finding]:
    """What is known of them. Raises `httpx.HTTPError` where the database cannot be asked."""
    findings = []
    with httpx.Client(base_url=database, timeout=30) as client:
        for start in range(0, len(packages), AT_ONCE):
            some = packages[start : start + AT_ONCE]
            queries = [
                {"package": {"ecosystem": p.ecosystem, "name": p.name}, "version": p.version}
                for p in some
            ]
            answer = client.post("/v1/querybatch", json={"queries": queries}).raise_for_status()
            results: list[dict[str, Any]] = answer.json()["results"]
            for package, result in zip(some, results, strict=True):
                findings += [Finding(package, each["id"]) for each in result.get("vulns", [])]
    return findings


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0 nothing known, 1 something, 2 nobody to ask."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--database", default=DATABASE, help="address of an OSV database")
    database: str = parser.parse_args(arguments).database
    packages = installed()
    try:
        findings = known(packages, database)
    except (httpx.HTTPError, ValueError, KeyError) as error:
        sys.stderr.write(
            f"nothing was audited: {database} could not be asked about {len(packages)} packages "
            f"({type(error).__name__}: {error})\n"
        )
        return 2
    for finding in findings:
        package = finding.package
        sys.stdout.write(
            f"{package.ecosystem} {package.name} {package.version}: {finding.id}, "
            f"https://osv.dev/vulnerability/{finding.id}\n"
        )
    vulnerable = len({finding.package for finding in findings})
    sys.stdout.write(f"{len(packages)} packages asked about, {vulnerable} with known faults\n")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
