#!/bin/sh
# Builds the image and sees what the README says of it: it serves on a read-only file system, as a user who is not root,
# is ready, answers, and has gone within 5 seconds of SIGTERM with exit status 0.
#
#   DOCKER=docker sh tests/container.sh [BUILD OPTION ...]
set -eu
cd "$(dirname "$0")/.."
docker=${DOCKER:-docker}
name=cellserve-test-$$
$docker build "$@" -t cellserve .
trap '$docker rm -f "$name" >/dev/null 2>&1 || true' EXIT
$docker run -d --name "$name" --read-only -p 127.0.0.1::8000 cellserve
address=$($docker port "$name" 8000 | head -n 1)  # on a free port, which the engine chose
tries=0
until ask=$(python3 -c "import urllib.request as u; print(u.urlopen('http://$address/readyz', timeout=2).status)" 2>/dev/null); do
    tries=$((tries + 1))
    [ $tries -lt 60 ] || { $docker logs "$name"; echo "not ready after 60 seconds" >&2; exit 1; }
    sleep 1
done
[ "$($docker exec "$name" id -u)" != 0 ]
$docker exec "$name" python3 -c "
import importlib.util as i
assert not [n for n in ('tensorflow', 'tf2onnx') if i.find_spec(n)], 'the image holds TensorFlow'"
python3 - "$address" <<'P'
import json, sys, urllib.request as u
body = json.dumps({"model": "sunspots", "sequences": [[[96.7], [104.3], [116.7]]]}).encode()
answer = u.urlopen(u.Request(f"http://{sys.argv[1]}/predict", body, {"Content-Type": "application/json"}))
print(answer.read().decode())
P
start=$(date +%s)
$docker stop -t 10 "$name" >/dev/null
taken=$(($(date +%s) - start))
status=$($docker inspect -f '{{.State.ExitCode}}' "$name")
[ "$status" = 0 ] || { echo "exit status $status" >&2; exit 1; }
[ $taken -le 5 ] || { echo "stopping took $taken seconds" >&2; exit 1; }
echo "the container serves, and stopped in $taken s"
