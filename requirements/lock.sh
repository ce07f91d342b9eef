#!/bin/sh
# Pins versions and hashes of what pyproject.toml asks for, for every platform and Python, each flavour in a file.
# Versions that stand there already are kept where they still fit.
#
#   sh requirements/lock.sh            writes requirements/*.txt
#   sh requirements/lock.sh --upgrade  the same with the newest versions that pyproject.toml allows
#   sh requirements/lock.sh --check    says whether they fit pyproject.toml, and writes nothing
set -eu
cd "$(dirname "$0")/.."
folder=requirements upgrade=
case ${1-} in
    --upgrade) upgrade=--upgrade ;;
    --check)
        folder=$(mktemp -d)
        trap 'rm -rf "$folder"' EXIT
        cp requirements/*.txt "$folder"
        ;;
esac

lock() {
    file=$folder/$1.txt
    shift
    "${UV:-uv}" pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
        --custom-compile-command "make lock" $upgrade -o "$file" "$@"
}

training="requirements/tensorflow.in --overrides requirements/overrides.in"
lock dev pyproject.toml --extra dev $training
# The others take the same versions: what is served is what was tested.
for flavour in cpu gpu; do
    lock $flavour pyproject.toml --extra $flavour --extra grpc --extra onnx --extra redis --extra tracing -c "$folder/dev.txt"
done
lock all pyproject.toml --extra all $training -c "$folder/dev.txt"
for extra in docs release; do
    lock $extra pyproject.toml --extra $extra -c "$folder/dev.txt"
done
lock silero requirements/silero.in --no-deps
lock triton requirements/triton.in --no-deps

[ "$folder" = requirements ] && exit
for file in requirements/*.txt; do
    # A version may get more files, and so more hashes, at any time: that is no change of ours.
    without_hashes='/^ *--hash/d; s/ \\$//'
    sed "$without_hashes" "$file" >"$folder/before"
    sed "$without_hashes" "$folder/$(basename "$file")" | diff "$folder/before" - || {
        echo "$file does not fit pyproject.toml: run make lock" >&2
        exit 1
    }
done
