"""Commands about data: fetched, packed, or in tars made elsewhere; looked at and checked."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cluster.answers import Json, print_result

commands = typer.Typer()
Shards = Annotated[str, typer.Argument(metavar="SHARDS", help="A folder or URL with a manifest, from `pack` or `index`.")]
SHOWN = 20


@commands.command()
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="emoji, digits or fashion-mnist.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder: one folder of images for each class.")],
    source: Annotated[Path | None, typer.Option(help="fashion-mnist: a folder that holds the IDX files.")] = None,
    as_json: Json = False,
) -> None:
    """Fetch a known data set as a folder of images by class, with its licences.

    Example: nearfar fetch emoji images/emoji
    """
    from cluster.progress import bar
    from configs.registry import resolve

    options = {} if source is None else {"source": source}
    with bar(f"fetching {name}") as report:
        try:
            summary = resolve("dataset", name)(out, progress=report, **options)
        except TypeError as error:
            raise ValueError(f"--source is for fashion-mnist, {name} has none") from error
    found = {"classes": summary.classes, "images": summary.images, "out": str(out)}
    print_result(found, as_json=as_json, text=f"{summary.images} images of {summary.classes} classes in {out}")


@commands.command()
def pack(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="Images in folders by class, a table (parquet, CSV, JSONL), or tars; path or URL."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the shards.")],
    kind: Annotated[str, typer.Option(help="labelled, pair, labelled_pair or triplet.")] = "labelled",
    eval_fraction: Annotated[float, typer.Option(min=0.0, max=0.9, help="Share held out, in OUT/eval.")] = 0.0,
    split: Annotated[str, typer.Option(help="Hold out whole classes (class) or single records (record).")] = "class",
    max_shard_mb: Annotated[int, typer.Option(min=1)] = 256,
    max_shard_records: Annotated[int | None, typer.Option(min=1)] = None,
    max_side: Annotated[int | None, typer.Option(min=8, help="Shrink larger images to this longest side.")] = None,
    quality: Annotated[int | None, typer.Option(min=1, max=100, help="Of JPEGs written anew; 92 if not given.")] = None,
    reencode: Annotated[bool, typer.Option("--reencode", help="Make every JPEG upright, baseline and 4:2:0.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes, 2 if not given; Ray tasks: one a CPU.")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="Tasks of this machine's own Ray instead of processes.")] = False,
    address: Annotated[str | None, typer.Option(metavar="URL", help="Tasks of a running Ray cluster; OUT is shared.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the split, of the order in the shards, of what is drawn.")] = 0,
    sample: Annotated[
        str | None,
        typer.Option(
            help="Draw pairs or triplets from labelled images: random, neighbours; by --vectors: near, far, relevance."
        ),
    ] = None,
    per_image: Annotated[int, typer.Option(min=1, help="How often each image is an anchor.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most so many images of each class.")] = None,
    vectors: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Vectors by label or key: targets, or with --sample in place of the positive."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn images into shards that training streams. Stopped in the middle, the same command goes on.

    Example: nearfar pack images/emoji shards/emoji --eval-fraction 0.25
    Example: nearfar pack shards/emoji/train shards/emoji-triplets --kind triplet --sample random --per-image 4
    """
    from cluster.packing import as_dict, describe, run_pack, tell_left_out
    from pipelines.sources.sampled import Sample

    summary = run_pack(
        source,
        out,
        ray=ray,
        address=address,
        workers=workers,
        kind=kind,
        eval_fraction=eval_fraction,
        split=split,
        max_shard_mb=max_shard_mb,
        max_shard_records=max_shard_records,
        max_side=max_side,
        quality=quality,
        reencode=reencode,
        seed=seed,
        sample=Sample(sample, vectors, per_image, limit),
    )
    tell_left_out(summary, out)
    print_result(as_dict(summary), as_json=as_json, text=describe(summary))


@commands.command()
def text(
    source: Annotated[str, typer.Argument(metavar="TEXTS", help="JSONL, CSV or parquet with columns label, text, (category).")],
    out: Annotated[str, typer.Argument(metavar="OUT.parquet", help="For `pack --vectors`.")],
    dim: Annotated[int, typer.Option(min=1, help="Numbers of a vector.")] = 64,
    as_json: Json = False,
) -> None:
    """Turn the names of classes into vectors (TF-IDF and latent semantic analysis).

    Example: nearfar text images/emoji/texts.jsonl texts.parquet --dim 64
    """
    from pipelines.text_vectors import lsa, read_texts, write_vectors

    texts = read_texts(source)
    write_vectors(out, texts, lsa(texts.texts, dim))
    found = {"texts": len(texts.labels), "dim": dim, "out": out}
    print_result(found, as_json=as_json, text=f"{len(texts.labels)} texts, vectors of {dim} numbers in {out}")


@commands.command()
def index(
    tars: Annotated[
        list[str],
        typer.Argument(metavar="TARS...", help="Paths, folders, globs, ranges like '{000..123}', or URLs; quote them."),
    ],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the manifest goes; default: beside the tars.")] = None,
    kind: Annotated[str | None, typer.Option(help="labelled, pair, labelled_pair or triplet; default: by the members.")] = None,
    salvage: Annotated[bool, typer.Option("--salvage", help="Keep what lies before the damage in a damaged tar.")] = False,
    keys_per_tar: Annotated[
        bool, typer.Option("--keys-per-tar", help="Put the tar's name before each key, where tars repeat keys.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    as_json: Json = False,
) -> None:
    """Make a manifest for webdataset tars made elsewhere, so that training can stream them as they are.

    Example: nearfar index 'imagenet/train-{0000..1281}.tar' --workers 8
    """
    from cluster.progress import bar, say
    from pipelines.index import REJECTED
    from pipelines.index import index as make_index
    from pipelines.parallel import when_slow
    from pipelines.tar_urls import expand_tars

    urls = expand_tars(tars)
    with bar("indexing", "tars") as report:
        summary = make_index(
            urls,
            out=out,
            kind=kind,
            salvage=salvage,
            keys_per_tar=keys_per_tar,
            map=when_slow(workers),
            progress=report,
        )
    for one in [*summary.damaged, *summary.rejected][:SHOWN]:
        say(f"left out: {one.shard} {one.key or '(the rest)'} at byte {one.offset}: {one.reason}")
    if len(summary.rejected) > SHOWN:
        say(f"... and {len(summary.rejected) - SHOWN} more in {summary.out / REJECTED}")
    if summary.passed:
        say("not looked into: " + ", ".join(f"{count} {what}" for what, count in summary.passed.most_common(8)))
    if summary.kind == "labelled" and summary.longest_run == 1:
        say("no class has two images in a row: for data.per_class make shards of these tars with `nearfar pack`")
    text = (
        f"{summary.out}: {summary.records} {summary.kind} records, {summary.images} images, {summary.classes} classes, "
        f"{summary.shards} tars; {len(summary.rejected)} records left out"
    )
    print_result(summary.as_dict(), as_json=as_json, text=text)


@commands.command()
def verify(shards: Shards, workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2, as_json: Json = False) -> None:
    """Read and decode everything and compare it with the manifest; list what is bad; exit 1 when anything is.

    Example: nearfar verify shards/emoji/train --workers 8
    """
    from cluster.progress import bar
    from pipelines.parallel import when_slow
    from pipelines.verify import verify as verify_all

    with bar("verifying", "shards") as report:
        verdict = verify_all(shards, map=when_slow(workers), progress=report)
    lines = [f"{one.shard} {one.key} at byte {one.offset}: {one.reason}".replace("  ", " ") for one in verdict.faults]
    read = f"{verdict.images} images decoded, {verdict.nbytes} bytes in {verdict.shards} shards"
    known = f", {verdict.num_bad} records known to be bad" if verdict.num_bad else ""
    lines.append(f"{shards}: {verdict.records} records, {read}{known}; " + (f"{len(lines)} faults" if lines else "all good"))
    print_result({"good": not verdict.faults, **asdict(verdict)}, as_json=as_json, text="\n".join(lines))
    if verdict.faults:
        sys.exit(1)


@commands.command()
def inspect(
    shards: Annotated[
        str | None, typer.Argument(metavar="[SHARDS]", help="A folder or URL with a manifest; with --mining the config's.")
    ] = None,
    sheet: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw records as training sees them.")] = None,
    config: Annotated[Path | None, typer.Option(help="For the sheet: whose data section and seed to use.")] = None,
    against: Annotated[
        str | None, typer.Option(metavar="SHARDS", help="Look for images that are here and there; the sheet shows them.")
    ] = None,
    duplicates: Annotated[bool, typer.Option("--duplicates", help="Look for images that are here in two classes.")] = False,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Compare by this encoder, too: for crops and other views.")
    ] = None,
    threshold: Annotated[float | None, typer.Option(min=0, max=1, help="Cosine from which the encoder's count; 0.99.")] = None,
    distance: Annotated[int | None, typer.Option(min=0, max=11, help="Bits by which hashes of copies differ; 10.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that decode.")] = 2,
    mining: Annotated[
        Path | None, typer.Option(metavar="CONFIG", help="Show what the loss of a config or run's folder mines from a batch.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Count records, classes, sizes and formats; draw a contact sheet of what training sees; find copies of images.

    Example: nearfar inspect shards/emoji/train --sheet sheet.png --config configs/recipes/emoji.yaml
    Example: nearfar inspect shards/mine/eval --against shards/mine/train --sheet copies.png
    Example: nearfar inspect --mining runs/mine --sheet picked.png
    """
    if mining is not None:
        if duplicates or any(option is not None for option in (config, against, model, threshold, distance)):
            raise ValueError("--mining goes with SHARDS, --sheet and --json only")
        from cluster.mining_inspection import describe as describe_mining
        from cluster.mining_inspection import inspect_mining

        seen = inspect_mining(mining, shards, sheet)
        print_result(seen, as_json=as_json, text=describe_mining(seen))
        return
    if shards is None:
        raise ValueError("give SHARDS to look at, or --mining CONFIG")
    if against is not None or duplicates:
        if config is not None or (against is not None and duplicates):
            raise ValueError("--against, --duplicates and --config exclude each other")
        from cluster.copies import CopyOptions, run_inspect

        options = CopyOptions(model=model, threshold=threshold, distance=distance, sheet=sheet, workers=workers)
        run_inspect(shards, against, options, as_json=as_json)
        return
    if any(option is not None for option in (model, threshold, distance)):
        raise ValueError("--model, --threshold and --distance are for --against SHARDS or --duplicates: give one of these")
    from cluster.inspection import describe
    from pipelines.inspect import inspect as look
    from pipelines.manifest import Manifest

    if config is not None and sheet is None:
        raise ValueError("--config is for the sheet: give --sheet FILE.png, too")
    manifest = Manifest.open(shards)
    contents = look(manifest)
    found, text = contents.as_dict(), describe(contents)
    if sheet is not None:
        from configs.load import load_config
        from pipelines.sheet import draw_sheet

        loaded = load_config(config) if config is not None else None
        rows = draw_sheet(manifest, sheet, data=loaded.data if loaded else None, seed=loaded.seed if loaded else 0)
        found["sheet"], text = str(sheet), f"{text}\nsheet      {sheet}, {rows} rows"
    print_result(found, as_json=as_json, text=text)
