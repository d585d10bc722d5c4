"""`nearfar export`: a model, whatever names it, as a folder of its own and as a version in the registry."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.exporting import POSITIVE, Trained, export_trained
from cluster.models import PROGRAM, REGISTERED, build_trained, fetch, find_checkpoint, in_mlflow
from cluster.progress import say
from cluster.promotion import Registered, check_model_name
from cluster.proof import Proof, example
from cluster.registration import LOGGED_AS, Gate, about, copy, register
from cluster.runfolder import RunFolder, read_lines
from cluster.spool import Position
from cluster.store import experiment_id, open_client, redact, tracking_uri
from configs.schema import Tracking
from trainer.checkpoints import Saved
from trainer.export import SETTINGS, load_exported


@dataclass(frozen=True, slots=True)
class Wish:
    """What the command line asks for; `alias` and `metric` None: those of the run."""

    out: Path | None
    onnx: bool
    register: str | None
    alias: str | None
    metric: str | None
    force: bool
    uri: str | None


@dataclass(frozen=True, slots=True)
class Ready:
    """An exported folder, with what registering it takes."""

    folder: Path
    uri: str
    run_id: str | None  # of MLflow, where it is known; it may lie on another server
    image: bytes
    verify: Callable[[Any], None]
    why_torch: str | None = None


def ship(reference: str, wish: Wish) -> dict[str, Any]:
    """Export `reference` and register it as told; returns what --json prints.

    reference: as `open_model` takes it. Raises ValueError for what is not there or not asked for rightly, RuntimeError when
    the export differs from the encoder or MLflow fails.
    """
    if wish.register is None and (wish.alias or wish.force or wish.metric):
        raise ValueError("--alias, --metric and --force are for a version in the registry: give --register NAME with them")
    if wish.register is not None:
        check_model_name(wish.register)
    path = Path(reference).expanduser().absolute()
    if in_mlflow(reference):
        return _from_mlflow(reference, wish)
    if (path / PROGRAM).exists():
        ready = _from_folder(path, wish, tracking_uri(Tracking(uri=wish.uri), Path("runs")), None)
    else:
        ready = _from_run(*find_checkpoint(path), wish, newest=not (path / "state.json").exists())
    return _told(ready.folder, ready.why_torch, _register(ready, wish))


def _from_run(run: RunFolder, saved: Saved, wish: Wish, *, newest: bool) -> Ready:
    config = run.config()
    out = (wish.out or (run.export if newest else run.path / f"export-{saved.name}")).absolute()
    say(f"exporting {run.path}, step {saved.step}")
    trained = Trained(build_trained(config, saved), saved.step, _measured(run, saved))
    done, proof = export_trained(config, run, trained, out, onnx=wish.onnx)
    uri = tracking_uri(config.tracking.model_copy(update={"uri": wish.uri or config.tracking.uri}), run.path.parent)
    known = Position.read(run.path / "tracking.json").run_id
    return Ready(out, uri, known, proof.images[0], lambda loaded: proof.check(loaded.predict), done.why_torch)


def _measured(run: RunFolder, saved: Saved) -> dict[str, float]:
    """What was evaluated at the very step of the checkpoint."""
    rows = [row for row in read_lines(run.metrics) if row["step"] == saved.step]
    return {key[4:]: value for row in rows for key, value in row.items() if key.startswith("val/")}


def _from_folder(folder: Path, wish: Wish, uri: str, run_id: str | None) -> Ready:
    """An exported folder as it is, or its copy in --out."""
    if not wish.onnx:
        raise ValueError(f"{folder} is exported already: --no-onnx is for a run or a checkpoint")
    if wish.out is None and wish.register is None:
        raise ValueError(f"{folder} is exported already: give --out DIR for a copy, or --register NAME")
    if wish.out is not None:
        out = wish.out.absolute()
        if out.exists() and not (out / SETTINGS).is_file():
            raise ValueError(f"{out} exists and is no exported encoder; choose another folder or remove it")
        if out != folder:
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(folder, out, ignore=shutil.ignore_patterns("__pycache__"))
    image = example()
    exported = load_exported(folder)
    proof = Proof([image], exported([image]), raw=getattr(exported, "distance", "cosine") == "euclidean")

    def verify(loaded: Any) -> None:
        proof.check(loaded.predict)

    return Ready(folder if wish.out is None else wish.out.absolute(), uri, run_id, image, verify)


def _from_mlflow(reference: str, wish: Wish) -> dict[str, Any]:
    uri = tracking_uri(Tracking(uri=wish.uri), Path("runs"))
    if not reference.startswith(REGISTERED):
        ready = _from_folder(fetch(reference, uri)[0], wish, uri, reference)
        return _told(ready.folder if wish.out else None, None, _register(ready, wish))
    if wish.out is None and wish.register is None:
        raise ValueError(f"{reference} is registered: give --out DIR for its folder, or --register NAME for another name")
    if wish.out is not None:
        _from_folder(fetch(reference, uri)[0], wish, uri, None)
    done = None if wish.register is None else copy(reference, uri=uri, name=wish.register, gate=_gate(wish, {}))
    return _told(None if wish.out is None else wish.out.absolute(), None, done)


def _register(ready: Ready, wish: Wish) -> Registered | None:
    if wish.register is None:
        return None
    told = about(ready.folder)
    say(f"registering it at {redact(ready.uri)}")
    run_id, logged_as = _run_for(ready, told)
    how: dict[str, Any] = {"uri": ready.uri, "gate": _gate(wish, told["gate"])}
    done = register(
        run_id, ready.folder, logged_as=logged_as, name=wish.register, example=ready.image, verify=ready.verify, **how
    )
    if (ready.folder / POSITIVE / PROGRAM).exists():
        other = _from_folder(ready.folder / POSITIVE, replace(wish, out=None, onnx=True), ready.uri, run_id)
        names: dict[str, Any] = {"logged_as": f"{logged_as}-{POSITIVE}", "name": f"{wish.register}-{POSITIVE}"}
        register(run_id, other.folder, example=other.image, verify=other.verify, **names, **how)
    return done


def _gate(wish: Wish, usual: dict[str, str]) -> Gate:
    metric = wish.metric or usual.get("metric", "recall_at_1")
    return Gate(metric, wish.alias or usual.get("alias", "champion"), wish.force)


def _run_for(ready: Ready, told: Mapping[str, Any]) -> tuple[str, str]:
    """The model's run in MLflow, or a new one where it is not there; and the model's name in it.

    Not the name that training gave it: the id of the run goes on to stand for what the training ended with.
    """
    from mlflow.exceptions import MlflowException

    client = open_client(ready.uri)
    if ready.run_id is not None:
        with suppress(MlflowException):
            return str(client.get_run(ready.run_id).info.run_id), f"{LOGGED_AS}-step-{told['tags']['steps']}"
    experiment = experiment_id(client, Tracking().experiment, ready.uri, Path("runs"))
    run_id = str(client.create_run(experiment, run_name=f"{told['name']}, exported").info.run_id)
    client.set_terminated(run_id, "FINISHED")
    return run_id, LOGGED_AS


def _told(folder: Path | None, why_torch: str | None, done: Registered | None) -> dict[str, Any]:
    found: dict[str, Any] = {"export": None if folder is None else str(folder), "why_torch": why_torch}
    names = ("name", "version", "alias", "promoted", "holder")
    found |= {name: None if done is None else getattr(done, name) for name in names}
    return found | {"model": None if done is None else done.uri}


def describe(found: dict[str, Any]) -> str:
    """For a person."""
    lines = [] if found["export"] is None else [f"export      {found['export']}"]
    if found["model"] is not None:
        lines.append(f"model       {found['model']}, version {found['version']}")
        kept = f"stays at version {found['holder']}, which is at least as good; --force moves it"
        was = "" if found["holder"] is None else f", before at version {found['holder']}"
        lines.append(f"{found['alias']:11} {f'moved{was}' if found['promoted'] else kept}")
    return "\n".join(lines)
