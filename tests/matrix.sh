#!/usr/bin/env bash
# Runs tests with several releases of transformers, and of whatever a comma adds:
#     tests/matrix.sh "5.18.0,torch==2.9.1,torchao==0.16.0 5.20.2" tests/training -k resume
# An environment in .matrix/ holds what differs from .venv and takes the rest from there. The index's torch for Linux
# brings CUDA along (6 GB); PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu has it without.
set -uo pipefail
cd "$(dirname "$0")/.."

environment() {
    local folder=.matrix/$1 wanted own shared
    read -ra wanted <<< "transformers==${1//,/ }"
    [[ $folder/.built -nt .venv/.testable && $folder/.built -nt constraints.txt ]] && return
    rm -rf "$folder"
    .venv/bin/python -m venv --without-pip "$folder" || return
    own=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    shared=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "import site; site.addsitedir('$shared')" > "$own/shared.pth"
    printf '%s\n' "${wanted[@]%%=*}" | sed 's/.*/^&==/' | grep -vf - constraints.txt > "$folder/constraints.txt"
    .venv/bin/python -m pip --python "$folder/bin/python" install -q -c "$folder/constraints.txt" "${wanted[@]}" &&
        touch "$folder/.built"
}

table="version passed failed skipped minutes"
failed=0
for version in $1; do
    log=.matrix/$version.log
    echo "== $version, written to $log"
    start=$SECONDS
    mkdir -p .matrix
    { environment "$version" && ".matrix/$version/bin/python" -m pytest "${@:2}"; } &> "$log" || failed=1
    counted() { grep -aE "[0-9]+ (passed|failed|error)" "$log" | tail -n 1 | grep -oE "[0-9]+ ($1)" | awk '{ sum += $1 } END { print sum + 0 }'; }
    table+=$'\n'"$version $(counted passed) $(counted 'failed|error') $(counted skipped) $(((SECONDS - start + 30) / 60))"
    grep -E "^(FAILED|ERROR)" "$log"
done
echo "$table" | column -t
exit $failed
