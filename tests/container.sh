#!/bin/sh
# Builds the image and sees what the README says of it: it serves on a read-only file system, as a user who is not root,
# is ready, answers, and has gone within 5 seconds of SIGTERM with exit status 0. Then the image without examples, which
# serves a mounted model on another port and adopts one. Sessions in a volume outlive a stop, a kill, and an upgrade to
# the other image.
#
#   DOCKER=docker sh tests/container.sh [BUILD OPTION ...]
set -eu
cd "$(dirname "$0")/.."
docker=${DOCKER:-docker}
name=cellserve-test-$$
folder=$(mktemp -d)
chmod 755 "$folder"
trap '{ $docker rm -f "$name"; $docker volume rm "$name"; } >/dev/null 2>&1 || true; rm -rf "$folder"' EXIT

# Runs an image in the background and waits until it has answered a prediction.
#   serve PORT RUN_OPTION ... IMAGE ARGUMENT ...
serve() {
    port=$1
    shift
    $docker run -d --name "$name" --read-only -p "127.0.0.1::$port" "$@" >/dev/null
    address=$($docker port "$name" "$port" 2>/dev/null | head -n 1)  # on a free port, which the engine chose
    python3 - "${address:-127.0.0.1:$port}" <<'P' || { $docker logs "$name"; exit 1; }
import json, sys, time, urllib.request as u
body = json.dumps({"model": "sunspots", "sequences": [[[96.7], [104.3], [116.7]]]}).encode()
predict = u.Request(f"http://{sys.argv[1]}/predict", body, {"Content-Type": "application/json"})
start = time.monotonic()
while True:
    try:
        print(u.urlopen(predict, timeout=2).read().decode().strip())
        print(f"answered {time.monotonic() - start:.1f} s after `docker run`")
        break
    except OSError as error:
        if time.monotonic() - start > 60:
            sys.exit(f"no answer after 60 seconds: {error}")
        time.sleep(0.1)
P
    $docker exec "$name" python3 -m cellserve.service.cli.healthcheck
}

$docker build "$@" -t cellserve .
serve 8000 cellserve
[ "$($docker exec "$name" id -u)" != 0 ]
$docker logs "$name" 2>&1 | grep -q "^no volume at /sessions" || { echo "no line says that sessions end" >&2; exit 1; }
$docker exec "$name" python3 -c "
import importlib.util as i, json, os
assert os.path.exists(i.cache_from_source(json.__file__)), 'the standard library is compiled at each start'
assert not [n for n in ('tensorflow', 'tf2onnx') if i.find_spec(n)], 'the image holds TensorFlow'"
$docker cp "$name:/artifacts" "$folder/models"
start=$(date +%s)
$docker stop -t 10 "$name" >/dev/null
taken=$(($(date +%s) - start))
status=$($docker inspect -f '{{.State.ExitCode}}' "$name")
[ "$status" = 0 ] || { echo "exit status $status" >&2; exit 1; }
[ $taken -le 5 ] || { echo "stopping took $taken seconds" >&2; exit 1; }
$docker rm "$name" >/dev/null
echo "the container serves, and stopped in $taken s"

# Steps a session to a position: the step before is repeated first, and must get the answer it had.
step_to() {
    python3 - "${address:-127.0.0.1:8000}" "$folder/answers" "$1" <<'P'
import json, pathlib, sys, urllib.request as u
address, file, end = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3])
def call(method, path, body):
    headers = {"Content-Type": "application/json"}
    answer = u.urlopen(u.Request(f"http://{address}{path}", json.dumps(body).encode(), headers, method=method))
    return json.load(answer), answer.headers
answers = json.loads(file.read_text()) if file.exists() else []
if not answers:
    call("PUT", "/sessions/kept", {"model": "sunspots"})
for position in range(max(0, len(answers) - 1), end):
    answer, headers = call("POST", "/sessions/kept/step", {"x": [100.0 + position], "position": position})
    if position < len(answers):
        assert (answer, headers["Idempotent-Replay"]) == (answers[position], "true"), (answer, answers[position])
    else:
        assert (answer["position"], answer["durable"]) == (position + 1, "process"), answer
        answers.append(answer)
file.write_text(json.dumps(answers))
P
}

serve 8000 -v "$name:/sessions" cellserve serve --workers 2
[ "$($docker exec "$name" stat -c %u /sessions)" = 10001 ]
step_to 3
if refused=$($docker run --rm --read-only -v "$name:/sessions" cellserve serve --port 8001 2>&1); then exit 1; fi
echo "$refused" | grep -q "another server uses /sessions" || { echo "$refused" >&2; exit 1; }
$docker stop -t 10 "$name" >/dev/null && $docker rm "$name" >/dev/null
serve 8000 -v "$name:/sessions" cellserve
step_to 6
$docker kill "$name" >/dev/null && $docker rm -f "$name" >/dev/null

$docker build "$@" --build-arg EXAMPLES=none -t cellserve-without-models .
serve 8000 -v "$name:/sessions" -v "$folder/models:/artifacts:ro" cellserve-without-models
step_to 9
$docker rm -f "$name" >/dev/null
echo "the sessions in the volume outlived a stop, a kill, and an upgrade"

mkdir "$folder/new"
chmod 777 "$folder/new"  # the image's user is another one
$docker run --rm -v "$folder/new:/artifacts" --entrypoint sh cellserve-without-models -c 'python3 -c "
from onnx import TensorProto as T, helper as h, save
tensors = [h.make_tensor_value_info(n, T.FLOAT, [\"batch\", 2]) for n in (\"x\", \"h\", \"y\", \"hn\")]
nodes = [h.make_node(\"Add\", [\"x\", \"h\"], [\"hn\"]), h.make_node(\"Tanh\", [\"hn\"], [\"y\"])]
graph = h.make_graph(nodes, \"g\", tensors[:2], tensors[2:])
save(h.make_model(graph, opset_imports=[h.make_opsetid(\"\", 17)], ir_version=9), \"/tmp/sum.onnx\")
" && cellserve adopt /tmp/sum.onnx --name sum'
cp -r "$folder/new/sum" "$folder/models/sum"
serve 9000 -v "$folder/models:/artifacts:ro" cellserve-without-models serve --port 9000
$docker exec "$name" cellserve models | grep -q '^sum ' || { echo "the adopted model is not served" >&2; exit 1; }
echo "the container without models adopts one, and serves those of a mounted folder"
