"""Hundreds of random faults against both scripts, and a table of what was seen: `python tests/faults.py [SEEDS]`.

The stories of tests/test_faults.py, with SEEDS (30) seeds for each script: about five minutes.
"""

from collections import Counter
import json
import os
from pathlib import Path
import re
import sys
import tempfile

import pytest

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        os.environ.update(FAULT_SEEDS=sys.argv[1] if len(sys.argv) > 1 else "30", FAULT_LOG=str(log))
        stories = str(Path(__file__).with_name("test_faults.py"))
        code = pytest.main(["-q", "-m", "long", "-n", "2", "--dist", "load", stories])
        seen = Counter()
        for line in log.read_text().splitlines():
            record = json.loads(line)
            words = re.sub(r"(?<=process )\d+.*|(?<=_)\d+", "…", record["seen"])  # of processes and files
            seen[record["script"], record["fault"], " ".join(words.split()[:7])] += 1
    for (script, fault, words), count in sorted(seen.items()):
        print(f"{count:4} {script:16} {fault:22} {words}")
    print(f"{sum(seen.values())} faults")
    sys.exit(code)
