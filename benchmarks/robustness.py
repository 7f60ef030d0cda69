"""Counts what the tests break, as their run reports it: inputs that are tried and faults that are injected.

    python benchmarks/robustness.py            # runs the tests that break something, a quarter of an hour
    python benchmarks/robustness.py --kills 7  # kills a run of the tests' own at 7 moments instead of 50
    python benchmarks/robustness.py --xml FILE # takes the numbers of a run that was made with --junitxml

A fault counts if its test passed. Faults are numbers that tests are marked with (`@pytest.mark.injects(n)`, see
tests/conftest.py), inputs those that `test_bad_inputs.py` has handed to the command line.

Writes `benchmarks/results/robustness-cpu-DATE.json` and the sentence between the README's markers.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- robustness -->", "<!-- /robustness -->"
FILES = ("bad_inputs", "faults", "journal", "kill", "notice", "restart")
# What the faults of a file are, for the README.
NAMES = {
    "kill": "kills",
    "notice": "notices to end",
    "journal": "damaged journals",
    "restart": "deaths of an engine",
    "faults": "broken checkpoints, full disks and other faults",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="moments at which `tests/test_kill.py` kills a run")
    parser.add_argument("--xml", type=Path, help="a report that pytest has written")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = arguments.xml or run(Path(folder) / "report.xml", arguments.kills)
        result = counted(ET.parse(report).getroot())
    result["versions"] = {"python": platform.python_version()}
    result["command"] = " ".join(["python benchmarks/robustness.py", *sys.argv[1:]])
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    target = arguments.results / f"robustness-cpu-{today}.json"
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if arguments.results == RESULTS:
        readme = ROOT / "README.md"
        before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        readme.write_text(f"{before}{BEGIN}\n{sentence(result, target)}\n{END}{after}", encoding="utf-8")
    print(json.dumps(result, indent=1))


def run(report: Path, kills: int) -> Path:
    """The tests that break something; what they report."""
    command = [sys.executable, "-m", "pytest", *(f"tests/test_{name}.py" for name in FILES), f"--junitxml={report}"]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "TANDEM_KILLS": str(kills)})
    return report


def counted(report: ET.Element) -> dict[str, Any]:
    """Inputs and faults by file, of the tests that passed; how many did not pass."""
    faults: dict[str, int] = {}
    inputs, tests, skipped, failed = 0, 0, [], []
    for case in report.iter("testcase"):
        name = case.attrib["classname"].rpartition(".")[2].removeprefix("test_")
        tests += 1
        if case.find("skipped") is not None:
            skipped.append(case.attrib["name"])
        elif case.find("failure") is not None or case.find("error") is not None:
            failed.append(case.attrib["name"])
        else:
            for entry in case.iter("property"):
                if entry.attrib["name"] == "faults":
                    faults[name] = faults.get(name, 0) + int(entry.attrib["value"])
                elif entry.attrib["name"] == "inputs":
                    inputs += int(entry.attrib["value"])
    counts = {"inputs": inputs, "faults": sum(faults.values()), "faults_by_file": faults}
    return {"bench": "robustness", **counts, "tests": tests, "failed": failed, "skipped": skipped}


def sentence(result: dict[str, Any], path: Path) -> str:
    """What the README says of a result."""
    parts = [f"{result['faults_by_file'][file]} {name}" for file, name in NAMES.items()]
    inputs, faults = result["inputs"], result["faults"]
    return (
        f"The tests hand {inputs} bad inputs to the command line and inject {faults} faults into runs\n"
        f"({', '.join(parts)}): one clear message each, or the same end as an undisturbed run\n"
        f"([{path.name}]({path.relative_to(ROOT).as_posix()}); what happens on each: [docs/faults.md](docs/faults.md))."
    )


if __name__ == "__main__":
    main()
