#!/usr/bin/env bash
# Make docs/report.png and bench/results/first-run.json of one run of the first command in README.md, which has their numbers.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(mktemp -d)
trap 'rm -r "$out"' EXIT
python -m sparsefw.run --output "$out/pruned"
chromium --headless --no-sandbox --hide-scrollbars --window-size=1000,930 --screenshot=docs/report.png \
  "file://$out/pruned/report.html"
python - "$out/pruned/report.json" <<'END'
import hashlib, itertools, json, sys
from pathlib import Path
from PIL import Image
from sparsefw.report import content, log

# A window of Chromium also holds its bars, for which the picture has an empty margin.
with Image.open("docs/report.png") as screen:
    screen.crop((0, 0, 1000, 830)).save("docs/report.png", optimize=True)
report = content.read_report(Path(sys.argv[1]))
picture = hashlib.sha256(Path("docs/report.png").read_bytes()).hexdigest()
table = list(itertools.takewhile(bool, log.summary(report)))
found = {"device": report.device, "versions": report.versions, "table": table, "picture": picture}
Path("bench/results/first-run.json").write_text(json.dumps(found, indent=2) + "\n")
END
