"""NVIDIA's Triton with its Python backend: writes a model repository and becomes `tritonserver`.

usage: python -m bench.peers.triton PORT FOLDER STEP_BATCH STEP_WAIT PREDICT_BATCH PREDICT_WAIT

Waits are in milliseconds. FOLDER holds the networks. Triton comes with nvidia-pytriton from PyPI, in an environment of
its own, `.venv-triton`, since its Python backend is built for NumPy 1. The backend runs a model in a separate process,
a stub linked to the library of one Python version; there is a stub for each of Python 3.8 to 3.13.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PEERS = Path(__file__).parent
ENVIRONMENT = PEERS.parent.parent / ".venv-triton"
WHERE = "import sys, sysconfig as s; print(sys.version_info[1], s.get_path('purelib'), sys.base_prefix, sep='\\n')"

STEP = """\
name: "step"
backend: "python"
max_batch_size: BATCH
input [{ name: "x", data_type: TYPE_FP32, dims: [16] }]
output [{ name: "y", data_type: TYPE_FP32, dims: [4] }]
instance_group [{ count: 1, kind: KIND_CPU }]
sequence_batching {
  max_sequence_idle_microseconds: 3600000000
  oldest { max_candidate_sequences: 1024, max_queue_delay_microseconds: WAIT }
}
"""
# A request is one row: its sequences concatenated, and their lengths. Ragged, so that requests of different sizes can
# share a batch.
PREDICT = """\
name: "predict"
backend: "python"
max_batch_size: BATCH
input [
  { name: "x", data_type: TYPE_FP32, dims: [-1, 16], allow_ragged_batch: true },
  { name: "lengths", data_type: TYPE_INT32, dims: [-1], allow_ragged_batch: true }
]
output [{ name: "y", data_type: TYPE_FP32, dims: [-1, 4] }]
instance_group [{ count: 1, kind: KIND_CPU }]
dynamic_batching { max_queue_delay_microseconds: WAIT }
"""


def main() -> None:
    port, folder = sys.argv[1], Path(sys.argv[2])
    step_batch, step_wait, predict_batch, predict_wait = map(int, sys.argv[3:])
    python = ENVIRONMENT / "bin/python"
    if not python.exists():
        sys.exit(f"{ENVIRONMENT.name} is missing: run `make bench`")
    found = subprocess.run([python, "-c", WHERE], check=True, capture_output=True, text=True).stdout.split("\n")
    minor, packages, base = found[0], Path(found[1]), found[2]
    triton = packages / "pytriton/tritonserver"
    stub = triton / f"python_backend_stubs/3.{minor}/triton_python_backend_stub"
    for path in (triton / "bin/tritonserver", stub):
        if not path.exists():
            sys.exit(f"{path.relative_to(packages)} is not in {ENVIRONMENT.name}")
    libraries = f"{packages / 'nvidia_pytriton.libs'}:{base}/lib"
    environment = {**os.environ, "LD_LIBRARY_PATH": libraries, "PATH": f"{python.parent}:{os.environ['PATH']}"}
    environment["BENCH_FOLDER"] = str(folder)
    linked = subprocess.run(["ldd", stub], env=environment, capture_output=True, text=True).stdout
    for line in linked.splitlines():
        if "not found" in line:
            library = line.split()[0]
            sys.exit(f"{library} is missing, which Triton's Python backend needs: apt-get install libpython3.{minor}")

    # A folder for each run: the stub of the run before may still be ending, and nobody may write to its file then.
    own = Path(tempfile.mkdtemp(prefix="triton-", dir=folder))
    backends, repository = own / "backends", own / "models"
    shutil.copytree(triton / "backends/python", backends / "python", dirs_exist_ok=True)
    shutil.copy(stub, backends / "python")
    for name, text, batch, wait in (
        ("step", STEP, step_batch, step_wait),
        ("predict", PREDICT, predict_batch, predict_wait),
    ):
        configuration = text.replace("BATCH", str(batch)).replace("WAIT", str(1000 * wait))
        version = repository / name / "1"
        version.mkdir(parents=True, exist_ok=True)
        (version.parent / "config.pbtxt").write_text(configuration)
        shutil.copy(PEERS / f"triton_{name}.py", version / "model.py")
        shutil.copy(PEERS / "lstm.py", version)
    program = str(triton / "bin/tritonserver")
    flags = {
        "model-repository": repository,
        "backend-directory": backends,
        "http-address": "127.0.0.1",
        "http-port": port,
        "http-thread-count": 2,  # the default of 8 is meant for several cores
        "allow-grpc": "false",
        "allow-metrics": "false",
    }
    os.execve(program, [program, *(f"--{name}={value}" for name, value in flags.items())], environment)


if __name__ == "__main__":
    main()
