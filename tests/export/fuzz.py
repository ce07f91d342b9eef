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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

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
    from cellserve.export.verify.keras_runs import run_saved_model_in_double
    from cellserve.export.verify.parity import limit_of, own_error_of, relative_error
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
            with trying(plan.get("numbers", ())):
                reference = reference_of(network)
        except ExportError as refusal:
            return f"refused: {refusal}"
    equal = 0
    x, _ = random_inputs(network.signature, 3, 20, np.random.default_rng(3))
    inputs = unpack(x)
    true = model.predict(inputs if len(inputs) > 1 else inputs[0], verbose=0)
    # What rounding makes of Keras's own numbers, so far, is no fault: at a jump (mod, select) it may be anything.
    exact, *others = (run[0] for run in run_saved_model_in_double(model, inputs) or [[true]])
    own = own_error_of(true, exact, others)
    limit = np.maximum(1e-3, limit_of(np.maximum.accumulate(own, axis=1) if true.ndim == 3 else own))
    for name, runtime in forms:
        failed = reference.compare(runtime).failed
        # A form that is wrong on special numbers alone is passed over where another is right.
        assert all(difference.run == "special" for difference in failed), (name, failed[:3])
        equal += not failed
        y, _ = runtime.run(x, np.full(3, 20, np.int32), runtime.zeros(3) if causal else [])
        ours = unpack(y)[0] if true.ndim == 3 else unpack(y)[0][:, -1]
        wrong = np.isfinite(true) & ~(relative_error(ours, true) <= limit)
        assert not wrong.any(), (name, "differs from model.predict", ours[wrong][:3], true[wrong][:3])
    assert equal, f"no form is right on special numbers: {failed[:3]}"
    return "exported"


@contextmanager
def trying(numbers: Sequence[float]) -> Iterator[None]:
    """Adds numbers to those that the proof visits."""
    from cellserve.export.verify import special_values

    small = tuple(number for number in numbers if abs(number) <= 100)
    with (
        patch.object(special_values, "_NUMBERS", (*special_values._NUMBERS, *numbers)),
        patch.object(special_values, "_STATE_NUMBERS", (*special_values._STATE_NUMBERS, *small)),
    ):
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the fuzzer; returns 1 if a network was wrong, or fewer than 95 % of the causal ones were exported."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=1000, help="how many to try (default: 1000)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per core)")
    parser.add_argument("--seed", type=int, help="of the random networks (default: a random one, printed)")
    parser.add_argument("--folder", type=Path, default=Path("fuzz"), help="for the results and the wrong networks")
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)  # this is one of the processes
    told = parser.parse_args(argv)
    if told.results:
        return _work(told.networks, told.seed, told.results)
    seed = random.randrange(10**9) if told.seed is None else told.seed
    folder = told.folder / f"{seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True)
    console = Console()
    console.print(f"seed {seed}, results in {folder}")
    started = time.monotonic()
    workers, files = [], []
    for job in range(told.jobs):
        share = told.networks // told.jobs + (job < told.networks % told.jobs)
        files.append(folder / f"{job}.jsonl")
        command = [sys.executable, "-m", "tests.export.fuzz", "--networks", str(share), "--seed", str(seed + job)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1"}
        with (folder / f"{job}.log").open("w") as log:
            command += ["--results", str(files[-1])]
            workers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    columns = TextColumn("networks"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=told.networks)
        while any(worker.poll() is None for worker in workers):
            time.sleep(1)
            progress.update(task, completed=len(_read(files)))
    return _report(console, _read(files), time.monotonic() - started, [worker.returncode for worker in workers])


def _read(files: Sequence[Path]) -> list[dict[str, Any]]:
    lines = [line for file in files if file.exists() for line in file.read_text().splitlines()]
    return [json.loads(line) for line in lines if line.endswith("}")]


def _report(console: Console, results: list[dict[str, Any]], seconds: float, statuses: list[int]) -> int:
    counts = Counter(each["result"].partition(":")[0] for each in results)
    causal = [each for each in results if each["causal"]]
    share = sum(each["result"] == "exported" for each in causal) / max(1, len(causal))
    spent = sum(each["seconds"] for each in results) / max(1, len(results))
    table = Table("", "networks", title=f"{seconds:.0f} s, {spent:.1f} s a network")
    for name, count in (("tried", len(results)), ("exported", counts["exported"]), ("refused", counts["refused"])):
        table.add_row(name, str(count))
    others = Counter(each["result"][:160] for each in results if each["result"] != "exported").most_common()
    for reason, count in sorted(others, key=lambda each: each[0]):
        table.add_row(Text(f"  {reason}"), str(count))
    table.add_row("wrong", str(counts["wrong"]))
    table.add_row("of the causal ones exported", f"{share:.1%} of {len(causal)}")
    console.print(table)
    return int(any(statuses) or counts["wrong"] > 0 or share < ENOUGH)


def _work(networks: int, seed: int, results: Path) -> int:
    """Tries networks one after another; saves those that are wrong beside the results, as drawn and shrunk."""
    from cellserve.models.tensorflow_import import import_tensorflow

    import_tensorflow()
    tried = 0
    while tried < networks:
        tried += _until_wrong(networks - tried, seed + 1000 * tried, results)
    return 0


def _until_wrong(networks: int, seed: int, results: Path) -> int:
    """Tries networks until one is wrong, which is saved as drawn, shrunk and saved; returns how many were tried.

    Shrinking may slide to another fault than that of the network as drawn.
    """
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    from tests.export.random_networks import build, is_causal
    from tests.export.random_networks import networks as plans

    tried = 0
    smallest: dict[str, Any] = {}
    path = results.with_name(f"{results.stem}-{seed}")

    @seeded(seed)
    @settings(
        max_examples=networks,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(plans())
    def run(plan: dict[str, Any]) -> None:
        nonlocal tried
        started, shrinking = time.monotonic(), bool(smallest)
        try:
            result = examine(plan)
        except Exception as error:
            result = f"wrong: {type(error).__name__}: {' '.join(str(error).split())[:1000]}"
            smallest.update(plan)
            if not shrinking:
                path.with_suffix(".drawn").write_text(json.dumps(plan, indent=1))
        if not shrinking:
            tried += 1
            line = {"result": result, "causal": is_causal(plan), "seconds": time.monotonic() - started, "plan": plan}
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
        assert not result.startswith("wrong"), result

    try:
        run()
    except Exception as error:
        path.with_suffix(".json").write_text(json.dumps(smallest, indent=1))
        build(smallest).save(path.with_suffix(".keras"))
        print(f"{path}.json, .keras: {error}", file=sys.stderr)
    return max(tried, 1)


if __name__ == "__main__":
    sys.exit(main())
