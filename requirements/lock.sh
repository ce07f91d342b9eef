#!/bin/sh
# Writes the versions and hashes of what pyproject.toml asks for, for every platform and Python, into the folder.
# Versions that stand there already are kept where they still fit; --upgrade takes the newest that pyproject.toml allows.
#
#   sh requirements/lock.sh requirements [--upgrade]
set -eu
folder=$1
shift
lock() {
    file=$folder/$1.txt
    shift
    "${UV:-uv}" pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
        --custom-compile-command "make lock" "$@" -o "$file"
}
lock dev pyproject.toml --extra dev "$@"
# The others take the same versions, so that what is served is what was tested.
lock all pyproject.toml --extra all -c "$folder/dev.txt" "$@"
lock cpu pyproject.toml --extra cpu --extra grpc --extra redis --extra tracing -c "$folder/dev.txt" "$@"
lock gpu pyproject.toml --extra gpu --extra grpc --extra redis --extra tracing -c "$folder/dev.txt" "$@"
for name in silero triton; do
    lock $name "$folder/$name.in" "$@"
done
