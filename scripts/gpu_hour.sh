#!/bin/sh
# The first hour on a machine with a GPU: scripts/gpu_hour.sh OUT [--dry-run]
#
# Tests, a search for races, the benchmarks and the best cuts, in parts of at most ten minutes. It needs no network and
# uses the packages that are there; PYTHON names another interpreter. A part that is done is skipped when the script
# starts again; remove OUT/NAME.done to repeat it. Ends with targets and predictions beside what was found.
set -u
usage() { echo "usage: scripts/gpu_hour.sh OUT [--dry-run]" >&2; exit 2; }
[ $# -ge 1 ] && [ $# -le 2 ] && [ "${2:---dry-run}" = --dry-run ] || usage
case $1 in -*) usage ;; esac
OUT=$1 DRY=${2:-}
PYTHON=${PYTHON:-python3}
cd "$(dirname "$0")/.." || exit
case $OUT in /*) ;; *) OUT=$OLDPWD/$OUT ;; esac
FAILED=

# part NAME SECONDS COMMAND...: runs the command unless it is done; its output goes to OUT/NAME.log.
part() {
    name=$1 limit=$2
    shift 2
    echo "$name (at most $limit s): $*"
    [ -n "$DRY" ] && return
    if [ -e "$OUT/$name.done" ]; then echo "  done before"; return; fi
    if timeout "$limit" "$@" > "$OUT/$name.log" 2>&1; then
        touch "$OUT/$name.done"
        echo "  done"
    else
        echo "  failed with status $?: the end of $OUT/$name.log:"
        tail -5 "$OUT/$name.log" | sed 's/^/  /'
        FAILED="$FAILED $name"
    fi
}

# tool COMMAND: whether it is installed; says so if not.
tool() { [ -n "$DRY" ] || command -v "$1" > /dev/null || { echo "skipped: $1 is not installed"; return 1; }; }

[ -n "$DRY" ] || mkdir -p "$OUT" || exit
bench="$PYTHON scripts/benchmark.py"
part doctor 120 "$PYTHON" -m sru.doctor
part tests 480 "$PYTHON" -m pytest -m gpu -rs -p no:cacheprovider tests/sru tests/tasks
tool compute-sanitizer && part races 120 compute-sanitizer --tool racecheck --target-processes all --error-exitcode 1 \
    $bench accuracy --device cuda --modes fp32 --seconds 0.001 --out "$OUT/races"
part accuracy 300 $bench accuracy --device cuda --minutes 4 --out "$OUT"
part recurrence 500 $bench recurrence --device cuda --modes fp32,bf16 --minutes 7 --out "$OUT"
part layer 400 $bench layer --device cuda --modes tf32,bf16 --seconds 0.1 --minutes 5 --out "$OUT"
part stack 300 $bench stack --device cuda --modes tf32,bf16 --seconds 0.1 --minutes 4 --out "$OUT"
part step 300 $bench step --device cuda --modes tf32,bf16 --seconds 0.1 --minutes 4 --out "$OUT"
part cuts 500 $bench cuts --device cuda --seconds 0.02 --out "$OUT"
tool ncu && part profile 300 ncu --set full --target-processes all --launch-count 8 --export "$OUT/ncu" --force-overwrite $bench recurrence --device cuda \
    --modes fp32 --shapes A --seconds 0.001 --out "$OUT/profiled"
part table 60 "$PYTHON" scripts/benchmarks/targets.py "$OUT"
[ -n "$DRY" ] || cat "$OUT/table.log"
[ -z "$FAILED" ] || { echo "failed:$FAILED; start the script again to repeat these parts"; exit 1; }
