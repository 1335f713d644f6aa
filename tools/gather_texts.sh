#!/usr/bin/env bash
# Collects the training text of models/tiny-qwen3-moe into FOLDER, one subfolder per domain.
#
#     tools/gather_texts.sh FOLDER
#
# Sources, all under free licences, as packages of Debian 12 and PyPI:
#   python, tests  the standard library of this Python (PSF licence), its own tests apart
#   docs           python3.11-doc, the sources of Python's documentation (PSF licence)
#   prose          bible-kjv, the King James Bible (public domain)
#   go             golang-1.19-src, Go's standard library (BSD 3-clause)
#   json           botocore from PyPI, descriptions of web services (Apache 2.0)
# apt-get install python3.11-doc bible-kjv golang-1.19-src; pip install botocore
set -euo pipefail
out=${1:?usage: gather_texts.sh FOLDER}
mkdir -p "$out"/{python,tests,docs,prose,go,json}
out=$(cd "$out" && pwd)

stdlib=$(python3 -c "import sysconfig; print(sysconfig.get_paths()['stdlib'])")
(cd "$stdlib" && find . -name '*.py' -not -path '*/site-packages/*' -not -path './encodings/*' \
  -not -path './pydoc_data/*' -size -400k -print0 |
  while IFS= read -r -d '' file; do
    case "$file" in */test/* | */tests/* | */idle_test/*) kind=tests ;; *) kind=python ;; esac
    iconv -f utf-8 -t utf-8 "$file" >/dev/null 2>&1 || continue
    install -D -m 644 "$file" "$out/$kind/$file"
  done)
(cd /usr/share/doc/python3.11/html/_sources && find . -name '*.rst.txt' -exec install -D -m 644 {} "$out/docs/"{} \;)
(cd /usr/share/go-1.19/src && find . -name '*.go' -type f -not -name '*_test.go' -not -path './vendor/*' \
  -not -path './cmd/*' -not -path '*/testdata/*' -not -name '*tables*.go' -not -name 'z*.go' -size -100k \
  -exec install -D -m 644 {} "$out/go/"{} \;)
bible -f 'Gen1:1-Rev22:21' | awk -v out="$out/prose" '
  { split($1, at, ":"); file = out "/" at[1] ".txt"; sub(/^[^ ]+ /, ""); print > file }'
python3 - "$out/json" <<'PYTHON'
import gzip, pathlib, sys
import botocore
root = pathlib.Path(botocore.__file__).parent / "data"
for path in sorted(root.glob("*/*/service-2.json*"))[::6]:
    text = (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8").read()
    (pathlib.Path(sys.argv[1]) / f"{path.parts[-3]}.json").write_text(text[:60_000])
PYTHON
du -sh "$out"/*
