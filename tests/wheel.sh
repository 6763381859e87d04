#!/bin/sh
# wheel.sh FOLDER TORCH: installs the wheel of FOLDER with TORCH in a new environment; predicts the example in the package.
set -e
wheel=$(ls "$PWD/$1"/fleetflow-*.whl)
pins="$PWD/constraints.txt"
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check "$2" "$wheel" -c "$pins"
cd "$place"
venv/bin/fleetflow demo
example=$(venv/bin/python -c "from importlib import resources; print(resources.files('fleetflow') / 'example')")
venv/bin/fleetflow predict "$example/frame1.png" "$example/frame2.png" -o flow.flo
test "$(wc -c < flow.flo)" -eq $((12 + 448 * 320 * 8))
echo "the wheel predicts its example"
