"""Run everything: ``python -m benchmarks [torch] [jax] [tensorflow] [data]``, then report."""

from __future__ import annotations

import subprocess
import sys

from benchmarks import report


def main(arguments: list[str]) -> int:
    """Measure each framework in its own process; return 1 if a test fails or a target is missed."""
    known = (*report.FRAMEWORKS, report.DATA)
    frameworks = arguments or list(known)
    unknown = sorted(set(frameworks) - set(known))
    if unknown:
        print(f"unknown framework {unknown[0]!r}; there are {', '.join(known)}")
        return 2
    folder = report.HERE / "results"
    folder.mkdir(exist_ok=True)
    failed = False
    for framework in frameworks:
        out = folder / f"{framework}.json"
        out.unlink(missing_ok=True)  # a failed run must not leave an older result in its place
        names = ("shapes", framework, f"sam_{framework}", f"nfnet_{framework}")
        files = (report.HERE / f"test_{name}.py" for name in names)
        tests = [f"benchmarks/{file.name}" for file in files if file.exists()]
        command = [sys.executable, "-m", "pytest", *tests]
        failed |= bool(
            subprocess.run(
                [*command, f"--benchmark-json={out}"], cwd=report.HERE.parent, check=False
            ).returncode
        )
    return int(bool(report.main(["--check"])) or failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
