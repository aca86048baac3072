"""Tabulate finished runs and published numbers: `python scripts/results.py runs/ --png curves.png`."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tasks/ is not installed

from reporting.curves import draw
from reporting.kept_runs import keep, replace_file
from reporting.runs import REASONS, DamagedError, Found, find_runs, group_runs, read_runs
from reporting.table import tabulate

from tasks.run import console

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


def main(arguments: list[str] | None = None) -> None:
    """Print the table. SystemExit: there is no finished run, or a file cannot be read or written."""
    options = parse(arguments)
    try:
        if options.readme is None:
            show(options)
            return
        from reporting.markdown import find_pages, rewrite

        for path in options.readme or find_pages():
            print(rewrite(path))
    except OSError as error:
        sys.exit(f"error: {error.filename or 'a file'} cannot be read or written: {error.strerror}.")
    except ModuleNotFoundError as error:
        sys.exit(f"error: this needs {error.name}: pip install -e '.[train]'")
    except DamagedError as error:
        sys.exit(f"error: {error}")


def show(options: argparse.Namespace) -> None:
    speeds = [place for place in options.places if place.is_file() and place.suffix == ".json"]
    places = [place for place in options.places if place not in speeds]
    if missing := [
        str(place) for place in places if not (place.is_dir() or (place.is_file() and place.suffix == ".jsonl"))
    ]:
        sys.exit(
            f"error: {', '.join(missing)} is neither a folder nor a file of kept runs (.jsonl). "
            "Runs are below runs/ unless you typed run_dir=..."
        )
    found = read_runs(find_runs(places))
    groups, left_out = group_runs(found.runs), list_left_out(found)
    if options.papers or options.html:
        from reporting.paper_rows import compose_rows, match, tabulate_papers

        rows = match(compose_rows(), found.runs)
        text = tabulate_papers(rows)
        if options.html:
            from reporting.html import build_page

            replace_file(options.html, build_page(rows, groups, found, speeds).encode())
            print(f"{options.html} was written", file=sys.stderr)
    elif not groups and not left_out:
        below = ", ".join(map(str, options.places))
        sys.exit(f"error: no run (a folder with config.yaml) below {below}. Start one: {MAKE_ONE}")
    else:
        text = "\n".join([*([tabulate(groups)] if groups else []), *left_out])
    if options.papers or not options.html:
        print(text)
    if not groups and not (options.papers or options.html):
        sys.exit(
            "error: no finished run to show. Continue an unfinished one: python train.py resume=FOLDER; "
            f"or start one: {MAKE_ONE}"
        )
    if options.output:
        replace_file(options.output, f"{text}\n".encode())
    messages = keep(found.runs, options.keep, options.places) if options.keep else []
    for message in [*messages, *(draw(groups, options.png, options.curve) if options.png else [])]:
        print(message, file=sys.stderr)


def list_left_out(found: Found) -> list[str]:
    """Lines that count and name the runs that are not in the table."""
    lines = []
    for reason, places in found.left_out.items():
        if places:
            lines += [
                f"\n{len(places)} {reason} ({REASONS[reason]}), left out:\n",
                *(f"- `{place}`" for place in places),
            ]
    return lines


if __name__ == "__main__":
    console.use_utf8()
    main()
