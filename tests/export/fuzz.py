"""Fuzzes the export: random networks are exported and equal to Keras, or refused for a reason that is so.

usage: make fuzz, or python -m tests.export.fuzz [--networks 1000] [--jobs N] [--seed S] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

ENOUGH = 0.95  # of the causal networks must be exported


def examine(plan: dict[str, Any]) -> str:
    """Exports a plan's network and compares it with Keras; returns what became of it.

    Returns:
        "exported", or "refused: " and the reason.

    Raises:
        AssertionError: It was exported wrongly, or refused for a reason that is not so.
    """
    import numpy as np

    from cellserve.export.candidates.candidates import build as build_graphs
    from cellserve.export.candidates.candidates import open_model, operator_choices, reference_of
    from cellserve.export.errors import ExportError
    from cellserve.export.exporter import network_of
    from cellserve.export.keras_model.load import load
    from cellserve.export.keras_model.step_network import StatefulNetwork
    from cellserve.models.signature import Exactness, ModelDocument
    from cellserve.service.runtime.batch_invariance import random_inputs
    from cellserve.service.runtime.tensor_layout import unpack
    from tests.export.random_networks import build, is_causal

    model = build(plan)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.keras")
        model.save(path)
        try:
            network = network_of(load(path))
            causal = isinstance(network, StatefulNetwork)
            assert causal or not is_causal(plan), f"a causal network is not stepped: {network.reason}"  # type: ignore[union-attr]
            document = ModelDocument(
                name="mine", signature=network.signature, exactness=Exactness(proved=False, why="")
            )
            forms = []
            for name, operators in operator_choices(network):
                graph, step = build_graphs(network, network.signature, operators)
                forms += [(name, open_model(graph, each, document)) for each in ((None, step) if step else (None,))]
            reference = reference_of(network)
        except ExportError as refusal:
            return f"refused: {refusal}"
    equal = 0
    x, _ = random_inputs(network.signature, 3, 20, np.random.default_rng(3))
    inputs = unpack(x)
    true = model.predict(inputs if len(inputs) > 1 else inputs[0], verbose=0)
    for name, runtime in forms:
        failed = reference.compare(runtime).failed
        # A form that is wrong on special numbers alone is passed over where another is right.
        assert all(difference.run == "special" for difference in failed), (name, failed[:3])
        equal += not failed
        y, _ = runtime.run(x, np.full(3, 20, np.int32), runtime.zeros(3) if causal else [])
        finite = np.isfinite(true)
        ours = unpack(y)[0] if true.ndim == 3 else unpack(y)[0][:, -1]
        np.testing.assert_allclose(ours[finite], true[finite], rtol=1e-3, atol=1e-3)
    assert equal, f"no form is right on special numbers: {failed[:3]}"
    return "exported"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the fuzzer; returns 1 if a network was wrong, or fewer than 95 % of the causal ones were exported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=1000, help="how many to try (default: 1000)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--seed", type=int, help="of the random networks (default: a random one, printed)")
    parser.add_argument("--folder", type=Path, default=Path("fuzz"), help="where wrong networks are saved")
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)  # this is one of the processes
    told = parser.parse_args(argv)
    if told.results:
        return _work(told.networks, told.seed, told.results, told.folder)
    seed = random.randrange(10**9) if told.seed is None else told.seed
    console = Console()
    console.print(f"seed {seed}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        workers, files = [], []
        for job in range(told.jobs):
            share = told.networks // told.jobs + (job < told.networks % told.jobs)
            files.append(Path(folder, f"{job}.jsonl"))
            command = [sys.executable, "-m", "tests.export.fuzz", "--networks", str(share), "--seed", str(seed + job)]
            command += ["--results", str(files[-1]), "--folder", str(told.folder)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1"}
            workers.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
        columns = TextColumn("networks"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=told.networks)
            while any(worker.poll() is None for worker in workers):
                time.sleep(1)
                progress.update(task, completed=len(_read(files)))
        results = _read(files)
    return _report(console, results, time.monotonic() - started, [worker.returncode for worker in workers])


def _read(files: Sequence[Path]) -> list[dict[str, Any]]:
    lines = [line for file in files if file.exists() for line in file.read_text().splitlines()]
    return [json.loads(line) for line in lines if line.endswith("}")]


def _report(console: Console, results: list[dict[str, Any]], seconds: float, statuses: list[int]) -> int:
    counts = Counter(each["result"].partition(":")[0] for each in results)
    causal = [each for each in results if each["causal"]]
    share = sum(each["result"] == "exported" for each in causal) / max(1, len(causal))
    spent = sum(each["seconds"] for each in results) / max(1, len(results))
    console.print(f"{len(results)} networks in {seconds:.0f} s, {spent:.1f} s each: {dict(counts)}")
    for reason, count in Counter(each["result"][:160] for each in results if "refused" in each["result"]).most_common():
        console.print(f"  {count} {reason}", markup=False)
    console.print(f"of {len(causal)} causal ones {share:.1%} are exported")
    return int(any(statuses) or share < ENOUGH)


def _work(networks: int, seed: int, results: Path, folder: Path) -> int:
    """Tries networks one after another; shrinks and saves the first that is wrong."""
    from cellserve.models.tensorflow_import import import_tensorflow

    import_tensorflow()
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    from tests.export.random_networks import build, is_causal
    from tests.export.random_networks import networks as plans

    smallest: list[dict[str, Any]] = []

    @seeded(seed)
    @settings(
        max_examples=networks,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(plans())
    def run(plan: dict[str, Any]) -> None:
        started = time.monotonic()
        result = "wrong"
        try:
            result = examine(plan)
        except BaseException:
            smallest[:] = [plan]
            raise
        finally:
            line = {"result": result, "causal": is_causal(plan), "seconds": time.monotonic() - started}
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")

    try:
        run()
    except BaseException as error:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{seed}.json").write_text(json.dumps(smallest[0] if smallest else None, indent=1))
        if smallest:
            build(smallest[0]).save(folder / f"{seed}.keras")
        print(f"seed {seed}: {folder}/{seed}.json, .keras: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
