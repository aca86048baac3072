"""Tabulate finished runs and published numbers: `python scripts/results.py runs/ --png curves.png`."""

import argparse
import sys
from pathlib import Path

from reporting.curves import draw
from reporting.kept_runs import keep, replace_file
from reporting.runs import DamagedError, Found, Group, find_runs, group_runs, read_runs
from reporting.table import tabulate

ROOT = Path(__file__).resolve().parent.parent
MAKE_ONE = "python train.py data=trec model=sru"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "places",
        nargs="*",
        type=Path,
        metavar="RUNS",
        help="folders with runs at any depth, and .jsonl files of kept runs; with --papers and --html also .json files "
        "of scripts/benchmark.py (default: bench/results and runs)",
    )
    parser.add_argument("--png", type=Path, help="draw learning curves into this file")
    parser.add_argument("--output", type=Path, help="also write the table into this file")
    parser.add_argument("--keep", type=Path, metavar="JSONL", help="write finished runs into this file, one per line")
    parser.add_argument("--curve", help="with --png: column of metrics.csv to draw over steps, for example train/loss")
    papers = "tabulate the rows of the papers' tables: reached, not reached or not run"
    parser.add_argument("--papers", action="store_true", help=papers)
    parser.add_argument("--html", type=Path, help="write everything into one HTML page")
    readme = (
        "rewrite the tables between <!-- results: ... --> and <!-- end --> in these files (default: README.md, docs/)"
    )
    parser.add_argument("--readme", nargs="*", type=Path, metavar="MARKDOWN", help=readme)
    options = parser.parse_args(arguments)
    # A wrong ending may mean that another file would be overwritten by mistake.
    examples = {"keep": "mine.jsonl", "html": "page.html", "png": "curves.png", "output": "table.md"}
    for option, example in examples.items():
        path = getattr(options, option)
        if path and path.suffix != Path(example).suffix:
            parser.error(f"--{option} {path} must end in {Path(example).suffix}, for example {example}")
    if not options.places:
        if not (options.papers or options.html or options.readme is not None):
            parser.error("name folders of runs, or .jsonl files of kept runs, such as runs/")
        results = ROOT / "bench/results"
        options.places = [*sorted(results.glob("*.json*")), *(path for path in [ROOT / "runs"] if path.is_dir())]
    return options


def main(arguments: list[str] | None = None) -> int:
    """Print the table; returns the exit code: 1 if there is no finished run or a file cannot be written."""
    options = parse(arguments)
    try:
        if options.readme is not None:
            from reporting.markdown import find_pages, rewrite

            for path in options.readme or find_pages():
                print(rewrite(path))
            return 0
        return show(options)
    except OSError as error:
        return fail(f"{error.filename or 'a file'} cannot be read or written: {error.strerror}.")
    except ModuleNotFoundError as error:
        return fail(f"this needs {error.name}: pip install -e '.[train]'")
    except DamagedError as error:
        return fail(str(error))


def show(options: argparse.Namespace) -> int:
    missing = [place for place in options.places if not place.is_dir() and not is_file(place, ".jsonl", ".json")]
    if missing:
        return fail(
            f"{', '.join(map(str, missing))} is neither a folder nor a file of kept runs (.jsonl). "
            "Runs are below runs/ unless you typed run_dir=..."
        )
    places = [place for place in options.places if not is_file(place, ".json")]
    found = read_runs(find_runs(places))
    groups = group_runs(found.runs)
    if options.papers or options.html:
        from reporting.paper_rows import compose_rows, match, tabulate_papers

        rows = match(compose_rows(), found.runs)
        text = tabulate_papers(rows)
        if options.html:
            from reporting.html import build_page

            speeds = [place for place in options.places if is_file(place, ".json")]
            replace_file(options.html, build_page(rows, groups, found, speeds).encode())
            print(f"{options.html} was written", file=sys.stderr)
    elif not any(vars(found).values()):
        below = ", ".join(map(str, options.places))
        return fail(f"no run (a folder with config.yaml) below {below}. Start one: {MAKE_ONE}")
    else:
        text = "\n".join([*([tabulate(groups)] if groups else []), *list_left_out(found)])
    if options.papers or not options.html:
        print(text)
    return write(options, groups, found, text)


def write(options: argparse.Namespace, groups: list[Group], found: Found, text: str) -> int:
    if not groups and not (options.papers or options.html):
        return fail(
            "no finished run to show. Continue an unfinished one: python train.py resume=FOLDER; "
            f"or start one: {MAKE_ONE}"
        )
    if options.output:
        replace_file(options.output, f"{text}\n".encode())
    messages = keep(found.runs, options.keep, options.places) if options.keep else []
    for message in [*messages, *(draw(groups, options.png, options.curve) if options.png else [])]:
        print(message, file=sys.stderr)
    return 0


def list_left_out(found: Found) -> list[str]:
    """Lines that count and name the runs that are not in the table."""
    text = []
    for word, places in (
        ("unfinished (no metrics.json)", found.unfinished),
        ("failed (failed.json says why)", found.failed),
        ("tested on a few batches only (trainer=debug)", found.brief),
        ("damaged", found.damaged),
    ):
        if places:
            text += [f"\n{len(places)} {word}, left out:\n", *(f"- `{place}`" for place in places)]
    return text


def is_file(path: Path, *endings: str) -> bool:
    return path.suffix in endings and path.is_file()


def fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tasks/ is in the parent folder
    from tasks.run import console

    console.use_utf8()
    sys.exit(main())
